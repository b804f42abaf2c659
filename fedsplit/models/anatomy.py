"""Where a model keeps its blocks, its embeddings and its head: probed, never looked up by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedsplit.errors import UnsupportedModelError


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, as found by :func:`probe`.

    Attributes:
        blocks: the ``num_layers`` transformer blocks, in the order in which they run.
        blocks_path: dotted name of ``blocks`` inside the probed model (``"model.layers"``).
        base: the module that owns ``blocks`` as an attribute.
        input_embeddings: the token embedding (in a top: the stub in its place).
        output_embeddings: the language-modelling head, or None.
        num_layers: number of blocks.
        hidden_size: width d of what travels between blocks.
        tied: whether the head's matrix is the same tensor as the token embedding's.
    """

    blocks: nn.ModuleList
    blocks_path: str
    base: nn.Module
    input_embeddings: nn.Module
    output_embeddings: nn.Module | None
    num_layers: int
    hidden_size: int
    tied: bool


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the text part (the configuration itself for a text model)."""
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def probe(model: PreTrainedModel) -> Anatomy:
    """Locate the blocks, embeddings and head of ``model``.

    The blocks are the one outermost ``nn.ModuleList`` of length
    ``config.get_text_config().num_hidden_layers``.

    Raises:
        UnsupportedModelError: if the model is an encoder-decoder, or there is not exactly one such
            list, or no token embedding; says what was looked for and lists every ModuleList found.
    """
    config = text_config(model)
    wanted = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = ", ".join(f"{n}[{len(m)}]" for n, m in lists) or "none"
    who = f"{type(model).__name__} (model_type={config.model_type!r})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{who}: looked for one stack of blocks, but it is an encoder-decoder; "
            f"ModuleLists found: {found}"
        )
    if not isinstance(wanted, int) or not isinstance(width, int):
        raise UnsupportedModelError(
            f"{who}: looked for num_hidden_layers and hidden_size in its config, "
            f"found {wanted!r} and {width!r}; ModuleLists found: {found}"
        )
    matches = [(n, m) for n, m in lists if len(m) == wanted]
    # A list inside a block (experts, say) may happen to have the same length: outermost ones count.
    matches = [(n, m) for n, m in matches if not any(n.startswith(o + ".") for o, _ in matches)]
    if len(matches) != 1:
        raise UnsupportedModelError(
            f"{who}: looked for exactly one nn.ModuleList of length num_hidden_layers={wanted}, "
            f"found {len(matches)}; ModuleLists found: {found}"
        )
    path, blocks = matches[0]
    try:
        inputs = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        inputs = None
    if inputs is None:
        raise UnsupportedModelError(
            f"{who}: looked for a token embedding, but get_input_embeddings() gives none"
        )
    try:
        outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except (NotImplementedError, AttributeError):
        outputs = None
    matrix = getattr(outputs, "weight", None)
    return Anatomy(
        blocks=blocks,
        blocks_path=path,
        base=model.get_submodule(path.rpartition(".")[0]),
        input_embeddings=inputs,
        output_embeddings=outputs,
        num_layers=wanted,
        hidden_size=width,
        tied=matrix is not None and matrix is getattr(inputs, "weight", None),
    )
