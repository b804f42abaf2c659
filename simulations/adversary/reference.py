"""What the first version let a lying server read, by case and variant.

Measured with ``python -m simulations run adversary`` on that version's owner code
(:data:`COMMIT`), with SST-2's sentences.
"""

from __future__ import annotations

COMMIT = "8fc59d2"

# (case, variant) -> share read
BEFORE: dict[tuple[int, str], float] = {}
