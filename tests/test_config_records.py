"""What older records meant by settings that they lack."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.config.offsite import INSTEAD
from fedsplit.config.records import with_defaults
from fedsplit.settings import read_settings


def test_an_older_record_means_the_defaults_but_for_how_ranks_were_compressed() -> None:
    usual = RunConfig().to_flat()
    old = {k: v for k, v in usual.items() if k != "offsite.truncation"}
    assert with_defaults(old, usual) == usual  # nothing was compressed
    compressed = {**old, "offsite.beta": 0.5}
    assert with_defaults(compressed, usual)["offsite.truncation"] == "weights"
    assert with_defaults({**compressed, "offsite.compressor": "gradot"}, usual) == {
        **usual,
        "offsite.beta": 0.5,
        "offsite.compressor": "gradot",
    }
    said = {**compressed, "offsite.truncation": "outputs"}
    assert with_defaults(said, usual) == said
    assert "offsite.truncation" not in with_defaults(compressed, {"train.rounds": 3})


def test_a_record_of_offsite_tuning_may_hold_what_was_never_read() -> None:
    usual = RunConfig().to_flat()
    now = read_settings({"strategy": "offsite-tuning", "model.task": "causal-lm"}).to_flat()
    new = ("offsite.lora-dropout", "offsite.lora-targets", "offsite.lora-form")
    old = {k: v for k, v in now.items() if k not in new}
    odd = {"train.method": "lora", "train.lora-rank": 3, "labels.protection": "max-norm"}
    assert odd.keys() <= INSTEAD.keys()
    assert with_defaults({**old, **odd}, usual) == now
    split = {**usual, **odd}
    assert with_defaults(split, usual) == split
