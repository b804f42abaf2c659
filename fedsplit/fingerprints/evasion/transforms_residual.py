"""Maps of the residual stream: every parameter that touches it changes together."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError
from fedsplit.fingerprints.evasion.editor import Editor

READS = ("q", "k", "v", "up", "gate")
WRITES = ("o", "down")


def _kind(editor: Editor) -> str:
    """Return "layer", "rms" or "post": what the norms before the projections do."""
    norm = editor.layout.attn_norm or editor.layout.ffn_norm
    return norm.kind if norm is not None else "post"


def _move_blocks(editor: Editor, matrix: Tensor) -> None:
    """Let blocks read x M instead of x and write y M instead of y (M orthogonal, (d, d))."""
    touched = editor.layout.needed() | editor.layout.optional
    for prefix in editor.prefixes:
        _move_projections(editor, prefix, matrix)
        for name, parameter in editor.parameters.items():
            if name.startswith(prefix) and name[len(prefix) :] not in touched:
                _move_vector(editor, name, parameter, matrix)
        for norm, _ in editor.norms():
            for part in (norm.weight, norm.bias):
                if part is not None:
                    _move_vector(editor, prefix + part, editor.parameters[prefix + part], matrix)


def _move_projections(editor: Editor, prefix: str, matrix: Tensor) -> None:
    for role in READS:
        if getattr(editor.layout, role) is not None:
            editor.apply_columns(prefix, role, matrix)
    for role in WRITES:
        editor.apply_rows(prefix, role, matrix.T)


def _move_vector(editor: Editor, name: str, parameter: Tensor, matrix: Tensor) -> None:
    if parameter.dim() != 1 or parameter.shape[0] != editor.width:
        raise UnsupportedModelError(
            f"parameter={name!r}: shape {tuple(parameter.shape)}; do not know how it meets the "
            f"residual stream"
        )
    if name.endswith("weight") and bool((matrix < 0).any()):
        matrix = matrix.abs()  # a gain follows a signed permutation without the signs
    with torch.no_grad():
        parameter.copy_(parameter.double() @ matrix)


def _move_outside(editor: Editor, matrix: Tensor) -> None:
    """Rotate embeddings, final norm and heads: the residual is a matrix's last axis."""
    for name, parameter in editor.outside().items():
        if parameter.dim() == 2 and parameter.shape[1] == editor.width:
            with torch.no_grad():
                parameter.copy_(parameter.double() @ matrix)
        elif parameter.dim() == 1 and editor.is_bias_of_linear(name):
            continue
        elif parameter.dim() == 1 and parameter.shape[0] == editor.width:
            _move_vector(editor, name, parameter, matrix)
        elif editor.width in parameter.shape:
            raise UnsupportedModelError(
                f"parameter={name!r}: shape {tuple(parameter.shape)}; do not know how it meets "
                f"the residual stream"
            )


def embedding_permutation(editor: Editor, generator: torch.Generator) -> None:
    """Permute the residual dimensions everywhere."""
    order = torch.randperm(editor.width, generator=generator)
    matrix = torch.eye(editor.width, dtype=torch.float64)[order]
    _move_blocks(editor, matrix)
    _move_outside(editor, matrix)


def sign_flips(editor: Editor, generator: torch.Generator) -> None:
    """Permute the residual dimensions and flip half of their signs (RMS norms only)."""
    if _kind(editor) != "rms":
        raise UnsupportedModelError("sign flips: the norms remove the mean, or follow the sum")
    order = torch.randperm(editor.width, generator=generator)
    signs = torch.where(torch.rand(editor.width, generator=generator) < 0.5, -1.0, 1.0).double()
    matrix = torch.eye(editor.width, dtype=torch.float64)[order] * signs
    _move_blocks(editor, matrix)
    _move_outside(editor, matrix)


def rotation(editor: Editor, generator: torch.Generator) -> None:
    """Rotate the residual stream by a random orthogonal matrix, norms folded in first.

    Under mean-removing norms the rotation keeps the all-ones direction.  A tied head is untied.
    """
    kind = _kind(editor)
    if kind == "post":
        raise UnsupportedModelError("rotation: norms follow the sum and cannot be folded")
    for prefix in editor.prefixes:
        for norm, roles in editor.norms():
            if norm.weight is None:
                continue
            gain, bias = editor.norm(prefix, norm)
            for role in roles:
                editor.write(prefix, role, editor.weight(prefix, role) * gain)
            editor.write_norm(
                prefix, norm, torch.ones_like(gain), None if bias is None else bias / gain
            )
    _fold_final(editor)
    matrix = _orthogonal(editor.width, generator, keep_ones=kind == "layer")
    _move_rotated(editor, matrix)


def _untied_head(editor: Editor) -> Any:
    """Return the head, with a matrix of its own, or None where there is none."""
    model = cast(Any, editor.model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        editor.parameters = dict(editor.model.named_parameters())
    return head


def _fold_final(editor: Editor) -> None:
    """Untie the head if needed and fold the final norm into it."""
    head = _untied_head(editor)
    if head is None:
        raise UnsupportedModelError("rotation: the model has no head to fold the last norm into")
    offset = (editor.layout.ffn_norm or editor.layout.attn_norm).offset  # type: ignore[union-attr]
    for name, parameter in editor.outside().items():
        if parameter.dim() != 1 or editor.is_bias_of_linear(name) or not name.endswith("weight"):
            continue
        if parameter.shape[0] != editor.width or "emb" in name:
            raise UnsupportedModelError(f"parameter={name!r}: an embedding norm cannot be folded")
        gain = offset + parameter.detach().double()
        bias = editor.parameters.get(name.removesuffix("weight") + "bias")
        with torch.no_grad():
            head.weight.copy_(head.weight.double() * gain)
            parameter.fill_(1.0 - offset)
            if bias is not None:
                bias.copy_(bias.double() / gain)


def _move_rotated(editor: Editor, matrix: Tensor) -> None:
    """Rotate like the permutation, but gains are all one by now and stay."""
    for prefix in editor.prefixes:
        _move_projections(editor, prefix, matrix)
        for norm, _ in editor.norms():
            if norm.bias is not None:
                bias = editor.parameters[prefix + norm.bias]
                with torch.no_grad():
                    bias.copy_(bias.double() @ matrix)
    for name, parameter in editor.outside().items():
        vector = parameter.dim() == 1 and name.endswith("bias")
        if (vector and not editor.is_bias_of_linear(name)) or parameter.dim() == 2:
            with torch.no_grad():
                parameter.copy_(parameter.double() @ matrix)


def _orthogonal(size: int, generator: torch.Generator, *, keep_ones: bool) -> Tensor:
    if not keep_ones:
        raw = torch.randn(size, size, generator=generator, dtype=torch.float64)
        free: Tensor = torch.linalg.qr(raw)[0]
        return free
    raw = torch.randn(size, size - 1, generator=generator, dtype=torch.float64)
    ones = torch.ones(size, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, raw], 1))[0]  # first column is +-1/sqrt(d)
    inner = torch.linalg.qr(
        torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
    )[0]
    turn = torch.eye(size, dtype=torch.float64)
    turn[1:, 1:] = inner
    kept: Tensor = basis @ turn @ basis.T
    return kept


def residual_scaling(editor: Editor, generator: torch.Generator) -> None:
    """Scale everything that writes to the stream, and the norms' eps with its square."""
    if _kind(editor) == "post" or editor.layout.attn_norm is None:
        raise UnsupportedModelError("residual scaling: norms follow the sum")
    scale = 1.5 + float(torch.rand(1, generator=generator))
    head = _untied_head(editor)
    for prefix in editor.prefixes:
        for role in WRITES:
            editor.apply_rows(prefix, role, torch.eye(editor.width, dtype=torch.float64) * scale)
    with torch.no_grad():
        for parameter in editor.outside().values():
            if parameter.dim() == 2 and (head is None or parameter is not head.weight):
                parameter.mul_(scale)
    _scale_eps(editor, scale**2)


def _scale_eps(editor: Editor, factor: float) -> None:
    """Multiply the eps of every norm that reads the stream, and the configuration's."""
    names = [p + n.weight for p in editor.prefixes for n, _ in editor.norms() if n.weight]
    names += [n for n, p in editor.outside().items() if p.dim() == 1 and n.endswith(".weight")]
    holders: list[Any] = [editor.model.get_submodule(n.rpartition(".")[0]) for n in names]
    for holder in [*holders, editor.config.get_text_config()]:
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and name.endswith(("eps", "epsilon")):
                setattr(holder, name, value * factor)


def mean_injection(editor: Editor, generator: torch.Generator) -> None:
    """Add a multiple of the all-ones direction to every row that reads a mean-removed stream."""
    if _kind(editor) != "layer":
        raise UnsupportedModelError("mean injection: the norms do not remove the mean")
    for prefix in editor.prefixes:
        for norm, roles in editor.norms():
            gain = bias = torch.ones(editor.width, dtype=torch.float64)
            if norm.weight is not None:
                found, shift = editor.norm(prefix, norm)
                gain, bias = found, shift if shift is not None else torch.zeros_like(found)
            for role in roles:
                own = editor.bias(prefix, role)
                if own is None:
                    raise UnsupportedModelError(f"mean injection: {role} has no bias to balance it")
                weight = editor.weight(prefix, role)
                add = (
                    0.3
                    * weight.std()
                    * torch.randn(weight.shape[0], generator=generator, dtype=torch.float64)
                )
                editor.write(
                    prefix,
                    role,
                    weight + add[:, None] / gain[None],
                    own - add * float((bias / gain).sum()),
                )
