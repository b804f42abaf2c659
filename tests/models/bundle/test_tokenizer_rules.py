"""Which tokenizers of another party run here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedsplit.errors import ModelError
from fedsplit.models.bundle.tokenizer_rules import check_expression, check_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("text", [GPT2, LLAMA3, O200K, " {2,}", r"\s+", "a", "[^(|)+*]", r"\."])
def test_expressions_of_real_tokenizers_are_allowed(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["(a+)+b", "(a|a)*b", "(a|ab){9,}", "(.*)*", r"(a)\1", "a+*", ".*.*.*.*x", "a{1,999}", "(?R)"],
)
def test_costly_expressions_are_refused(text: str) -> None:
    with pytest.raises(ModelError, match="expression"):
        check_expression(text)


def whole(**parts: Any) -> bytes:
    return json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}}, **parts}).encode()


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"normalizer": {"type": "Exec"}}, "not allowed"),
        ({"made_up": 1}, "not allowed"),
        ({"model": {"type": "BPE", "dropout": 0.5}}, "at random"),
        ({"truncation": {"max_length": 1}}, "truncation"),
        ({"normalizer": replace({"String": "a"}, "b" * 40)}, "too long"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [replace({"String": "a"}, "a" * 10)] * 3,
                }
            },
            "lengthen",
        ),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+"}}}, "repeats"),
    ],
)
def test_what_no_tokenizer_needs_is_refused(parts: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        check_tokenizer(whole(**parts))
    check_tokenizer(whole(normalizer=replace({"String": " "}, "_")))
