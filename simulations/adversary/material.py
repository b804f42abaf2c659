"""What a lying server sends: tokenizers and bottoms of its own making, and texts to try them on."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fedsplit.models import load, split
from fedsplit.models.anatomy import probe
from fedsplit.models.bundle import tokenizer as tokenizer_files
from fedsplit.models.bundle.bottom import Bundle, lay_out_whole, pack_bottom
from fedsplit.models.bundle.head import AUTO
from fedsplit.models.splitting.halves import Bottom, Top

SST2 = Path(__file__).parents[2].parent / "shared" / "data" / "sst2" / "train.jsonl"
PAD, UNKNOWN = "[PAD]", "[UNK]"
SPECIALS = (PAD, UNKNOWN)
FILLER = "~"


@dataclass(frozen=True)
class Corpus:
    """An owner's texts, and public ones of the same kind.

    Attributes:
        texts: the owner's.
        labels: one per text.
        public: nobody's secret.
        real: whether they are SST-2's sentences.
    """

    texts: list[str]
    labels: list[int]
    public: list[str]
    real: bool

    @property
    def words(self) -> list[str]:
        """Return every word of both, sorted: a vocabulary of the language."""
        return sorted({word for text in (*self.texts, *self.public) for word in text.split()})


def corpus(count: int, *, seed: int = 0, classes: int = 2, real: bool = False) -> Corpus:
    """Return ``count`` texts of an owner and four times as many public ones.

    Args:
        count: of the owner's.
        seed: of the choice.
        classes: of the labels; SST-2 has two.
        real: SST-2's sentences where they are there; else sentences of an invented language whose
            words follow Zipf's law and tell the label no better than chance.
    """
    generator = random.Random(seed)
    if real and SST2.exists() and classes == 2:
        rows = [json.loads(line) for line in SST2.read_text(encoding="utf-8").splitlines()]
        generator.shuffle(rows)
        owned, rest = rows[:count], rows[count : 5 * count]
        labels = [int(r["label"]) for r in owned]
        return Corpus([r["text"] for r in owned], labels, [r["text"] for r in rest], True)
    words = [f"w{i}" for i in range(300)]
    weights = [1.0 / (i + 3) for i in range(300)]

    def sentence() -> str:
        return " ".join(generator.choices(words, weights, k=generator.randint(5, 14)))

    texts = [sentence() for _ in range(count)]
    public = [sentence() for _ in range(4 * count)]
    return Corpus(texts, [generator.randrange(classes) for _ in texts], public, False)


def word_tokenizer(
    words: Sequence[str],
    *,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    spread: int = 0,
) -> Any:
    """Return a tokenizer of whole words.

    Args:
        words: the vocabulary, in order of their ids.
        before: tokens put before every text; added to the vocabulary where it lacks them.
        after: the same behind it.
        spread: filler words put behind each word of a text.
    """
    listed = set(words)
    extra = list(dict.fromkeys((*SPECIALS, *before, *after, *([FILLER] if spread else []))))
    extra = [word for word in extra if word not in listed]
    vocabulary = {word: i for i, word in enumerate(extra)}
    vocabulary |= {word: len(extra) + i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    if spread:
        made.normalizer = normalizers.Replace(" ", f" {FILLER}" * spread + " ")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=" ".join((*before, "$A", *after)),
            special_tokens=[(token, vocabulary[token]) for token in {*before, *after}],
        )
    return as_shipped(made.to_str())


def as_shipped(text: str) -> Any:
    """Return the tokenizer that an owner makes of a ``tokenizer.json``."""
    about = {"pad_token": PAD, "unk_token": UNKNOWN, "model_max_length": 1 << 20}
    files = {"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(about).encode()}
    return tokenizer_files.unpack(files)


CLASSIFY, LANGUAGE = "sequence-classification", "causal-lm"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


OPT: dict[str, Any] = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "ffn_dim": 64,
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def write_tiny(
    folder: Path,
    tokenizer: Any,
    *,
    task: str = CLASSIFY,
    family: dict[str, Any] = LLAMA,
    width: int = 32,
    layers: int = 2,
    classes: int = 2,
    seed: int = 0,
    **config: Any,
) -> None:
    """Write the checkpoint of a small model with random weights, and its tokenizer.

    Args:
        folder: empty.
        tokenizer: its own; the vocabulary is as large.
        task: what its head does.
        family: its ``config.json``, without the sizes.
        width: d.
        layers: blocks.
        classes: of a classifier.
        seed: of the weights.
        **config: more of its configuration.
    """
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
    }
    content = {**family, **sizes, **config}
    about = {"k": layers - 1, "attention": "eager", "experts": None}
    buildable = {k: v for k, v in content.items() if k != "architectures"}
    shapes = lay_out_whole(buildable, about, AUTO[task], num_labels=classes).state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.3 * torch.randn(t.shape, generator=generator) + (1.0 if t.ndim == 1 else 0.0)
        for name, t in shapes.items()
        if t.is_floating_point()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    about_tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(about_tokens))


def tiny(
    tokenizer: Any,
    *,
    task: str = CLASSIFY,
    classes: int = 2,
    width: int = 32,
    table: Tensor | None = None,
    seed: int = 0,
    **more: Any,
) -> Any:
    """Return a small model with random weights, as it is loaded from its checkpoint.

    Args:
        tokenizer: see :func:`write_tiny`, as the rest.
        task: what its head does.
        classes: of a classifier.
        width: d.
        table: its word embedding (V, width); None: random directions of length 1.
        seed: of the weights.
        **more: see :func:`write_tiny`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder, tokenizer, task=task, classes=classes, width=width, seed=seed, **more)
        made: Any = load(folder, task, num_labels=classes if task == CLASSIFY else None).model
    embedding: Any = probe(made).input_embeddings
    with torch.no_grad():
        rows = directions(len(tokenizer), width, seed) if table is None else table
        embedding.weight.copy_(rows)
    return made.eval()


def directions(rows: int, width: int, seed: int = 0) -> Tensor:
    """Return random unit vectors (rows, width)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=generator)
    unit: Tensor = found / found.norm(dim=1, keepdim=True)
    return unit


def pack(model: Any, k: int, tokenizer: Any) -> tuple[Bundle, Bottom, Top]:
    """Return the bundle that an owner is sent, and both halves for the server."""
    bottom, top = split(model, k, verify=False)
    return pack_bottom(bottom, tokenizer), bottom.eval(), top.eval()


def with_file(bundle: Bundle, name: str, content: bytes) -> Bundle:
    """Return ``bundle`` with one file replaced or added."""
    return Bundle({**bundle.files, name: content})
