"""Writing TOML: run configs for Flower's CLI and the effective configuration of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError


def to_toml(config: Mapping[str, Any]) -> str:
    """Return ``config`` as TOML: scalars, lists of scalars, nested tables; None is left out.

    Raises:
        ConfigError: for any other value; names the key.
    """
    lines: list[str] = []
    _add_table(config, (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def _add_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(map(_toml_key, path))}]"]
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_toml_key(key)} = {_toml_value(value, '.'.join((*path, key)))}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            _add_table(value, (*path, key), lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key, key)


def _toml_string(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}={text!r}: must be valid Unicode") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # nan and inf are TOML
    if isinstance(value, (str, Path)):
        return _toml_string(str(value), name)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item, name) for item in value)}]"
    raise ConfigError(f"{name}={value!r}: must be a bool, int, float, str, list or table for TOML")
