"""Every public package says what it offers, and its example runs."""

from __future__ import annotations

import doctest
import importlib

import pytest

FACES = (
    "fedsplit",
    "fedsplit.attacks",
    "fedsplit.client",
    "fedsplit.config",
    "fedsplit.data",
    "fedsplit.emulators",
    "fedsplit.evaluation",
    "fedsplit.fingerprints",
    "fedsplit.models",
    "fedsplit.owners",
    "fedsplit.privacy",
    "fedsplit.strategies",
    "fedsplit.wire",
    "simulations",
)


@pytest.mark.parametrize("name", FACES)
def test_every_name_of_a_face_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__, key=_isort)
    for public in module.__all__:
        found = getattr(module, public)
        documented = isinstance(found, dict | tuple | str) or bool(found.__doc__)
        assert documented, f"{name}.{public}: has no docstring"
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def _isort(name: str) -> tuple[bool, bool, str]:
    """Return the key of the order constants, classes, functions."""
    return not name.isupper(), not name[0].isupper(), name


@pytest.mark.parametrize("name", FACES)
def test_the_example_of_a_face_runs(name: str) -> None:
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(recurse=False).find(module, name)
    examples = [example for test in found for example in test.examples]
    assert examples, f"{name}: its docstring must hold an example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.failures == 0
