"""The offer of a serving model, kept in the owner's home: one token per session.

The ClientApp writes it when the server announces itself in a Flower message; ``fedsplit predict``,
another process of the same owner, takes tokens from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, SessionError
from fedsplit.settings import read_settings
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.serving import ServingOffer

FILE = "serving.json"


@dataclass(frozen=True)
class TakenOffer:
    """What one session with a serving model needs.

    Attributes:
        session: address, authority, bottom and one token.
        config: the serving run's settings.
        node_config: the owner's own, as its SuperNode has it.
    """

    session: SessionOffer
    config: RunConfig
    node_config: dict[str, Any]


def save_offer(
    root: Path,
    offer: ServingOffer,
    flat: Mapping[str, Any],
    node_config: Mapping[str, object],
) -> None:
    """Write the offer, readable by its owner alone; it replaces an earlier one.

    Raises:
        ConfigError: it cannot be written.
    """
    session = asdict(offer.session) | {"ca": offer.session.ca.decode("ascii", "replace")}
    content = {
        "session": session,
        "tokens": list(offer.tokens),
        "flat": dict(flat),
        "node-config": dict(node_config),
    }
    with _locked(root):
        _write(root, content)


def serving_config(root: Path) -> RunConfig:
    """Return the serving run's settings without using up a token.

    Raises:
        As :func:`take_offer`.
    """
    return _parse(_read(root / FILE)).config


def take_offer(root: Path) -> TakenOffer:
    """Return what one session needs; its token is gone from the file before it is used.

    Raises:
        SessionError: nothing serves this owner, or its tokens are used up.
        ConfigError: the file is damaged.
    """
    path = root / FILE
    with _locked(root):
        content = _read(path)
        taken = _parse(content)
        tokens = content.get("tokens")
        if not isinstance(tokens, list):
            raise ConfigError(f"{FILE}: damaged: tokens must be a list")
        if not tokens:
            raise SessionError(
                f"{path}: all tokens are used; the server sends new ones every "
                f"{taken.config.serving.renew_s:g} s"
            )
        _write(root, {**content, "tokens": tokens[1:]})
    return replace(taken, session=replace(taken.session, token=str(tokens[0])))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SessionError(
            f"{path}: no model serves this owner yet; its SuperNode must be connected to a run "
            "with strategy = serving"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: must be a readable offer: {error}") from None


def _parse(content: Mapping[str, Any]) -> TakenOffer:
    try:
        session = dict(content["session"])
        session["ca"] = str(session["ca"]).encode()
        config = read_settings(content["flat"])
        return TakenOffer(SessionOffer(**session), config, dict(content["node-config"]))
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{FILE}: damaged: {type(error).__name__} {error}") from None


def _write(root: Path, content: Mapping[str, Any]) -> None:
    try:
        storage.write(root / FILE, json.dumps(content), mode=storage.PRIVATE)
    except OSError as error:
        raise ConfigError(f"{root / FILE}: cannot be written: {error}") from None


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = storage.FileLock(root / ".serving.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise ConfigError(f"owner home {root}: must be a writable folder: {error}") from None
    try:
        yield
    finally:
        lock.release()
