"""Where a top runs: one device, or several by a map."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsplit.config.devices import AUTOMATIC
from fedsplit.errors import ConfigError
from fedsplit.models.splitting.halves import Upper


def place(
    top: Upper,
    device_map: str | torch.device | Mapping[str, str | int],
    dtype: torch.dtype | None = None,
) -> Upper:
    """Move ``top`` and return it; ``hidden`` may then come from anywhere, logits are float32.

    Args:
        top: a top or a head; changed in place.
        device_map: a device (``"cpu"``, ``"cuda:1"``), one of ``auto``, ``balanced``,
            ``balanced_low_0``, ``sequential`` (accelerate spreads the modules over what is there,
            never cutting through a block), or a map from module name, as inside ``top.model``, to
            device.
        dtype: cast parameters and buffers first; None leaves them.

    Raises:
        ConfigError: if the device or map is not one that this machine can serve.
    """
    if dtype is not None:
        top.model.to(dtype)  # type: ignore[arg-type]
    if isinstance(device_map, str) and device_map not in AUTOMATIC:
        device_map = _device(device_map)
    if isinstance(device_map, torch.device):
        _present(device_map)
        top.model.to(device_map)  # type: ignore[arg-type]
        return top
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(top.model, "_no_split_modules", None) or [])
    if isinstance(device_map, str):
        memory = None
        if device_map != "sequential":
            memory = get_balanced_memory(
                top.model,
                no_split_module_classes=whole,
                low_zero=device_map == "balanced_low_0",
            )
        chosen = infer_auto_device_map(top.model, max_memory=memory, no_split_module_classes=whole)
    else:
        chosen = dict(device_map)
    try:
        dispatch_model(top.model, device_map=chosen)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"device_map={chosen!r}: must fit the model and machine: {error}") from (
            error
        )
    return top


def device_of(name: str, setting: str) -> torch.device:
    """Return the device that a setting names.

    Raises:
        ConfigError: it is none, or not one of this machine; names the setting.
    """
    device = _device(name, setting)
    _present(device, setting)
    return device


def _device(name: str, setting: str = "device_map") -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        known = ", ".join(AUTOMATIC)
        raise ConfigError(
            f"{setting}={name!r}: must be a device, a map, or one of {known}"
        ) from error


def _present(device: torch.device, setting: str = "device_map") -> None:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{setting}={str(device)!r}: must be one of this machine's "
            f"{torch.cuda.device_count()} CUDA devices"
        )
