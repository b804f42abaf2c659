"""Numerical discovery of a block's layout; see :mod:`fedsplit.models.layout.projections`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.layout.experts import expert_ffn, find_experts

Raw = dict[str, Any]


class _Trace:
    """One forward of the probe model with every linear output of the block made a free variable."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        linears: dict[str, nn.Module],
        tokens: int,
        *,
        scaled: dict[str, Tensor] | None = None,
        free_norm: str | None = None,
    ) -> None:
        self.x: dict[str, Tensor] = {}
        self.y: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.leaf_in: dict[str, Tensor] = {}
        self.leaf_out: dict[str, Tensor] = {}
        self.norm_free: dict[str, Tensor] = {}
        self.block_out: Tensor | None = None
        generator = torch.Generator().manual_seed(7)
        handles = []

        def free(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]:
            def hook(_m: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
                if not isinstance(out, Tensor) or not args:  # a mixture's router
                    return None
                if name in self.y:
                    raise UnsupportedModelError(f"layer={name!r}: used more than once in a block")
                self.x[name], self.raw[name] = args[0], out.detach()
                value = torch.randn(out.shape, generator=generator)
                if scaled and name in scaled:
                    value = value * scaled[name]
                self.y[name] = value.requires_grad_()
                return self.y[name].clone()  # some blocks add to it in place

            return hook

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]:
            def hook(_m: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
                if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                    self.leaf_in[name], self.leaf_out[name] = args[0], out
                    if name == free_norm:
                        self.norm_free[name] = out.detach().clone().requires_grad_()
                        return self.norm_free[name].clone()
                return None

            return hook

        def keep(_m: nn.Module, _a: Any, out: Any) -> None:
            self.block_out = out[0] if isinstance(out, tuple) else out

        for name, layer in linears.items():
            handles.append(layer.register_forward_hook(free(name)))
        for name, leaf in block.named_modules():
            if name and name not in linears and not any(True for _ in leaf.children()):
                handles.append(leaf.register_forward_hook(watch(name)))
        handles.append(block.register_forward_hook(keep))
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        inputs = torch.randn(1, tokens, embedding.weight.shape[1], generator=generator)
        try:
            model(
                inputs_embeds=inputs,
                attention_mask=torch.ones(1, tokens, dtype=torch.long),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its block cannot be probed: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def moved(self, of: Tensor, by: str) -> Tensor | None:
        """Return |d(sum of random weights * of) / d y[by]|, shape of y, or None."""
        if not of.requires_grad:
            return None
        weights = torch.rand(of.shape, generator=torch.Generator().manual_seed(3)) + 0.5
        (grad,) = torch.autograd.grad(
            (of * weights).sum(), [self.y[by]], allow_unused=True, retain_graph=True
        )
        return None if grad is None or not bool(grad.abs().max() > 0) else grad.abs()


def probe_block(model: nn.Module, block: nn.Module, config: Any) -> Raw:
    """Find the roles of a block's linear layers and norms by running it.

    Returns:
        the fields of a ``BlockLayout`` as plain dicts.

    Raises:
        UnsupportedModelError: naming the model type, what was expected and what was found.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linears = {n: m for n, m in block.named_modules() if _is_linear(m)}
    experts = find_experts(block)
    if experts is not None:
        linears[experts] = block.get_submodule(experts)
    used = _Trace(model, block, linears, 3)
    linears = {n: m for n, m in linears.items() if n in used.x}
    feeds = {
        b: {a for a in linears if a != b and used.moved(used.x[b], a) is not None} for b in linears
    }
    consumers = [b for b in linears if feeds[b]]
    mixing = [b for b in consumers if any(_crosses(used, b, a) for a in feeds[b])]
    plain = [b for b in consumers if b not in mixing and feeds[b] - set(mixing)]
    stacked = experts is not None and experts in linears and not plain
    if len(mixing) != 1 or (len(plain) != 1 and not stacked):
        shapes = {n: tuple(p.shape) for n, p in block.named_parameters() if p.dim() >= 2}
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: expected one attention output and one FFN output "
            f"projection made of linear layers, found {mixing} and {plain} among {shapes}"
        )
    o = mixing[0]
    found = _attention(model, block, linears, used, o, feeds[o], config)
    found["o"] = _site(linears, used, o)
    if experts is not None and stacked:
        width = int(used.x[experts].shape[-1])
        found |= expert_ffn(linears[experts], experts, width, str(config.model_type))
    else:
        down = plain[0]
        found |= _ffn(model, block, linears, used, down, feeds[down], config)
        found["down"] = _site(linears, used, down)
    found |= _norms(model, block, linears, used, found, config)
    return found


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = not any(True for _ in module.children())
    return leaf and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _crosses(trace: _Trace, b: str, a: str) -> bool:
    """Return whether b's input at the last position moves with a's output at the first."""
    of = trace.x[b].reshape(trace.y[a].shape[-2], -1)[-1]
    grad = trace.moved(of, a)
    return grad is not None and bool(grad.reshape(-1, grad.shape[-1])[0].max() > 0)


def _site(
    linears: dict[str, nn.Module], trace: _Trace, name: str, rows: list[int] | None = None
) -> Raw:
    layer: Any = linears[name]
    x, y = trace.x[name].detach(), trace.raw[name]
    bias = layer.bias if getattr(layer, "bias", None) is not None else None
    out = y - bias if bias is not None else y
    weight = layer.weight
    straight = weight.shape[1] == x.shape[-1] and weight.shape[0] == y.shape[-1]
    turned = weight.shape[0] == x.shape[-1] and weight.shape[1] == y.shape[-1]
    if straight and torch.allclose(x @ weight.T, out, atol=1e-3, rtol=1e-3):
        transposed = False
    elif turned and torch.allclose(x @ weight, out, atol=1e-3, rtol=1e-3):
        transposed = True
    else:
        raise UnsupportedModelError(f"layer={name!r}: its output is not x W^T + b or x W + b")
    if rows is not None and rows == list(range(y.shape[-1])):
        rows = None
    return {
        "weight": f"{name}.weight",
        "bias": f"{name}.bias" if bias is not None else None,
        "rows": None if rows is None else tuple(rows),
        "transposed": transposed,
    }


def _attention(
    model: nn.Module,
    block: nn.Module,
    linears: dict[str, nn.Module],
    trace: _Trace,
    o: str,
    sources: set[str],
    config: Any,
) -> Raw:
    heads = int(config.num_attention_heads)
    single = _Trace(model, block, linears, 1)
    passed = single.x[o].detach().flatten()  # (H*D,)
    kind = config.model_type
    if passed.numel() % heads:
        raise UnsupportedModelError(
            f"model_type={kind!r}: {heads} heads do not divide {passed.numel()}"
        )
    dim = passed.numel() // heads
    v_of: list[tuple[str, int]] = []
    lookup = {v: (a, i) for a in sources for i, v in enumerate(single.y[a].flatten().tolist())}
    for value in passed.tolist():
        if value not in lookup:
            raise UnsupportedModelError(
                f"model_type={kind!r}: with one token the attention's output is not its values"
            )
        v_of.append(lookup[value])
    v_names = {a for a, _ in v_of}
    if len(v_names) != 1:
        raise UnsupportedModelError(f"model_type={kind!r}: values come from {sorted(v_names)}")
    v_name = v_names.pop()
    v_rows = list(dict.fromkeys(i for _, i in v_of))
    groups = len(v_rows) // dim
    place = {row: n for n, row in enumerate(v_rows)}
    kv_of_head = tuple(place[v_of[h * dim][1]] // dim for h in range(heads))
    whole = [place[i] for _, i in v_of]
    if groups * dim != len(v_rows) or whole != [
        g * dim + j for g in kv_of_head for j in range(dim)
    ]:
        raise UnsupportedModelError(f"model_type={kind!r}: values are not grouped by head")
    q_sites, k_sites = [], []
    mixed = trace.x[o].reshape(3, heads, dim)  # (T, H, D)
    for head in range(heads):
        q_rows, k_rows = [], []
        for name in sorted(sources):
            grad = trace.moved(mixed[-1, head], name)
            if grad is None:
                continue
            grad = grad.reshape(3, -1)
            values = set(v_rows) if name == v_name else set()
            early = {int(i) for i in grad[0].nonzero().flatten()} - values
            late = {int(i) for i in grad[-1].nonzero().flatten()} - values - early
            k_rows += [(name, i) for i in sorted(early)]
            q_rows += [(name, i) for i in sorted(late)]
        q_sites.append(q_rows)
        k_sites.append(k_rows)
    q_name, q_index = _collect(q_sites, heads, dim, "queries", kind)
    by_group: dict[int, list[tuple[str, int]]] = {}
    for head, rows in enumerate(k_sites):
        if by_group.setdefault(kv_of_head[head], rows) != rows:
            raise UnsupportedModelError(f"model_type={kind!r}: keys and values group differently")
    k_name, k_index = _collect([by_group[g] for g in range(groups)], groups, dim, "keys", kind)
    return {
        "q": _site(linears, trace, q_name, q_index),
        "k": _site(linears, trace, k_name, k_index),
        "v": _site(linears, trace, v_name, v_rows),
        "heads": heads,
        "kv_heads": groups,
        "head_dim": dim,
        "kv_of_head": kv_of_head,
        "names": {"q": q_name, "k": k_name, "v": v_name, "o": o},
    }


def _collect(
    per_head: list[list[tuple[str, int]]], heads: int, dim: int, what: str, kind: str
) -> tuple[str, list[int]]:
    """Join per-head rows; a norm over all heads makes every head depend on every row."""
    names = {name for rows in per_head for name, _ in rows}
    if len(names) != 1:
        raise UnsupportedModelError(f"model_type={kind!r}: {what} come from {sorted(names)}")
    flat = [i for rows in per_head for _, i in rows]
    if len(flat) != heads * dim and all(len(r) == heads * dim for r in per_head):
        flat = [i for _, i in per_head[0]]
    if len(flat) != heads * dim or len(set(flat)) != len(flat):
        raise UnsupportedModelError(
            f"model_type={kind!r}: {what} use {len(set(flat))} rows, must be {heads * dim}"
        )
    return names.pop(), flat


def _ffn(
    model: nn.Module,
    block: nn.Module,
    linears: dict[str, nn.Module],
    trace: _Trace,
    down: str,
    sources: set[str],
    config: Any,
) -> Raw:
    hidden = trace.x[down].shape[-1]
    names = sorted(sources)
    widths = {n: trace.y[n].shape[-1] for n in names}

    def doubled(scaled: dict[str, Tensor]) -> bool:
        other = _Trace(model, block, linears, 3, scaled=scaled)
        return torch.allclose(
            other.x[down].detach(), 2 * trace.x[down].detach(), rtol=1e-3, atol=1e-5
        )

    if len(names) == 1 and widths[names[0]] == hidden:
        return {"up": _site(linears, trace, names[0]), "gate": None, "ffn_name": names[0]}
    if len(names) == 2 and all(w == hidden for w in widths.values()):
        for up, gate in (names, names[::-1]):
            if doubled({up: torch.tensor(2.0)}):
                return {
                    "up": _site(linears, trace, up),
                    "gate": _site(linears, trace, gate),
                    "ffn_name": up,
                }
    if len(names) == 1 and widths[names[0]] == 2 * hidden:
        halves = [list(range(hidden)), list(range(hidden, 2 * hidden))]
        strides = [list(range(0, 2 * hidden, 2)), list(range(1, 2 * hidden, 2))]
        for first, second in (halves, strides):
            for up_rows, gate_rows in ((first, second), (second, first)):
                scale = torch.ones(2 * hidden)
                scale[up_rows] = 2.0
                if doubled({names[0]: scale}):
                    return {
                        "up": _site(linears, trace, names[0], up_rows),
                        "gate": _site(linears, trace, names[0], gate_rows),
                        "ffn_name": names[0],
                    }
    raise UnsupportedModelError(
        f"model_type={config.model_type!r}: FFN of {hidden} units fed by {widths}"
    )


def _norms(
    model: nn.Module,
    block: nn.Module,
    linears: dict[str, nn.Module],
    trace: _Trace,
    found: Raw,
    config: Any,
) -> Raw:
    names = found.pop("names")
    ffn = found.pop("ffn_name")
    modules = dict(block.named_modules())
    fitted = {
        n: fit
        for n in trace.leaf_in
        if (fit := _fit_norm(n, modules[n], trace.leaf_in[n], trace.leaf_out[n])) is not None
    }
    out: Raw = {}
    for role, layer in (("attn_norm", names["q"]), ("ffn_norm", ffn)):
        out[role] = None
        x = trace.x[layer].reshape(3, -1)
        for name, fit in fitted.items():
            y = trace.leaf_out[name]
            if y.numel() != x.numel() or not torch.equal(y.detach().reshape(3, -1), x.detach()):
                continue
            free = _Trace(model, block, linears, 3, free_norm=name)
            (grad,) = torch.autograd.grad(
                _summed(free.block_out), [free.norm_free[name]], allow_unused=True
            )
            if grad is None or not bool(grad.abs().max() > 0):  # feeds projections only: pre-norm
                out[role] = fit
    inner: dict[str, list[Raw]] = {"q": [], "k": []}
    for name, fit in fitted.items():
        moved = {r: trace.moved(trace.leaf_in[name], names[r]) is not None for r in ("q", "k")}
        if names["q"] == names["k"]:
            index = {r: torch.tensor(found[r]["rows"]) for r in ("q", "k")}
            by = trace.moved(trace.leaf_in[name], names["q"])
            moved = {r: by is not None and bool((by[..., index[r]] > 0).any()) for r in index}
        for role in ("q", "k"):
            if moved[role] and trace.moved(trace.leaf_in[name], names["o"]) is None:
                inner[role].append(fit)
    for role, fits in inner.items():
        if len(fits) > 1:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r}: {len(fits)} norms on {role}, at most 1"
            )
        out[f"{role}_norm"] = fits[0] if fits else None
    return out


def _summed(out: Tensor | None) -> Tensor:
    assert out is not None
    return (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum()


def _fit_norm(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Raw | None:
    """Fit y = xhat * (offset + weight) + bias for both kinds of norm, or None."""
    if x.shape != y.shape or x.shape[-1] < 2:
        return None
    with torch.no_grad():
        weight: Any = getattr(module, "weight", None)
        bias: Any = getattr(module, "bias", None)
        hats = {
            "rms": x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
            "layer": (x - x.mean(-1, keepdim=True))
            * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True)),
        }
        for kind, hat in hats.items():
            for offset in (0.0, 1.0):
                if isinstance(weight, Tensor) and weight.shape != x.shape[-1:]:
                    return None
                fit = hat * (offset + weight) if isinstance(weight, Tensor) else hat
                fit = fit + bias if isinstance(bias, Tensor) else fit
                if torch.allclose(fit, y, rtol=5e-3, atol=5e-3):
                    return {
                        "kind": kind,
                        "weight": f"{name}.weight" if isinstance(weight, Tensor) else None,
                        "bias": f"{name}.bias" if isinstance(bias, Tensor) else None,
                        "offset": offset if isinstance(weight, Tensor) else 0.0,
                    }
    return None
