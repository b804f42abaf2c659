"""The layer table of the design, held by reading every import, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("fedsplit", "strategies", "simulations")
LONGEST = 450

# Package -> layer.  A module imports its own package, and packages of lower layers.
LAYERS = {
    "fedsplit": 0,
    "fedsplit.errors": 0,
    "fedsplit.config": 0,
    "fedsplit.registry": 0,
    "fedsplit.seeding": 0,
    "fedsplit.models": 1,
    "fedsplit.data": 1,
    "fedsplit.wire": 1,
    "fedsplit.privacy": 2,
    "fedsplit.emulators": 2,
    "fedsplit.fingerprints": 2,
    "fedsplit.attacks": 3,
    "fedsplit.owners": 3,
    "fedsplit.client_app": 4,
    "fedsplit.client_work": 4,
    "fedsplit.client_serving": 4,
    "fedsplit.client_offsite": 4,
    "fedsplit.commands": 4,
    "fedsplit.cli": 4,
    "strategies": 4,
    "simulations": 5,
}
# Layer 0 is one layer of small modules, and the ClientApp loads its heavy half when it works.
TOGETHER = [
    {name for name, layer in LAYERS.items() if layer == 0},
    {
        "fedsplit.client_app",
        "fedsplit.client_work",
        "fedsplit.client_serving",
        "fedsplit.client_offsite",
    },
    {"fedsplit.cli", "fedsplit.commands"},
]
# The owner's side and the model owner's meet in the wire alone.
NEVER = {"strategies": {"fedsplit.owners", "fedsplit.client_app", "fedsplit.client_work"}}

# External package -> where it may be imported.
ONLY_IN = {
    "transformers": ("fedsplit.models",),
    "peft": ("fedsplit.models",),
    "accelerate": ("fedsplit.models",),
    "opacus": ("fedsplit.privacy.accounting", "fedsplit.privacy.dp_optimizer"),
    "flwr": (
        "fedsplit.wire",
        "fedsplit.client_app",
        "fedsplit.client_work",
        "fedsplit.client_serving",
        "fedsplit.client_offsite",
        "strategies",
        "simulations",
    ),
    "ray": ("simulations",),
    "grpc": ("fedsplit.wire", "simulations"),
    "datasets": ("fedsplit.data",),
    "flwr_datasets": ("fedsplit.data",),
    "onnx": ("fedsplit.fingerprints",),
    "onnxruntime": ("fedsplit.fingerprints",),
}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle"}


def sources() -> list[Path]:
    return sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """Return the row of ``LAYERS`` that a module of the project belongs to."""
    if module.startswith("fedsplit.") and not module.startswith("fedsplit.__"):
        return ".".join(module.split(".")[:2])
    return module.split(".")[0]


def imports(module: str, is_package: bool, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of everything imported, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func) in ("import_module", "__import__"):
            found = node.args[0] if node.args else None
            if isinstance(found, ast.Constant) and isinstance(found.value, str):
                yield found.value, node.lineno


def dotted(node: ast.AST) -> str:
    """Return ``torch.load`` for that expression; ``importlib.`` is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".removeprefix("importlib.")
    return node.id if isinstance(node, ast.Name) else "(...)"


def layer_faults(module: str, imported: str) -> str | None:
    """Return why ``module`` may not import ``imported``, or None."""
    if imported.split(".")[0] not in TOPS:
        return None
    mine, theirs = package_of(module), package_of(imported)
    if theirs not in LAYERS:
        # ``from fedsplit import __version__`` names no module.
        theirs = "fedsplit" if (ROOT / "fedsplit").is_dir() and theirs.count(".") else theirs
        if (ROOT / Path(*imported.split(".")[:2])).with_suffix(".py").exists():
            return f"{imported}: has no layer"
    if mine == theirs:
        return None
    if theirs in NEVER.get(mine, set()):
        return f"{mine} must never import {theirs}"
    if LAYERS[theirs] < LAYERS[mine] or any({mine, theirs} <= group for group in TOGETHER):
        return None
    return f"{mine} (layer {LAYERS[mine]}) imports {theirs} (layer {LAYERS[theirs]})"


def external_faults(module: str, imported: str) -> str | None:
    top = imported.split(".")[0]
    if top in UNSAFE_MODULES:
        return f"imports {top}: nothing is unpickled"
    allowed = ONLY_IN.get(top)
    if allowed is None or any(module == a or module.startswith(f"{a}.") for a in allowed):
        return None
    return f"imports {top}, which only {', '.join(allowed)} may"


def call_faults(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in UNSAFE_CALLS:
            yield f"calls {name}", node.lineno
        for keyword in node.keywords:
            value = keyword.value
            fixed = isinstance(value, ast.Constant) and value.value is False
            if keyword.arg in ("trust_remote_code", "allow_pickle") and not fixed:
                yield f"{keyword.arg} is not False", node.lineno


def faults(module: str, is_package: bool, text: str) -> list[str]:
    tree = ast.parse(text)
    found = []
    for imported, line in imports(module, is_package, tree):
        for fault in (layer_faults(module, imported), external_faults(module, imported)):
            if fault:
                found.append(f"{module}:{line}: {fault}")
    found += [f"{module}:{line}: {fault}" for fault, line in call_faults(tree)]
    return found


def test_every_module_has_a_layer() -> None:
    for path in sources():
        assert package_of(name_of(path)) in LAYERS, f"{path}: give its package a layer"


@pytest.mark.parametrize("top", TOPS)
def test_imports_go_down_and_nothing_is_unpickled(top: str) -> None:
    found = []
    for path in sources():
        if path.is_relative_to(ROOT / top):
            found += faults(name_of(path), path.name == "__init__.py", path.read_text())
    assert not found, "\n".join(found)


def test_modules_stay_short() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert {p: n for p, n in lengths.items() if n > LONGEST} == {}
    assert not list(ROOT.rglob("fedsplit/**/utils.py"))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fedsplit.privacy.x", "def f():\n    from fedsplit.emulators import build"),
        ("fedsplit.fingerprints.x", "import fedsplit.privacy.none"),
        ("fedsplit.attacks.x", "from fedsplit import owners"),
        ("fedsplit.owners.x", "from fedsplit.attacks.scoring import score"),
        ("fedsplit.models.x", "from ..data import table"),
        ("fedsplit.data.x", "from fedsplit.wire.frames import Kind"),
        ("fedsplit.wire.x", "import strategies.hub"),
        ("fedsplit.config", "from fedsplit.models.loading import load"),
        ("fedsplit.owners.x", "import simulations"),
        ("strategies.x", "from fedsplit.owners.plan import train_steps"),
        ("strategies.x", "from fedsplit import client_app"),
        ("strategies.x", "if True:\n    import simulations.settings"),
        ("fedsplit.client_app", "import strategies"),
        ("fedsplit.owners.x", "import transformers"),
        ("strategies.x", "from peft import LoraConfig"),
        ("simulations.x", "def f():\n    import transformers.models"),
        ("fedsplit.privacy.gaussian", "import opacus"),
        ("fedsplit.owners.x", "from flwr.app import Message"),
        ("strategies.x", "import ray"),
        ("fedsplit.data.x", "import importlib\nimportlib.import_module('ray')"),
        ("simulations.x", "import pickle"),
        ("fedsplit.models.x", "import torch\ntorch.load('x')"),
        ("fedsplit.models.x", "eval('1')"),
        ("fedsplit.models.x", "def f(m):\n    exec(m)"),
        ("fedsplit.models.x", "load('x', trust_remote_code=True)"),
        ("fedsplit.models.x", "load('x', trust_remote_code=given)"),
        ("fedsplit.models.x", "numpy.load('x', allow_pickle=True)"),
    ],
)
def test_what_breaks_a_rule_is_found(module: str, text: str) -> None:
    assert len(faults(module, False, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fedsplit.owners.x", "from fedsplit import __version__\nimport fedsplit"),
        ("fedsplit.owners.x", "from fedsplit.owners.home import OwnerHome"),
        ("fedsplit.emulators.x", "from fedsplit.models import load\nfrom . import plan"),
        ("strategies.x", "from fedsplit.fingerprints.gate import LineageGate\nimport flwr"),
        ("simulations.x", "import ray\nimport strategies\nfrom fedsplit.owners import plan"),
        (
            "fedsplit.models.x",
            "import transformers\nmodel.eval()\nmake(1).eval()\nload(trust_remote_code=False)",
        ),
    ],
)
def test_what_keeps_the_rules_is_not(module: str, text: str) -> None:
    assert faults(module, False, text) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fedsplit", "flwr ray torch transformers numpy grpc"),
        ("fedsplit.errors", "flwr ray torch"),
        ("fedsplit.config", "flwr ray torch transformers"),
        ("fedsplit.wire.message_types", "flwr ray torch"),
        ("fedsplit.client_app", "ray torch transformers"),
    ],
)
def test_importing_is_cheap(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*({absent.split()!r} & sys.modules.keys()))"
    code = code.replace(repr(absent.split()), f"set({absent.split()!r})")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
