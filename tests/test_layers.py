"""The layer table of the design, held by reading every import, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("fedsplit", "strategies", "simulations")
LONGEST = 450  # lines of a module
LARGEST = 17  # modules of a folder, its __init__ included

# Package -> layer.  A module imports its own package, and packages of lower layers.
LAYERS = {
    "fedsplit": 0,
    "fedsplit.errors": 0,
    "fedsplit.config": 0,
    "fedsplit.registry": 0,
    "fedsplit.confusion": 0,
    "fedsplit.entities": 0,
    "fedsplit.score_levels": 0,
    "fedsplit.sums": 0,
    "fedsplit.rank_counts": 0,
    "fedsplit.statistics": 0,
    "fedsplit.seeding": 0,
    "fedsplit.observe": 0,
    "fedsplit.storage": 0,
    "fedsplit.models": 1.6,  # a task says which head its models have
    "fedsplit.data": 1,
    "fedsplit.wire": 1,
    "fedsplit.tasks": 1.3,  # labels as data has them, reports as the wire has them
    "fedsplit.privacy": 2,
    "fedsplit.emulators": 2,
    "fedsplit.evaluation": 2,
    "fedsplit.fingerprints": 2,
    "fedsplit.settings": 2.5,  # reads every table; owners and attacks read settings through it
    "fedsplit.attacks": 3,
    "fedsplit.owners": 3,
    "fedsplit.client_app": 4,
    "fedsplit.client": 4,
    "fedsplit.deploy": 4,
    "fedsplit.commands": 4,
    "fedsplit.cli": 4,
    "strategies": 4,
    "simulations": 5,
    # A clone's second name of that folder: for users, not for the project's own modules.
    "fedsplit.strategies": 5,
}
# Layer 0 is one layer of small modules, and the ClientApp loads its heavy half when it works.
TOGETHER = [
    {name for name, layer in LAYERS.items() if layer == 0},
    {"fedsplit.client_app", "fedsplit.client"},
    {"fedsplit.cli", "fedsplit.commands"},
    {"fedsplit.commands", "fedsplit.deploy"},
]
# The owner's side and the model owner's meet in the wire alone.
NEVER = {
    "strategies": {"fedsplit.owners", "fedsplit.client_app", "fedsplit.client"},
    # Peers; what a task knows of labels and reports is between them.
    "fedsplit.models": {"fedsplit.data", "fedsplit.wire"},
}

# External package -> where it may be imported.
ONLY_IN = {
    "transformers": ("fedsplit.models",),
    "peft": ("fedsplit.models",),
    "accelerate": ("fedsplit.models",),
    "opacus": ("fedsplit.privacy.dp",),
    "flwr": (
        "fedsplit.wire",
        "fedsplit.client_app",
        "fedsplit.client",
        "fedsplit.deploy.guard",
        "strategies",
        "simulations",
    ),
    "ray": ("simulations",),
    "grpc": ("fedsplit.wire", "simulations"),
    "datasets": ("fedsplit.data",),
    "lm_eval": ("fedsplit.evaluation",),
    "flwr_datasets": ("fedsplit.data",),
    "onnx": ("fedsplit.fingerprints", "simulations.fuzz.lineage"),
    "onnxruntime": ("fedsplit.fingerprints",),
    "PIL": ("fedsplit.fingerprints.portraits",),
    "prometheus_client": ("strategies.telemetry",),
    "tensorboard": ("strategies.telemetry",),
    "tomli_w": ("simulations",),
    "jinja2": ("fedsplit.evaluation", "fedsplit.models.chat_rendering", "simulations.report"),
}
# What turns foreign bytes into code, or unpacks foreign paths: neither called nor even named.
UNSAFE_MODULES = {
    *("pickle", "_pickle", "cPickle", "pickle5", "pickletools", "marshal", "shelve", "dill"),
    *("cloudpickle", "joblib", "jsonpickle", "code", "codeop", "imp", "runpy"),
}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("torch.serialization.load", "torch.export.load", "pandas.read_pickle", "pandas.read_hdf"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("shutil.unpack_archive", "tempfile.mktemp", "ssl._create_unverified_context"),
    *("importlib.util.spec_from_file_location", "multiprocessing.connection.Client"),
    *("multiprocessing.connection.Listener", "numpy.lib.format.read_array"),
}
UNSAFE_METHODS = {"extractall", "read_pickle", "to_pickle", "load_module"}
# Keywords that have one safe value: it must be that one, written out.
FIXED = {"trust_remote_code": False, "allow_pickle": False, "shell": False}
# Whose from_pretrained reads no weights; PEFT's may, where the file is known to be safetensors.
NO_WEIGHTS = {"AutoConfig", "AutoTokenizer"}
CHECKED_WEIGHTS = {("fedsplit.models.adapters.peft_folder", "PeftModel")}


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


def known_as(tree: ast.AST) -> dict[str, str]:
    """Return what imported names stand for: ``np`` -> ``numpy``, ``load`` -> ``torch.load``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def named(node: ast.AST, names: dict[str, str]) -> str:
    """Return what an expression names, with what was imported under other names put in."""
    if isinstance(node, ast.Call) and dotted(node.func) == "getattr" and len(node.args) >= 2:
        leaf = node.args[1]
        if isinstance(leaf, ast.Constant):
            return f"{named(node.args[0], names)}.{leaf.value}"
    if not isinstance(node, (ast.Attribute, ast.Name)):
        return ""
    first, _, rest = dotted(node).partition(".")
    return f"{names.get(first, first)}.{rest}".rstrip(".")


def call_faults(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    names = known_as(tree)
    for node in ast.walk(tree):
        if (name := named(node, names)) in UNSAFE_CALLS:
            yield f"names {name}", getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and node.attr in UNSAFE_METHODS:
            yield f"names .{node.attr}", node.lineno
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            value, arg = keyword.value, keyword.arg
            fixed = isinstance(value, ast.Constant) and value.value is FIXED.get(arg or "")
            if arg in FIXED and not fixed:
                yield f"{arg} is not {FIXED[arg]}", node.lineno
        called = named(node.func, names)
        if called == "numpy.load" and len(node.args) > 2:
            yield "allow_pickle is not False", node.lineno
        if called.endswith(".from_pretrained"):
            whose = called.split(".")[-2]
            safe = any(
                k.arg == "use_safetensors" and getattr(k.value, "value", 0) is True
                for k in node.keywords
            )
            if not safe and whose not in NO_WEIGHTS and (module, whose) not in CHECKED_WEIGHTS:
                yield "from_pretrained without use_safetensors=True", node.lineno


@cache
def examined(module: str, is_package: bool, text: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return (modules that a module imports, faults); a tree is walked once for several tests."""
    tree = ast.parse(text)
    imported, found = set(), []
    for name, line in imports(module, is_package, tree):
        imported.add(name)
        for fault in (layer_faults(module, name), external_faults(module, name)):
            if fault:
                found.append(f"{module}:{line}: {fault}")
    found += [f"{module}:{line}: {fault}" for fault, line in call_faults(module, tree)]
    return frozenset(imported), tuple(found)


def faults(module: str, is_package: bool, text: str) -> list[str]:
    return list(examined(module, is_package, text)[1])


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


def test_strategies_import_each_other_by_relative_names() -> None:
    """The wheel carries the folder as ``fedsplit.strategies``: no module may name it otherwise."""
    for path in sorted((ROOT / "strategies").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert "strategies" not in {name.split(".")[0] for name in names}, path


def test_modules_stay_short() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert {p: n for p, n in lengths.items() if n > LONGEST} == {}
    assert not list(ROOT.rglob("fedsplit/**/utils.py"))


def test_folders_stay_small() -> None:
    sizes = Counter(str(p.parent.relative_to(ROOT)) for p in sources())
    assert {folder: n for folder, n in sizes.items() if n > LARGEST} == {}


def first_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle, the first one again at its end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count, and those for type checking alone too."""
    paths = {name_of(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for imported in examined(name, path.name == "__init__.py", path.read_text())[0]:
            found = imported if imported in paths else imported.rpartition(".")[0]
            if found in paths and not name.startswith(found):  # a package face resolves its parts
                graph[name].add(found)
    assert first_circle(graph) == []


def test_a_circle_is_found() -> None:
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert first_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fedsplit.privacy.x", "def f():\n    from fedsplit.emulators import build"),
        ("fedsplit.fingerprints.x", "import fedsplit.privacy.mechanisms.none"),
        ("fedsplit.attacks.x", "from fedsplit import owners"),
        ("fedsplit.owners.x", "from fedsplit.attacks.scoring import score"),
        ("fedsplit.models.x", "from ..data import table"),
        ("fedsplit.data.x", "from fedsplit.wire.frames import Kind"),
        ("fedsplit.wire.x", "import strategies.sessions.transports"),
        ("fedsplit.config", "from fedsplit.models.loading import load"),
        ("fedsplit.owners.x", "import simulations"),
        ("strategies.x", "from fedsplit.owners.split.schedule import train_steps"),
        ("strategies.x", "from fedsplit import client_app"),
        ("strategies.x", "if True:\n    import simulations.core.settings"),
        ("fedsplit.client_app", "import strategies"),
        ("fedsplit.commands.x", "import fedsplit.strategies"),
        ("strategies.x", "from fedsplit.strategies.rounds import averaging"),
        ("simulations.x", "from fedsplit.strategies import STRATEGIES"),
        ("fedsplit.owners.x", "import transformers"),
        ("strategies.x", "from peft import LoraConfig"),
        ("simulations.x", "def f():\n    import transformers.models"),
        ("fedsplit.privacy.mechanisms.gaussian", "import opacus"),
        ("fedsplit.owners.x", "from flwr.app import Message"),
        ("strategies.x", "import ray"),
        ("fedsplit.commands.x", "from lm_eval import evaluator"),
        ("fedsplit.data.x", "import importlib\nimportlib.import_module('ray')"),
        ("simulations.x", "import pickle"),
        ("fedsplit.models.x", "import torch\ntorch.load('x')"),
        ("fedsplit.models.x", "eval('1')"),
        ("fedsplit.models.x", "def f(m):\n    exec(m)"),
        ("fedsplit.models.x", "load('x', trust_remote_code=True)"),
        ("fedsplit.models.x", "load('x', trust_remote_code=given)"),
        ("fedsplit.models.x", "numpy.load('x', allow_pickle=True)"),
        ("fedsplit.models.x", "import numpy as np\nnp.load('x', None, True)"),
        ("fedsplit.models.x", "from torch import load as read\nread('x')"),
        ("fedsplit.models.x", "import torch as t\nkept = map(t.load, paths)"),
        ("fedsplit.models.x", "import torch\ngetattr(torch, 'load')('x')"),
        ("fedsplit.models.x", "import torch\ntorch.jit.load('x')"),
        ("fedsplit.models.x", "from yaml import full_load\nfull_load('x')"),
        ("fedsplit.models.x", "compile('1', 'x', 'eval')"),
        ("fedsplit.models.x", "AutoModel.from_pretrained('x')"),
        ("fedsplit.models.x", "AutoModel.from_pretrained('x', use_safetensors=None)"),
        ("fedsplit.models.x", "PeftModel.from_pretrained(model, 'x')"),
        ("fedsplit.owners.x", "import subprocess\nsubprocess.run('x', shell=True)"),
        ("fedsplit.owners.x", "import os\nos.system('x')"),
        ("fedsplit.owners.x", "archive.extractall('x')"),
        ("fedsplit.owners.x", "def f():\n    import runpy"),
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
        (
            "strategies.x",
            "from fedsplit.fingerprints.gate.lineage_gate import LineageGate\nimport flwr",
        ),
        ("simulations.x", "import ray\nimport strategies\nfrom fedsplit.owners import plan"),
        (
            "fedsplit.models.x",
            "import transformers\nmodel.eval()\nmake(1).eval()\nload(trust_remote_code=False)",
        ),
        (
            "fedsplit.models.x",
            "import re, subprocess\nimport numpy as np\nre.compile('x')\nnp.load('x')\n"
            "from safetensors.torch import load\nload(b'')\nsubprocess.run(['x'])\n"
            "auto.from_pretrained('x', use_safetensors=True)\nAutoConfig.from_pretrained('x')",
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
        ("fedsplit.storage", "flwr ray torch transformers numpy"),
        ("fedsplit.config", "flwr ray torch transformers"),
        ("fedsplit.wire.message_types", "flwr ray torch"),
        ("fedsplit.client_app", "ray torch transformers"),
        ("fedsplit.owners.ledger.chain", "flwr ray torch transformers numpy grpc"),
        ("fedsplit.deploy.start", "flwr ray torch transformers numpy grpc"),  # it stays for weeks
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
