"""Each text's representation, computed on that text alone.

What an owner adds noise to must be a function of the text and of nothing else: two sends of a text
whose representation depends on its batch, on padding or on earlier texts differ by exactly what
the noise should hide.  Every function here gives the same bits for a text in whatever order and
company it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.anatomy import text_config
from fedsplit.models.splitting.halves import Bottom

# Rotary frequencies that change with the length of the sequence, or remember the longest one.
CHANGING_ROPE = ("dynamic", "longrope")
# Keys of experts that drop what is over their capacity, which other texts fill.
CAPACITY = ("expert_capacity", "capacity_factor", "moe_capacity_factor", "moe_token_dropping")


def represent(bottom: nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return each text's hidden states, a list of (T_i, d) with their graph where there is one.

    Args:
        bottom: (input_ids (B, T), attention_mask (B, T)) -> (B, T, d), in evaluation mode.
        texts: token ids (T_i,), without padding.
    """
    if _row_by_row(bottom) and len(texts) > 1:
        lengths = [len(ids) for ids in texts]
        padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)  # (B, T)
        mask = (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).long()
        hidden = bottom(padded, mask)
        return [hidden[row, :length] for row, length in enumerate(lengths)]
    return [bottom(ids[None], torch.ones_like(ids)[None])[0] for ids in texts]


def _row_by_row(bottom: nn.Module) -> bool:
    """Return whether every row of the output is computed from its own token and place alone.

    Tables and layer norms work row by row, in an order of operations that no other row changes.
    A matrix product does not: its kernel, and so its rounding, depends on the number of rows.
    """
    if not isinstance(bottom, Bottom) or bottom.k:
        return False
    owners = [m for m in bottom.modules() if next(m.parameters(recurse=False), None) is not None]
    return all(isinstance(m, nn.Embedding) or type(m) is nn.LayerNorm for m in owners)


def check_alone(bottom: Bottom) -> None:
    """Refuse a bottom whose output for a text depends on more than that text.

    The configuration is searched for settings that are known to do so, and the bottom is run on
    public inputs: a short text before and after a longer one must give the same bits, and no
    buffer may change.

    Raises:
        UnsupportedModelError: names the setting, or what changed.
    """
    if bottom.k:
        for name, value in _settings(text_config(bottom.model).to_dict()):
            if name in ("rope_type", "type") and value in CHANGING_ROPE:
                raise UnsupportedModelError(
                    f"{name}={value!r}: rotary frequencies must not change with the length of a "
                    "sequence (a representation must depend on its own text alone)"
                )
            if name in CAPACITY and value not in (None, False, 0):
                raise UnsupportedModelError(
                    f"{name}={value!r}: experts must not have a capacity that other texts fill"
                )
    ids = (torch.arange(24) * 5 + 3) % bottom.vocab  # (24,)
    before = {name: buffer.clone() for name, buffer in bottom.named_buffers()}
    with torch.no_grad():
        try:
            first = bottom(ids[None, :3])
            bottom(ids[None].repeat(2, 1))
        except (IndexError, RuntimeError):  # a shorter table of positions than the longer text
            first = bottom(ids[None, :3])
        again = bottom(ids[None, :3])
    after = dict(bottom.named_buffers())
    moved = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
    if moved or not torch.equal(first, again):
        raise UnsupportedModelError(
            f"{type(bottom.model).__name__}: its output for a text changes with earlier texts"
            + (f" (buffer {moved[0]})" if moved else "")
        )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of a configuration, nested ones too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value)
        else:
            yield str(name), value
