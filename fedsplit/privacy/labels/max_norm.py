"""The max-norm heuristic against the norm attack (Li et al., ICLR 2022, arXiv 2102.08504, 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig
from fedsplit.privacy.labels.base import LabelProtection, check_gradients
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class MaxNorm(LabelProtection):
    """Protection that scales each gradient by 1 + s e, e ~ N(0, 1), to the batch's largest norm.

    s_j^2 = ||g_max||^2 / ||g_j||^2 - 1, hence E||g~_j||^2 = ||g_max||^2 for every j and E g~_j =
    g_j.  Any number of classes; no parameter.

    Guarantee:
        None: a heuristic that makes expected squared norms equal.  A gradient about as long as the
        longest keeps its direction, so in two-class problems the sign of the longest stays
        readable; short ones lose their sign with probability approaching 1/2.  The batch's largest
        norm is shown.
    """

    name: ClassVar[str] = "max-norm"

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> MaxNorm:
        return cls()

    def guarantee(self) -> str:
        return "heuristic without a guarantee: expected gradient norms are equal within a batch"

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        check_gradients(rows, labels)
        values = rows.to(torch.float64)
        squared = values.square().sum(1)  # (N,)
        ratio = squared.max() / squared.clamp_min(torch.finfo(torch.float64).tiny)
        deviation = (ratio - 1.0).clamp_min(0.0).sqrt()  # (N,)
        draw = torch.from_numpy(stream.normal(len(rows)))
        # A row that is exactly zero has no direction to hide along, and stays zero.
        factor = torch.where(squared > 0, 1.0 + deviation * draw, 0.0)
        return (values * factor[:, None]).to(rows.dtype)
