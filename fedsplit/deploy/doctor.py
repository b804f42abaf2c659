"""What a machine has and lacks: one line for each thing that a run can fail of, with what to do."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

from fedsplit.deploy.checks import FAIL, MIN_DISK_BYTES, OK, SKIPPED, WARN, Check, check_machine
from fedsplit.deploy.node import NodeFile
from fedsplit.errors import FedsplitError

OLDEST_PYTHON = (3, 11)
SERVER_PORTS = (9092, 9093)  # of docs/deploy.md: the SuperLink's and the session server's
DAY_S = 86400.0
UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


@dataclass(frozen=True)
class Patient:
    """What is looked at beside the machine itself.

    Attributes:
        node: an owner's ``node.toml``; its data, keys, folders and server are looked at too.
        policy: the owner's policy.
        network: whether to connect to the owner's server.
        data: a file or folder of texts.
        text_column: its texts.
        label_column: its labels; empty: none.
        model: a hub name, folder, ``.gguf`` or ``package:NAME``.
        task: of the model.
    """

    node: Path | None = None
    policy: Path = Path("owner.toml")
    network: bool = True
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    model: str = ""
    task: str = "sequence-classification"


def examine(patient: Patient) -> list[Check]:
    """Return a line for each thing; whatever goes wrong with one is its line."""
    steps: dict[str, Callable[[], Iterator[Check]]] = {
        "Python": _python,
        "packages": _packages,
        "ports": _ports,
        "clock": _clock,
        "disk": _disk,
        "GPU": _gpu,
        "certificates": lambda: _owner(patient),
        "data": lambda: _data(patient),
        "model": lambda: _model(patient),
    }
    found: list[Check] = []
    for name, step in steps.items():
        try:
            found += step()
        except Exception as error:  # the other lines are wanted all the same
            told = str(error) if isinstance(error, FedsplitError) else repr(error)
            found.append(Check(name, FAIL, told, f"mend what it says; {name} cannot be used so"))
    return found


def _python() -> Iterator[Check]:
    text = f"{platform.python_version()}, {platform.machine()}, {sys.executable}"
    wanted = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        yield Check("Python", FAIL, text, f"install Python {wanted} or newer")
    elif sys.platform != "linux":
        todo = "use Linux: nothing else is tested; Windows needs WSL"
        yield Check("Python", WARN, f"{text}, on {sys.platform}", todo)
    else:
        yield Check("Python", OK, text)


def _packages() -> Iterator[Check]:
    try:
        wanted = [Requirement(text) for text in metadata.requires("fedsplit") or []]
        extras = metadata.metadata("fedsplit").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        todo = "pip install -e . in the clone, or pip install fedsplit"
        yield Check("packages", FAIL, "fedsplit runs from a folder and is not installed", todo)
        return
    needed = [r for r in wanted if _applies(r.marker, "")]
    if missing := list(_missing(needed)):
        fix = " ".join(f"'{r.name}{r.specifier}'" for r in needed if _fault(r))
        yield Check("packages", FAIL, "; ".join(missing), f"pip install {fix}")
    else:
        told = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "flwr"))
        yield Check("packages", OK, f"all {len(needed)} that are always needed; {told}")
    without = [
        extra
        for extra in extras
        if extra != "all"
        and any(_missing([r for r in wanted if _applies(r.marker, extra) and r not in needed]))
    ]
    if without:
        todo = f"if you want what they do: pip install 'fedsplit[{','.join(without)}]'"
        yield Check("extras", WARN, f"not installed: {', '.join(without)}", todo)
    else:
        yield Check("extras", OK, f"all of them: {', '.join(e for e in extras if e != 'all')}")


def _applies(marker: Marker | None, extra: str) -> bool:
    return marker is None or marker.evaluate({"extra": extra})


def _missing(wanted: list[Requirement]) -> Iterator[str]:
    return (fault for requirement in wanted if (fault := _fault(requirement)))


def _fault(wanted: Requirement) -> str:
    try:
        there = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(there, prereleases=True):
        return f"{wanted.name} {there}: must be {wanted.specifier}"
    if not wanted.extras:
        return ""
    brought = [Requirement(text) for text in metadata.requires(wanted.name) or []]
    more = [r for r in brought if r.marker and not _applies(r.marker, "")]
    asked = [r for r in more if any(_applies(r.marker, extra) for extra in wanted.extras)]
    return next(_missing(asked), "")


def _ports() -> Iterator[Check]:
    fault = _bound("127.0.0.1", 0)
    if fault:
        todo = "allow listening on 127.0.0.1: Flower's processes talk to each other there"
        yield Check("ports", FAIL, f"no port of 127.0.0.1 can be opened: {fault}", todo)
        return
    taken = [str(port) for port in SERVER_PORTS if _bound("127.0.0.1", port)]
    ports = " and ".join(map(str, SERVER_PORTS))
    if taken:
        todo = "nothing at an owner; a server: ss -ltnp names who, or choose another port"
        yield Check("ports", WARN, f"taken: {', '.join(taken)} (of a server's {ports})", todo)
    else:
        yield Check("ports", OK, f"loopback can be used; a server's {ports} are free")


def _bound(host: str, port: int) -> str:
    """Return why a port cannot be opened; empty if it can."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _clock() -> Iterator[Check]:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    installed = Path(__file__).stat().st_mtime
    todo = "set the clock: certificates and signed requests of a wrong one are refused"
    if time.time() < installed - DAY_S:
        then = time.strftime("%Y-%m-%d", time.gmtime(installed))
        yield Check("clock", FAIL, f"{now}, before {then}, when fedsplit was installed", todo)
        return
    state = _kernel_clock()
    if state == UNSYNCHRONISED:
        todo = "compare it with a watch; better, run chrony or systemd-timesyncd"
        yield Check("clock", WARN, f"{now}, and nothing keeps it right", todo)
    else:
        kept = "" if state is None else ", kept right by a time service"
        yield Check("clock", OK, now + kept)


def _kernel_clock() -> int | None:
    """Return what adjtimex(2) says of the clock; None where it cannot be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else int(state)


def _disk() -> Iterator[Check]:
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{folder}: {free / 2**30:.1f} GiB free, {MIN_DISK_BYTES / 2**30:.0f} GiB wanted"
        if not os.access(folder, os.W_OK):
            yield Check(name, FAIL, f"{folder}: cannot be written to", "chmod, or another folder")
        elif free < MIN_DISK_BYTES:
            yield Check(name, WARN, text, "make room: a full disk stops whatever leaves an owner")
        else:
            yield Check(name, OK, text)


def _gpu() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found = [torch.cuda.get_device_properties(number) for number in range(count)]
        text = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in found)
        yield Check("GPU", OK, f"{text}; model.device = cuda uses it")
    elif any(Path("/proc/driver/nvidia/gpus").glob("*")):
        todo = "install a torch that is built for CUDA, or stay with model.device = cpu"
        yield Check("GPU", WARN, f"the driver sees one, torch {torch.__version__} does not", todo)
    else:
        yield Check("GPU", OK, "none; model.device = cpu, the default, needs none")


def _owner(patient: Patient) -> Iterator[Check]:
    if patient.node is None:
        yield Check("certificates", SKIPPED, "not looked at", "--node FILE looks at an owner's")
        return
    node = NodeFile.load(patient.node)
    if node.port and (fault := _bound("127.0.0.1", node.port)):
        todo = "set port = 0 in the node file, or end what listens there"
        yield Check("SuperNode's port", FAIL, f"127.0.0.1:{node.port}: {fault}", todo)
    yield from check_machine(node, patient.policy, network=patient.network)


def _data(patient: Patient) -> Iterator[Check]:
    from fedsplit.data.tagged import CONLL
    from fedsplit.deploy.data_check import look_at_labels
    from fedsplit.owners.data_source import read_own

    if patient.data is None:
        if patient.node is None:
            yield Check("data", SKIPPED, "not looked at", "--data FILE reads one")
        return
    conll = patient.data.suffix.lower() in CONLL[:-1]  # plain text has the last one, too
    node: dict[str, object] = {
        "data-path": str(patient.data),
        "data-kind": "tagged" if conll else "file",
        "text-column": patient.text_column,
        "label-column": patient.label_column,
    }
    train, test = read_own(node, labelled=False)
    words = sorted(len(text.split()) for text in train.texts)
    text = f"{patient.data}: {len(train)} texts, {words[len(words) // 2]} words in the median"
    yield Check("data", OK, text + (f"; {len(test)} to test on" if test is not None else ""))
    if patient.label_column:
        what, state, told = look_at_labels(node)
        todo = "name them in model.label-names (or give model.label-range)" if state == WARN else ""
        yield Check(what, state, told, todo)


def _model(patient: Patient) -> Iterator[Check]:
    from fedsplit.models import load, split

    if not patient.model:
        yield Check("model", SKIPPED, "not looked at", "--model NAME loads and splits one")
        return
    loaded = load(patient.model, patient.task)
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    free = _available_memory()
    bottom, _ = split(loaded.model, 0)
    text = (
        f"{patient.model}: {size / 2**20:.0f} MiB, width {bottom.hidden_size}; "
        "bottom then top equals the whole"
    )
    if free is not None and 4 * size > free:  # weights, gradients, two moments
        todo = "train fewer blocks, adapters, or on a machine with more memory"
        tight = f"; {free / 2**20:.0f} MiB are free, training all of it takes four times its size"
        yield Check("model", WARN, text + tight, todo)
    else:
        yield Check("model", OK, text)


def _available_memory() -> int | None:
    """Return the bytes that a process may still take; None where that is not told."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
