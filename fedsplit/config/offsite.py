"""The group ``offsite``: adapters tuned against an emulator (``strategy = "offsite-tuning"``)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.config.groups import LORA_FORMS
from fedsplit.config.robust import AVERAGINGS
from fedsplit.errors import ConfigError, check, one_of

IMPORTANCE = "importance"

INSTEAD = {
    "train.method": "offsite.method",
    "train.lora-rank": "offsite.rank",
    "train.lora-alpha": "offsite.lora-alpha",
    "train.lora-dropout": "offsite.lora-dropout",
    "train.lora-targets": "offsite.lora-targets",
    "train.lora-form": "offsite.lora-form",
    "model.autocast": "offsite.bf16",
    "server.workers": "model.device",
    "server.devices": "model.device",
    "split.averaging": "offsite.averaging",
    "privacy.mechanism": "dp.noise-multiplier or offsite.central-dp-noise",
    "labels.protection": "dp.noise-multiplier or offsite.central-dp-noise",
}
"""Settings that offsite tuning does not read, and what it reads in their place."""


@dataclass(frozen=True)
class OffsiteConfig:
    """What owners are sent to train on, and how their adapters are averaged.

    Attributes:
        compressor: a row of ``fedsplit.emulators.COMPRESSORS``.
        positions: A's blocks: numbers such as ``0,1,10,11``; ``importance`` = those that an
            importance run ranks highest; empty = the same for ScaleOT, the ends for the others.
        adapters: number of A's blocks, where ``positions`` gives no numbers.
        alpha: ScaleOT: share of the other blocks replaced by harmonizers.
        beta: ScaleOT, withholding: rank reduction of what remains; GradOT: of all.
        truncation: ScaleOT, withholding: what rank compression keeps closest: ``outputs`` of the
            projections on public text, or ``weights`` (the paper's).
        margin: withholding: nats that the untuned emulator loses on public text.
        keep: LayerDrop, CRaSh: blocks kept (shared) outside A.
        rank_by: what blocks are chosen by: ``costs``, the divergence that replacing a block
            alone causes, or ``scores``, the importance run's policy (the paper's).
        settle_steps: steps in which the chosen harmonizers are trained together before shipping
            (LayerDrop: of distillation); 0 = off.
        importance_steps: gradient steps of the importance run, where one is needed.
        scores: the server's file with scores and costs of an earlier importance run of this base
            (its ``importance.json``): none is made then.  Harmonizers begin as identities, so
            ``settle_steps`` are what trains them; empty = a run is made.
        public: the server's file of public text, for importance, calibration and plug-in
            evaluation; empty = what the interpreter ships.
        block: tokens of one training block.
        packing: put several texts or conversations into a block, none of which attends to another.
            Owners whose reports are noisy (``reports.epsilon``) do not.
        averaging: Flower strategy that averages the owners' adapters.
        proximal: FedProx: weight of the squared distance to the round's start (0 = off).
        method: what is trained inside A's blocks: ``full`` (the blocks), ``lora``, ``bottleneck``,
            ``bitfit`` (biases and the norms' weights) or ``prefix``.
        rank: of LoRA's updates.
        lora_alpha: LoRA's updates are scaled by ``lora_alpha / rank``.
        lora_dropout: on the input of LoRA's updates, in owners' training.
        lora_targets: names of the projections that get LoRA's updates, separated by commas, as the
            last parts of module names (``q_proj,v_proj``); empty: all of them.
        lora_form: ``lora``, ``rslora`` (scaled by alpha over the root of the rank) or ``dora``
            (magnitudes trained beside directions); as PEFT has them.
        width: of the bottlenecks.
        prefix: trained positions of each attention.
        micro_batch: blocks of one forward and backward; a step sums them up to ``train.batch-size``
            (0 = all at once).  With ``dp.*`` it is always one.
        bf16: owners' steps, the importance run and settling compute in bfloat16 (autocast);
            weights stay float32.
        checkpointing: owners keep no activations inside blocks and compute them again.
        server_lr: FedAdam: how far the server's step moves a weight; 0 = as far as the first
            round's plain average did (root mean square over weights).
        central_dp_clip: bound on the norm of one owner's update of a round, kept by the owner and
            again by the server (0 = off).
        central_dp_noise: standard deviation of the noise on the sum of the owners' updates, in
            units of the bound (0 = off); updates then weigh the same.
    """

    compressor: str = "scaleot"
    positions: str = ""
    adapters: int = 4
    alpha: float = 0.25
    beta: float = 0.0
    truncation: str = "outputs"
    margin: float = 0.2
    keep: int = 4
    rank_by: str = "costs"
    settle_steps: int = 200
    importance_steps: int = 400
    scores: str = ""
    public: str = ""
    block: int = 128
    packing: bool = False
    averaging: str = "fedavg"
    proximal: float = 0.0
    method: str = "full"
    rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: str = ""
    lora_form: str = "lora"
    width: int = 32
    prefix: int = 8
    micro_batch: int = 0
    bf16: bool = False
    checkpointing: bool = False
    server_lr: float = 0.0
    central_dp_clip: float = 0.0
    central_dp_noise: float = 0.0

    def __post_init__(self) -> None:
        # Their tables are asked when settings are read (fedsplit.settings).
        for name in ("compressor", "method", "rank_by", "truncation"):
            value = getattr(self, name)
            check(bool(value), f"offsite.{name.replace('_', '-')}", value, "a name")
        one_of("offsite.averaging", self.averaging, AVERAGINGS)
        _ = self.chosen
        for name in ("adapters", "keep", "importance_steps"):
            value = getattr(self, name)
            check(value >= 1, f"offsite.{name.replace('_', '-')}", value, ">= 1")
        check(self.settle_steps >= 0, "offsite.settle-steps", self.settle_steps, ">= 0")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"offsite.{name}", value, "in [0, 1]")
        check(0 <= self.margin <= 100, "offsite.margin", self.margin, "in [0, 100] nats")
        check(2 <= self.block <= 131_072, "offsite.block", self.block, "in [2, 131072] tokens")
        check(0 <= self.proximal <= 1e6, "offsite.proximal", self.proximal, "in [0, 1e6]; 0 = off")
        for name in ("rank", "width", "prefix"):
            value = getattr(self, name)
            check(1 <= value <= 65_536, f"offsite.{name}", value, "in [1, 65536]")
        check(0 < self.lora_alpha <= 1e6, "offsite.lora-alpha", self.lora_alpha, "in (0, 1e6]")
        check(0 <= self.lora_dropout < 1, "offsite.lora-dropout", self.lora_dropout, "in [0, 1)")
        one_of("offsite.lora-form", self.lora_form, LORA_FORMS)
        check(self.micro_batch >= 0, "offsite.micro-batch", self.micro_batch, ">= 0 (0 = all)")
        check(0 <= self.server_lr < 10, "offsite.server-lr", self.server_lr, "in [0, 10)")
        self._check_central_dp()

    def _check_central_dp(self) -> None:
        clip, noise = self.central_dp_clip, self.central_dp_noise
        check(0 <= clip <= 1e6, "offsite.central-dp-clip", clip, "in [0, 1e6]; 0 = off")
        check(0 <= noise <= 1e6, "offsite.central-dp-noise", noise, "in [0, 1e6]; 0 = off")
        if noise:
            check(clip > 0, "offsite.central-dp-noise", noise, "0 where central-dp-clip is 0")
            check(
                self.averaging == "fedavg",
                "offsite.averaging",
                self.averaging,
                "fedavg where central-dp-noise is set: the noise is cut to a plain mean",
            )

    @property
    def chosen(self) -> tuple[int, ...]:
        """A's blocks as given; empty where importance, or the compressor, decides."""
        if self.asks_importance:
            return ()
        try:
            found = tuple(int(x) for x in self.positions.split(",") if x.strip())
        except ValueError:
            raise ConfigError(
                f"offsite.positions={self.positions!r}: must be block numbers such as 0,1,10,11 "
                f"or {IMPORTANCE!r}"
            ) from None
        good = len(set(found)) == len(found) and all(x >= 0 for x in found)
        check(good, "offsite.positions", self.positions, "distinct block numbers >= 0")
        return found

    @property
    def asks_importance(self) -> bool:
        """Whether ``positions`` leaves A's blocks to an importance run."""
        return self.positions.strip() == IMPORTANCE
