"""What the first version let a lying server read, by case and variant.

Measured by these cases on that version's owner code (:data:`COMMIT`), one run, with SST-2's
sentences where a case takes real ones; "contextual" is that version's attack.
"""

from __future__ import annotations

COMMIT = "8fc59d2"

# (case, variant) -> share read
BEFORE: dict[tuple[int, str], float] = {
    (1, "width of the batch"): 0.836,
    (1, "order of single texts"): 0.828,
    (2, "dchi"): 1.0,
    (2, "nearest-token"): 1.0,
    (2, "pac"): 1.0,
    (2, "gaussian"): 1.0,
    (2, "wide vectors"): 0.977,
    (3, "ratio 2, nearest"): 0.998,
    (3, "ratio 2, contextual"): 0.999,
    (3, "ratio 3, nearest"): 0.906,
    (3, "ratio 3, contextual"): 0.968,
    (3, "ratio 4.66, nearest"): 0.38,
    (3, "ratio 4.66, contextual"): 0.622,
    (3, "ratio 6, nearest"): 0.149,
    (3, "ratio 6, contextual"): 0.365,
    (4, "one session"): 0.003,
    (4, "other special tokens"): 0.991,
    (4, "other cuts"): 0.789,
    (4, "held-out texts chosen"): 1.0,
    (4, "mode predict"): 0.996,
    (5, "max-norm, zero logits"): 1.0,
    (5, "marvell, noise power 1e-9"): 1.0,
    (5, "drawn again, other epsilons"): 1.0,
    (5, "drawn again, other tokenizers"): 1.0,
    (5, "digits of an average loss"): 1.0,
    (5, "differences of accuracies"): 1.0,
    (5, "client head, its weights known"): 1.0,
    (5, "next tokens, client head"): 0.951,
    (6, "count of words, not finite"): 0.979,
    (6, "largest label of a batch"): 0.875,
    (6, "presence of a word"): 1.0,
    (7, "serving allowed, train asked"): 0.792,
    (7, "serving allowed, evaluate asked"): 0.208,
    (7, "offsite allowed, split over messages"): 0.8,
    (8, "one block, one step"): 1.0,
    (8, "rounds beyond every limit"): 1.0,
    (9, "own head, six runs"): 0.575,
    (9, "adapters, six runs"): 0.063,
    (10, "bottoms kept"): 1.0,
    (10, "process ended, chain of replacements"): 1.0,
    (10, "process ended, costly expression"): 1.0,
    (10, "server's words in owner's log"): 1.0,
    (10, "owner's words in server's log"): 1.0,
}
