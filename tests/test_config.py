"""The run's settings: defaults, round trip, and refusals that name the setting, value and bound."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.config import RunConfig, Scalar
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FLAT = RunConfig().to_flat()

# Per setting: values just outside its range, and its outermost good ones.
RANGES: dict[str, tuple[list[Scalar], list[Scalar]]] = {
    "seed": ([-1, 2**63], [0, 2**63 - 1]),
    "model.name": ([""], ["x"]),
    "model.task": (["", "masked-lm"], ["causal-lm"]),
    "model.labels": ([1, 100_001], [2, 100_000]),
    "model.max-tokens": ([0, 131_073], [1, 131_072]),
    "model.dropout": ([-0.5, 1.0], [-1.0, 0.0, 0.99]),
    "model.dtype": (["float16", ""], ["bfloat16"]),
    "model.autocast": (["float16", "on"], ["bfloat16"]),
    "model.device": (["", "gpu", "cuda:", "cuda:x", "CPU"], ["cpu", "cuda", "cuda:7", "auto"]),
    "split.k": ([-1, 10_001], [0, 10_000]),
    "split.bottom": (["thawed", ""], ["joint"]),
    "train.rounds": ([0, -3], [1]),
    "train.epochs": ([0], [1]),
    "train.max-steps": ([-1], [0, 1]),
    "train.batch-size": ([0], [1]),
    "train.method": (["dora"], ["all", "head", "lora", "bitfit", "ia3", "adapter"]),
    "train.optimizer": (["lion"], ["adamw", "sgd"]),
    "train.lr": ([0.0, -1e-4, 10.0, float("inf")], [1e-9, 9.9]),
    "train.head-lr": ([-1e-9, 10.0], [0.0, 9.9]),
    "train.bottom-lr": ([0.0, 10.0], [1e-9]),
    "train.weight-decay": ([-1e-9, float("inf")], [0.0]),
    "train.warmup": ([-0.1, 1.0], [0.0, 0.99]),
    "train.sampler": (["rare", ""], ["uniform", "balanced"]),
    "train.schedule": (["steps"], ["constant", "linear", "cosine"]),
    "train.lora-rank": ([0], [1]),
    "train.lora-alpha": ([0.0, float("inf")], [1e-3]),
    "train.lora-dropout": ([-0.1, 1.0], [0.0, 0.9]),
    "train.lora-form": (["qlora"], ["lora", "rslora", "dora"]),
    "train.accumulate": ([0], [1, 8]),
    "train.patience": ([-1], [0, 3]),
    "train.watch": (["accuracy", ""], ["loss"]),  # metric: with train.patience alone
    "train.clip": ([-0.1, float("inf")], [0.0]),
    "train.fraction": ([0.0, 1.01], [1e-6, 1.0]),
    "train.min-owners": ([0], [1]),
    "train.bench-after": ([-1], [0]),
    "train.bench-rounds": ([0], [1]),
    "session.transport": (["smoke"], ["stream", "messages"]),
    "session.schedule": (["random"], ["parallel", "sequential"]),
    "session.codec": (["fp8", "pickle"], ["fp32", "bf16", "int8"]),
    "session.logits-codec": (["fp8"], ["fp32", "bf16", "int8"]),
    "session.wave": ([-1], [0]),
    "session.wave-wait-s": ([0.0, 86_401.0], [0.1, 86_400.0]),
    "session.deadline-s": ([0.0, -1.0], [0.1]),
    "session.idle-s": ([0.0, float("inf")], [0.1]),
    "session.round-s": ([0.0, 604_801.0], [0.1, 604_800.0]),
    "session.reconnect-s": ([-0.1, 3601.0], [0.0, 3600.0]),
    "session.window": ([0, 1025], [1, 1024]),
    "session.max-frame-mb": ([0, 1025], [1, 1024]),
    "session.port": ([-1, 65_536], [0, 65_535]),
    "privacy.eta": ([-1.0, float("inf")], [0.0, 1e-3]),
    "privacy.noise-ratio": ([-1.0, float("inf")], [0.0]),
    "privacy.row-clip": (["", "on", "0", "-1", "inf", "nan"], ["off", "auto", "1e-3", "12"]),
    "privacy.mechanism": (["laplace", ""], ["none"]),  # the others need a level: see below
    "privacy.epsilon": ([-1.0, float("inf")], [0.0, 1e-3]),
    "privacy.delta": ([0.0, 1.0], [1e-9, 0.5]),
    "privacy.clip": ([-1.0, float("inf")], [0.0, 1e-3]),
    "privacy.budget": ([-1.0, float("inf")], [0.0, 1e-3]),
    "privacy.covariance": (["private"], ["public", "own"]),
    "privacy.subsamples": ([0, 65], [1, 64]),
    "privacy.spare": ([0.0, 1.1], [1e-3, 1.0]),
    "privacy.cti": (["idf", ""], ["off", "tfidf", "purity", "public-idf", "frequent"]),
    "privacy.denoise": (
        ["wiener"],
        ["off", "ends", "uniform", "unigram", "contextual", "linear", "learned"],
    ),
    "privacy.cti-per-class": ([0], [1]),
    "privacy.cti-max-share": ([0.0, 1.1], [1.0]),
    "privacy.cti-rho": ([-0.1, 1.1], [0.0, 1.0]),
    "labels.protection": (
        ["marvell", "hidden", "none+client-head"],  # Marvell: two classes, not eight
        ["none", "client-head+none", "client-head", "randomised-response", "client-head+max-norm"],
    ),
    "labels.epsilon": ([0.0, -1.0, 101.0], [1e-3, 100.0]),
    "labels.noise-power": ([0.0, float("inf")], [1e-3]),
    "labels.noise-ratio": ([0.0, float("inf")], [1e-3]),
    "labels.gradient-clip": ([0.0, float("inf")], [1e-3]),
    "labels.tail-blocks": ([0, -1], [1, 24]),
    "labels.tail-weights": (["secret", ""], ["averaged", "own"]),
    "dp.noise-multiplier": ([-1.0, 1.0], [0.0]),  # owners of the defaults train nothing themselves
    "serving.minutes": ([-1.0, float("inf")], [0.0, 0.5]),
    "serving.tokens": ([0, 1025], [1, 1024]),
    "serving.renew-s": ([0.5, 1801.0], [1.0, 1800.0]),
    "serving.sessions": ([0, 1025], [1, 1024]),
    "serving.max-batch": ([0, 65_537], [1, 65_536]),
    "serving.max-wait-ms": ([-1.0, 10_001.0], [0.0, 10_000.0]),
    "serving.new-tokens": ([0, 65_537], [1, 65_536]),
    "offsite.compressor": (["", "zip"], ["scaleot"]),
    "offsite.positions": (["0,a", "1,1", "-1"], ["", "0,1,10", "importance"]),
    "offsite.adapters": ([0], [1]),
    "offsite.alpha": ([-0.1, 1.1], [0.0, 1.0]),
    "offsite.beta": ([-0.1, 1.1], [0.0, 1.0]),
    "offsite.margin": ([-0.1, float("nan"), 101.0], [0.0, 100.0]),
    "offsite.keep": ([0], [1]),
    "offsite.rank-by": (["", "gradients"], ["costs", "scores"]),
    "offsite.truncation": (["", "inputs"], ["outputs", "weights"]),
    "offsite.settle-steps": ([-1], [0]),
    "offsite.importance-steps": ([0], [1]),
    "offsite.block": ([1, 131_073], [2, 131_072]),
    "offsite.averaging": (["mean", ""], ["fedavg", "fedadam", "krum", "bulyan"]),
    "split.averaging": (["mean", ""], ["fedavg", "multikrum"]),
    "robust.clip": ([-1.0, 0.5, float("inf")], [0.0, 1.0, 1e6]),
    "robust.weight-cap": ([-1.0, 0.5, float("nan")], [0.0, 1.0, 1e6]),
    "robust.malicious": ([-1, 10_001], [0, 10_000]),
    "server.workers": ([0, 65], [1, 64]),
    "server.devices": (["gpu", "cuda:x", "cpu,"], ["", "cpu", "cuda:1"]),
    "server.frozen-weights": (["", "int4"], ["as-loaded"]),  # the others ask for train.method
    "offsite.proximal": ([-1.0, float("inf")], [0.0, 1e6]),
    "offsite.method": (["ia3", ""], ["full", "lora", "bottleneck", "bitfit", "prefix"]),
    "offsite.rank": ([0, 65_537], [1, 65_536]),
    "offsite.lora-alpha": ([0.0, float("inf")], [1e-3]),
    "offsite.lora-dropout": ([-0.1, 1.0], [0.0, 0.9]),
    "offsite.lora-form": (["qlora", ""], ["lora", "rslora", "dora"]),
    "offsite.width": ([0], [1]),
    "offsite.prefix": ([0], [1]),
    "offsite.micro-batch": ([-1], [0, 1]),
    "offsite.server-lr": ([-1.0, 10.0], [0.0, 1e-3]),
    "offsite.central-dp-clip": ([-1.0, float("inf")], [0.0]),  # split tuning, the default, has none
    "offsite.central-dp-noise": ([-1.0, 1.0], [0.0]),  # needs a bound, which the defaults lack
    "buffer.size": ([-1, 100_001], [0]),  # split tuning, the default, has none
    "buffer.staleness": ([-0.1, 11.0], [0.0, 10.0]),
    "buffer.most-stale": ([-1, 10_001], [0, 10_000]),
    "buffer.spread": ([-0.1, 6.0], [0.0, 5.0]),
    "secure.threshold": ([0.49, 1.0, float("nan")], [0.5, 0.99]),
    "secure.neighbours": ([-2, 3, 10_002], [0, 2, 10_000]),
    "secure.bound": ([0.0, float("inf")], [1e-12, 1e6]),
    "secure.norm": ([-1.0, float("inf")], [0.0, 1.0]),
    "secure.most-targets": ([0, 2**40 + 1], [1, 2**40]),
    "secure.bits": ([16, 33], [32, 64]),
    "secure.min-owners": ([1, 100_001], [2, 100_000]),
    "dp.clip": ([0.0], [1e-3]),
    "dp.delta": ([0.0, 1.0], [1e-9]),
    "dp.accountant": (["moments"], ["rdp", "prv"]),
    "data.owners": ([0, 1_000_001], [1, 1_000_000]),
    "data.alpha": ([0.0, -1.0], [1e-3]),
    "data.limit": ([-1], [0]),
    "data.test-share": ([0.0, 1.0], [0.5]),
    "lineage.gate": (["ignore", ""], ["off", "warn", "reject", "stop"]),
    "lineage.in-lineage": ([0.1, 1.01], [0.5, 1.0]),
    "lineage.block": ([0.0, 1.01], [0.5, 1.0]),
    "lineage.scale": ([-1.0, float("inf")], [0.0, 1.0]),
    "lineage.quality": ([-1.0, float("inf")], [0.0, 0.1]),
    "output.evaluate-every": ([-1], [0]),
    "output.threads": ([-1, 1025], [0, 1024]),
    "output.owner-threads": ([0, 1025], [1, 1024]),
    "output.checkpoint-steps": ([-2], [-1]),
    "output.record-mb": ([0, (1 << 20) + 1], [1, 1 << 20]),
    "output.metrics-port": ([-1, 65_536], [0, 65_535]),
}
# Rows of tables that a later layer holds, names of columns, hosts, paths: any text.
FREE_TEXT = {
    "strategy",
    "model.sha256",
    "model.label-names",
    "model.label-range",
    "train.class-weights",
    "train.lora-targets",
    "offsite.lora-targets",
    "session.host",
    "privacy.public-text",
    "privacy.task-words",
    "serving.weights",
    "offsite.public",
    "offsite.scores",
    "data.kind",
    "data.path",
    "data.text-column",
    "data.label-column",
    "data.train-split",
    "data.test-split",
    "data.test-path",
    "data.delimiter",
    "data.partition",
    "data.column",
    "output.dir",
}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def test_defaults_equal_those_of_the_flower_app() -> None:
    app = tomllib.loads(PROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    theirs = flatten(app)
    assert theirs == FLAT
    assert {k: type(v) for k, v in theirs.items()} == {k: type(v) for k, v in FLAT.items()}
    assert RunConfig.from_flat(theirs) == RunConfig() == RunConfig.from_flat({})


def test_every_setting_is_a_flat_scalar_with_a_range_or_free_text() -> None:
    assert all(type(value) in (bool, int, float, str) for value in FLAT.values())
    switches = {key for key, value in FLAT.items() if isinstance(value, bool)}
    assert RANGES.keys() | FREE_TEXT | switches == FLAT.keys()
    assert not RANGES.keys() & FREE_TEXT


@pytest.mark.parametrize("key", RANGES)
def test_values_out_of_range_are_refused_with_name_value_and_bound(key: str) -> None:
    bad, good = RANGES[key]
    for value in good:
        assert read_settings({key: value}).to_flat()[key] == value
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            read_settings({key: value})
        assert str(caught.value).startswith(f"{key}={value!r}: must be "), caught.value
        assert len(str(caught.value)) > len(f"{key}={value!r}: must be ")


VALID = st.fixed_dictionaries(
    {},
    optional={key: st.sampled_from(good) for key, (_, good) in RANGES.items()}
    | {key: st.text(max_size=20) for key in FREE_TEXT}
    | {"output.capture": st.booleans(), "output.transcript": st.booleans()},
)


@given(VALID)
@settings(max_examples=60, deadline=None)
def test_flat_form_round_trips(flat: dict[str, Scalar]) -> None:
    config = RunConfig.from_flat(flat)
    whole = config.to_flat()
    assert whole.keys() == FLAT.keys()
    assert {key: whole[key] for key in flat} == flat
    assert all(whole[key] == FLAT[key] for key in FLAT.keys() - flat.keys())
    assert RunConfig.from_flat(whole) == config


@given(st.sampled_from(sorted(FLAT)), st.sampled_from([True, 3, 2.5, "three", None, [1], {}, b"x"]))
@settings(max_examples=200, deadline=None)
def test_values_of_another_type_are_refused(key: str, value: Any) -> None:
    kind = type(FLAT[key])
    if type(value) is kind or (kind is float and type(value) is int):
        return
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({key: value})
    assert str(caught.value) == f"{key}={value!r}: must be of type {kind.__name__}"


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.sampled_from([1, "x", True]))
@settings(max_examples=200, deadline=None)
def test_unknown_settings_are_refused(key: str, value: Scalar) -> None:
    if key.replace("_", "-") in FLAT:
        return
    with pytest.raises(ConfigError, match="unknown"):
        RunConfig.from_flat({key: value})


@pytest.mark.parametrize("key", sorted(FLAT))
def test_a_misspelt_setting_is_refused_and_the_known_ones_are_told(key: str) -> None:
    group, _, name = key.rpartition(".")
    with pytest.raises(ConfigError, match="unknown") as caught:
        RunConfig.from_flat({key + "x": FLAT[key]})
    assert (name or group) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["", ".", "train", "train.", ".lr", "train.lr.x", "strategy.x", "seed.x", "__class__.x"]
)
def test_keys_that_name_no_setting(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        RunConfig.from_flat({key: 1})


def test_not_a_number_is_refused_everywhere() -> None:
    for key, value in FLAT.items():
        if isinstance(value, float):
            with pytest.raises(ConfigError, match=f"^{re.escape(key)}=nan: must be"):
                RunConfig.from_flat({key: float("nan")})


def test_a_whole_number_serves_as_a_float_and_nothing_else_is_converted() -> None:
    assert type(RunConfig.from_flat({"train.lr": 1}).train.lr) is float
    for key, value in (("train.rounds", 3.0), ("train.rounds", "3"), ("train.rounds", True)):
        with pytest.raises(ConfigError, match="must be of type int"):
            RunConfig.from_flat({key: value})


@pytest.mark.parametrize(
    ("eta", "ratio", "good"),
    [(0.0, 0.0, False), (5.0, 0.5, False), (5.0, 0.0, True), (0.0, 0.5, True)],
)
def test_dchi_takes_either_eta_or_the_noise_ratio(eta: float, ratio: float, good: bool) -> None:
    flat = {"privacy.mechanism": "dchi", "privacy.eta": eta, "privacy.noise-ratio": ratio}
    if good:
        assert read_settings(flat).privacy.eta == eta
    else:
        with pytest.raises(ConfigError, match=rf"^privacy.eta={eta}: must be > 0 when"):
            read_settings(flat)


def test_settings_cannot_be_changed_afterwards() -> None:
    config = RunConfig()
    for holder, name in ((config, "seed"), (config.train, "lr"), (config.privacy, "eta")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, name, 1)


def test_every_setting_is_documented() -> None:
    for group in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), group.name)
        if dataclasses.is_dataclass(value):
            for setting in dataclasses.fields(value):
                assert re.search(rf"^\s+{setting.name}: \S", type(value).__doc__ or "", re.M), (
                    f"{group.name}.{setting.name}"
                )


NOISY_TEXT: dict[str, Scalar] = {
    "model.task": "causal-lm",
    "privacy.mechanism": "dchi",
    "privacy.eta": 8.0,
}


@pytest.mark.parametrize("protection", ["auto", "client-head"])
def test_noise_that_gradients_undo_is_refused_with_the_reason(protection: str) -> None:
    with pytest.raises(ConfigError, match="gradient of each next token spells it"):
        read_settings({**NOISY_TEXT, "labels.protection": protection})
    assert read_settings({"model.task": "causal-lm"}).labels.protection == "none"


@pytest.mark.parametrize(
    "flat",
    [
        {"labels.protection": "max-norm", "model.task": "causal-lm"},
        {"labels.protection": "client-head", "train.method": "head"},
        {"labels.protection": "client-head", "labels.debias": True},
        {"labels.protection": "client-tail"},  # the server has no gradient to train on
        {"labels.protection": "client-tail", "train.method": "head", "split.bottom": "joint"},
        {"labels.protection": "client-tail", "labels.tail-weights": "secret"},
        {"labels.protection": "client-tail", "labels.tail-blocks": 0},
        {"labels.protection": "row-noise", "labels.noise-ratio": 0.0},
        {"dp.noise-multiplier": 1.0, "labels.protection": "max-norm"},
        {
            "dp.noise-multiplier": 1.0,
            "labels.protection": "client-head",
            "model.task": "causal-lm",
            "train.method": "lora",
        },
    ],
)
def test_settings_that_exclude_each_other(flat: dict[str, Scalar]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        read_settings(flat)


@pytest.mark.parametrize(
    "flat",
    [
        {"labels.protection": "client-head+marvell", "model.labels": 2},
        {"labels.protection": "client-head", "model.task": "causal-lm", "train.method": "lora"},
        {"labels.protection": "client-tail", "model.task": "causal-lm", "train.method": "head"},
        {"labels.protection": "client-head+row-noise", "model.task": "causal-lm"},
        {"labels.protection": "randomised-response", "labels.debias": True},
        {"dp.noise-multiplier": 1.0, "labels.protection": "client-head"},
        {"dp.noise-multiplier": 1.0, "split.bottom": "joint"},
        {**NOISY_TEXT, "labels.protection": "none"},
        {**NOISY_TEXT, "labels.protection": "client-head+none"},
        {"model.task": "causal-lm", "strategy": "offsite-tuning"},
        {"model.task": "causal-lm"},
    ],
)
def test_settings_that_go_together(flat: dict[str, Scalar]) -> None:
    assert read_settings(flat).to_flat().items() >= flat.items()
