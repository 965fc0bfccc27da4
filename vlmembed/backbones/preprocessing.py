"""From items to model inputs, through a checkpoint's own processor and chat template.

The calls are the ones that Sentence Transformers makes on an exported folder: one chat message per item, with the
instruction, its own or the backbone's, as the system message. So what was trained is what is served. A batch goes from
top to bottom:

    items → conversations (images, videos and audio read) → the processor's inputs → cut at max_length → `PackedItems`
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from jinja2 import TemplateError
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmembed.backbones.chat_templates import PairTemplate, check_template
from vlmembed.backbones.packing import PackedItems
from vlmembed.media import audio_seconds, image_size, load_audio, load_image, load_video
from vlmembed.pooling import Template, TokenSelection
from vlmembed.types import Inputs, Item, Pair, Part, Preprocessor, Role

Message = dict[str, Any]

#: From an image's height and width to those that the processor resizes it to.
Resized = Callable[[int, int], tuple[int, int]]

#: From conversations to what the model reads.
Applied = Callable[[list[list[Message]]], Inputs]

# What an item costs only decides which items share a chunk, so rough numbers do.
CHARACTERS_PER_TOKEN = 4
PIXELS_PER_TOKEN = 32 * 32
TOKENS_PER_VIDEO_FILE = 10_000
TOKENS_PER_SECOND = 25

#: So many beginnings and ends of templates are remembered.
FRAMES = 1000


class ChatPreprocessor(Preprocessor):
    """Renders items through a chat template, tokenizes them, and resizes their images.

    Args:
        processor: The checkpoint's processor: tokenizer, image processor, perhaps more, and chat template.
        instructions: The system message for each role, of items that have none of their own; None or empty for none.
        generation_prompt: Whether to end with the template's opening of an answer.
        max_length: The most tokens an item may have. A longer text loses its end, but keeps what the template puts
            behind it. None for no limit.
        pair_template: Where the template is one of pairs, which.
        appended: Tokens that the template ends with, besides its own.
        expansion: Tokens that it puts behind these where an item is a query.
    """

    #: What needs to know all instructions beforehand, and knows those of the roles only: a pooling's name.
    fixed_instructions: str | None = None
    #: Which tokens of each role's items have a vector, where items have several: ``kept`` (B, L) of a chunk.
    selections: Mapping[Role, TokenSelection] | None = None

    def __init__(
        self,
        processor: ProcessorMixin,
        instructions: Mapping[Role, str | None],
        generation_prompt: bool = True,
        max_length: int | None = None,
        pair_template: PairTemplate | None = None,
        appended: Sequence[str] = (),
        expansion: Sequence[str] = (),
    ) -> None:
        self.processor: Any = processor
        self.instructions = instructions
        self.generation_prompt = generation_prompt
        self.max_length = max_length
        self.pair_template = pair_template
        self.appended = appended
        self.expansion = expansion
        self._frames: dict[tuple[tuple[Role, ...], str | None], tuple[int, list[int]]] = {}

    @cached_property
    def template(self) -> Template:
        """What token ids mean: which are no text, and the system message with which each role's items begin."""
        names = ("image_token_id", "video_token_id", "audio_token_id")
        visual = tuple(token for name in names if (token := getattr(self.processor, name, None)) is not None)
        chats = [[self._chat({role: []})[0]] for role, instruction in self.instructions.items() if instruction]
        encoded = [self.processor.apply_chat_template([chat], tokenize=True, return_dict=True) for chat in chats]
        return Template(visual, tuple(dict.fromkeys(tuple(inputs["input_ids"][0]) for inputs in encoded)))

    def __call__(self, items: Sequence[Item | Pair]) -> Inputs:
        """Preprocess items, or pairs, into one chunk.

        Returns:
            ``input_ids`` and ``attention_mask`` of shape (B, L), padded on the right, and what the towers read.

        Raises:
            ValueError: If an image or audio cannot be read, the processor refuses an item, or one that is not only
                text has more than ``max_length`` tokens.
        """
        return self._read(items, self._apply_template)

    def cost(self, item: Item | Pair) -> int:
        """Estimate an item's tokens: of texts and its own instruction by length, of images and audio by their sizes."""
        cost = len(item.instruction or "") // CHARACTERS_PER_TOKEN
        for part in item.parts:
            if part.kind == "text":
                cost += len(str(part.value)) // CHARACTERS_PER_TOKEN
            elif part.kind == "audio":
                self._refuse_audio(item.origin)
                cost += int(TOKENS_PER_SECOND * audio_seconds(part.value, item.origin))  # type: ignore[arg-type]
            else:
                sizes = [image_size(frame, item.origin) for frame in part.frames]
                cost += sum(self._pixels(*size) // PIXELS_PER_TOKEN for size in sizes) or TOKENS_PER_VIDEO_FILE
        return cost

    def _pixels(self, width: int, height: int) -> int:
        """Return how many pixels of an image are read, as well as that is known."""
        return width * height

    def _read(self, items: Sequence[Item | Pair], apply: Applied, resized: Resized | None = None) -> Inputs:
        frames: dict[bytes, Any] = {}  # Equal images of a batch are opened once, and are one object.
        for item in items:
            for one in _split(item):
                for part in one.parts:
                    if part.kind == "image":
                        frames.setdefault(part.digest, (part.value, one.origin))
        images = {digest: load_image(frame, origin, resized) for digest, (frame, origin) in frames.items()}
        conversations = [
            self._chat(
                {one.role: [self._content(part, one, images) for part in one.parts] for one in _split(item)},
                self._instruction(item),
            )
            for item in items
        ]
        try:
            inputs = apply(conversations)
        except (ValueError, TemplateError):
            # The processor is given all items at once, and does not say which of them it refuses.
            for item, conversation in zip(items, conversations, strict=True):
                try:
                    apply([conversation])
                except (ValueError, TemplateError) as error:
                    raise ValueError(
                        f"{item.origin or 'An item'}: the checkpoint's processor refuses it ({error}). Replace what it "
                        "holds, or remove the row."
                    ) from error
            raise
        if self.max_length is not None and inputs["input_ids"].shape[1] > self.max_length:
            inputs = self._truncate(inputs, items, self.max_length)
        return inputs if self.selections is None else {**inputs, "kept": self._kept(inputs, items)}

    def _kept(self, inputs: Inputs, items: Sequence[Item | Pair]) -> Bool[Tensor, "B L"]:
        """Return which tokens of each item have a vector; refuse an item without any."""
        selections = self.selections or {}
        ids, mask, kept = inputs["input_ids"], inputs["attention_mask"], []
        for row, item in enumerate(items):
            assert isinstance(item, Item)
            selection = selections[item.role]
            expansion = len(self.expansion) if item.role == "query" else 0
            skipped = self.skipped[item.role]
            kept.append(selection.select(ids[row, None], mask[row, None], self.template, skipped, expansion))
            if not kept[-1].any():
                raise ValueError(
                    f"{item.origin or 'An item'} has no token that {item.role}_tokens keeps ({selection}), and so no "
                    "vector to be found by. Keep other tokens as well, or remove the row."
                )
        return torch.cat(kept)

    @cached_property
    def skipped(self) -> dict[Role, list[int]]:
        """The ids of the tokens that have no vector."""
        vocabulary = self.processor.tokenizer.get_vocab()
        for role, selection in (self.selections or {}).items():
            if unknown := [token for token in selection.skip if token not in vocabulary]:
                raise ValueError(
                    f"{role}_tokens.skip: {unknown[0]!r} is not one token of this checkpoint's vocabulary, where a "
                    "word behind a space is spelt with Ġ. Leave it out, or spell it so."
                )
            if role == "query" and (both := [token for token in selection.skip if token in self.expansion]):
                raise ValueError(f"query_tokens.skip has {both[0]!r}, which is one of expansion_tokens. Remove either.")
        return {role: [vocabulary[token] for token in part.skip] for role, part in (self.selections or {}).items()}

    def _chat(self, contents: Mapping[Role, list[dict[str, Any]]], instruction: str | None = None) -> list[Message]:
        """Return an item as the user's message, or a pair as one message of each role, behind the instruction.

        That of the role, unless there is one; empty for none.
        """
        if len(contents) > 1:
            messages: list[Message] = [{"role": role, "content": contents[role]} for role in contents]
        else:  # Whose tokens a template may append, see `expand_queries`.
            messages = [{"role": "user", "content": content, "task": role} for role, content in contents.items()]
        if instruction is None:
            instruction = self.instructions[next(iter(contents))]
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        return [system, *messages] if instruction else messages

    def _instruction(self, item: Item | Pair) -> str | None:
        """Return an item's own instruction, or None; refuse one that would not be read as it stands."""
        instruction, is_pair = item.instruction, isinstance(item, Pair)
        if isinstance(item, Pair) and item.document.instruction is not None:
            raise ValueError(
                f"{item.document.origin or 'A document'} has the instruction {item.document.instruction!r:.100}, and a "
                "pair is read with one, its query's. Drop it with columns: {document_instruction: null}."
            )
        if instruction is None:
            return None
        place = _split(item)[0].origin or "An item"
        origin = f"{place} has the instruction {instruction!r:.100}, and"
        if self.fixed_instructions:
            raise ValueError(
                f"{origin} {self.fixed_instructions} knows only the backbone's, query_instruction and "
                "document_instruction. Choose another pooling, or drop the instruction."
            )
        if is_pair and not instruction:
            raise ValueError(
                f"{origin} a pair's template puts its own in the place of an empty one. Write the instruction, or null "
                "for the template's."
            )
        self._refuse_marks(instruction, place, "instruction")
        roles, template = (("query", "document") if is_pair else ("user",)), self.pair_template
        if instruction:  # The backbone's own have been tried; a template that needs none may leave out others.
            try:
                name = template.origin if template else "the checkpoint's chat template"
                check_template(self.processor, name, roles, {"An instruction."}, self.generation_prompt)
            except ValueError as error:
                raise ValueError(f"{origin} {error}") from error
        return instruction

    def _content(self, part: Part, item: Item, images: Mapping[bytes, Any]) -> dict[str, Any]:
        """Return one content part of a chat message."""
        value: Any = part.value
        if part.kind == "image":
            return {"type": "image", "image": images[part.digest]}
        if part.kind == "video":
            if getattr(self.processor, "video_processor", None) is None:
                raise ValueError(f"{item.origin or 'An item'} has a video, and this checkpoint's processor takes none.")
            frames, metadata = load_video(value, self.processor.video_processor, item.origin)
            return {"type": "video", "video": frames, "metadata": metadata}
        if part.kind == "audio":
            return {"type": "audio", "audio": self._samples(value, item.origin)}
        self._refuse_marks(value, item.origin or "An item", "text")
        return {"type": "text", "text": value}

    def _refuse_marks(self, text: str, origin: str, what: str) -> None:
        for mark in self._marks:
            if mark in text:
                raise ValueError(
                    f"{origin} has {mark} in its {what} {text!r:.100}: it stands for an image, a video or an audio and "
                    "nothing else. Remove it."
                )

    @property
    def audio_rate(self) -> int | None:
        """How many samples of a second the checkpoint reads; None for one that reads no audio."""
        extractor = getattr(self.processor, "feature_extractor", None)
        return None if extractor is None else int(extractor.sampling_rate)

    def _refuse_audio(self, origin: str) -> None:
        """Refuse audio for a checkpoint that reads none."""
        if self.audio_rate is None:
            raise ValueError(
                f"{origin or 'An item'} has an audio, and this checkpoint's processor takes none. Use one that hears, "
                "such as Qwen/Qwen2.5-Omni-3B with vlmembed.backbones.VisionLanguageModel, or leave out the audio."
            )

    def _samples(self, audio: Path | bytes, origin: str) -> np.ndarray:
        """Open a recording (samples,) for the processor; refuse one of which it would leave out the end."""
        self._refuse_audio(origin)
        samples = load_audio(audio, rate := self.audio_rate or 0, origin)
        # Qwen3-Omni's tower, as transformers has it, fills up what is shorter than a chunk by the longest of a batch.
        shortest = 2 * getattr(self.processor, "n_window", 0) * self.processor.feature_extractor.hop_length
        if len(samples) < shortest:
            raise ValueError(
                f"{origin or 'An item'} has an audio of {len(samples) / rate:.2f} seconds, and of less than "
                f"{shortest / rate:g} this checkpoint makes another embedding in every batch. Append silence: "
                f"ffmpeg -i FILE -af apad=whole_dur={shortest / rate:g} FILE.flac."
            )
        if len(samples) > (longest := getattr(self.processor.feature_extractor, "n_samples", math.inf)):
            raise ValueError(
                f"{origin or 'An item'} has an audio of {len(samples) / rate:.1f} seconds, and this checkpoint reads "
                f"{longest / rate:.0f}. Cut it into several rows, or raise chunk_length in the checkpoint's "
                "preprocessor_config.json."
            )
        return samples

    @cached_property
    def _marks(self) -> list[str]:
        """What stands for an image in a text: in a user's text, it would be taken for the next one."""
        names = ("image_token", "video_token", "audio_token")
        return [mark for name in names if (mark := getattr(self.processor, name, None))]

    def _apply_template(self, conversations: list[list[Message]], **pixel_options: Any) -> Inputs:
        metadata = [part["metadata"] for part in _parts(conversations) if part["type"] == "video"]
        heard = [len(part["audio"]) for part in _parts(conversations) if part["type"] == "audio"]
        # The processor itself samples only where all of a batch's videos are files, or all are frames.
        video_options = {**pixel_options, "do_sample_frames": False, "video_metadata": metadata}
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=self.generation_prompt,
            processor_kwargs={
                "text_kwargs": {"padding": True, "padding_side": "right"},
                "images_kwargs": pixel_options,
                "videos_kwargs": video_options if metadata else {},
                "audio_kwargs": _audio_options(self.processor.feature_extractor, max(heard)) if heard else {},
                "common_kwargs": {"return_tensors": "pt"},
            },
        )
        return dict(inputs)

    def _truncate(self, inputs: Inputs, items: Sequence[Item | Pair], limit: int) -> Inputs:
        """Cut texts at the limit, with the template's end behind them; refuse what would lose more than text."""
        for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
            if length <= limit:
                continue
            item = items[row]
            too_long = f"{item.origin or 'An item'} has {length} tokens, more than max_length={limit}, and cutting it "
            if any(part.kind != "text" for part in item.parts):
                raise ValueError(
                    f"{too_long}could cut through an image or audio. Raise max_length, or lower max_pixels so that "
                    "images take fewer."
                )
            if self.pair_template is not None and self.pair_template.ends_with_query:
                raise ValueError(
                    f"{too_long}at its end would cut its query. Raise max_length, or use a template that puts the "
                    "query first."
                )
            least, end = self._frame(tuple(one.role for one in _split(item)), item.instruction)
            if limit <= least:
                place = "" if item.instruction is None else f"{item.origin or 'An item'}: "
                raise ValueError(
                    f"{place}max_length={limit} has no room for a text: the chat template and the instruction alone "
                    f"take {least} tokens. Raise max_length."
                )
            inputs["input_ids"][row, limit - len(end) : limit] = torch.tensor(end)
        per_token = {*self.processor.tokenizer.model_input_names, "mm_token_type_ids"}
        return {name: value[:, :limit] if name in per_token else value for name, value in inputs.items()}

    def _frame(self, roles: tuple[Role, ...], instruction: str | None) -> tuple[int, list[int]]:
        """Return how many tokens an item has besides its texts, and those that the template puts behind them.

        These are what two texts have in common at their ends.
        """
        key = roles, instruction
        if key not in self._frames:
            if len(self._frames) >= FRAMES:
                self._frames.clear()
            contents = ({role: [{"type": "text", "text": text}] for role in roles} for text in ("0", "1 2 3 4"))
            chats = [self._chat(content, instruction) for content in contents]
            reversed_ids = [self._apply_template([chat])["input_ids"][0].tolist()[::-1] for chat in chats]
            common = takewhile(lambda tokens: tokens[0] == tokens[1], zip(*reversed_ids, strict=False))
            self._frames[key] = len(reversed_ids[0]) - len(roles), [token for token, _ in common][::-1]
        return self._frames[key]


def _split(item: Item | Pair) -> tuple[Item, ...]:
    return (item.query, item.document) if isinstance(item, Pair) else (item,)


def _audio_options(extractor: Any, longest: int) -> dict[str, Any]:
    """Have features of a recording that depend on no other one of its batch.

    Whisper's extractor mirrors the end of a batch's longest recording, and puts silence behind the others. So there is
    silence behind all: a window here, and up to ``n_samples`` where the folder is served.
    """
    if not hasattr(extractor, "n_samples"):
        return {"padding": True}
    return {"padding": "max_length", "max_length": min(longest + extractor.n_fft, extractor.n_samples)}


def _parts(conversations: Sequence[Sequence[Message]]) -> list[dict[str, Any]]:
    return [part for chat in conversations for message in chat for part in message["content"]]


class PackingPreprocessor(ChatPreprocessor):
    """Prepares items of Qwen3-VL as `PackedItems`: images as bytes, to be normalised on the device.

    Args:
        vision: The vision tower's configuration.
        shares: Whether items that begin alike compute their beginning once.
        *options: As for `ChatPreprocessor`.
    """

    def __init__(self, vision: PretrainedConfig, shares: bool, *options: Any) -> None:
        super().__init__(*options)
        self.vision = vision
        self.shares = shares

    def prepare(self, items: Sequence[Item | Pair], draft: bool = False) -> PackedItems:
        """Read the items of a batch; see `Preprocessor.prepare`."""
        inputs = self._read(items, self._apply_once, self._resized if draft else None)
        if "pixel_values" in inputs:
            # (patches, 3 × moments × pixels): the processor has copied every image to several moments in time.
            moments = self.vision.temporal_patch_size
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(1, (3, moments, -1))[:, :, 0].flatten(1)
        return PackedItems(inputs, self.vision, self.shares)

    def _apply_once(self, conversations: list[list[Message]]) -> Inputs:
        """Do what transformers' processor does, with each distinct image once; ``image_order`` says which is where."""
        processor, options = self.processor, {"do_rescale": False, "do_normalize": False}
        parts = _parts(conversations)
        shown = [part["image"] for part in parts if part["type"] == "image"]
        if not shown or any(part["type"] == "video" for part in parts):
            return self._apply_template(conversations, **options)
        distinct = {id(image): image for image in shown}
        numbers = {identity: number for number, identity in enumerate(distinct)}
        order = torch.tensor([numbers[id(image)] for image in shown])
        pixels = processor.image_processor(images=[*distinct.values()], return_tensors="pt", **options)
        # An image is one mark in the rendered text, and becomes as many as it has tokens.
        tokens = iter((pixels["image_grid_thw"].prod(dim=1) // self.vision.spatial_merge_size**2)[order].tolist())
        texts = processor.apply_chat_template(conversations, add_generation_prompt=self.generation_prompt)
        mark = re.escape(processor.image_token)
        texts = [re.sub(mark, lambda match: match[0] * next(tokens), text) for text in texts]
        inputs = processor.tokenizer(texts, padding=True, padding_side="right")
        inputs["mm_token_type_ids"] = processor.create_mm_token_type_ids(inputs["input_ids"])
        # Not by the tokenizer, which looks for ragged lists at great length.
        tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
        return {**tensors, **pixels, "image_order": order}

    def _pixels(self, width: int, height: int) -> int:
        with suppress(ValueError):  # Too narrow an image, which the processor refuses.
            height, width = self._resized(height, width)
        return width * height

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        processor = self.processor.image_processor
        size, factor = processor.size, processor.patch_size * processor.merge_size
        return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])


def check_normalisation(processor: ProcessorMixin, checkpoint: str) -> None:
    """Refuse what bytes cannot be turned into on the device: other pixels would be trained than are served."""
    for name in ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std"):
        image, video = (
            np.asarray(getattr(part, name)).tolist() for part in (processor.image_processor, processor.video_processor)
        )
        if not image or image != video:
            raise ValueError(
                f"The checkpoint {checkpoint!r} has {name}={image} for images and {video} for videos; Qwen3VL needs "
                "pixels that are rescaled and normalised, both alike."
            )
