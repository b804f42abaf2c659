"""Views of models on disk: safetensors only, sharded or not, one tensor in memory at a time.

A tensor is mapped when it is asked for and unmapped when it is let go; embedding rows are read row
by row.  Corrected ICS of a model therefore touches two blocks and K rows, whatever its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.errors import ModelError
from fedsplit.fingerprints.view import WeightView
from fedsplit.models.layout.probe_model import probed_size
from fedsplit.models.layout.projections import layout_of, read_config
from fedsplit.models.shards import TensorFiles, weight_files

_PLAY = 1 << 22  # position tables and other parts that a checkpoint may leave out
_EXPERT = re.compile(
    r"(?P<block>.*)\.(?:mlp|block_sparse_moe)\.experts\.(?P<index>\d+)\.(?P<role>\w+)\.weight"
)
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}
_ROLES |= {"w2": "down", "down_proj": "down"}


class ExpertFiles(TensorFiles):
    """Files that keep each expert by itself, read under the stacked names that models use.

    ``mlp.experts.gate_up_proj`` is (E, 2I, d), gate before up, and ``mlp.experts.down_proj``
    (E, d, I); the tensors they are made of are no longer listed.  Mixtral's router moves with them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self.parts: dict[str, list[list[str]]] = {}
        found: dict[str, dict[tuple[int, str], str]] = {}
        for name in list(self.shapes):
            match = _EXPERT.fullmatch(name)
            if match and match["role"] in _ROLES:
                key = (int(match["index"]), _ROLES[match["role"]])
                found.setdefault(match["block"], {})[key] = name
        for block, names in found.items():
            count = 1 + max(index for index, _ in names)
            for stacked, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                whole = f"{block}.mlp.experts.{stacked}"
                keys = [[(index, role) for role in roles] for index in range(count)]
                missing = [k for expert in keys for k in expert if k not in names]
                if missing:
                    raise ModelError(f"{block}: expert {missing[0][0]} has no {missing[0][1]!r}")
                self.parts[whole] = [[names[k] for k in expert] for expert in keys]
                first = [self.shapes[n] for n in self.parts[whole][0]]
                self.shapes[whole] = (count, sum(s[0] for s in first), first[0][1])
        self.routers = {
            name.replace(".block_sparse_moe.", ".mlp."): name
            for name in self.shapes
            if ".block_sparse_moe.gate." in name
        }
        for name, old in self.routers.items():
            self.shapes[name] = self.shapes.pop(old)
        for experts in self.parts.values():
            for name in (n for expert in experts for n in expert):
                self.shapes.pop(name, None)

    def get(self, name: str) -> Tensor:
        """Return one tensor, or one stacked from its experts'."""
        if name not in self.parts:
            return super().get(self.routers.get(name, name))
        get = super().get
        try:
            return torch.stack([torch.cat([get(n) for n in expert]) for expert in self.parts[name]])
        except RuntimeError as error:
            raise ModelError(f"{name}: its experts do not fit each other: {error}") from error


def open_view(directory: str | Path) -> WeightView:
    """View a model directory (config.json and safetensors) without loading it.

    Raises:
        ModelError: for missing or damaged files.
        UnsupportedModelError: for architectures that cannot be probed.
    """
    path = Path(directory)
    config, names = read_config(path), weight_files(path)
    # One block is made to look at: a small file that tells of a huge one must not get the memory.
    held = sum(math.prod(shape) for shape in TensorFiles(names).shapes.values())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if (told := probed_size(text)) > 2 * held + _PLAY:
        raise ModelError(f"{path}: config.json tells of {told} parameters, the files hold {held}")
    layout = layout_of(config)
    stacked = len(layout.shapes[layout.down.weight]) == 3
    files = (ExpertFiles if stacked else TensorFiles)(names)
    return WeightView(layout, files.shapes, files.get, get_rows=files.rows)
