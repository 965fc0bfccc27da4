"""One training step's way through the encoder and back: images first, then texts; exact gradients at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vlmembed import distributed, gradcache
from vlmembed.backbones.packing import halve, picked, select
from vlmembed.encoder import Encoder
from vlmembed.features import FeatureCache
from vlmembed.gradcache import CachedStep, GraphBudget
from vlmembed.types import Batch, Inputs, RankingBatch

ADVICE = (
    "Lower data.chunk_size or the backbone's max_pixels, set backbone.gradient_checkpointing: true, or train a LoRA "
    "instead of all weights."
)


class Engine:
    """Embeds batches, and sends the gradient of their embeddings through the encoder.

    The vision tower sees each distinct image of a batch once. Of a frozen tower only the features are needed. A
    trainable tower gets a gradient cache of its own, which collects what all texts send back, and goes backward once
    for each image. Only where no graph may be kept does it run together with the texts of its images: features of a
    whole batch would take the memory that was to be saved.

    Args:
        encoder: With weights, and adapters applied.
        graph_bytes: What graphs may take; see `gradcache.GraphBudget`.
        features: Keeps a frozen tower's features from step to step.
        steps: Per epoch, to predict what ``features`` will take.
    """

    def __init__(
        self, encoder: Encoder, graph_bytes: float = 0.0, features: FeatureCache | None = None, steps: int = 0
    ) -> None:
        self.encoder = encoder
        self.graph_bytes = graph_bytes
        self._features = features
        self._steps = steps
        self._predicted = features is None
        self._short_of_memory = False
        self._texts: CachedStep | None = None
        self._images: CachedStep | None = None
        #: Whether the optimizer steps after this batch, not after another whose gradient is added to its.
        self.before_step = False
        #: What the graphs of the last step took.
        self.room = GraphBudget()
        self._frozen = not encoder.backbone.trains_vision

    def embed(self, batch: Batch | RankingBatch) -> Float[Tensor, "N D"]:
        """Embed a batch's items, or score its pairs, for a loss whose backward `replay` takes over.

        They come in the order of the batch's chunks.

        Where memory runs out, chunks are halved and no graphs are kept from then on; there are no gradients yet that
        could be lost.

        Raises:
            RuntimeError: If memory runs out all the same.
        """
        try:
            return self._embed(_halved(batch) if self._short_of_memory else batch)
        except torch.OutOfMemoryError as error:
            if self._short_of_memory or not all("images" in chunk for chunk in batch.chunks):
                raise RuntimeError(f"{_description(batch)} {ADVICE}") from error
            print(f"{_description(batch)} Chunks are halved, and no graphs are kept, from now on.")
        # Outside of the handler, because its traceback holds on to what was computed.
        self._short_of_memory, self.graph_bytes = True, 0.0
        self._texts = self._images = None
        torch.cuda.empty_cache()
        return self.embed(batch)

    def _embed(self, batch: Batch | RankingBatch) -> Tensor:
        self.room = GraphBudget(self.graph_bytes, self.encoder.parameters())
        self._texts = gradcache.embed(self._see_images(batch), batch.chunks, self.room)
        return self._texts.embeddings

    def _see_images(self, batch: Batch | RankingBatch) -> Callable[[Inputs], Tensor]:
        """See the images that can be seen apart; return what encodes a chunk."""
        self._images = None
        if self._frozen:
            features = self._see(batch)
        elif self.graph_bytes:
            self._images = gradcache.run(self.encoder.backbone.encode_images, batch.images, self.room)
            features = self._images.outputs
        else:
            return lambda chunk: self._encode_with_images(chunk, batch.images)
        return lambda chunk: self.encoder(chunk, features)

    def replay(self) -> None:
        """Send the gradient of the embeddings through the encoder. Call once, after the loss's backward."""
        if self._texts is None:
            raise RuntimeError("Call embed before replay.")
        self._texts.replay()
        if self._images is not None:
            self._images.replay()
        self._texts = self._images = None

    def _encode_with_images(self, chunk: Inputs, images: list[Inputs]) -> Tensor:
        """Encode one chunk, and see no more than the images that it shows."""
        shown = set(chunk["images"][:, 1].tolist()) if "images" in chunk else set()
        features: dict[int, Tensor] = {}
        for kind, places in picked(images, shown):
            features |= zip(places, self.encoder.backbone.encode_images(kind), strict=True)
        return self.encoder(chunk, features)

    @torch.no_grad()
    def _see(self, batch: Batch | RankingBatch) -> list[Tensor]:
        """See all images, or those that are not kept."""
        if self._features is None:
            return self.encoder.encode_images(batch.images)
        features, new = self.encoder.encode_missing_images(batch.images, self._features.get)
        self._predict(sum(image.nbytes for image in features), len(batch.queries))
        for key, image in new.items():
            self._features.put(key, image)
        return features

    def _predict(self, size: int, examples: int) -> None:
        """Say once what the cache will take, or refuse: in all processes alike, going by their first steps."""
        if not self._predicted and self._features is not None:
            size, examples = distributed.total(size), distributed.total(examples)
            self._features.predict(size / examples, self._steps * examples, announce=distributed.print_once)
        self._predicted = True


def _halved(batch: Batch | RankingBatch) -> Batch | RankingBatch:
    """Cut every chunk in two; items and images keep their order."""
    chunks = [half for chunk in batch.chunks for half in halve(chunk)]
    places = [range(len(images["keys"])) for images in batch.images]
    images = [
        select(group, half)
        for group, every in zip(batch.images, places, strict=True)
        for half in (every[: len(every) // 2], every[len(every) // 2 :])
        if half
    ]
    return replace(batch, chunks=chunks, images=images)


def _description(batch: Batch | RankingBatch) -> str:
    shapes = [tuple(chunk["input_ids"].shape) for chunk in batch.chunks]
    return f"Out of memory while embedding {len(shapes)} chunks, the largest of {max(shapes)} items and tokens each."
