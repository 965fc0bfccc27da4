"""The encoder: a backbone and a pooling."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmembed.backbones import VisionLanguageModel
from vlmembed.pooling import Pooling
from vlmembed.types import Inputs


class Encoder(nn.Module):
    """Turns a chunk of inputs into embeddings, not normalised: losses and metrics do that at the dimension they want.

    Args:
        backbone: Reads the inputs.
        pooling: Turns its hidden states into one embedding per item.
    """

    def __init__(self, backbone: VisionLanguageModel, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling

    def configure(self) -> None:
        """Load the backbone's weights and create the pooling's."""
        self.backbone.configure()
        self.pooling.configure(self.backbone.hidden_size)

    @property
    def dimension(self) -> int:
        """D, the dimension of the embeddings."""
        return self.pooling.dimension(self.backbone.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> str:
        """The type of the backbone's weights, such as float32."""
        return str(self.backbone.model.dtype).removeprefix("torch.")

    def forward(self, inputs: Inputs) -> Float[Tensor, "B D"]:
        """Encode one chunk.

        Args:
            inputs: B items, from the backbone's preprocessor, on any device.
        """
        # Chunks wait on the host and come over one at a time, so device memory does not grow with the batch.
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        hidden = self.backbone(inputs, self.pooling.layers)
        return self.pooling(hidden, inputs["attention_mask"], inputs["input_ids"])
