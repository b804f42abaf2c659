"""The model owner's side in a clone, under the name that the wheel has it by.

The wheel carries the folder ``strategies/`` as ``fedsplit.strategies``.  A clone has the folder at
the top, where the Flower app takes it from, and this module in its stead: both names stand for the
same modules, each loaded once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import strategies

if TYPE_CHECKING:
    from strategies import *  # noqa: F403


class _SameModule(MetaPathFinder, Loader):
    """Finder and loader that answer ``fedsplit.strategies.x`` with the module ``strategies.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the module that ``fullname`` stands for; None for other names."""
        if not fullname.startswith("fedsplit.strategies."):
            return None
        own = find_spec(fullname.removeprefix("fedsplit."))
        return own and ModuleSpec(fullname, self, loader_state=own)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its own name and return it."""
        return import_module(spec.name.removeprefix("fedsplit."))

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own spec, which the import system has replaced."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _SameModule())
sys.modules[__name__] = strategies
