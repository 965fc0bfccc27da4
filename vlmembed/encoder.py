"""The encoder, a backbone and a pooling; and the scorer, whose pooling is a score head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.base import DEFAULT_INSTRUCTION, Features, label_token_ids
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.backbones.packing import halve, picked, select
from vlmembed.heads import ScoreHead
from vlmembed.pooling import MeanWithoutInstruction, Pooling
from vlmembed.types import Batch, Inputs, RankingBatch


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
        backbone.appended = pooling.appended
        backbone.learned_tokens = partial(getattr, pooling, "token_embeddings") if pooling.learns_tokens else None

    def configure(self) -> None:
        """Load the backbone's weights and create the pooling's."""
        self.backbone.configure()
        self.pooling.configure(self.backbone.hidden_size)
        for part in self.pooling.modules():
            if isinstance(part, Pooling) and part.reads_template:
                part.template = self.backbone.preprocessor.template

    @property
    def dimension(self) -> int:
        """D, the dimension of the embeddings."""
        return self.pooling.dimension(self.backbone.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    @property
    def dtype(self) -> str:
        """The type of the backbone's weights, such as float32."""
        return str(self.backbone.model.dtype).removeprefix("torch.")

    def encode_images(self, images: Sequence[Inputs]) -> list[Tensor]:
        """Run the vision tower.

        Args:
            images: Chunks of images, from the backbone's preprocessor, on any device.

        Returns:
            Of each image, the features that `forward` takes.
        """
        return [image for chunk in images for image in self.backbone.encode_images(chunk)]

    def encode_missing_images(
        self, images: Sequence[Inputs], kept: Callable[[int], Tensor | None]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Run the vision tower on those images whose features are not kept.

        Args:
            images: As for `encode_images`.
            kept: Returns the features of an image by its key, if it has them.

        Returns:
            By key, the features that were kept, and those that are new.
        """
        keys = [key for chunk in images for key in chunk["keys"].tolist()]
        found = {key: features for key in keys if (features := kept(key)) is not None}
        new: dict[int, Tensor] = {}
        for chunk in images:
            missing = [place for place, key in enumerate(chunk["keys"].tolist()) if key not in found]
            if missing:
                rest = select(chunk, missing)
                new |= zip(rest["keys"].tolist(), self.backbone.encode_images(rest), strict=True)
        return found, new

    def fresh(self):
        return Encoder(self.backbone, self.pooling)

    def forward_with_images(self, inputs: Inputs, images: Sequence[Inputs]) -> Float[Tensor, "B D"]:
        """Encode one chunk, and of the batch's images no more than those that it shows."""
        shown = set(inputs["images"][:, 1].tolist()) if "images" in inputs else set()
        features: dict[int, Tensor] = {}
        for chunk, indices in picked(images, shown):
            features |= zip(indices, self.backbone.encode_images(chunk), strict=True)
        return self(inputs, features)

    def halve(self, batch: Batch | RankingBatch) -> Batch | RankingBatch:
        """Cut every chunk in two; items and images keep their order."""
        images = [
            select(group, half)
            for group in batch.images
            for count in [len(group["keys"])]
            for half in (range(count // 2), range(count // 2, count))
            if half
        ]
        return replace(batch, chunks=[half for chunk in batch.chunks for half in halve(chunk)], images=images)

    def forward(self, inputs: Inputs, features: Features = ()) -> Float[Tensor, "B D"]:
        """Encode one chunk.

        Args:
            inputs: B items, from the backbone's preprocessor, on any device.
            features: Of each image of the batch, where images come in chunks of their own.
        """
        hidden = self.backbone(inputs, self.pooling.layers, features, self.pooling.num_last_tokens)
        mask, tokens = (inputs[name].to(hidden.device, non_blocking=True) for name in ("attention_mask", "input_ids"))
        return self.pooling(hidden, mask, tokens)


class Scorer(Encoder):
    """Turns a chunk of pairs into scores (B, 1): how well each document answers its query.

    Args:
        backbone: Reads the pairs.
        head: Turns its hidden states into one score per pair.
        template: How a query and a document become one input.

    Raises:
        ValueError: If the backbone has instructions, which a pair has not, or the head's pooling asks for them.
    """

    pooling: ScoreHead

    def __init__(self, backbone: VisionLanguageModel, head: ScoreHead, template: PairTemplate) -> None:
        super().__init__(backbone, head)
        unused = {role: text for role, text in backbone.instructions.items() if text not in (None, DEFAULT_INSTRUCTION)}
        if unused:
            raise ValueError(
                f"The backbone has instructions {unused}, which no pair is read with: give model.template its own."
            )
        if any(isinstance(part, MeanWithoutInstruction) for part in head.modules()):
            raise ValueError(
                "MeanWithoutInstruction does not know where the instruction of a pair ends. Choose another pooling."
            )
        backbone.instructions = {"query": None, "document": None}
        backbone.pair_template = template
        self.template = template

    def configure(self) -> None:
        """Load the backbone's weights and create the head's.

        Raises:
            ValueError: If an answer of the head is not one token.
        """
        super().configure()
        if self.pooling.label_tokens:
            tokens = label_token_ids(self.backbone.preprocessor.processor.tokenizer, self.pooling.label_tokens)
            self.pooling.bind_lm_head(self.backbone.lm_head_rows(tokens), partial(self.backbone.embed, tokens))
