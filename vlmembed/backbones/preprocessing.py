"""From items to model inputs, through a checkpoint's own processor and chat template.

The calls are the ones that Sentence Transformers makes on an exported folder: one chat message per item, with the
instruction as the system message. So what was trained is what is served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmembed.backbones.packing import PackedItems, VisionLayout
from vlmembed.media import image_size, load_image, load_video
from vlmembed.pooling import Template
from vlmembed.types import Frame, Inputs, Item, Pair, Part, Preprocessor, Role

Message = dict[str, Any]

#: From an image's height and width to those that the processor resizes it to.
Resized = Callable[[int, int], tuple[int, int]]

#: From conversations to what the model reads.
Applied = Callable[[list[list[Message]]], Inputs]

# What an item costs only decides which items share a chunk, so rough numbers do.
CHARACTERS_PER_TOKEN = 4
PIXELS_PER_TOKEN = 32 * 32
TOKENS_PER_VIDEO_FILE = 10_000


class ChatPreprocessor(Preprocessor):
    """Renders items through a chat template, tokenizes them, and resizes their images.

    Args:
        processor: The checkpoint's processor: tokenizer, image processor and chat template. Made to pad on the right.
        instructions: The system message for each role; None or empty for none.
        generation_prompt: Whether to end with the template's opening of an answer.
        max_length: The most tokens an item may have. A longer text loses its end, but keeps what the template puts
            behind it. None for no limit.
        ends_with_query: Whether the template puts a pair's query behind its document.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        instructions: Mapping[Role, str | None],
        generation_prompt: bool = True,
        max_length: int | None = None,
        ends_with_query: bool = False,
    ) -> None:
        processor.tokenizer.padding_side = "right"
        self.processor = processor
        self.instructions = instructions
        self.generation_prompt = generation_prompt
        self.max_length = max_length
        self.ends_with_query = ends_with_query
        self._tails: dict[tuple[Role, ...], list[int]] = {}

    @cached_property
    def template(self) -> Template:
        """What token ids mean."""
        names = ("image_token_id", "video_token_id")
        visual = tuple(token for name in names if (token := getattr(self.processor, name, None)) is not None)
        roles = [role for role, instruction in self.instructions.items() if instruction]
        return Template(visual, tuple(dict.fromkeys(self._instruction(role) for role in roles)))

    def _instruction(self, role: Role) -> tuple[int, ...]:
        """Return the tokens of a role's system message, with which its items begin."""
        system, _ = self._chat({role: []})
        inputs: Any = self.processor.apply_chat_template([[system]], tokenize=True, return_dict=True)
        return tuple(inputs["input_ids"][0])

    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        """Preprocess items into one chunk.

        Args:
            items: B items, or B pairs.

        Returns:
            ``input_ids`` and ``attention_mask`` of shape (B, L), padded on the right, and what the vision tower reads.

        Raises:
            ValueError: If an image cannot be read, the processor refuses an item, or one with images has more than
                ``max_length`` tokens.
        """
        return self._read(items, self._apply_template)

    def cost(self, item: Item | Pair) -> int:
        """Estimate an item's tokens from the lengths of its texts and the sizes of its images."""
        return sum(_part_cost(part, item.origin) for part in item.parts)

    def _read(
        self,
        items: Sequence[Item | Pair],
        apply: Applied,
        resized: Resized | None = None,
    ) -> Inputs:
        loaded: dict[bytes, Any] = {}
        inputs = _apply_all(apply, [self._conversation(item, resized, loaded) for item in items], items)
        if self.max_length is None or inputs["input_ids"].shape[1] <= self.max_length:
            return inputs
        return self._truncate(inputs, items, self.max_length)

    def _conversation(self, item: Item | Pair, resized: Resized | None, loaded: dict[bytes, Any]) -> list[Message]:
        contents = {
            each.role: [self._content(part, each.origin, resized, loaded) for part in each.parts]
            for each in _items(item)
        }
        return self._chat(contents)

    def _content(self, part: Part, origin: str, resized: Resized | None, loaded: dict[bytes, Any]) -> dict[str, Any]:
        """Return one content part of a chat message. Equal images of a batch are one object."""
        value: Any = part.value
        if part.kind == "image":
            if part.digest not in loaded:
                loaded[part.digest] = load_image(value, origin, resized)
            value = loaded[part.digest]
        if part.kind == "text":
            self._refuse_marks(value, origin)
        if part.kind != "video":
            return {"type": part.kind, part.kind: value}
        processor = getattr(self.processor, "video_processor", None)
        if processor is None:
            raise ValueError(f"{origin or 'An item'} has a video, and this checkpoint's processor takes none.")
        frames, metadata = load_video(value, processor, origin)
        return {"type": "video", "video": frames, "metadata": metadata}

    def _refuse_marks(self, text: str, origin: str) -> None:
        """Refuse a text that holds what stands for an image: it would be taken for the next one."""
        for name in ("image_token", "video_token"):
            mark = getattr(self.processor, name, None)
            if mark and mark in text:
                raise ValueError(
                    f"{origin or 'An item'} has {mark} in its text {text!r:.100}: it stands for an image or a video "
                    "and nothing else. Remove it."
                )

    def _chat(self, contents: Mapping[Role, list[dict[str, Any]]]) -> list[Message]:
        """Return an item as the user's message, or a pair as one message of each role."""
        if len(contents) > 1:
            return [{"role": role, "content": content} for role, content in contents.items()]
        ((role, content),) = contents.items()
        user = {"role": "user", "content": content}
        instruction = self.instructions[role]
        if not instruction:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": instruction}]}, user]

    def _apply_template(self, conversations: list[list[Message]], **pixel_options: Any) -> Inputs:
        parts = (part for chat in conversations for message in chat for part in message["content"])
        metadata = [part["metadata"] for part in parts if part["type"] == "video"]
        inputs: Any = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=self.generation_prompt,
            processor_kwargs={
                "text_kwargs": {"padding": True},
                "images_kwargs": pixel_options,
                # The processor itself samples only where all of a batch's videos are files, or all are frames.
                "videos_kwargs": {**pixel_options, "do_sample_frames": False, "video_metadata": metadata}
                if metadata
                else {},
                "common_kwargs": {"return_tensors": "pt"},
            },
        )
        return dict(inputs)

    def _truncate(self, inputs: Inputs, items: Sequence[Item | Pair], limit: int) -> Inputs:
        for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
            if length <= limit:
                continue
            if any(part.kind != "text" for part in items[row].parts):
                raise ValueError(
                    f"{items[row].origin or 'An item'} has {length} tokens, more than max_length={limit}, and cutting "
                    "it could cut through an image. Raise max_length, or lower max_pixels so that images take fewer."
                )
            if isinstance(items[row], Pair) and self.ends_with_query:
                raise ValueError(
                    f"{items[row].origin}: {length} tokens are more than max_length={limit}, and cutting the pair at "
                    "its end would cut its query. Raise max_length, or use a template that puts the query first."
                )
            tail = self._template_tail(tuple(each.role for each in _items(items[row])))
            if limit <= len(tail):
                raise ValueError(
                    f"max_length={limit} has no room for a text: the chat template alone ends with {len(tail)} tokens. "
                    "Raise max_length."
                )
            inputs["input_ids"][row, limit - len(tail) : limit] = torch.tensor(tail)
        per_token = {*self.processor.tokenizer.model_input_names, "mm_token_type_ids"}
        return {name: value[:, :limit] if name in per_token else value for name, value in inputs.items()}

    def _template_tail(self, roles: tuple[Role, ...]) -> list[int]:
        """Return the tokens that the template puts behind a text: what two texts have in common at their ends."""
        if roles not in self._tails:
            self._tails[roles] = self._common_end(roles)
        return self._tails[roles]

    def _common_end(self, roles: tuple[Role, ...]) -> list[int]:
        texts = [[{"type": "text", "text": text}] for text in ("0", "1 2 3 4")]
        chats = [self._chat(dict.fromkeys(roles, text)) for text in texts]
        one, other = (self._apply_template([chat])["input_ids"][0].tolist()[::-1] for chat in chats)
        common = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        return [token for token, _ in common][::-1]


def _apply_all(apply: Applied, conversations: list[list[Message]], items: Sequence[Item | Pair]) -> Inputs:
    """Apply a template and, where the processor refuses an item, find which: it is given all of them at once."""
    try:
        return apply(conversations)
    except ValueError:
        for item, conversation in zip(items, conversations, strict=True):
            _apply_one(apply, conversation, item)
        raise


def _apply_one(apply: Applied, conversation: list[Message], item: Item | Pair) -> None:
    try:
        apply([conversation])
    except ValueError as error:
        raise ValueError(
            f"{item.origin or 'An item'}: the checkpoint's processor refuses it ({error}). Replace what it holds, or "
            "remove the row."
        ) from error


def _items(item: Item | Pair) -> tuple[Item, ...]:
    return (item.query, item.document) if isinstance(item, Pair) else (item,)


def _part_cost(part: Part, origin: str) -> int:
    if part.kind == "text":
        return len(str(part.value)) // CHARACTERS_PER_TOKEN
    return sum(_frame_cost(frame, origin) for frame in part.frames) or TOKENS_PER_VIDEO_FILE


def _frame_cost(frame: Frame, origin: str) -> int:
    width, height = image_size(frame, origin)
    return width * height // PIXELS_PER_TOKEN


class PackingPreprocessor(ChatPreprocessor):
    """Prepares items as `PackedItems`: images as bytes, to be normalised on the device.

    Args:
        layout: Of the vision tower.
        shares: Whether items that begin alike compute their beginning once.
        **options: As for `ChatPreprocessor`.
    """

    def __init__(self, layout: VisionLayout, shares: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.layout = layout
        self.shares = shares

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> PackedItems:
        """Read the items of a batch; see `Preprocessor.prepare`."""
        inputs = self._read(items, self._apply_once, self._resized if draft else None)
        if "pixel_values" in inputs:
            # The processor has copied every image to several moments in time.
            moments = self.processor.image_processor.temporal_patch_size
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(1, (3, moments, -1))[:, :, 0].flatten(1)
        return PackedItems(inputs, self.layout, self.shares)

    def _apply_once(self, conversations: list[list[Message]]) -> Inputs:
        """Do what transformers' processor does, with each distinct image once; ``image_order`` says which is where."""
        processor: Any = self.processor
        options = {"do_rescale": False, "do_normalize": False}
        parts = [part for chat in conversations for message in chat for part in message["content"]]
        shown = [part["image"] for part in parts if part["type"] == "image"]
        if not shown or any(part["type"] == "video" for part in parts):
            return self._apply_template(conversations, **options)
        distinct = {id(image): image for image in shown}
        places = {identity: place for place, identity in enumerate(distinct)}
        order = torch.tensor([places[id(image)] for image in shown])
        pixels = processor.image_processor(images=[*distinct.values()], return_tensors="pt", **options)
        tokens = iter((pixels["image_grid_thw"].prod(dim=1) // self.layout.merge_size**2)[order].tolist())
        mark = re.compile(re.escape(processor.image_token))
        texts = processor.apply_chat_template(conversations, add_generation_prompt=self.generation_prompt)
        texts = [mark.sub(lambda found: found[0] * next(tokens), text) for text in texts]
        inputs = processor.tokenizer(texts, padding=True)
        inputs["mm_token_type_ids"] = processor.create_mm_token_type_ids(inputs["input_ids"])
        # Not by the tokenizer, which looks for ragged lists at great length.
        tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
        return {**tensors, **pixels, "image_order": order}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        processor = self.processor.image_processor
        size, factor = processor.size, processor.patch_size * processor.merge_size
        return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])


def check_normalisation(processor: ProcessorMixin, checkpoint: str) -> None:
    """Refuse what bytes cannot be turned into on the device: other pixels would be trained than are served."""
    names = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
    image, video = (
        {name: np.asarray(getattr(part, name)).tolist() for name in names}
        for part in (processor.image_processor, processor.video_processor)
    )
    for name in names:
        if not image[name] or image[name] != video[name]:
            raise ValueError(
                f"The checkpoint {checkpoint!r} has {name}={image[name]} for images and {video[name]} for videos; "
                "Qwen3VL needs pixels that are rescaled and normalised, both alike."
            )
