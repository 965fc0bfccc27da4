"""Adapters: what is trained of a backbone, and through what. Applied in the order in which a config lists them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from vlmembed.backbones import VisionLanguageModel


class Adapter(ABC):
    """Changes what is trainable in a loaded backbone."""

    @abstractmethod
    def apply(self, backbone: VisionLanguageModel) -> None:
        """Change the backbone in place.

        Raises:
            ValueError: If nothing in the backbone matches; an adapter never does nothing silently.
        """


class LoRA(Adapter):
    """Low-rank adaptation (arXiv:2106.09685) through peft; everything else in the backbone is frozen.

    DoRA, rsLoRA, PiSSA and the rest are options of peft's configuration; QLoRA is LoRA with the backbone's
    ``load_in_4bit``. The adapters are merged into the weights before export.

    Args:
        config: peft's configuration, as it is: ``r``, ``lora_alpha``, ``target_modules``, ``use_dora``, …
            ``target_modules`` is a list of module names, or one regular expression over full names such as
            ``.*language_model.*(q_proj|v_proj)``.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def apply(self, backbone: VisionLanguageModel) -> None:
        """Wrap the backbone's model; see `Adapter.apply`."""
        if isinstance(backbone.model, PeftModel):
            raise ValueError(
                "There is a LoRA already, and a second one would freeze it. Give one LoRA all target_modules, and "
                "rank_pattern and alpha_pattern where they differ."
            )
        try:
            _check_targets(backbone.model, self.config.target_modules)
            backbone.model = get_peft_model(backbone.model, self.config)  # type: ignore[assignment]
        except ValueError as error:
            linear = {
                name.split(".")[-1] for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"LoRA with target_modules={self.config.target_modules!r} does not fit {backbone.checkpoint!r}: "
                f"{error} Its linear layers are called {', '.join(sorted(linear))}."
            ) from error


def _check_targets(model: nn.Module, targets: Collection[str] | str | None) -> None:
    """Check each name of a list: peft is content if one of them matches, so a misspelt one would go unnoticed."""
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets or ():
        if not any(name.endswith(f".{target}") for name in names):
            raise ValueError(f"No module is called {target!r}.")


class Freeze(Adapter):
    r"""Keeps parts of the backbone as they are.

    Args:
        modules: What to freeze: ``vision``, ``merger`` or ``language``, or regular expressions that are searched for in
            parameter names, such as ``visual\.blocks\.[0-5]\.``.

    Raises:
        ValueError: If ``modules`` is one string, whose letters would each be a pattern, or empty.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f"Freeze takes a list of at least one group or pattern, got {modules!r}.")
        self.modules = modules

    def apply(self, backbone: VisionLanguageModel) -> None:
        """Freeze the parameters that match; see `Adapter.apply`."""
        for pattern in self.modules:
            for _, parameter in matching_parameters(backbone, pattern):
                parameter.requires_grad_(False)


def matching_parameters(backbone: VisionLanguageModel, pattern: str) -> list[tuple[str, nn.Parameter]]:
    """Return the backbone's parameters that a group's name or a regular expression means, with their names.

    Raises:
        ValueError: If there are none.
    """
    if pattern in backbone.groups:
        found = [entry for entry in backbone.named_parameters() if backbone.group_of(entry[0]) == pattern]
    else:
        found = [entry for entry in backbone.named_parameters() if re.search(pattern, entry[0])]
    if not found:
        names = [name for name, _ in backbone.named_parameters()]
        raise ValueError(
            f"The pattern {pattern!r} matches no parameter of {backbone.checkpoint!r}. "
            f"Groups are {', '.join(backbone.groups)}; names look like {names[0]} and {names[-1]}."
        )
    return found


def merge(backbone: VisionLanguageModel) -> None:
    """Fold a LoRA into the weights that it adapts, so that the model is an ordinary one again."""
    if isinstance(backbone.model, PeftModel):
        backbone.model = backbone.model.merge_and_unload(safe_merge=True)
