"""Seeds for everything that should be the same twice.

One root seed gives an independent stream to each purpose, named by labels, so adding a consumer
never shifts the numbers of another.  Nothing here may feed a privacy mechanism outside simulations:
noise comes from :mod:`fedsplit.privacy.secret`.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(root: int, *labels: str | int) -> int:
    """Return a 63-bit seed for the purpose named by ``labels``, independent across purposes."""
    text = "\x1f".join([str(int(root)), *(f"{type(x).__name__}:{x}" for x in labels)])
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"fedsplit-seed").digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(root: int, *labels: str | int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` seeded for the purpose named by ``labels``."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(root, *labels))
    return generator


def numpy_generator(root: int, *labels: str | int) -> np.random.Generator:
    """Return a NumPy generator seeded for the purpose named by ``labels``."""
    return np.random.default_rng(derive_seed(root, *labels))
