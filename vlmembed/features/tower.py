"""The tower that makes the features: that it is frozen, and which one it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def refuse_trainable(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that a tower's features cannot change.

    Args:
        named_parameters: The tower's, after the adapters.

    Raises:
        ValueError: If one of them is trained.
    """
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            raise ValueError(
                f"The feature cache needs a frozen vision tower, but {name!r} is trained, so the features change in "
                "every step. Freeze it with the adapter vlmembed.adapters.Freeze(modules: [vision, merger]), keep a "
                "LoRA's target_modules out of it, or remove the feature cache from the YAML."
            )


def fingerprint(parameters: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """Identify what makes features.

    Args:
        parameters: The tower's weights and buffers, as in ``state_dict().items()``, on any device.
        settings: All else that decides about the features, as JSON knows it: the processor's settings, the precision.

    Returns:
        32 hexadecimal digits: others where a name, type, shape, byte or setting is another.

    Raises:
        TypeError: If a setting is nothing that JSON knows.
    """
    hashed = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=16)
    for name, parameter in parameters:
        hashed.update(f"\0{name} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
        # One at a time: the tower may be on a device, and the host need not hold it whole.
        hashed.update(bytes_of(parameter.detach().cpu()))
    return hashed.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return what a tensor on the CPU holds, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
