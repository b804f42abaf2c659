"""Bounded JSON for bundles: another party's text becomes plain, small values or is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedsplit.errors import ModelError

MAX_DEPTH = 12
MAX_ITEMS = 4096
MAX_TEXT = 1 << 16
MAX_NUMBER = 2**53
# Keys by which a configuration could name code, a download or another way to run.
REFUSED = {
    "auto_map",
    "attn_implementation",
    "backbone",
    "custom_pipelines",
    "experts_implementation",
    "quantization_config",
    "trust_remote_code",
    "use_pretrained_backbone",
    "use_timm_backbone",
}


def dump_json(value: Mapping[str, Any]) -> bytes:
    """Return ``value`` as JSON, the same bytes for the same content."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def parse_json(name: str, content: bytes) -> dict[str, Any]:
    """Return the object in ``content``, the file called ``name``.

    Raises:
        ModelError: if it is not a JSON object within the bounds of depth, items, text and number.
    """

    def constant(text: str) -> Any:
        # json's own writer emits Infinity (DeBERTa's limits); only NaN can never be meant.
        if text == "NaN":
            raise ValueError("NaN")
        return float(text)

    try:
        value = json.loads(content.decode(), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name}: must be a JSON object, not {type(value).__name__}")
    _bound(name, value, 0)
    return value


def without_private_keys(value: Any) -> Any:
    """Return ``value`` without the keys, at any depth, that :func:`refuse_config_keys` refuses."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in REFUSED and not k.startswith("_")}
        return {k: without_private_keys(v) for k, v in kept.items()}
    return [without_private_keys(v) for v in value] if isinstance(value, list) else value


def refuse_config_keys(name: str, value: Any) -> None:
    """Refuse keys that choose code or hidden settings, at any depth.

    Raises:
        ModelError: names the key.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in REFUSED or key.startswith("_"):
                raise ModelError(f"{name}: the key {key!r} is not allowed")
            refuse_config_keys(name, inner)
    elif isinstance(value, list):
        for inner in value:
            refuse_config_keys(name, inner)


def _bound(name: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ModelError(f"{name}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict | list):
        if len(value) > MAX_ITEMS:
            raise ModelError(f"{name}: {len(value)} items in one place: must be <= {MAX_ITEMS}")
        for inner in value.values() if isinstance(value, dict) else value:
            _bound(name, inner, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ModelError(f"{name}: a text of {len(value)}: must be <= {MAX_TEXT} characters")
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ModelError(
            f"{name}: a number of {value.bit_length()} bits: must be within +-{MAX_NUMBER}"
        )
