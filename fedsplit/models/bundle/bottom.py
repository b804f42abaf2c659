"""What the server ships to an owner: a bottom as a handful of bounded, checked files.

A bundle is rebuilt without the base model: the family's code is laid out without memory from the
configuration, then given the bundle's tensors.  Nothing in it is executed, and nothing in it can
name code, a path or a remote place: file names, configuration keys and tensors come from closed
lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import fedsplit
from fedsplit.errors import FedsplitError, ModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.bundle import tokenizer as bundle_tokenizer
from fedsplit.models.bundle.bounded_files import check_folder, check_size
from fedsplit.models.bundle.bounded_json import (
    dump_json,
    parse_json,
    refuse_config_keys,
    without_private_keys,
)
from fedsplit.models.splitting.halves import Bottom
from fedsplit.models.splitting.structure import Exit, ZeroEmbedding, ZeroLinear, strip

FORMAT = 1
NARROWED = 2  # the format of a bundle whose parameters travel in a narrower dtype
MAX_LAYERS = 1024
# Bytes that each file may have; no other file is accepted.
LIMITS = {
    "config.json": 1 << 20,
    "fedsplit.json": 1 << 16,
    "tokenizer.json": 1 << 27,
    "tokenizer_config.json": 1 << 20,
    "bottom.safetensors": 1 << 36,
    # Only where the head is the owner's (see fedsplit.models.bundle.head).
    "head.json": 1 << 16,
    "head.safetensors": 1 << 36,
}
WEIGHTS = "bottom.safetensors"
REQUIRED = {"config.json", "fedsplit.json", WEIGHTS}
# Attention code that ships with transformers; other values may name a kernel to be downloaded.
ATTENTION = ("eager", "sdpa")
EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The server's own business (labels, paths), or rebuilt here (dtype, attention).
UNSHIPPED = ("architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Bundle:
    """The files of one bottom, by name.

    Attributes:
        files: contents by name; only names in :data:`LIMITS`, within its sizes.

    Raises:
        ModelError: if a name is not listed, one is missing, or a size is over its bound.
    """

    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name, content in self.files.items():
            check_size(name, len(content), LIMITS)
        missing = sorted(REQUIRED - self.files.keys())
        if missing:
            raise ModelError(f"bundle: must hold {', '.join(missing)}")

    @property
    def digest(self) -> str:
        """Sha256 (hex) over names, lengths and contents, in order of name."""
        sha = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            sha.update(f"{name}\0{len(content)}\0".encode())
            sha.update(content)
        return sha.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files into ``folder``, which is made if need be and must be empty."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ModelError(f"{folder}: must be empty")
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Read a bundle from ``folder``; sizes are checked before anything is read.

        Raises:
            ModelError: if the folder holds anything but plain files of the listed names and sizes.
        """
        paths = check_folder(Path(folder), LIMITS, REQUIRED)
        return cls({p.name: p.read_bytes() for p in paths})


def pack_bottom(bottom: Bottom, tokenizer: Tokenizer | None) -> Bundle:
    """Return the bundle of ``bottom`` and its tokenizer (None: without one).

    Parameters in float32 of which all are exact in bfloat16 or float16 (a base that is stored so)
    travel in that dtype and become the same float32 again at the owner.

    Ships the embeddings, blocks < k, the buffers they use and the base configuration; no head, no
    later block, no label names, no paths.  Of the tokenizer: its ``tokenizer.json``, special
    tokens, padding and truncation sides, length limit and chat template.

    Raises:
        ModelError: if the family cannot be rebuilt from its configuration, or the tokenizer has no
            ``tokenizer.json`` form that encodes alike.
    """
    model = bottom.model
    config = shipped_config(model)
    about = {
        "format": FORMAT,
        "k": bottom.k,
        "task": bottom.task,
        # Carried on so that the owner's numbers are the server's, bit for bit.
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        "versions": {
            "fedsplit": fedsplit.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
    tensors = _tensors(model)
    _check_about(about)
    laid_out = _lay_out(config, about)
    # A buffer may serve later blocks only (another layer type's rotary frequencies).
    known = _tensors(laid_out).keys() | {n for n, _ in model.named_parameters()}
    tensors = {n: t for n, t in tensors.items() if n in known}
    parameters = {n for n, p in model.named_parameters(remove_duplicate=False)}
    narrow = _narrower(t for n, t in tensors.items() if n in parameters)
    if narrow is not None:
        about |= {"format": NARROWED, "widen": "float32"}
    seen: set[int] = set()
    tensors = {
        n: _own(t, narrow if n in parameters and t.dtype == torch.float32 else None, seen)
        for n, t in tensors.items()
    }
    _check_shapes(laid_out, tensors)  # refuse here what no owner could unpack
    files = {
        "config.json": dump_json(config),
        "fedsplit.json": dump_json(about),
        "bottom.safetensors": safetensors.torch.save(tensors),
    }
    if tokenizer is not None:
        files.update(bundle_tokenizer.pack(tokenizer))
    return Bundle(files)


def _narrower(parameters: Iterable[Tensor]) -> torch.dtype | None:
    """Return a dtype of two bytes in which all float32 parameters are exact; None where none is."""
    wide = [p.detach() for p in parameters if p.dtype == torch.float32]
    for dtype in (torch.bfloat16, torch.float16):
        if wide and all(_exact(tensor, dtype) for tensor in wide):
            return dtype
    return None


def _exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    # In pieces: most tensors fail in the first, and none is held a second time.
    pieces = torch.split(tensor.reshape(-1), 1 << 20)
    return all(torch.equal(piece, piece.to(dtype).to(piece.dtype)) for piece in pieces)


def _own(tensor: Tensor, dtype: torch.dtype | None, seen: set[int]) -> Tensor:
    """Return a tensor for a file: on the CPU, in a storage that no other has, in ``dtype``.

    Copied only where it must be: most of a bottom goes from its own memory into the file.
    """
    own = tensor.detach().to("cpu", dtype).contiguous()
    storage = own.untyped_storage().data_ptr()
    if storage in seen:
        own = own.clone()
    seen.add(storage)
    return own


def shipped_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration as owners get it: without code, labels' names and paths."""
    config = parse_json("config.json", model.config.to_json_string(use_diff=False).encode())
    shipped: dict[str, Any] = without_private_keys(
        {k: v for k, v in config.items() if k not in UNSHIPPED}
    )
    return shipped


def unpack_bottom(source: Bundle | str | Path) -> tuple[Bottom, Tokenizer | None]:
    """Rebuild the bottom of a bundle, bit for bit, on the CPU, in evaluation mode.

    Args:
        source: a bundle or the folder of one.  May be hostile: everything is checked.

    Returns:
        The bottom, and the tokenizer if the bundle has one.

    Raises:
        ModelError: if anything is not as it must be; names the file and the bound.
    """
    files, tensors = _read(source)
    about = parse_json("fedsplit.json", files["fedsplit.json"])
    _check_about(about)
    config = parse_json("config.json", files["config.json"])
    model = _lay_out(config, about)
    _check_shapes(model, tensors)
    for name, tensor in tensors.items():
        pieces = torch.split(tensor.reshape(-1), 1 << 20)
        if tensor.is_floating_point() and not all(bool(p.isfinite().all()) for p in pieces):
            raise ModelError(f"bottom.safetensors: {name}: must be finite")
    if about.get("widen"):
        for name, _ in model.named_parameters(remove_duplicate=False):
            if name in tensors and tensors[name].dtype in (torch.bfloat16, torch.float16):
                tensors[name] = tensors[name].float()
    _fill(model, tensors)
    bottom = Bottom(model, int(about["k"]))
    bottom.task = about.get("task")
    tokenizer = bundle_tokenizer.unpack(files)
    if tokenizer is not None and len(tokenizer) > bottom.vocab:
        raise ModelError(
            f"tokenizer.json: {len(tokenizer)} tokens: must be <= {bottom.vocab} embedding rows"
        )
    return bottom.eval(), tokenizer


def _read(source: Bundle | str | Path) -> tuple[Mapping[str, bytes], dict[str, Tensor]]:
    """Return a bundle's small files and its bottom's tensors; those of a folder are mapped."""
    try:
        if isinstance(source, Bundle):
            return source.files, safetensors.torch.load(source.files[WEIGHTS])
        paths = {p.name: p for p in check_folder(Path(source), LIMITS, REQUIRED)}
        small = {n: p.read_bytes() for n, p in paths.items() if not n.endswith(".safetensors")}
        # Its pages belong to the file: a row that is never looked up takes no memory.
        return small, safetensors.torch.load_file(paths[WEIGHTS])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{WEIGHTS}: not a safetensors file: {error}") from error


def _check_about(about: Mapping[str, Any]) -> None:
    k, task, widen = about.get("k"), about.get("task"), about.get("widen")
    if about.get("format") != (FORMAT if widen is None else NARROWED):
        raise ModelError(
            f"fedsplit.json: format={about.get('format')!r}: must be {FORMAT}, or {NARROWED} with "
            "widen"
        )
    if widen not in (None, "float32"):
        raise ModelError(f"fedsplit.json: widen={widen!r}: must be float32 where it is there")
    if type(k) is not int or not 0 <= k < MAX_LAYERS:
        raise ModelError(f"fedsplit.json: k={k!r}: must be an integer in 0..{MAX_LAYERS - 1}")
    if task not in (None, "sequence-classification", "token-classification", "causal-lm"):
        raise ModelError(f"fedsplit.json: task={task!r}: must be a known task")
    for key, allowed in (("attention", ATTENTION), ("experts", EXPERTS)):
        if about.get(key) not in allowed:
            raise ModelError(f"fedsplit.json: {key}={about.get(key)!r}: must be one of {allowed}")


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, but for those of stubs."""
    result: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ZeroEmbedding | ZeroLinear):
            continue
        zeroed = getattr(module, "_zeroed", ())
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if name not in zeroed:
                result[f"{prefix}.{name}" if prefix else name] = tensor
    return result


def _lay_out(config: dict[str, Any], about: Mapping[str, Any]) -> PreTrainedModel:
    """Return the family's base model for k blocks, without memory (on the meta device)."""
    model = lay_out_whole(config, about, AutoModel)
    anatomy = probe(model)
    anatomy.blocks[-1] = Exit(anatomy.blocks[-1])
    return model


def lay_out_whole(
    config: dict[str, Any], about: Mapping[str, Any], auto: Any, **changes: Any
) -> PreTrainedModel:
    """Return the family's model of k + 1 blocks, without memory (on the meta device).

    Args:
        config: a bundle's configuration; may be hostile.
        about: a bundle's checked ``fedsplit.json``.
        auto: transformers' Auto class of the model to make.
        **changes: settings that outrank the configuration.

    Raises:
        ModelError: if the configuration is refused or builds no such model.
    """
    refuse_config_keys("config.json", config)
    settings = config | changes
    kind = settings.pop("model_type", None)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
    )
    if not isinstance(kind, str) or kind not in known or kind not in MODEL_MAPPING_NAMES:
        raise ModelError(f"config.json: model_type={kind!r}: must be a language model's")
    try:
        built: PreTrainedConfig = AutoConfig.for_model(kind, **settings)
        built.use_cache = False  # families that never cache drop the setting when they read it
        layers = built.get_text_config().num_hidden_layers
        if layers != about["k"] + 1:
            raise ModelError(
                f"config.json: num_hidden_layers={layers!r}: must be k + 1 = {about['k'] + 1}"
            )
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                built,
                attn_implementation=about["attention"],
                experts_implementation=about["experts"],
                trust_remote_code=False,
            )
        probe(model)
    except FedsplitError as error:
        raise ModelError(f"config.json: {error}") from error
    except Exception as error:
        raise ModelError(f"config.json: no {kind} model can be built from it: {error}") from error
    return model


def _check_shapes(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Check that everything shipped is used, and that all that the k blocks need is shipped."""
    expected = _tensors(model)
    for name, tensor in tensors.items():
        if name not in expected:
            raise ModelError(f"bottom.safetensors: {name}: must not be there (not of this bottom)")
        like = expected[name]
        if tensor.shape != like.shape:
            raise ModelError(
                f"bottom.safetensors: {name}: shape {tuple(tensor.shape)}: must be "
                f"{tuple(like.shape)} by config.json"
            )
        same = tensor.dtype in FLOATS if like.is_floating_point() else tensor.dtype == like.dtype
        if not same:
            raise ModelError(
                f"bottom.safetensors: {name}: dtype {tensor.dtype}: must be like {like.dtype}"
            )
    blocks = probe(model).blocks_path + "."
    for name in expected.keys() - tensors.keys():
        # Outside the blocks a bottom may lack what its blocks do not use (a final norm, a pooler).
        embedding = expected[name] is getattr(probe(model).input_embeddings, "weight", None)
        if name.startswith(blocks) or embedding:
            raise ModelError(f"bottom.safetensors: {name}: must be there")


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a laid-out model its tensors; what is not shipped becomes zeros that own no memory."""
    expected = _tensors(model)
    strip(model, {id(t) for n, t in expected.items() if n in tensors})
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(
                name, nn.Parameter(tensors[path + name], parameter.is_floating_point())
            )
        for name, buffer in list(module.named_buffers(recurse=False)):
            stub = isinstance(module, ZeroEmbedding | ZeroLinear)
            if stub or name in getattr(module, "_zeroed", ()):
                zeros = torch.zeros(buffer.shape, dtype=dtype)
                module._buffers[name] = zeros
            elif path + name in tensors:
                module._buffers[name] = tensors[path + name]
            else:
                raise ModelError(f"bottom.safetensors: {path}{name}: must be there")
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ModelError(f"config.json: {path}{name} cannot be rebuilt from a bundle")
