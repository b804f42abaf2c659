"""Run, round and owner that log lines are about, bound once for all that is called inside.

A value bound here is seen by everything called inside the ``with`` block, and by a thread that was
started through :func:`carried` (a plain thread begins with nothing bound).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from types import MappingProxyType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Value = str | int

_BOUND: ContextVar[Mapping[str, Value]] = ContextVar(
    "fedsplit-observe", default=MappingProxyType({})
)


def context() -> Mapping[str, Value]:
    """Return what is bound where this is called."""
    return _BOUND.get()


@contextmanager
def bound(**values: Value) -> Iterator[None]:
    """Add ``values`` to the context for as long as the block lasts; inner values win."""
    before = _BOUND.set(MappingProxyType({**_BOUND.get(), **values}))
    try:
        yield
    finally:
        _BOUND.reset(before)


def carried(work: Callable[P, T]) -> Callable[P, T]:
    """Return ``work`` so that another thread, which calls it once, has this thread's context."""
    here = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return here.run(work, *args, **kwargs)

    return run
