"""Writing projections back into a live model: the tool of the evasion suite."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import ModelError
from fedsplit.models.layout.projections import (
    BlockLayout,
    NormSite,
    Site,
    block_prefixes,
    layout_of,
)


class Editor:
    """Reads and writes a model's unfolded projections, (out, in), in place.

    Args:
        model: a live model without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = cast(Any, model).config
        self.layout: BlockLayout = layout_of(self.config)
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.prefixes = block_prefixes(self.layout, self.parameters)
        self.width = int(self.config.get_text_config().hidden_size)

    def site(self, role: str) -> Site:
        """Return where a projection lives."""
        found: Site | None = getattr(self.layout, role)
        if found is None:
            raise ModelError(f"projection={role!r}: this model has none")
        return found

    def weight(self, prefix: str, role: str) -> Tensor:
        """Return a copy of the (out, in) weight in float64."""
        site = self.site(role)
        stored = self.parameters[prefix + site.weight].detach().double()
        out = stored.T if site.transposed else stored
        return out[list(site.rows)] if site.rows is not None else out.clone()

    def bias(self, prefix: str, role: str) -> Tensor | None:
        """Return a copy of the bias in float64, or None."""
        site = self.site(role)
        if site.bias is None:
            return None
        stored = self.parameters[prefix + site.bias].detach().double()
        return stored[list(site.rows)] if site.rows is not None else stored.clone()

    def write(self, prefix: str, role: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Overwrite the weight, and the bias if given.

        Raises:
            ModelError: if a bias is given to a projection that has none.
        """
        site = self.site(role)
        with torch.no_grad():
            parameter = self.parameters[prefix + site.weight]
            view = parameter.T if site.transposed else parameter
            rows: Any = list(site.rows) if site.rows is not None else slice(None)
            view[rows] = weight.to(parameter.dtype)
            if bias is not None:
                if site.bias is None:
                    raise ModelError(f"projection={role!r}: has no bias to write to")
                stored = self.parameters[prefix + site.bias]
                stored[rows] = bias.to(stored.dtype)

    def apply_rows(self, prefix: str, role: str, matrix: Tensor) -> None:
        """Apply W <- M W and b <- M b."""
        bias = self.bias(prefix, role)
        self.write(
            prefix,
            role,
            matrix @ self.weight(prefix, role),
            None if bias is None else matrix @ bias,
        )

    def apply_columns(self, prefix: str, role: str, matrix: Tensor) -> None:
        """Apply W <- W M."""
        self.write(prefix, role, self.weight(prefix, role) @ matrix)

    def norm(self, prefix: str, norm: NormSite) -> tuple[Tensor, Tensor | None]:
        """Return the norm's effective gain and its bias, float64."""
        if norm.weight is None:
            raise ModelError("norm: has no weight to move scale into")
        gain = norm.offset + self.parameters[prefix + norm.weight].detach().double()
        bias = None
        if norm.bias is not None:
            bias = self.parameters[prefix + norm.bias].detach().double()
        return gain, bias

    def write_norm(
        self, prefix: str, norm: NormSite, gain: Tensor, bias: Tensor | None = None
    ) -> None:
        """Set the norm's effective gain, and its bias if given."""
        with torch.no_grad():
            if norm.weight is not None:
                stored = self.parameters[prefix + norm.weight]
                stored.copy_(gain - norm.offset)
            if bias is not None and norm.bias is not None:
                self.parameters[prefix + norm.bias].copy_(bias)

    def norms(self) -> list[tuple[NormSite, tuple[str, ...]]]:
        """Return the pre-norms and the projections each feeds."""
        layout, gated = self.layout, self.layout.gate is not None
        attention: tuple[str, ...] = ("q", "k", "v")
        ffn: tuple[str, ...] = ("up", "gate") if gated else ("up",)
        if layout.attn_norm is not None and layout.attn_norm == layout.ffn_norm:
            return [(layout.attn_norm, attention + ffn)]
        pairs = [(layout.attn_norm, attention), (layout.ffn_norm, ffn)]
        return [(norm, roles) for norm, roles in pairs if norm is not None]

    def outside(self) -> dict[str, Tensor]:
        """Return the parameters that belong to no block."""
        return {
            n: p
            for n, p in self.parameters.items()
            if not any(n.startswith(prefix) for prefix in self.prefixes)
        }

    def is_bias_of_linear(self, name: str) -> bool:
        """Return whether a vector is the bias of a layer with a weight matrix."""
        owner, _, leaf = name.rpartition(".")
        weight = getattr(self.model.get_submodule(owner), "weight", None)
        return leaf == "bias" and isinstance(weight, Tensor) and weight.dim() == 2
