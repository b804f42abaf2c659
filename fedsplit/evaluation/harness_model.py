"""A live model as lm-evaluation-harness sees one; imported only when the harness is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fedsplit.errors import ConfigError, ModelError
from fedsplit.evaluation.likelihood import Likelihood
from fedsplit.evaluation.perplexity import forward
from fedsplit.models.modes import evaluating


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """Any causal language model, by :class:`~fedsplit.evaluation.likelihood.Likelihood`.

    Tokens are cut as the harness' own Hugging Face model cuts them, so figures compare.

    Args:
        likelihood: the model's.
        tokenizer: the model's.
        progress: called with (done, all) continuations.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        tokenizer: Any,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.tokenizer = tokenizer
        self.progress = progress
        # Encoders' tokenizers call the two otherwise.
        begin, end = (
            [getattr(tokenizer, f"{name}_token_id", None) for name in names]
            for names in (("bos", "cls"), ("eos", "sep"))
        )
        self._ends = [i for i in end if i is not None]
        self._begins = [i for i in begin if i is not None] or self._ends
        if not self._begins:
            raise ModelError("tokenizer: must have a bos or an eos token, to begin texts with")

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int((self._ends or self._begins)[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return int(self._begins[0])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return ids; with special tokens where the tokenizer adds them by itself."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = list(self.tokenizer(string, verbose=False, **special)["input_ids"])
        # A token that closes the text would stand between question and answer.
        if add_special_tokens is None and ids and ids[-1] in self._ends:
            ids.pop()
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, tail) for _, context, tail in requests]
        return [tuple(s) for s in self.likelihood.score(pairs, self.progress)]  # type: ignore[misc]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in the harness' own windows."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.likelihood.max_length,
                context_len=1,
            )
            for window in rolled:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self.likelihood.score(pairs, self.progress), strict=True):
            sums[owner] += score.nats
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations up to a stop text; one at a time, without a cache.

        Raises:
            ConfigError: sampling was asked for.
        """
        return [self._generate(*request.args) for request in requests]

    @torch.no_grad()
    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
            raise ConfigError(f"generation {settings}: must be greedy (do_sample false)")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        room = min(int(settings.get("max_gen_toks", 256)), self.likelihood.max_length - 1)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        model = self.likelihood.model
        device = next(model.parameters()).device
        made: list[int] = []
        text = ""
        with evaluating(model):
            for _ in range(room):
                seen = [*ids, *made][-self.likelihood.max_length :]
                logits = forward(model, torch.tensor([seen], device=device)).logits
                made.append(int(logits[0, -1].argmax()))
                if made[-1] == self.eot_token_id:
                    made.pop()
                    break
                text = self.tokenizer.decode(made, skip_special_tokens=True)
                if any(stop and stop in text for stop in stops):
                    break
        text = str(self.tokenizer.decode(made, skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return text
