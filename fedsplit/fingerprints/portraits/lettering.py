"""Words on a picture without any font file: the common 5 x 7 dot lettering of LCD modules.

Printable ASCII only; other characters become a question mark.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CELL = 6
HEIGHT = 9
"""Dots per letter across, its gap included, and down, descenders included."""

# Five columns per character from space to tilde, lowest bit on top.
_COLUMNS = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495620500008070300"
    "001c2241000041221c002a1c7f1c2a08083e0808008070300008080808080000606000201008040 2".replace(
        " ", ""
    )
    + "3e5149453e00427f400072494949462141494d331814127f1027454545393c4a49493141211109073649494936"
    "464949291e0000140000004034000000081422411414141414004122140802015909063e415d594e"
    "7c1211127c7f494949363e414141227f4141413e7f494949417f090909013e414151737f0808087f00417f4100"
    "2040413f017f081422417f404040407f021c027f7f0408107f3e4141413e7f090909063e4151215e7f09192946"
    "264949493203017f01033f4040403f1f2040201f3f4038403f631408146303047804036159494d43"
    "007f41414102040810200041 41417f04020102044040404040000307080020545478407f284444383844444428"
    "384444287f385454541800087e090218a4a49c787f0804047800447d40002040403d007f1028440000417f4000"
    "7c047804787c080404783844444438fc1824241818242418fc7c08040408485454542404043f4424"
    "3c4040207c1c2040201c3c4030403c44281028444c9090907c4464544c4400083641000000770000"
    "00413608000201020402".replace(" ", "")
)


def text_mask(text: str, scale: int = 1) -> NDArray[np.bool_]:
    """The dots of one line of text, (9 scale, 6 scale len(text))."""
    codes = [ord(c) - 32 if 32 <= ord(c) < 127 else ord("?") - 32 for c in text]
    mask = np.zeros((HEIGHT, CELL * max(1, len(codes))), dtype=np.bool_)
    for place, code in enumerate(codes):
        for x in range(5):
            column = _COLUMNS[5 * code + x]
            for y in range(8):
                mask[y, CELL * place + x] = bool(column >> y & 1)
    grown: NDArray[np.bool_] = mask.repeat(scale, 0).repeat(scale, 1)
    return grown


def write_text(
    page: NDArray[np.uint8], text: str, left: int, top: int, *, scale: int = 1, grey: int = 40
) -> None:
    """Write one line on an (h, w, 3) picture in place, cut off at its edges."""
    mask = text_mask(text, scale)[: max(0, page.shape[0] - top), : max(0, page.shape[1] - left)]
    area = page[top : top + mask.shape[0], left : left + mask.shape[1]]
    area[mask] = grey


def wrap(text: str, characters: int, lines: int) -> list[str]:
    """Break a label at spaces, hyphens and underscores into at most ``lines`` lines."""
    out: list[str] = []
    rest = text.strip()
    while rest and len(out) < lines:
        if len(rest) <= characters:
            out.append(rest)
            return out
        cuts = [i + 1 for i, c in enumerate(rest[:characters]) if c in " -_/"]
        cut = cuts[-1] if cuts and len(out) < lines - 1 else characters
        out.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest and out:
        out[-1] = out[-1][: characters - 2] + ".."
    return out
