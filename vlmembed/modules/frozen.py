"""Weights that are not trained: left out of checkpoints, and known again.

A LoRA of a few megabytes beside sixteen gigabytes that the run has read from somewhere else is a checkpoint of a few
megabytes. It says which frozen weights belong to it, by a sum over each one's bytes: a gigabyte takes some hundredths
of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

#: Where a checkpoint says what it left out: name → sum, and the type in which it was used.
KEY = "frozen"


def sums(module: nn.Module) -> dict[str, int]:
    """Sum up the bytes of every frozen parameter, under each of its names."""
    return {name: _sum(parameter) for name, parameter in _parameters(module) if not parameter.requires_grad}


def leave_out(checkpoint: dict[str, Any], module: nn.Module, known: Mapping[str, int]) -> None:
    """Take frozen weights out of a checkpoint, and say which they were.

    Args:
        checkpoint: With all weights; changed in place.
        module: Whose they are.
        known: The `sums` of its frozen weights when they were read.
    """
    frozen = {
        name: [known[name], str(parameter.dtype).removeprefix("torch.")]
        for name, parameter in _parameters(module)
        if name in known and not parameter.requires_grad
    }
    if frozen:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if not _belongs(name, frozen)}
        checkpoint[KEY] = frozen


def completed(checkpoint: Mapping[str, Any], module: nn.Module, known: Mapping[str, int]) -> dict[str, Tensor]:
    """Return a checkpoint's weights, and those of a module's own that have to be rounded as they were in training.

    Args:
        checkpoint: From `leave_out`.
        module: With its frozen weights in place.
        known: The `sums` of them when they were read.

    Raises:
        ValueError: If it has weights that the module lacks, or lacks what is trained, or if what is frozen is not what
            the checkpoint was trained with.
    """
    given, frozen, own = checkpoint["state_dict"], checkpoint[KEY], module.state_dict()
    _refuse("lacks weights", [name for name in own if name not in given and not _belongs(name, frozen)])
    _refuse("has weights that this model lacks", [name for name in (*given, *frozen) if name not in own])
    _refuse("was trained with other frozen weights", [name for name in frozen if known.get(name) != frozen[name][0]])
    types = {name: getattr(torch, used) for name, (_, used) in frozen.items()}
    return given | {name: own[name].to(used) for name, used in types.items() if own[name].dtype != used}


def part_of(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Cut a checkpoint down to the weights under a prefix, which their names lose."""
    return {key: within(checkpoint.get(key, {}), prefix) for key in ("state_dict", KEY)}


def within(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what is under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    # Tied weights come under each of their names, as they do in a checkpoint.
    return module.named_parameters(remove_duplicate=False)


def _sum(tensor: Tensor) -> int:
    content = tensor.detach().reshape(-1).view(torch.uint8)
    words = len(content) // 8 * 8
    return int(content[:words].view(torch.int64).sum() + content[words:].sum())


def _belongs(name: str, frozen: Mapping[str, Any]) -> bool:
    """Whether a name is a frozen parameter's, or of something that goes with one: 4-bit weights come with scales."""
    return any(start in frozen for start in accumulate(name.split("."), "{}.{}".format))


def _refuse(complaint: str, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"The checkpoint {complaint}: {len(names)} of them, such as {names[0]}. It belongs to a run with another "
            "model, or with other adapters; give the config.yaml of its own run, and the model that this one names."
        )
