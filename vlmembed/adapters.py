"""Adapters: what is trained of a backbone, and through what. Applied in the order in which a config lists them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from vlmembed.backbones import VisionLanguageModel


class Adapter(ABC):
    """Changes what is trainable in a loaded backbone."""

    @abstractmethod
    def apply(self, backbone: VisionLanguageModel) -> None:
        """Change the backbone in place; a ValueError if nothing in it matches."""


class LoRA(Adapter):
    """Low-rank adaptation (arXiv:2106.09685) through peft; everything else in the backbone is frozen.

    DoRA, rsLoRA and PiSSA are options of peft's configuration; QLoRA is LoRA with the backbone's ``load_in_4bit``. The
    adapters are merged into the weights before export.

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
        names = [f".{name}" for name, _ in backbone.model.named_modules()]
        targets = self.config.target_modules
        try:
            # peft is content if one name of a list matches, so a misspelt one would go unnoticed.
            for target in () if isinstance(targets, str) else targets or ():
                if not any(name.endswith(f".{target}") for name in names):
                    raise ValueError(f"No module is called {target!r}.")
            backbone.model = get_peft_model(backbone.model, self.config)  # type: ignore[assignment]
        except ValueError as error:
            modules = backbone.model.named_modules()
            linear = sorted({name.split(".")[-1] for name, module in modules if isinstance(module, nn.Linear)})
            raise ValueError(
                f"LoRA with target_modules={targets!r} does not fit {backbone.checkpoint!r}: {error} Its linear layers "
                f"are called {', '.join(linear)}."
            ) from error


class Freeze(Adapter):
    r"""Keeps parts of the backbone as they are.

    Args:
        modules: What to freeze: ``vision``, ``merger``, ``audio`` or ``language``, or regular expressions that are
            searched for in parameter names, such as ``visual\.blocks\.[0-5]\.``.
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
    """Return the backbone's parameters that a group's name or a regular expression means, with their names."""
    parameters = [*backbone.named_parameters()]
    if pattern in backbone.groups:
        matches = [entry for entry in parameters if backbone.group_of(entry[0]) == pattern]
    else:
        matches = [entry for entry in parameters if re.search(pattern, entry[0])]
    if not matches:
        raise ValueError(
            f"The pattern {pattern!r} matches no parameter of {backbone.checkpoint!r}. Groups are "
            f"{', '.join(backbone.groups)}; names look like {parameters[0][0]} and {parameters[-1][0]}."
        )
    return matches


def merge(backbone: VisionLanguageModel) -> None:
    """Fold a LoRA into the weights that it adapts, so that the model is an ordinary one again."""
    if isinstance(backbone.model, PeftModel):
        backbone.model = backbone.model.merge_and_unload(safe_merge=True)
