"""The owner's half of generation: the owner chooses every token and sends it as a representation.

The bottom's cache is here, the top's is at the server.  Each piece of the text crosses once, after
the owner's mechanism, with noise that depends on all of the text before it: the same word at two
places never shows the same noise on two different vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedsplit.errors import FrameError, SessionError, check
from fedsplit.models.splitting.cached_decoding import CachedBottom
from fedsplit.models.splitting.halves import Bottom
from fedsplit.owners.ledger.disclosure import (
    Announcement,
    Outgoing,
    Representations,
    Source,
    notice,
)
from fedsplit.owners.measuring import OwnTexts
from fedsplit.owners.samples import piece_identity
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind

Choose = Callable[[Tensor], int]


class GeneratingOwner:
    """Answers the frames of one session that continues one text, piece by piece.

    Args:
        bottom: of a causal language model; run without dropout.
        prompt: token ids (T,).
        text: identifies the raw prompt (see :func:`fedsplit.owners.samples.text_identity`).
        perturber: the privacy mechanism with the owner's secret.
        codec: wire form of representations.
        choose: logits (V,) -> the next token's id.
        stop: ids that end the text.
        most: tokens generated at most.
        on_token: called with every token as it is chosen.
        own: what the owner measures its own protection on.

    Raises:
        ConfigError: no prompt, or no token to generate.
    """

    def __init__(
        self,
        bottom: Bottom,
        prompt: Tensor,
        text: bytes,
        perturber: SamplePerturber,
        codec: str,
        *,
        choose: Choose,
        stop: frozenset[int],
        most: int,
        on_token: Callable[[int], None] = lambda token: None,
        own: OwnTexts | None = None,
    ) -> None:
        check(prompt.ndim == 1 and len(prompt) >= 1, "prompt tokens", len(prompt), ">= 1")
        check(most >= 1, "new tokens", most, ">= 1")
        self.perturber = perturber
        self.source = Source(bottom.eval(), perturber, len(prompt), len(prompt), own=own)
        self.done = False
        self.text: list[int] = prompt.tolist()
        self.generated: list[int] = []
        self._prompt = prompt
        self._text = text
        self._codec = codec
        self._decoder = CachedBottom(bottom)
        self._choose = choose
        self._stop = stop
        self._most = most
        self._on_token = on_token
        self._sent = 0  # pieces

    def ready(self) -> Outgoing:
        """Return the frame that announces at most how many pieces follow."""
        guarantee = self.perturber.mechanism.guarantee(1)
        header = {"batches": self._most, "samples": self._most, "mechanism": guarantee}
        shown = Announcement(batches=self._most, source=self.source)
        return Outgoing(Kind.READY, header, shown)

    def handle(self, frame: Frame) -> Iterator[Outgoing]:
        """Yield the frame that answers ``frame``.

        Raises:
            SessionError: the frame does not belong here.
            FrameError: its step, shape or numbers are not acceptable.
        """
        if frame.kind is Kind.START and not self._sent:
            yield self._piece(self._prompt)
        elif frame.kind is Kind.LOGITS:
            token = self._read(frame)
            self.generated.append(token)
            self.text.append(token)
            self._on_token(token)
            if token in self._stop or len(self.generated) >= self._most:
                self.done = True
                yield notice(Kind.DONE, {"samples": 1, "steps": self._sent})
                return
            yield self._piece(torch.tensor([token]))
        else:
            raise SessionError(f"{frame.kind.name} frame: not expected while generating")

    def _read(self, frame: Frame) -> int:
        shape = tuple(frame["shape"])
        if frame["step"] != self._sent - 1 or len(shape) != 2 or shape[0] != 1:
            raise FrameError(f"LOGITS step {frame['step']} of shape {shape}: must be (1, V)")
        if not 1 < shape[1] <= 1 << 20:
            raise FrameError(f"LOGITS over {shape[1]} tokens: must be in [2, 2^20]")
        return self._choose(decode_rows(frame.body, shape, frame["codec"])[0])

    def _piece(self, ids: Tensor) -> Outgoing:
        """Return the next piece (t,) of the text as a frame."""
        step = self._sent
        hidden = self._decoder.step(ids[None])[0]  # (t, d)
        # The same piece after another text is another text, not another view of this one.
        text = piece_identity(self._text, self.generated)
        touched = self.perturber.tokens_touched
        view = self.perturber.view(hidden, ids, text)
        self._sent += 1
        header = {
            "step": step,
            "slots": [step],
            "fresh": [step],
            "lengths": [len(ids)],
            "codec": self._codec,
            "dim": int(view.rows.shape[1]),
            "last": self._sent == self._most,
        }
        shown = Representations(
            used=1,
            epochs=None,
            texts=(text,),
            noises=(view.noise,),
            rows=view.rows,
            touched=self.perturber.tokens_touched - touched,
            source=self.source,
        )
        return Outgoing(Kind.BATCH, header, shown)


def sampler(temperature: float, top_p: float, seed: int | None) -> Choose:
    """Return how the next token is chosen.

    Args:
        temperature: 0 = the most probable token.
        top_p: only the most probable tokens with that much probability together.
        seed: None = from the operating system.

    Raises:
        ConfigError: a value out of range.
    """
    check(0 <= temperature <= 100, "temperature", temperature, "in [0, 100]; 0 = most probable")
    check(0 < top_p <= 1, "top-p", top_p, "in (0, 1]")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        probability, order = torch.softmax(logits.double() / temperature, 0).sort(descending=True)
        keep = int((probability.cumsum(0) < top_p).sum()) + 1
        return int(order[torch.multinomial(probability[:keep], 1, generator=generator)])

    return choose
