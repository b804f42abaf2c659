"""The process around a ClientApp: an app is digested before it is installed or run.

Flower's SuperExec starts ``flwr-clientapp`` for every message.  That process fetches the bundle the
server sent, installs it, imports the ClientApp that the bundle names, and calls it.  This module is
what runs in its place on a machine started by ``fedsplit owner start``: Flower's own code, except
that

- the bundle's bytes are digested before they are written anywhere, and a digest other than the
  policy's ``app.digest`` ends the task with an error reply that names both;
- what lies in the installed folder must be the bundle's files and nothing else (Flower keeps a
  folder that is there already, and names it by 32 bits of the hash);
- the ClientApp is imported from that folder and by the bundle's own words.  Flower itself would
  take folder and hash from the run, which is the server's word, so that a reviewed bundle could be
  sent along with the name of another folder;
- only ClientApps run: a task of any other kind (an AgentApp, a ServerApp) is refused likewise;
- no dependencies are installed at run time.

What is replaced are two functions that ``run_clientapp`` looks up by name.  A version of Flower
that looks up others is refused before it fetches anything.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fedsplit.errors import ConfigError, PolicyError, RunError
from fedsplit.owners.app_digest import digest_of_files, files_of_bundle, files_of_folder
from fedsplit.owners.naming import POLICY_VARIABLE

log = logging.getLogger(__name__)

CLIENT_APP = "flwr-clientapp"
PATH_VARIABLE = "FEDSPLIT_OWNER_PATH"
_MODULE = "flwr.supernode.runtime.run_clientapp"
# The first is not replaced, but without it there would be no message to refuse with a reply.
_SEAM = ("pull_task_input", "install_from_fab", "get_load_client_app_fn")
_INSTALLS = "--allow-runtime-dependency-installation"


def verify_bundle(bundle: bytes, policy: Path | None) -> dict[str, bytes]:
    """Return a bundle's files if they are the ones the policy pins.

    The policy is read anew each time, so that an owner who takes a digest out stops the next
    message.

    Raises:
        PolicyError: another digest (names both), no digest pinned, or no usable policy.
    """
    # Not above: the supervisor imports this module for a name and must not hold torch.
    from fedsplit.owners.policy.rules import Breach, Policy, refuse

    try:
        if policy is None:
            raise ConfigError(f"{POLICY_VARIABLE}: must name the owner's policy")
        rules = Policy.load(policy)
    except ConfigError as error:
        log.error("%s", error)
        raise PolicyError("owner's policy: cannot be used; its own log says why") from None
    pinned = rules.rules.get("app.digest", "")
    if not pinned:
        raise PolicyError("owner's policy: app.digest: must be set for an app to run here")
    try:
        files = files_of_bundle(bundle)
    except ConfigError as error:
        raise PolicyError(f"owner's policy: app.digest: {error}") from None
    digest = digest_of_files(files.items())
    if digest != pinned:
        refuse([Breach("app.digest", digest, pinned)])
    return files


def verify_installed(folder: Path, files: dict[str, bytes]) -> None:
    """Check that a folder holds a bundle's files and nothing else.

    Raises:
        PolicyError: anything differs; names the first differing path.
    """
    for compiled in [*folder.rglob("__pycache__")]:  # Python's own, and never to be believed
        if compiled.is_dir() and not compiled.is_symlink():
            shutil.rmtree(compiled)
    try:
        found = files_of_folder(folder, compiled=True)
    except ConfigError as error:
        raise PolicyError(f"owner's policy: app.digest: installed {error}") from None
    for name in sorted(found.keys() | files.keys()):
        if found.get(name) != files.get(name):
            raise PolicyError(
                f"owner's policy: app.digest: installed file {name!r} is not the bundle's; "
                "remove the folder of apps"
            )


class Guard:
    """What takes the place of Flower's functions in one ClientApp process.

    Args:
        policy: the owner's policy file; None refuses everything.
        kind: the task's command; any but ``flwr-clientapp`` is refused.
    """

    def __init__(self, policy: Path | None, kind: str = CLIENT_APP) -> None:
        self._policy = policy
        self._kind = kind
        self._verified: Path | None = None

    def attach(self, module: ModuleType) -> None:
        """Put this guard between ``run_clientapp`` and what it would call.

        Raises:
            RunError: this version of Flower does not look up what the guard replaces.
        """
        code = getattr(getattr(module, "run_clientapp", None), "__code__", None)
        names = code.co_names if code is not None else ()
        missing = [n for n in _SEAM if n not in names or not callable(getattr(module, n, None))]
        if missing:
            import flwr

            raise RunError(
                f"flwr {flwr.__version__}: run_clientapp does not call {missing[0]}: this version "
                "cannot be guarded, and nothing runs"
            )
        install: Callable[..., Path] = module.install_from_fab

        def guarded_install(content: Any, *args: object, **kwargs: object) -> Path:
            if self._kind != CLIENT_APP:
                raise PolicyError(f"owner's policy: {self._kind}: only ClientApps run here")
            if not isinstance(content, bytes):
                raise PolicyError("owner's policy: app.digest: the bundle must come as bytes")
            files = verify_bundle(content, self._policy)
            folder = install(content, skip_prompt=True)
            verify_installed(folder, files)
            self._verified = folder
            return folder

        def guarded_loader(*args: object, **kwargs: object) -> Callable[..., Any]:
            return lambda *run: self.load()

        vars(module).update(install_from_fab=guarded_install, get_load_client_app_fn=guarded_loader)

    def load(self) -> Any:
        """Import the ClientApp that the verified bundle names, from the verified folder.

        Raises:
            PolicyError: nothing was verified.
        """
        if self._verified is None:
            raise PolicyError("owner's policy: app.digest: no app was verified in this process")
        from flwr.clientapp.client_app import LoadClientAppError
        from flwr.supercore.object_ref import load_app

        project = tomllib.loads((self._verified / "pyproject.toml").read_text(encoding="utf-8"))
        named = project["tool"]["flwr"]["app"]["components"]["clientapp"]
        return load_app(named, LoadClientAppError, self._verified)


def check_flower() -> None:
    """Check, before any message comes, that the installed Flower can be guarded.

    Raises:
        RunError: it is not installed, or has changed where the guard stands.
    """
    try:
        real = importlib.import_module(_MODULE)
    except ImportError as error:
        raise RunError(f"flwr: {error}: this version cannot be guarded") from None
    copy = ModuleType(_MODULE)
    vars(copy).update(vars(real))
    Guard(None).attach(copy)


def main() -> NoReturn:
    """Run one task: ``python -m fedsplit.deploy.guard COMMAND FLOWER'S ARGUMENTS``."""
    kind, *arguments = sys.argv[1:] or [""]
    if _INSTALLS in arguments:
        sys.exit(f"{_INSTALLS}: must not be given, an owner's machine installs nothing at run time")
    given = os.environ.get(POLICY_VARIABLE)
    os.environ["PATH"] = os.environ.pop(PATH_VARIABLE, os.environ.get("PATH", os.defpath))
    try:
        module = importlib.import_module(_MODULE)
        Guard(Path(given) if given else None, kind).attach(module)
    except (ImportError, RunError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    from flwr.supernode.cli import flwr_clientapp

    sys.argv = [CLIENT_APP, *arguments]
    flwr_clientapp()
    sys.exit(0)


if __name__ == "__main__":
    main()
