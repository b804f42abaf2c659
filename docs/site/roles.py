"""Sphinx roles of docstrings, such as ``:class:`~a.b.C```, as links of the site's reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:mod|class|func|meth|data|attr|exc):`(~?)([\w.]+)`")


def linked(text: str) -> str:
    """Return ``text`` with roles as optional cross-references: a name without a page stays."""

    def link(match: re.Match[str]) -> str:
        name = match[2].lstrip(".")
        shown = name.rpartition(".")[2] if match[1] else name
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    return ROLE.sub(link, text)


class Roles(Extension):
    """Griffe extension that rewrites roles before docstrings are parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = linked(obj.docstring.value)
