"""Generators of pictures as ONNX files: what is accepted, and what is refused before it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.portraits.onnx_generator import OnnxGenerator
from fedsplit.fingerprints.portraits.sheet import sheet_image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
H, W = 6, 5
Build = Callable[..., Path]


def _weights(columns: int) -> Any:
    values = np.random.default_rng(0).standard_normal((512, columns)).astype(np.float32) / 30
    return onnx.numpy_helper.from_array(values, "weights")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A linear generator, with whatever is to be wrong about it."""

    def make(
        *,
        inputs: Any = None,
        output: Any = (1, 3, H, W),
        dtype: Any = onnx.TensorProto.FLOAT,
        nodes: Any = None,
        weights: Any = None,
        metadata: dict[str, str] | None = None,
        domains: tuple[str, ...] = (),
    ) -> Path:
        helper = onnx.helper
        shape = onnx.numpy_helper.from_array(np.array([1, *output[1:]], dtype=np.int64), "shape")
        if inputs is None:
            inputs = [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 512])]
        if nodes is None:
            nodes = [
                helper.make_node("MatMul", ["z", "weights"], ["flat"]),
                helper.make_node("Tanh", ["flat"], ["bounded"]),
                helper.make_node("Reshape", ["bounded", "shape"], ["image"]),
            ]
        graph = helper.make_graph(
            nodes,
            "generator",
            inputs,
            [helper.make_tensor_value_info("image", dtype, list(output))],
            [weights or _weights(int(np.prod(output[1:]))), shape],
        )
        sets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=9)
        for name, value in (metadata or {}).items():
            helper.set_model_props(model, {name: value})
        path = tmp_path / "generator.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


def _vector(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(512)


@pytest.mark.parametrize("output", [(1, 3, H, W), (1, H, W, 3)])
def test_a_picture_in_either_order_of_axes(build: Build, output: tuple[int, ...]) -> None:
    draw = OnnxGenerator(build(output=output))
    vectors = (_vector(), _vector() + 1e-3, _vector(1))
    near, again, far = (np.asarray(draw(vector)) for vector in vectors)
    assert near.shape == (H, W, 3)
    assert near.dtype == np.uint8
    moved = np.abs(near.astype(int) - again.astype(int)).mean()
    assert moved < 0.2 * np.abs(near.astype(int) - far.astype(int)).mean()


def test_the_stated_range_of_values(build: Build) -> None:
    plain = np.asarray(OnnxGenerator(build())(_vector()), dtype=float)
    unit = OnnxGenerator(build(metadata={"image_range": "0,1"}))
    stated = np.asarray(unit(_vector()), dtype=float)
    expected = np.rint((2 * plain - 255).clip(0, 255))
    assert np.abs(stated - expected).max() <= 2
    with pytest.raises(ModelError, match="image_range='0,2'"):
        OnnxGenerator(build(metadata={"image_range": "0,2"}))


def test_a_sheet_of_a_generators_pictures(build: Build) -> None:
    wide = OnnxGenerator(build(output=(1, 3, 2, 8)))
    page = np.asarray(sheet_image([("", [("base", _vector())])], size=32, painter=wide))
    portrait = page[14:46, 10:42]
    assert (portrait[[0, -1]] == 255).all()  # the picture is in the middle, white around it
    assert (portrait[16] != 255).any()


def _input(kind: Any, shape: list[Any]) -> Any:
    return [onnx.helper.make_tensor_value_info("z", kind, shape)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"inputs": _input(onnx.TensorProto.DOUBLE, [1, 512])}, r"must be float32 \(1, 512\)"),
        ({"inputs": _input(onnx.TensorProto.FLOAT, [1, 256])}, r"\(1, 256\): must be float32"),
        ({"inputs": _input(onnx.TensorProto.FLOAT, [4, 512])}, "batch 4: must be 1"),
        ({"inputs": _input(onnx.TensorProto.FLOAT, [512])}, r"must be float32 \(1, 512\)"),
        (
            {
                "inputs": [
                    *_input(onnx.TensorProto.FLOAT, [1, 512]),
                    onnx.helper.make_tensor_value_info("label", onnx.TensorProto.FLOAT, [1]),
                ]
            },
            r"inputs \['z', 'label'\]",
        ),
        ({"output": (1, 4, H, W)}, r"must be \(1, 3, H, W\)"),
        ({"output": (1, 3, 4096, 4)}, "sides <= 2048"),
        ({"dtype": onnx.TensorProto.INT64}, "must be float32 or uint8"),
        (
            {
                "nodes": [onnx.helper.make_node("Steal", ["z"], ["image"], domain="evil.ops")],
                "domains": ("evil.ops",),
            },
            r"operator evil\.ops\.Steal",
        ),
    ],
)
def test_wrong_signatures_and_operators_are_named(
    build: Build, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint):
        OnnxGenerator(build(**change))


def test_a_tensor_in_another_file_is_refused(build: Build) -> None:
    weights = _weights(3 * H * W)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(ModelError, match="'weights' lies in another file"):
        OnnxGenerator(build(weights=weights))


def test_another_picture_each_time_is_refused(build: Build) -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["z", "weights"], ["flat"]),
        helper.make_node("RandomNormalLike", ["flat"], ["noise"]),
        helper.make_node("Add", ["flat", "noise"], ["noisy"]),
        helper.make_node("Reshape", ["noisy", "shape"], ["image"]),
    ]
    with pytest.raises(ModelError, match="another picture for the same vector"):
        OnnxGenerator(build(nodes=nodes))(_vector())


def test_pictures_that_are_none(build: Build, tmp_path: Path) -> None:
    helper = onnx.helper
    divide = [
        helper.make_node("MatMul", ["z", "weights"], ["flat"]),
        helper.make_node("Sub", ["flat", "flat"], ["zero"]),
        helper.make_node("Div", ["flat", "zero"], ["infinite"]),
        helper.make_node("Reshape", ["infinite", "shape"], ["image"]),
    ]
    with pytest.raises(ModelError, match="NaN or infinite"):
        OnnxGenerator(build(nodes=divide))(_vector())
    draw = OnnxGenerator(build())
    for bad in (np.zeros(511), np.full(512, np.nan)):
        with pytest.raises(LineageError, match="must be"):
            draw(bad)
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x00\x01 nothing of the kind")
    with pytest.raises(ModelError, match="not an ONNX file"):
        OnnxGenerator(junk)
    with pytest.raises(ModelError, match="cannot be read"):
        OnnxGenerator(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="must be <= 10"):
        OnnxGenerator(build(), max_bytes=10)


def test_the_commands_draw_with_a_given_generator(
    build: Build, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from fedsplit.cli import app_cli

    tiny("llama").save_pretrained(tmp_path / "model")
    picture = tmp_path / "model.png"
    arguments = ["fingerprint", str(tmp_path / "model"), "--picture", str(picture), "--generator"]
    done = CliRunner().invoke(app_cli, [*arguments, str(build())])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    bad = CliRunner().invoke(app_cli, [*arguments, str(build(output=(1, 4, H, W)))])
    assert isinstance(bad.exception, ModelError)
    assert "must be (1, 3, H, W)" in str(bad.exception)
    svg = [*arguments[:3], str(tmp_path / "model.svg"), "--generator", str(build())]
    refused = CliRunner().invoke(app_cli, svg)
    assert "must end in .png" in str(refused.exception)
