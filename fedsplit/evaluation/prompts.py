"""A prompt template that fills in fields, and can do nothing else.

The syntax is Jinja's, as in the harness' task files, which render it unprotected: a template from
somebody else could then run anything.  Here a template is parsed, its syntax tree may hold text,
fields and a few filters, and it is rendered in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import ConfigError

FILTERS = ("trim", "lower", "upper", "capitalize", "title")
LONGEST = 4096
# Node classes of Jinja's syntax tree that only show text.
HARMLESS = ("Template", "Output", "TemplateData", "Name", "Const", "Getitem", "Filter")


@dataclass(frozen=True)
class Prompt:
    """A checked template.

    Attributes:
        text: such as ``"Question: {{question}}\\nAnswer:"``.

    Raises:
        ConfigError: if it does more than fill in fields.
    """

    text: str
    _template: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(self.text) > LONGEST:
            raise ConfigError(f"prompt: {len(self.text)} characters: must be <= {LONGEST}")
        env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            tree = env.parse(self.text)
        except (TemplateSyntaxError, RecursionError) as error:
            raise ConfigError(f"prompt: must be a template: {error}") from None
        nodes: list[Any] = [tree]
        while nodes:
            node = nodes.pop()
            kind = type(node).__name__
            named = kind != "Filter" or node.name in FILTERS
            if kind not in HARMLESS or not named:
                shown = getattr(node, "name", kind) if kind == "Filter" else kind
                raise ConfigError(
                    f"prompt: {shown}: must be text, {{{{field}}}}, {{{{field[0]}}}} or the filter "
                    f"{', '.join(FILTERS)}"
                )
            nodes += list(node.iter_child_nodes())
        object.__setattr__(self, "_template", env.from_string(self.text))

    def fill(self, doc: Mapping[str, Any]) -> str:
        """Return the prompt of one question.

        Raises:
            ConfigError: a field is not there.
        """
        from jinja2 import UndefinedError

        try:
            return str(self._template.render(dict(doc)))
        except (UndefinedError, TypeError) as error:
            raise ConfigError(f"prompt: {error}") from None
