"""A tokenizer as two bundle files: the tokenizers library's JSON and a few plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsplit.errors import ModelError
from fedsplit.models.bundle.bounded_json import dump_json, parse_json
from fedsplit.models.bundle.tokenizer_rules import check_tokenizer

SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
SIDES = ("padding_side", "truncation_side")
PROBE = ("Hello world, it's 12 o'clock!", "a", "naïve — Ünïcödé 你好\n\ttabs")


def pack(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ModelError: if the tokenizer has no such form, or the form encodes differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json form")
    # A call leaves its padding and truncation behind in the backend; they are no part of it.
    clean = Backend.from_str(backend.to_str())
    clean.no_padding()
    clean.no_truncation()
    settings: dict[str, Any] = {n: str(t) for n in SPECIAL if (t := getattr(tokenizer, n, None))}
    settings |= {side: getattr(tokenizer, side) for side in SIDES}
    settings["model_input_names"] = list(tokenizer.model_input_names)
    # "No limit" is 1e30 in transformers, which is no JSON integer that anyone should accept.
    settings["model_max_length"] = min(int(tokenizer.model_max_length), 2**31)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        settings["chat_template"] = template
    files = {
        "tokenizer.json": clean.to_str().encode(),
        "tokenizer_config.json": dump_json(settings),
    }
    again = unpack(files)
    for text in PROBE:
        if again is None or list(again(text)["input_ids"]) != list(tokenizer(text)["input_ids"]):
            raise ModelError(
                f"tokenizer: {type(tokenizer).__name__} encodes {text!r} differently once packed"
            )
    return files


def unpack(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in ``files``, or None if there is none.

    Raises:
        ModelError: if one of the two files is missing or holds something else.
    """
    present = [n for n in ("tokenizer.json", "tokenizer_config.json") if n in files]
    if not present:
        return None
    if len(present) == 1:
        raise ModelError(f"{present[0]}: must come with the other tokenizer file")
    settings = parse_json("tokenizer_config.json", files["tokenizer_config.json"])
    _check(settings)
    check_tokenizer(files["tokenizer.json"])
    try:
        backend = Backend.from_str(files["tokenizer.json"].decode())
        made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend, **settings
        )
        return made
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library panics outside Exception on some inputs
        raise ModelError(f"tokenizer.json: not a tokenizer: {error}") from error


def _check(settings: Mapping[str, Any]) -> None:
    file = "tokenizer_config.json"
    for key, value in settings.items():
        if key in SPECIAL or key == "chat_template":
            good = isinstance(value, str)
        elif key in SIDES:
            good = value in ("left", "right")
        elif key == "model_max_length":
            good = type(value) is int and 0 < value <= 2**31
        elif key == "model_input_names":
            names = ("input_ids", "attention_mask", "token_type_ids")
            good = isinstance(value, list) and all(v in names for v in value)
        else:
            raise ModelError(f"{file}: the key {key!r} is not allowed")
        if not good:
            raise ModelError(f"{file}: {key}={str(value)[:80]!r}: not a value that it can have")
