"""The encoder, a backbone and a pooling; one that keeps a vector a token; and the scorer, with a score head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmembed.backbones import VisionLanguageModel
from vlmembed.backbones.base import DEFAULT_INSTRUCTION, Features, label_token_ids
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.backbones.packing import halve, picked, select
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.heads import ScoreHead
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.pooling import MeanWithoutInstruction, Pooling, TokenProjection, TokenSelection
from vlmembed.pooling.base import at_least_float32
from vlmembed.types import Batch, Inputs, RankingBatch, Role


class Encoder(nn.Module):
    """Turns a chunk of inputs into embeddings, not normalised: losses and metrics do that at their dimension."""

    #: How pairs become one input, where pairs are read.
    template: PairTemplate | None = None
    #: Tokens behind every query; a number is of padding tokens.
    expansion_tokens: int | Sequence[str] | None = None

    def __init__(self, backbone: VisionLanguageModel, pooling: Pooling) -> None:
        super().__init__()
        if any(isinstance(part, TokenProjection) for part in pooling.modules()) != isinstance(self, MultiVectorEncoder):
            raise ValueError(
                "TokenProjection gives each token a vector: it is the projection of "
                f"vlmembed.modules.MultiVectorModule, and no pooling makes one of them (in {type(pooling).__name__})."
            )
        self.backbone = backbone
        self.pooling = pooling

    @cached_property
    def preprocessor(self) -> ChatPreprocessor:
        """What makes the inputs; it needs no weights, and can be sent to loader workers."""
        pooling = self.pooling
        preprocessor = self.backbone.make_preprocessor(
            self.template, pooling.appended, pooling.learns_tokens, self.expansion_tokens
        )
        if any(isinstance(part, MeanWithoutInstruction) for part in pooling.modules()):
            preprocessor.fixed_instructions = MeanWithoutInstruction.__name__
        return preprocessor

    def configure(self) -> None:
        """Load the backbone's weights and create the pooling's."""
        learned_tokens = partial(getattr, self.pooling, "token_embeddings") if self.pooling.learns_tokens else None
        self.backbone.configure(self.preprocessor, learned_tokens)
        self.pooling.configure(self.backbone.hidden_size)
        for part in self.pooling.modules():
            if isinstance(part, Pooling) and part.reads_template:
                part.template = self.preprocessor.template

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
        """Run the vision tower on chunks of images, on any device; return the features of each, for `forward`."""
        return [features for chunk in images for features in self.backbone.encode_images(chunk)]

    def encode_missing_images(
        self, images: Sequence[Inputs], cached: Callable[[int], Tensor | None]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Run the vision tower on those images for whose keys ``cached`` has no features.

        Returns the features of each image, as from `encode_images`; and by key those that are new.
        """
        features: dict[int, Tensor] = {}
        new: dict[int, Tensor] = {}
        for chunk in images:
            keys = chunk["keys"].tolist()
            features |= {key: image for key in keys if (image := cached(key)) is not None}
            if missing := [index for index, key in enumerate(keys) if key not in features]:
                encoded = self.backbone.encode_images(select(chunk, missing))
                new |= zip([keys[index] for index in missing], encoded, strict=True)
        features |= new
        return [features[key] for chunk in images for key in chunk["keys"].tolist()], new

    def forward_with_images(self, inputs: Inputs, images: Sequence[Inputs]) -> Float[Tensor, "B D"]:
        """Encode a chunk of B items, and of the batch's images no more than those that it shows."""
        shown = set(inputs["images"][:, 1].tolist()) if "images" in inputs else set()
        features: dict[int, Tensor] = {}
        for chunk, indices in picked(images, shown):
            # Of each image (L, K, H): its tokens, and the layers that take its features.
            features |= zip(indices, self.backbone.encode_images(chunk), strict=True)
        return self(inputs, features)

    def halve(self, batch: Batch | RankingBatch) -> Batch | RankingBatch:
        """Cut every chunk in two; items and images keep their order."""
        images = []
        for group in batch.images:
            count = len(group["keys"])
            images += [select(group, half) for half in (range(count // 2), range(count // 2, count)) if half]
        return replace(batch, chunks=[half for chunk in batch.chunks for half in halve(chunk)], images=images)

    def fresh(self) -> Encoder:
        """Return the same encoder without weights."""
        return Encoder(self.backbone, self.pooling)

    def by_item(self, outputs: Tensor, chunks: Sequence[Inputs]) -> Vectors:
        """Return what was made of each item of some chunks, which come in the same order."""
        return outputs

    def forward(self, inputs: Inputs, features: Features = ()) -> Float[Tensor, "B D"]:
        """Encode a chunk of B items; ``features`` are of all images of the batch, where these come in own chunks."""
        # (B, L, H), or (K, B, L, H) for a pooling of K layers.
        hidden = self.backbone(inputs, self.pooling.layers, features, self.pooling.num_last_tokens)
        mask, tokens = (inputs[name].to(hidden.device, non_blocking=True) for name in ("attention_mask", "input_ids"))
        return self.pooling(hidden, mask, tokens)  # (B, D)


class MultiVectorEncoder(Encoder):
    """Turns a chunk of items into the vectors of their tokens, one item's after the other's.

    ``selections`` say which tokens of each role's items have one, ``similarity`` how two items are compared:
    ``maxsim`` adds up over a query's vectors, ``meanmaxsim`` averages; ``expansion_tokens`` stand behind queries.
    """

    pooling: TokenProjection

    def __init__(
        self,
        backbone: VisionLanguageModel,
        projection: TokenProjection,
        selections: Mapping[Role, TokenSelection],
        similarity: str = "maxsim",
        expansion_tokens: int | Sequence[str] | None = None,
    ) -> None:
        super().__init__(backbone, projection)
        self.selections = selections
        self.similarity = similarity
        self.expansion_tokens = expansion_tokens

    @cached_property
    def preprocessor(self) -> ChatPreprocessor:
        """As `Encoder.preprocessor`; it also says which tokens are kept."""
        preprocessor = super().preprocessor
        preprocessor.selections = self.selections
        if any(selection.part == "without_instruction" for selection in self.selections.values()):
            preprocessor.fixed_instructions = "A selection of tokens without_instruction"
        preprocessor.skipped  # noqa: B018  # Refuses what is no token, before weights are loaded.
        return preprocessor

    def fresh(self) -> MultiVectorEncoder:
        """Return the same encoder without weights."""
        return MultiVectorEncoder(self.backbone, self.pooling, self.selections, self.similarity, self.expansion_tokens)

    def by_item(self, outputs: Float[Tensor, "T D"], chunks: Sequence[Inputs]) -> MultiVectors:
        """Give the vectors of some chunks to their items."""
        lengths = torch.cat([chunk.get("kept", chunk["attention_mask"]).sum(dim=1) for chunk in chunks])
        return MultiVectors(outputs, lengths.cpu(), self.similarity == "meanmaxsim")

    def forward(self, inputs: Inputs, features: Features = ()) -> Float[Tensor, "T D"]:
        """Encode a chunk: the T tokens of all its items that are kept; see `Encoder.forward`."""
        kept = inputs.get("kept", inputs["attention_mask"])
        read = {name: tensor for name, tensor in inputs.items() if name != "kept"}
        hidden = self.backbone(read, self.pooling.layers, features)  # (B, L, H)
        # Where they are is known on the host: (B, L, H) → (T, H), and nothing waits for the device.
        tokens = kept.flatten().nonzero()[:, 0].to(hidden.device, non_blocking=True)
        return self.pooling.project(at_least_float32(hidden.flatten(0, 1).index_select(0, tokens)))  # (T, D)


class Scorer(Encoder):
    """Turns a chunk of pairs into scores (B, 1): how well each document answers its query."""

    pooling: ScoreHead
    template: PairTemplate

    def __init__(self, backbone: VisionLanguageModel, head: ScoreHead, template: PairTemplate) -> None:
        super().__init__(backbone, head)
        self.template = template
        unused = {role: text for role, text in backbone.instructions.items() if text not in (None, DEFAULT_INSTRUCTION)}
        if unused:
            raise ValueError(
                f"The backbone has instructions {unused}, which no pair is read with: give model.template its own."
            )
        if any(isinstance(part, MeanWithoutInstruction) for part in head.modules()):
            raise ValueError(
                "MeanWithoutInstruction does not know where the instruction of a pair ends: choose another."
            )

    def fresh(self) -> Scorer:
        """Return the same scorer without weights."""
        return Scorer(self.backbone, self.pooling, self.template)

    def configure(self) -> None:
        """Load the backbone's weights and create the head's; refuse label tokens that are not one token each."""
        super().configure()
        if self.pooling.label_tokens:
            tokens = label_token_ids(self.preprocessor.processor.tokenizer, self.pooling.label_tokens)
            self.pooling.bind_lm_head(self.backbone.lm_head_rows(tokens), partial(self.backbone.embed, tokens))
