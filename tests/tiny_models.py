"""Tiny pretrained-like models and data sets on disk, made in fixtures; nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def random_model(
    config: Any,
    auto: Any = AutoModelForCausalLM,
    *,
    seed: int = 0,
    matrices: float = 0.1,
    vectors: float = 0.1,
    **options: Any,
) -> Any:
    """Return a random model in evaluation mode, its weights drawn far from their start.

    Biases and norms start at 0 and 1, so a wrongly moved one would not be seen.

    Args:
        config: of transformers.
        auto: the class that builds the model from it.
        seed: of the weights; the global generator stays as it was.
        matrices: standard deviation of what is added to matrices.
        vectors: the same for vectors.
        **options: of ``from_config``.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config, **options)
        for parameter in model.parameters():
            scale = vectors if parameter.dim() == 1 else matrices
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer with BERT's special tokens."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def save_tiny_bert(folder: Path, seed: int = 0, classes: int = 3, positions: int = 40) -> Path:
    """Write a 3-block BERT classifier's base with random weights and no dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.15,
        num_labels=classes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tiny_llama(folder: Path, seed: int = 0, layers: int = 3, width: int = 32) -> Path:
    """Write a small LLaMA language model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_texts(path: Path, rows: int, seed: int = 0, classes: int = 3) -> Path:
    """Write JSON lines whose label shows in the words, with a `writer` column of 5 writers."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for row in range(rows):
            label = generator.randrange(classes)
            own = WORDS[10 * label : 10 * label + 10]
            words = [
                generator.choice(own if generator.random() < 0.5 else WORDS)
                for _ in range(generator.randint(4, 12))
            ]
            line = {"text": " ".join(words), "label": label, "writer": f"p{row % 5}"}
            file.write(json.dumps(line) + "\n")
    return path
