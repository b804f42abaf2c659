"""Which components of the tokenizers library another party's ``tokenizer.json`` may use.

The library runs whatever the file says: a chain of replacements grows a text without bound, and an
expression with nested repetition takes time exponential in it.  So every component is of a type
listed here, and its texts and expressions are bounded.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedsplit.errors import ModelError

ALLOWED: dict[str, frozenset[str]] = {
    "model": frozenset({"BPE", "WordPiece", "WordLevel", "Unigram"}),
    "normalizer": frozenset(
        [
            "Sequence",
            "BertNormalizer",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Precompiled",
            "Prepend",
            "Replace",
            "Strip",
            "StripAccents",
        ]
    ),
    "pre_tokenizer": frozenset(
        [
            "Sequence",
            "BertPreTokenizer",
            "ByteLevel",
            "Digits",
            "Metaspace",
            "Punctuation",
            "Split",
            "UnicodeScripts",
            "Whitespace",
            "WhitespaceSplit",
        ]
    ),
    "post_processor": frozenset(
        ["Sequence", "BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"]
    ),
    "decoder": frozenset(
        [
            "Sequence",
            "BPEDecoder",
            "ByteFallback",
            "ByteLevel",
            "CTC",
            "Fuse",
            "Metaspace",
            "Replace",
            "Strip",
            "WordPiece",
        ]
    ),
}
KEYS = frozenset({*ALLOWED, "version", "truncation", "padding", "added_tokens"})
MOST_PARTS = 24  # components of one kind, sequences' own included
MOST_ADDED = 4096
LONGEST_PATTERN = 512  # characters
LONGEST_ADDED_TEXT = 32  # characters that one replacement, prefix or special token puts in
MOST_GROWTH = 64.0  # by which all replacements together may lengthen a text
MOST_REPEATS = 3  # open repetitions of one alternative of an expression
MOST_SPECIALS = 64  # pieces of one template


def check_tokenizer(content: bytes) -> None:
    """Refuse a ``tokenizer.json`` with a component or bound that is not allowed.

    Raises:
        ModelError: names the component.
    """
    try:
        whole = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"tokenizer.json: not a tokenizer: {error}") from None
    _need(isinstance(whole, dict), "is no object")
    for key in whole:
        _need(key in KEYS, f"the key {key!r:.80} is not allowed")
    for key in ("truncation", "padding"):
        _need(whole.get(key) is None, f"{key} must be null: the owner decides it")
    added = whole.get("added_tokens") or []
    _need(isinstance(added, list) and len(added) <= MOST_ADDED, f"over {MOST_ADDED} added tokens")
    growth = 1.0
    for kind, allowed in ALLOWED.items():
        for count, part in enumerate(_parts(whole.get(kind), kind), 1):
            name = part.get("type")
            if kind == "model" and name is None:  # an old file's
                name = "BPE" if "merges" in part else "Unigram" if "unk_id" in part else "WordLevel"
            _need(name in allowed, f"{kind} {name!r:.80} is not allowed")
            _need(count <= MOST_PARTS, f"over {MOST_PARTS} parts of its {kind}")
            if kind == "model":
                _check_model(part)
            else:
                growth *= _check_part(kind, part)
    _need(growth <= MOST_GROWTH, f"its replacements lengthen a text {growth:g} times")


def _parts(value: Any, kind: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield a component and those of the sequences in it."""
    if value is None:
        return
    _need(isinstance(value, dict) and depth <= 2, f"{kind} is no component, or nested too deep")
    yield value
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = value.get(key, [])
        _need(isinstance(inner, list), f"{kind}: {key} is no list")
        for part in inner:
            yield from _parts(part, kind, depth + 1)


def _check_model(model: Mapping[str, Any]) -> None:
    _need(not model.get("dropout"), "its model drops merges at random")
    longest = model.get("max_input_chars_per_word", 100)
    _need(isinstance(longest, int) and longest <= 1000, "words of over 1000 characters")


def _check_part(kind: str, part: Mapping[str, Any]) -> float:
    """Check one component and return by how much it can lengthen a text."""
    for key in ("prepend", "content", "replacement", "prefix", "suffix", "cls", "sep"):
        text = part.get(key, "")
        shown = text if isinstance(text, str) else ""
        _need(len(shown) <= LONGEST_ADDED_TEXT, f"{kind}: {key} is too long")
    for key in ("single", "pair"):
        pieces = part.get(key) or []
        _need(len(pieces) <= MOST_SPECIALS, f"{kind}: over {MOST_SPECIALS} pieces in a template")
    if part.get("type") == "Precompiled":
        return _check_charsmap(part.get("precompiled_charsmap"))
    pattern = part.get("pattern")
    if pattern is None:
        return 1.0
    _need(isinstance(pattern, dict) and len(pattern) == 1, f"{kind}: is no pattern")
    ((form, text),) = pattern.items()
    good = form in ("String", "Regex") and isinstance(text, str) and len(text) > 0
    _need(good and len(text) <= LONGEST_PATTERN, f"{kind}: a pattern too long, or none")
    if form == "Regex":
        check_expression(text)
    if part.get("type") != "Replace":
        return 1.0
    shortest = len(text) if form == "String" else 1
    extra = 0 if form == "String" or "content" not in part else 1  # it may match nothing at all
    return max(1.0, len(str(part.get("content", ""))) / shortest + extra * bool(part["content"]))


def _check_charsmap(value: Any) -> float:
    """Bound what a compiled map of characters puts in their place."""
    try:
        blob = base64.b64decode(value or "", validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ModelError("tokenizer.json: normalizer: is no map of characters") from None
    _need(len(blob) <= 1 << 21, "normalizer: a map of characters too large")
    trie = int.from_bytes(blob[:4], "little")
    longest = max(map(len, blob[4 + trie :].split(b"\0")), default=0)
    _need(longest <= 4 * LONGEST_ADDED_TEXT, "normalizer: a map to texts too long")
    return 1.0  # ordinary maps lengthen a few rare characters alone


_GROUP_REPEAT = re.compile(r"\)(?:[*+]|\{\d*,?\d*\})")
_REPEAT = re.compile(r"[*+]|\{\d+,\}")


def check_expression(text: str) -> None:
    """Refuse an expression whose time can grow faster than a small power of the text's length.

    A group may be optional and not repeated; an alternative has at most ``MOST_REPEATS`` open
    repetitions; nothing refers back.  Each repetition multiplies the worst time by the length.

    Raises:
        ModelError: it breaks one of these.
    """
    bare = re.sub(
        r"\\[pP]\{\^?\w+\}|\\[^1-9gk]", "a", text
    )  # classes and escapes are one character
    bare = re.sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]", "a", bare)
    shown = f"expression {text!r:.80}"
    _need("\\" not in bare, f"{shown} refers back")
    _need(not re.search(r"\(\?(?![:=!i>]|<[=!])", bare), f"{shown} has a group of another kind")
    _need(not _GROUP_REPEAT.search(bare), f"{shown} repeats a group")
    _need(not re.search(r"[*+}][*{]", bare), f"{shown} repeats a repetition")
    counts = re.findall(r"\{(\d*),?(\d*)\}", bare)
    _need(all(int(n or 0) <= 64 for pair in counts for n in pair), f"{shown} counts too far")
    most = max(len(_REPEAT.findall(part)) for part in bare.split("|"))
    _need(most <= MOST_REPEATS, f"{shown} repeats {most} times in a row")


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ModelError(f"tokenizer.json: {what}")
