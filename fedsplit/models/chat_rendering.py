"""The child process that lays out conversations by another party's chat template.

``python -m fedsplit.models.chat_rendering``: a JSON request on standard input, a JSON answer on
standard output.  The template is Jinja in its immutable sandbox, without anything that depends on
the time or on chance; the process writes no file, starts no other, and is bounded in memory, CPU
time and what it may say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

MEMORY = 1 << 29  # bytes, beside what the request takes
GROWTH = 4.0  # times its contents that a conversation may be long, beside EXTRA
EXTRA = 1 << 15  # characters
KEPT_GLOBALS = ("range", "dict", "namespace", "joiner", "cycler")


def main() -> None:
    """Answer one request; an error is told in the last line of standard error."""
    raw = sys.stdin.buffer.read()
    request = json.loads(raw)
    try:
        # Compiling folds constants already, so that it needs the bounds as rendering does.
        _bound(MEMORY + 16 * len(raw), int(request["seconds"]))
        template = _template(request["template"])
        special, prompt = dict(request["special"]), bool(request["prompt"])
        answer = [_laid_out(template, special, c, prompt) for c in request["conversations"]]
        text = json.dumps(answer)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no more is known'}")
    sys.stdout.write(text)


def _laid_out(
    template: Any, special: Mapping[str, str], messages: Sequence[Sequence[str]], prompt: bool
) -> dict[str, Any]:
    """Return a conversation's text, and from where to where each completion goes in it."""
    turns = [{"role": role, "content": content} for role, content in messages]
    most = EXTRA + GROWTH * sum(len(turn["content"]) for turn in turns)

    def render(count: int, opened: bool) -> str:
        # A piece at a time: a text without end is noticed before it is whole.
        pieces, length = [], 0
        values = {"messages": turns[:count], "add_generation_prompt": opened, **special}
        for piece in template.generate(**values):
            length += len(piece)
            if length > most:
                raise ValueError(f"its text is over {most:.0f} characters")
            pieces.append(piece)
        return "".join(pieces)

    if prompt:
        return {"text": render(len(turns), True), "spans": []}
    whole = render(len(turns), False)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, after = render(number, True), render(number + 1, False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"its text of {number + 1} messages does not begin with that of {number}, so "
                    "completions cannot be told from prompts"
                )
            spans.append([len(before), len(after)])
    return {"text": whole, "spans": spans}


def _template(source: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> NoReturn:
        raise TemplateError(str(message)[:200])

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As transformers sets it up, less what would make a text differ from one call to the next.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    kept = {name: environment.globals[name] for name in KEPT_GLOBALS}
    environment.globals.clear()
    environment.globals.update(kept, raise_exception=refuse)
    environment.filters.pop("random", None)
    environment.filters["tojson"] = as_json
    return environment.from_string(source)


def _bound(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent's deadline is what is left
        return
    for what, most in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
