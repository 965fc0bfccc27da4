"""The module that pools in an exported folder with code of its own: written into it, together with the pooling."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.base.modules.module import Module

from vlmembed.pooling import Template


class TrainedPooling(Module):
    """Pools as it was trained to.

    Args:
        pooling: The pooling's class and arguments, those of poolings inside it, and what its token ids mean.
        hidden_size: Of the token states.
    """

    config_keys: list[str] = ["pooling", "hidden_size"]

    def __init__(self, pooling: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.hidden_size = hidden_size
        self.layer = _build(pooling)
        self.layer.configure(hidden_size)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add the sentence embedding to the features."""
        hidden = features["token_embeddings"]
        if len(self.layer.layers) > 1:
            hidden = torch.stack([features["all_layer_embeddings"][layer] for layer in self.layer.layers])
        features["sentence_embedding"] = self.layer(hidden, features["attention_mask"], features["input_ids"])
        return features

    def get_embedding_dimension(self) -> int:
        """Return the embedding's dimension."""
        dimension: int = self.layer.dimension(self.hidden_size)
        return dimension

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write configuration and weights."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> TrainedPooling:  # type: ignore[override]
        """Read configuration and weights."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        options = {name: options[name] for name in names if name in options}
        module = cls(**cls.load_config(model_name_or_path, **options))
        loaded: TrainedPooling = cls.load_torch_weights(model_name_or_path, model=module, **options)
        return loaded


def _build(value: Any) -> Any:
    """Make a pooling, or a list of them, of what a configuration says; leave anything else as it is."""
    if isinstance(value, list):
        return [_build(each) for each in value]
    if not isinstance(value, dict):
        return value
    pooling = globals()[value["class"]](**{name: _build(each) for name, each in value["arguments"].items()})
    if value["template"]:
        visual, instructions = value["template"]
        pooling.template = Template(tuple(visual), tuple(tuple(each) for each in instructions))
    return pooling
