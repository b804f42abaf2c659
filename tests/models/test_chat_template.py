"""Chat templates of another party: as transformers renders them, bounded, and completions told."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsplit.errors import ConfigError, DataError, ModelError
from fedsplit.models import chat_template
from fedsplit.models.chat_template import encode, encode_prompt, lay_out

pytest.importorskip("jinja2")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nBe kind</s>\n' }}{% endif %}{{'<s>' + message['role'] + '\n' + "
    "message['content'] + '</s>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<s>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "{%- if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] | trim + ' [/INST]' }}\n"
    "{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}\n"
    "{%- else %}{{ raise_exception('roles are user and assistant') }}{%- endif %}\n"
    "{%- endfor %}"
)
BLOCKS = """{% for m in messages %}
    {% if m.role == 'user' %}
<|user|>
{{ m.content | tojson }}{{ eos_token }}
    {% else %}
<|{{ m.role }}|>
{{ m.content }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
ONE = [("user", "a b"), ("assistant", "c d")]
TWO = [*ONE, ("user", "é\n"), ("assistant", "f")]


def _tokenizer(template: str | None) -> Any:
    letters = [*"abcdefghijklmnopqrstuvwxyz[]/<>|_-\nI NSTé"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [CHATML, BRACKETS, BLOCKS])
@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_texts_are_those_of_transformers(template: str, conversation: Any) -> None:
    tokenizer = _tokenizer(template)
    turns = [{"role": r, "content": c} for r, c in conversation]
    (found,) = lay_out(tokenizer, [conversation])
    assert found.text == tokenizer.apply_chat_template(turns, tokenize=False)
    completions = [found.text[a:b] for a, b in found.spans]
    said = [c for r, c in conversation if r == "assistant"]
    assert [c.strip().removesuffix("</s>") for c in completions] == said
    (asked,) = lay_out(tokenizer, [conversation[:-1]], prompt=True)
    expected = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert asked.text == expected
    assert (
        encode_prompt(tokenizer, conversation[:-1])
        == tokenizer(expected, add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize("template", [None, CHATML, BRACKETS, BLOCKS])
def test_targets_are_the_completions_tokens_alone(template: str | None) -> None:
    tokenizer = _tokenizer(template)
    (found,) = encode(tokenizer, [TWO], 500)
    wanted = [i for i, target in zip(found.ids, found.targets, strict=True) if target]
    rest = [i for i, target in zip(found.ids, found.targets, strict=True) if not target]
    shown, hidden = tokenizer.decode(wanted), tokenizer.decode(rest)
    assert [c for c in shown if c in "abcdf"] == ["c", "d", "f"]
    assert wanted.count(tokenizer.eos_token_id) == 2
    assert not {"c d", "f"} & {hidden}
    assert found.ids[: len(encode_prompt(tokenizer, TWO[:1]))] == encode_prompt(tokenizer, TWO[:1])


@pytest.mark.parametrize("template", [CHATML, BRACKETS, BLOCKS])
@pytest.mark.parametrize("answer", ["f", "f \n\n", "f\n g"])
def test_an_answer_ends_with_its_mark(template: str, answer: str) -> None:
    tokenizer = _tokenizer(template)
    (found,) = encode(tokenizer, [[*TWO[:-1], ("assistant", answer)]], 500)
    for at, (token, target) in enumerate(zip(found.ids, found.targets, strict=True)):
        if target and token == tokenizer.eos_token_id:
            assert not any(found.targets[at + 1 : at + 2])  # what follows was never generated
    text = tokenizer.decode([i for i, t in zip(found.ids, found.targets, strict=True) if t])
    assert text.replace(" ", "").endswith(answer.strip().replace(" ", "") + "</s>") or (
        template != BRACKETS and text.replace(" ", "").endswith(answer.replace(" ", "") + "</s>")
    )


def test_an_end_mark_may_be_the_unknown_token_too() -> None:
    tokenizer = _tokenizer(CHATML)
    tokenizer.unk_token = "</s>"  # as GPT-2's tokenizer has it
    (found,) = encode(tokenizer, [ONE], 500)
    last = max(at for at, target in enumerate(found.targets) if target)
    assert found.ids[last] == tokenizer.eos_token_id


def test_white_space_without_a_mark_is_the_answers() -> None:
    tokenizer = _tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (found,) = encode(tokenizer, [[("user", "a"), ("assistant", "é\n")]], 500)
    assert sum(found.targets) == 3  # the letter, its line and the template's


def test_a_token_across_the_border_is_the_completions() -> None:
    vocabulary = {t: i for i, t in enumerate(["<unk>", "</s>", "a", "b", "\n", "\nb"])}
    backend = Tokenizer(models.Unigram([(t, -1.0) for t in vocabulary], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    (found,) = encode(tokenizer, [[("user", "a"), ("assistant", "b")]], 10)
    assert found.ids == [2, 5, 1]
    assert found.targets == [False, True, True]


def test_cuts_take_prompts_first_and_say_what_they_took() -> None:
    tokenizer = _tokenizer(CHATML)
    long = [("user", "a" * 50), ("assistant", "bcd")]
    (whole,), (cut,) = encode(tokenizer, [long], 500), encode(tokenizer, [long], 20)
    size = sum(whole.targets)
    assert size == 4  # b, c, d and the end mark; the template's line is no answer
    assert cut.ids == whole.ids[-21:-1]
    assert cut.targets == [False] * 16 + [True] * size
    assert (cut.lost_prompt, cut.lost_completion) == (len(whole.ids) - 20, 0)
    (short,) = encode(tokenizer, [[("user", "a"), ("assistant", "b" * 50)]], 20)
    assert short.lost_completion == 51 - sum(short.targets) > 0
    assert not short.targets[0]
    assert len(short.ids) == 20
    (two,) = encode(tokenizer, [[*ONE, ("user", "a" * 9), ("assistant", "b")]], 12)
    assert two.lost_completion == 4  # the first answer stood in what was cut
    assert tokenizer.decode([i for i, t in zip(two.ids, two.targets, strict=True) if t]) == (
        tokenizer.decode([7 - 2, 2])
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ""),
        ("{{ 'a' * 999999999 }}", "MemoryError|over|exit"),
        ("{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}"
         "{% endfor %}", "MemoryError|exit"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "text is over"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ messages | random }}", "No filter named 'random'"),
        ("{{ strftime_now('%d') }}", "strftime_now' is undefined"),
        ("{{ lipsum() }}", "lipsum' is undefined"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% include '/etc/passwd' %}", "no loader|TypeError"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "begin"),
        ("{{ unfinished", "TemplateSyntaxError"),
        ("x" * (1 << 17), "at most 65536 characters"),
    ],
)  # fmt: skip
def test_hostile_templates_are_bounded(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    with pytest.raises(ModelError, match=f"chat template.*({message})"):
        lay_out(_tokenizer(template), [ONE])


def test_the_shortest_cut_has_a_target() -> None:
    tokenizer = _tokenizer(CHATML)
    (found,) = encode(tokenizer, [ONE], 2)
    assert found.targets == [False, True]
    with pytest.raises(ConfigError, match="max_tokens=1: must be >= 2"):
        encode(tokenizer, [ONE], 1)


def test_a_template_that_leaves_a_completion_out_is_refused() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="0 tokens of a completion"):
        encode(_tokenizer(template), [ONE], 50)
