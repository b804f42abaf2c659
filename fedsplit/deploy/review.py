"""What an owner reads before it pins a digest: the bundle, and what is remarkable about it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

from fedsplit.deploy.flower_commands import find_command
from fedsplit.errors import ConfigError
from fedsplit.owners.app_digest import files_of_bundle

CLIENT_APP = "fedsplit.client_app:app"
_BUILD_S = 120.0


def bundle_of(path: Path) -> bytes:
    """Return a bundle's bytes; a source folder is bundled first, as ``flwr run`` would.

    Raises:
        ConfigError: no such file, or a folder that Flower cannot bundle.
    """
    if not path.is_dir():
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"app {path}: must be a .fab file or a folder: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [find_command("flwr"), "build", "--app", str(path.absolute())],
            cwd=folder,
            env={**os.environ, "FLWR_HOME": folder, "FLWR_TELEMETRY_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_BUILD_S,
            check=False,
        )
        made = sorted(Path(folder).glob("*.fab"))
        if done.returncode != 0 or len(made) != 1:
            told = " ".join((done.stdout + done.stderr).split())[-400:]
            raise ConfigError(f"app {path}: Flower cannot bundle it: {told}")
        return made[0].read_bytes()


def facts_of(bundle: bytes) -> list[str]:
    """Return sentences about a bundle that its reviewer should read first.

    Raises:
        ConfigError: no bundle, or one without a Flower app.
    """
    files = files_of_bundle(bundle)
    try:
        project = tomllib.loads(files["pyproject.toml"].decode())
        named = str(project["tool"]["flwr"]["app"]["components"]["clientapp"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"app: must name its ClientApp in pyproject.toml: {error!r}") from None
    code = sum(name.endswith(".py") for name in files)
    size = sum(map(len, files.values()))
    facts = [f"{len(files)} files ({size / 1e3:.0f} kB), {code} of them Python"]
    if named == CLIENT_APP and not any(n.split("/")[0] == "fedsplit" for n in files):
        facts.append(f"ClientApp: {named}, the copy that you installed")
    else:
        facts.append(f"ClientApp: {named}, NOT the copy of fedsplit that you installed: read it")
    tops = {name.split("/")[0].removesuffix(".py") for name in files if name.endswith(".py")}
    hiding = sorted(top for top in tops if top.isidentifier() and _installed(top))
    if hiding:
        facts.append(f"hides installed packages of yours: {', '.join(hiding)}: read why")
    return facts


def _installed(top: str) -> bool:
    """Whether a module of that name is installed in site-packages or the standard library."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    origin = (spec.origin or "") if spec is not None else ""
    return origin == "built-in" or "site-packages" in origin or f"{os.sep}lib{os.sep}" in origin
