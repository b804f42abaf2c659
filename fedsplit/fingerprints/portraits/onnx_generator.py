"""Image generators as ONNX files: z (1, 512) float32 -> a picture.

A StyleGAN2 trained on AFHQ dogs, as in HuRef (arXiv 2312.04828), section 5, exports to this form.
Signature: one input, float32, (1, 512), the first axis possibly symbolic; one output of rank 4,
(1, 3, H, W) or (1, H, W, 3), uint8 (0 to 255) or float32 (-1 to 1, as StyleGANs answer; a file
whose metadata says ``image_range = "0,1"`` is read so).

An ONNX file is a program, from whoever sent it.  Checked before anything runs: the file's size,
that it names no other file (external tensors), only standard operators (and functions that it
defines by them), the signature.  After: the picture's size and finiteness, and that the same vector
gives the same picture.  It runs on the CPU in this process; a hostile file can still waste time.

Needs the ``onnx`` extra: ``pip install fedsplit[onnx]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from fedsplit import storage
from fedsplit.errors import LineageError, ModelError

DIMENSION = 512
MAX_BYTES = 1 << 30
MAX_SIDE = 2048
STANDARD = ("", "ai.onnx")
RANGES = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0)}


class OnnxGenerator:
    """Generator of pictures, read from an ONNX file.

    Args:
        path: the ONNX file.
        max_bytes: largest file that is read.
        threads: of its arithmetic.

    Raises:
        ModelError: for a missing package, a file that is damaged, too large, not self-contained or
            not of standard operators, or of another signature; names what was found and expected.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = MAX_BYTES, threads: int = 2) -> None:
        self.path = Path(path)
        onnx, runtime = _packages()
        data = _read(self.path, max_bytes)
        model = _parsed(onnx, data, self.path)
        _check_program(onnx, model, self.path)
        self._input, self._output, self.dtype = _check_signature(onnx, model.graph, self.path)
        entries = {p.key: p.value for p in model.metadata_props}
        stated = entries.get("image_range", "-1,1").replace(" ", "")
        if stated not in RANGES:
            raise ModelError(f"{self.path}: image_range={stated!r}: must be one of {list(RANGES)}")
        self._low, self._high = RANGES[stated]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self._session = runtime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no public base
            raise ModelError(f"{self.path}: cannot be run: {_first(error)}") from error
        self._proved = False

    def __call__(self, vector: ArrayLike, size: int = 0) -> Image.Image:
        """Return the RGB picture of a 512-vector; ``size`` is ignored (a ``Painter`` has one).

        Raises:
            LineageError: for a vector that is not 512 finite numbers.
            ModelError: if the program fails, or its picture is not one.
        """
        del size
        z = np.asarray(vector, dtype=np.float32)
        if z.shape != (DIMENSION,) or not bool(np.isfinite(z).all()):
            raise LineageError(f"vector of shape {z.shape}: must be ({DIMENSION},) and finite")
        picture = self._pixels(self._run(z))
        if not self._proved:
            if not np.array_equal(picture, self._pixels(self._run(z))):
                raise ModelError(
                    f"{self.path}: gives another picture for the same vector; export it with "
                    f"constant noise"
                )
            self._proved = True
        return Image.fromarray(picture)

    def _run(self, z: NDArray[np.float32]) -> NDArray[Any]:
        try:
            found = self._session.run([self._output], {self._input: z[None]})[0]
        except Exception as error:
            raise ModelError(f"{self.path}: failed while running: {_first(error)}") from error
        return np.asarray(found)

    def _pixels(self, found: NDArray[Any]) -> NDArray[np.uint8]:
        shape = found.shape
        if len(shape) != 4 or shape[0] != 1 or 3 not in (shape[1], shape[3]):
            raise ModelError(f"{self.path}: answered {shape}: must be (1, 3, H, W) or (1, H, W, 3)")
        image = found[0].transpose(1, 2, 0) if shape[1] == 3 else found[0]
        if not all(1 <= side <= MAX_SIDE for side in image.shape[:2]):
            raise ModelError(f"{self.path}: picture {image.shape[:2]}: sides must be <= {MAX_SIDE}")
        if image.dtype == np.uint8:
            return np.ascontiguousarray(image)
        if not bool(np.isfinite(image).all()):
            raise ModelError(f"{self.path}: picture contains NaN or infinite values")
        share = (image.astype(np.float64) - self._low) / (self._high - self._low)
        pixels: NDArray[np.uint8] = np.rint(share.clip(0, 1) * 255).astype(np.uint8)
        return pixels


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"generators need the onnx extra ({error.name} is missing): pip install fedsplit[onnx]"
        ) from error
    return onnx, onnxruntime


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        return storage.read_bounded(path, max_bytes)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(onnx: Any, data: bytes, path: Path) -> Any:
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, without importing protobuf
        raise ModelError(f"{path}: not an ONNX file: {_first(error)}") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX file: it holds no graph")
    return model


def _check_program(onnx: Any, model: Any, path: Path) -> None:
    """Check that a file has standard operators and functions made of them, and every tensor."""
    own = {(f.domain, f.name) for f in model.functions}
    bodies = [model.graph.node, *(f.node for f in model.functions)]
    external = onnx.TensorProto.EXTERNAL
    tensors = list(model.graph.initializer)
    tensors += [part for s in model.graph.sparse_initializer for part in (s.values, s.indices)]
    for node, graph_tensors in _nodes(bodies):
        tensors += graph_tensors
        if node.domain not in STANDARD and (node.domain, node.op_type) not in own:
            raise ModelError(
                f"{path}: operator {node.domain}.{node.op_type}: only standard ONNX operators may "
                f"be used"
            )
    for tensor in tensors:
        if tensor.data_location == external or tensor.external_data:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} lies in another file; export one file that holds "
                f"everything"
            )


def _nodes(bodies: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every node, those of nested graphs too, with the tensors that it carries."""
    pending = list(bodies)
    while pending:
        for node in pending.pop():
            tensors: list[Any] = []
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    tensors += [sparse.values, sparse.indices]
                for graph in (attribute.g, *attribute.graphs):
                    tensors += list(graph.initializer)
                    for sparse in graph.sparse_initializer:
                        tensors += [sparse.values, sparse.indices]
                    pending.append(graph.node)
            yield node, tensors


def _check_signature(onnx: Any, graph: Any, path: Path) -> tuple[str, str, str]:
    """Return (input's name, output's name, output's dtype)."""
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.UINT8: "uint8"}
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    outputs = list(graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        found = [v.name for v in inputs], [v.name for v in outputs]
        raise ModelError(
            f"{path}: inputs {found[0]} and outputs {found[1]}: must be one vector and one picture"
        )
    dtype, shape = _form(inputs[0])
    if names.get(dtype) != "float32" or len(shape) != 2 or shape[1] != DIMENSION:
        raise ModelError(
            f"{path}: input {inputs[0].name!r} is {names.get(dtype, dtype)} {shape}: must be "
            f"float32 (1, {DIMENSION})"
        )
    if shape[0] not in (1, None):
        raise ModelError(f"{path}: input {inputs[0].name!r}: batch {shape[0]}: must be 1")
    dtype, shape = _form(outputs[0])
    if dtype not in names:
        raise ModelError(
            f"{path}: output {outputs[0].name!r} has element type {dtype}: must be float32 or uint8"
        )
    fits = len(shape) == 4 and shape[0] in (1, None) and bool({3, None} & {shape[1], shape[3]})
    if not fits or any(s is not None and s > MAX_SIDE for s in shape):
        raise ModelError(
            f"{path}: output {outputs[0].name!r} is {shape}: must be (1, 3, H, W) or "
            f"(1, H, W, 3), sides <= {MAX_SIDE}"
        )
    return str(inputs[0].name), str(outputs[0].name), names[dtype]


def _form(value: Any) -> tuple[int, tuple[int | None, ...]]:
    """Return (element type, shape); None for a symbolic axis."""
    kind = value.type.tensor_type
    axes = tuple(
        int(axis.dim_value) if axis.HasField("dim_value") else None for axis in kind.shape.dim
    )
    return int(kind.elem_type), axes


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
