"""The module that pools in an exported folder with code: written into it, behind the poolings' own source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.module import Module

from vlmembed.pooling.base import Template
from vlmembed.pooling.tokens import TokenSelection


class ServedPooling(Module):
    """Pools as in training, by a pooling's class and arguments, and those of poolings inside it."""

    config_keys: list[str] = ["pooling", "hidden_size"]

    def __init__(self, pooling: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.hidden_size = hidden_size
        self.layer = _build(pooling)
        self.layer.configure(hidden_size)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add the sentence embedding (B, D) to the features."""
        hidden = features["token_embeddings"]
        if len(self.layer.layers) > 1:
            hidden = torch.stack([features["all_layer_embeddings"][layer] for layer in self.layer.layers])
        features["sentence_embedding"] = self.layer(hidden, features["attention_mask"], features["input_ids"])
        return features

    def get_embedding_dimension(self) -> int:
        """Return D."""
        return int(self.layer.dimension(self.hidden_size))

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write configuration and weights, and this file into the folder above, where Sentence Transformers looks."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        _save_code(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> ServedPooling:  # type: ignore[override]
        """Read configuration and weights."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        options = {name: options[name] for name in names if name in options}
        module = cls(**cls.load_config(model_name_or_path, **options))
        loaded: ServedPooling = cls.load_torch_weights(model_name_or_path, model=module, **options)
        return loaded


class ServedSelection(Module):
    """Keeps the tokens that had a vector in training: sets the attention mask (B, L) by which vectors are returned."""

    config_keys: list[str] = ["selections", "skipped", "template", "num_expansion_tokens"]
    forward_kwargs: set[str] = {"task"}

    def __init__(
        self,
        selections: dict[str, Any],
        skipped: dict[str, list[int]],
        template: list[Any],
        num_expansion_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.selections, self.skipped, self.template = selections, skipped, template
        self.num_expansion_tokens = num_expansion_tokens

    def forward(self, features: dict[str, Any], task: str | None = None, **_: Any) -> dict[str, Any]:
        """Take tokens out of the mask; an input without a task is a document."""
        role = "query" if task == "query" else "document"
        ids, mask = features["input_ids"], features["attention_mask"]
        selection, template = TokenSelection(**self.selections[role]), _template(self.template)
        expansion = self.num_expansion_tokens if role == "query" else 0
        features["attention_mask"] = selection.select(ids, mask, template, self.skipped[role], expansion)
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the configuration, and this file into the folder above, where Sentence Transformers looks."""
        self.save_config(output_path)
        _save_code(output_path)


def _build(value: Any) -> Any:
    """Make a pooling, or a list of them, from its description; leave any other argument as it is."""
    if isinstance(value, list):
        return [_build(item) for item in value]
    if not isinstance(value, dict):
        return value
    arguments = {name: _build(argument) for name, argument in value["arguments"].items()}
    pooling = globals()[value["class"]](**arguments)  # The pooling's class is in this file too.
    if value["template"]:
        pooling.template = _template(value["template"])
    return pooling


def _template(described: list[Any]) -> Template:
    visual, instructions = described
    return Template(tuple(visual), tuple(map(tuple, instructions)))


def _save_code(output_path: str) -> None:
    shutil.copyfile(__file__, Path(output_path).parent / Path(__file__).name)
