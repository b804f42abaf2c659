"""What older records meant by settings that they lack."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.config.records import with_defaults


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
