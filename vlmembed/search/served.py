"""An exported folder as an engine: what Sentence Transformers computes from it, by our packed forward pass.

The folder's ``modules.json`` says what is computed. Its first module, the Transformer, is run by one of our backbones,
on the weights that Sentence Transformers has loaded; all modules behind it run as they are.

    items → plan (distinct items, sorted by cost, in batches) → loader workers → backbone → the folder's modules → order
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils.data import DataLoader

from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.data import ItemCollator
from vlmembed.data.sources import RowLists
from vlmembed.distributed import computing_threads, in_order, print_once, thread_count
from vlmembed.encoder import Encoder
from vlmembed.export.modules import CODE
from vlmembed.files import content_digest, digest, read_json
from vlmembed.late_interaction import MultiVectors, Vectors
from vlmembed.media import load_audio, load_image
from vlmembed.pooling import Pooling
from vlmembed.training.signals import leave_stopping_to_parent
from vlmembed.types import Inputs, Item, LazyImage, Part, Role

#: The most tokens, and items, of a batch: more of them are no faster on two cores, and fill a large GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
BATCH_ITEMS = 256
#: Items of a batch for Sentence Transformers, which pads.
PADDED_ITEMS = 32
THREADS = 4

#: A tokenizer without a limit has a number above it.
UNLIMITED = 10**9

STOCK = "sentence_transformers."

#: Samples a second of audio that is in no file; what the models that hear are made for.
AUDIO_RATE = 16_000

#: The prompts of each role, in the order in which Sentence Transformers looks for them.
PROMPTS: dict[Role, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}

#: Modules of Sentence Transformers that read no more than what a backbone computes, and those of our exports' code.
READING_STATES = (
    *("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "WeightedLayerPooling", "MultiVectorMask"),
    *("HierarchicalTokenPooling", "LambdaTokenPooling", "ServedPooling", "ServedSelection"),
)


# What is opened


class ServedModules(Pooling):
    """The modules of a folder that stand behind its Transformer, as one pooling.

    Args:
        served: The folder, as Sentence Transformers has opened it.
    """

    def __init__(self, served: Any) -> None:
        super().__init__()
        transformer, first = served[0], served[1] if len(served) > 1 else None
        output = transformer.modality_config["message"]["method_output_name"]
        if not isinstance(output, str):  # ["hidden_states", -2]
            self.layers = (output[1],)
        elif getattr(transformer.model.config, "output_hidden_states", False):
            self.layers = (*range(-1 - transformer.model.config.get_text_config().num_hidden_layers, 0),)
        elif getattr(first, "pooling_mode", None) == "lasttoken":
            self.num_last_tokens = 1
        else:  # A pooling of ours, by code that the folder brings.
            self.num_last_tokens = getattr(getattr(first, "layer", None), "num_last_tokens", None)
        served[0] = torch.nn.Identity()
        self.served = served

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None, role: Role = "document") -> Any:
        """Return embeddings (B, D); or of each of B items the vectors (n, D)."""
        features: dict[str, Any] = {"attention_mask": mask, "input_ids": input_ids, "modality": "message"}
        if len(self.layers) > 1:
            features["all_layer_embeddings"] = (*hidden,)
            hidden = hidden[-1]
        features = self.served({**features, "token_embeddings": hidden}, task=role)
        if "sentence_embedding" in features:
            return features["sentence_embedding"][:, : self.served.truncate_dim]
        kept = features["attention_mask"].bool()
        return [vectors[tokens] for vectors, tokens in zip(features["token_embeddings"], kept, strict=True)]


class ServedEncoder(Encoder):
    """An exported model on one of our backbones: its vectors are normalised as the folder serves them."""

    pooling: ServedModules

    def forward(self, inputs: Inputs, features: Any = (), role: Role = "document") -> Any:
        """Encode a chunk of B items of a role; see `ServedModules.forward`."""
        hidden = self.backbone(inputs, self.pooling.layers, features, self.pooling.num_last_tokens)
        mask, tokens = (inputs[name].to(hidden.device, non_blocking=True) for name in ("attention_mask", "input_ids"))
        return self.pooling(hidden, mask, tokens, role)


@dataclass
class Encoded:
    """What came of a window of items, in its order."""

    window: Any
    rows: list[int]  #: Those that could be read, ascending.
    vectors: Vectors  #: Theirs, in float32, on the host.
    unreadable: dict[int, str]  #: Why each of the others could not be read; it names the item.


class ServedModel:
    """An exported folder that encodes items; made by `open`.

    ``encoder`` is None where no backbone of ours computes what the folder says; then Sentence Transformers encodes.
    """

    def __init__(self, folder: Path, served: Any, encoder: ServedEncoder | None) -> None:
        self.folder = folder
        self.served = served
        self.encoder = encoder
        self.is_multi_vector = type(served).__name__ == "MultiVectorEncoder"
        self.similarity = str(served.similarity_fn_name)
        #: What computes, as a manifest names it.
        self.engine = "sentence_transformers" if encoder is None else "vlmembed"

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> ServedModel:
        """Open an exported folder, a run that has one, or any embedder of Sentence Transformers, also from the Hub.

        A ``ValueError`` says that there is none, that it is a reranker, or that it brings code and is not trusted.
        """
        path = find_folder(folder)
        config = read_settings(path / "config_sentence_transformers.json")
        if config.get("model_type") == "CrossEncoder":
            raise ValueError(
                f"{folder} is a reranker: it scores pairs, and gives no item a vector. Name an embedder's folder here, "
                "and the reranker where pairs are ranked."
            )
        types = [str(module.get("type")) for module in read_settings(path / "modules.json", list)]
        foreign = [name for name in types if not name.startswith(STOCK)]
        if foreign and not trust_remote_code:
            raise ValueError(
                f"{folder} brings code ({foreign[0]} in modules.json). If you trust it, open it with trust_remote_code."
            )
        options: Any = {"device": device and str(device), "trust_remote_code": trust_remote_code}
        options |= {"model_kwargs": {"dtype": dtype}} if dtype else {}
        try:
            served = open_served(str(path), config, **options).eval()
        except Exception as error:
            raise ValueError(
                f"Sentence Transformers cannot open {folder}: {type(error).__name__}: {error}. Is the folder whole?"
            ) from error
        try:
            encoder = _adopt(path, types, served, trust_remote_code)
        except ValueError as reason:
            encoder = None
            print_once(f"{folder} is encoded by Sentence Transformers, as no backbone of vlmembed can: {reason}")
        return cls(path, served, encoder)

    # What it is

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.served.device if self.encoder is None else self.encoder.device

    @cached_property
    def dimension(self) -> int:
        """D, the dimension of the vectors."""
        size = self.served.get_embedding_dimension()
        if size is None:
            size = self.encode([Item("query", (Part("text", "one"),))], "query").shape[-1]
        return int(size)

    @cached_property
    def dimensions(self) -> list[int]:
        """Those that the embeddings were trained to be truncated to, if any."""
        return [int(size) for size in read_settings(self.folder / "config.json").get("matryoshka_dimensions", [])]

    @cached_property
    def pixels(self) -> dict[str, int] | None:
        """The least and the most pixels of an image; None where that is not known."""
        if self.encoder is None or not isinstance(self.encoder.backbone, Qwen3VL):  # Of others an edge is a length.
            return None
        size = dict(self.encoder.preprocessor.processor.image_processor.size)
        return {"min": int(size["shortest_edge"]), "max": int(size["longest_edge"])}

    @cached_property
    def digest(self) -> str:
        """Another one for another content of the folder; its card may be written anew."""
        return folder_digest(self.folder)

    def prompt_of(self, role: Role) -> str:
        """Return the prompt that the folder has for a role; empty for none."""
        return prompt_of(self.served.prompts, role) or ""

    # What it does

    def encode(self, items: Sequence[Item], role: Role) -> Vectors:
        """Encode items, in their order: float32 (N, D) on the host, or the vectors of each.

        As ``encode_query`` or ``encode_document`` does: with the prompt of the role, where an item has no instruction
        of its own. A ``ValueError`` names the first item that cannot be read.
        """
        for encoded in self.stream([items], role):
            for reason in encoded.unreadable.values():
                raise ValueError(reason)
        return encoded.vectors

    def stream(
        self,
        windows: Iterable[Sequence[Item]],
        role: Role,
        num_workers: int = 0,
        batch_tokens: int | None = None,
        group_of: Callable[[Any], Hashable] | None = None,
    ) -> Iterator[Encoded]:
        """Encode windows of items, one after the other, while ``num_workers`` processes read those behind.

        Items of similar cost are encoded together, of one window; equal ones once, of a group: windows one after the
        other of the same ``group_of``, null for each alone. What comes of a group depends on nothing but its items. A
        window is a list, or any sequence that reads an item when it is asked for it; it is read once, some time before
        it is yielded. An item that cannot be read (a ``ValueError`` of the sequence, of the file or of the model's
        processor) is in ``Encoded.unreadable``, and the others are encoded without it.
        """
        plans: deque[_Plan] = deque()

        def batches() -> Iterator[list[tuple[int, Item]]]:
            for _, group in groupby(windows, group_of) if group_of else ((None, [window]) for window in windows):
                of_group = _Seen()
                for window in group:
                    seen = _Seen() if self.is_multi_vector else of_group  # A page has hundreds: too many to keep.
                    plans.append(self._plan(window, role, seen))
                    yield from self._cut(plans[-1], role, batch_tokens)
                    yield []  # The window ends.

        make = _open if self.encoder is None else ItemCollator(self.encoder.preprocessor).collate_items
        loader = DataLoader(
            RowLists(list),
            batch_size=None,
            sampler=batches(),
            collate_fn=partial(_preprocess, make),
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_stopping_to_parent,
        )
        # It is not known of other models that they can compute several batches at the same time.
        packs = self.encoder is not None and self.encoder.backbone.separate_vision_pass
        threads = thread_count(self.device) if packs else 1
        with computing_threads(threads) as pool:
            for rows, vectors, unreadable in in_order(pool, partial(self._compute, role), loader, ahead=threads):
                if rows or unreadable:
                    plans[0].take(rows, vectors, unreadable)
                else:
                    yield plans.popleft().result()

    # From a window to batches

    def _plan(self, window: Sequence[Item], role: Role, seen: _Seen) -> _Plan:
        """Read a window's items, and say which of them go through the model."""
        plan = _Plan(window, seen)
        for row in range(len(window)):
            try:
                item = window[row]
                plan.items[row] = item if item.role == role else replace(item, role=role)
            except ValueError as error:
                plan.unreadable[row] = str(error)
        with ThreadPoolExecutor(THREADS) as threads:  # Reading headers and hashing files leave Python's lock to others.
            looked = threads.map(self._look, plan.items.values())
            for row, (identity, cost) in zip([*plan.items], looked, strict=True):
                if isinstance(cost, str):
                    plan.unreadable[row] = cost
                elif identity not in seen.identities:
                    plan.costs[row] = cost
                    seen.identities.add(identity)
                plan.identities[row] = identity
        return plan

    def _look(self, item: Item) -> tuple[str, int | str]:
        """Return what identifies an item's content, and its cost; or why it cannot be read."""
        try:
            if self.encoder is not None:
                cost = self.encoder.preprocessor.cost(item)
            else:  # What Sentence Transformers sorts by.
                cost = sum(len(str(part.value)) for part in item.parts if part.kind == "text")
            return identity(item), cost
        except (ValueError, OSError) as error:
            origin = "" if item.origin and item.origin in str(error) else f"{item.origin or 'An item'}: "
            return "", f"{origin}{error}"

    def _cut(self, plan: _Plan, role: Role, batch_tokens: int | None) -> Iterator[list[tuple[int, Item]]]:
        """Cut numbered items into batches of similar cost, the most expensive first."""
        frame, most, room = 0, PADDED_ITEMS, math.inf
        if self.encoder is not None:
            shortest = self.encoder.preprocessor([Item(role, (Part("text", "1"),))])
            frame, most = int(shortest["attention_mask"].sum()), BATCH_ITEMS
            room = batch_tokens or BATCH_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        batch, taken = list[tuple[int, Item]](), 0
        for row in sorted(plan.costs, key=plan.costs.__getitem__, reverse=True):
            cost = frame + plan.costs[row]
            if batch and (len(batch) == most or taken + cost > room):
                yield batch
                batch, taken = [], 0
            batch.append((row, plan.items[row]))
            taken += cost
        if batch:
            yield batch

    # From a batch to vectors

    @torch.no_grad()  # Of a thread.
    def _compute(self, role: Role, batch: Preprocessed) -> tuple[list[int], Sequence[Tensor], dict[int, str]]:
        """Return what `_preprocess` does with the embedding (D,) of each item, or its vectors (n, D), in between."""
        made, rows, unreadable = batch
        if not rows:
            return rows, [], unreadable
        if self.encoder is not None:
            vectors = self.encoder(made.inputs, self.encoder.encode_images(made.images), role)
        else:
            items, inputs = zip(*made, strict=True)
            vectors = encode_padded(self.served, items, inputs, role, PADDED_ITEMS)
        if isinstance(vectors, Tensor):
            return rows, vectors.float().cpu().unbind(), unreadable
        # Over to the host in one piece.
        return rows, torch.cat(vectors).float().cpu().split([*map(len, vectors)]), unreadable


@dataclass
class _Seen:
    """What came of the distinct items of a group of windows, by identity."""

    identities: set[str] = field(default_factory=set)  # Of all that are planned.
    vectors: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass
class _Plan:
    """A window that is being encoded."""

    window: Sequence[Item]
    seen: _Seen
    items: dict[int, Item] = field(default_factory=dict)  # By row, those that there are.
    identities: dict[int, str] = field(default_factory=dict)
    costs: dict[int, int] = field(default_factory=dict)  # Of distinct items that were not in an earlier window.
    unreadable: dict[int, str] = field(default_factory=dict)

    def take(self, rows: Sequence[int], vectors: Sequence[Tensor], unreadable: Mapping[int, str]) -> None:
        """Take what came of the next batch."""
        self.seen.vectors |= zip((self.identities[row] for row in rows), vectors, strict=True)
        self.seen.unreadable |= {self.identities[row]: reason for row, reason in unreadable.items()}
        self.unreadable |= unreadable

    def result(self) -> Encoded:
        """Give every item what the first of its content has."""
        rows, vectors = [], []
        for row, item in self.items.items():
            identity = self.identities[row]
            if identity in self.seen.vectors:
                rows.append(row)
                vectors.append(self.seen.vectors[identity])
            elif row not in self.unreadable:
                reason = self.seen.unreadable[identity]
                self.unreadable[row] = f"{item.origin or 'An item'} has the same content as another: {reason}"
        several = bool(vectors) and vectors[0].ndim > 1
        joined = MultiVectors.of(vectors) if several else torch.stack(vectors) if vectors else torch.empty(0)
        return Encoded(self.window, rows, joined, dict(sorted(self.unreadable.items())))


#: Makes what is computed of numbered items.
Make = Callable[[Sequence[tuple[int, Item]]], Any]
#: A batch of items that can be read, their rows, and why others cannot be.
Preprocessed = tuple[Any, list[int], dict[int, str]]


def _preprocess(make: Make, items: Sequence[tuple[int, Item]]) -> Preprocessed:
    """Make a batch of the items that can be read."""
    if not items:
        return None, [], {}
    try:
        return make(items), [row for row, _ in items], {}
    except ValueError:
        unreadable: dict[int, str] = {}
        for row, item in items:
            try:
                make([(row, item)])
            except ValueError as error:
                unreadable[row] = str(error)
        if not unreadable:
            raise
        made, rows, _ = _preprocess(make, [(row, item) for row, item in items if row not in unreadable])
        return made, rows, unreadable


def _open(items: Sequence[tuple[int, Item]]) -> list[tuple[Item, Any]]:
    return [(item, model_input(item)) for _, item in items]


def identity(item: Item) -> str:
    """Return what is another for another content or instruction, whatever files are called."""
    pieces: list[str | bytes] = ["" if item.instruction is None else f"told {item.instruction}"]
    for part in item.parts:
        pieces.append(part.kind)
        for value in part.value if isinstance(part.value, tuple) else (part.value,):
            if isinstance(value, Path):
                pieces.append(content_digest(value))
            else:
                pieces.append(value.content if isinstance(value, LazyImage) else Part(part.kind, value).digest)
    return digest(pieces)


# Opening a folder


def open_served(model: str, config: Mapping[str, Any], **options: Any) -> Any:
    """Open an embedder by the class of Sentence Transformers that its configuration names."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer  # Takes seconds.

    opener: Any = MultiVectorEncoder if config.get("model_type") == "MultiVectorEncoder" else SentenceTransformer
    return opener(model, **options)


def find_folder(folder: str | Path) -> Path:
    """Return the exported folder that a path, a run's folder or a Hub id stands for."""
    path = Path(folder)
    if not path.exists():  # It may be a Hub id.
        try:
            path = Path(snapshot_download(str(folder)))
        except Exception as error:
            raise ValueError(f"{folder} is no folder, and cannot be loaded from the Hub: {error}") from error
    for candidate in (path, path / "export"):
        if (candidate / "modules.json").is_file():
            return candidate
    if (path / "config.yaml").is_file():
        raise ValueError(
            f"The run {folder} has no export. Make one: python -m vlmembed export --config {path / 'config.yaml'} "
            f"--ckpt_path CHECKPOINT --output_dir {path / 'export'}"
        )
    problem = "has no modules.json" if path.is_dir() else "is a file"
    raise ValueError(
        f"{folder} {problem}: name a folder that `python -m vlmembed export` or Sentence Transformers has written, "
        "the folder of a run, or a Hub id."
    )


def folder_digest(folder: Path) -> str:
    """Return what is another for other files of a model; its card (README.md) and hidden files do not count."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    counting = [name for name in names if name.name != "README.md" and not any(part[0] == "." for part in name.parts)]
    return digest(chain.from_iterable((name.as_posix(), content_digest(folder / name)) for name in counting))


def _adopt(folder: Path, types: Sequence[str], served: Any, trust_remote_code: bool) -> ServedEncoder:
    """Run a folder's Transformer by one of our backbones; a ``ValueError`` says why none computes the same."""
    if reason := _unlike(types, served):
        raise ValueError(reason)
    transformer = served[0]
    longest = served.max_seq_length or UNLIMITED
    options: dict[str, Any] = {
        "bidirectional": getattr(transformer.model.config.get_text_config(), "is_causal", True) is False,
        "generation_prompt": transformer.processing_kwargs.get("chat_template", {}).get("add_generation_prompt", False),
        "max_length": longest if longest < UNLIMITED else None,
        "trust_remote_code": trust_remote_code,
    } | {f"{role}_instruction": prompt_of(served.prompts, role) for role in PROMPTS}
    is_qwen3_vl = str(transformer.model.config.model_type).startswith("qwen3_vl")
    backbone = (Qwen3VL if is_qwen3_vl else VisionLanguageModel)(str(folder), **options)
    preprocessor: Any = backbone.make_preprocessor()
    # All items of a role begin with its prompt, which a batch computes once.
    preprocessor.shares = is_qwen3_vl and not backbone.bidirectional
    backbone.adopt(transformer.model, preprocessor)
    encoder = ServedEncoder(backbone, ServedModules(served))
    encoder.preprocessor = preprocessor
    return encoder.eval()


def _unlike(types: Sequence[str], served: Any) -> str | None:
    """Say what of a folder our backbones do not compute."""
    transformer, *behind = served
    if types[0].rsplit(".", 1)[-1] != "Transformer" or not types[0].startswith(STOCK):
        return f"its first module is {types[0]}"
    config = transformer.modality_config.get("message", {})
    output = config.get("method_output_name")
    if (config.get("method"), config.get("format")) != ("forward", "structured"):
        return "it reads no structured messages (modality_config of sentence_bert_config.json)"
    if output != "last_hidden_state" and not (isinstance(output, list | tuple) and output[0] == "hidden_states"):
        return f"its Transformer returns {output}"
    if transformer.transformer_task != "feature-extraction" or transformer.module_output_name != "token_embeddings":
        return f"its Transformer is one of {transformer.transformer_task} to {transformer.module_output_name}"
    settings = [f"{part}.{name}" for part, values in transformer.processing_kwargs.items() for name in values]
    settings += [name for name in ("query_length", "document_length", "query_expansion") if getattr(transformer, name)]
    if other := {*settings} - {"chat_template.add_generation_prompt", "audio.padding"}:
        return f"its sentence_bert_config.json has {', '.join(sorted(other))}"
    for name, module in zip(types[1:], behind, strict=True):
        known = name.startswith((STOCK, f"{CODE}.")) and name.rsplit(".", 1)[-1] in READING_STATES
        if not known or getattr(module, "include_prompt", True) is False:
            return f"its module {name} may read more than the states of tokens"
    return None


def prompt_of(prompts: Mapping[str, str | None], role: Role) -> str | None:
    """Return the prompt that Sentence Transformers takes for a role."""
    return next((prompts[name] for name in PROMPTS[role] if name in prompts), None)


def read_settings(path: Path, kind: type = dict) -> Any:
    """Return a JSON file of an exported folder, a mapping or a list of them; an empty one where there is none."""
    value = read_json(path) if path.is_file() else kind()
    if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(entry, dict) for entry in value)):
        raise ValueError(f"{path} is not what Sentence Transformers writes there: {value!r:.100}")
    return value


# What Sentence Transformers reads


def model_input(item: Item) -> dict[str, Any]:
    """Return what Sentence Transformers takes for an item: its texts, open images, videos and audio, by kind.

    A ``ValueError`` says that the item shows kinds by turns, which such a mapping cannot say.
    """
    content: dict[str, Any] = {}
    kinds = [kind for kind, _ in groupby(part.kind for part in item.parts)]
    if len(kinds) > len({*kinds}):
        raise ValueError(
            f"{item.origin}: texts and images by turns ({', '.join(kinds)}) cannot be given to Sentence Transformers "
            "in order. Put all images together."
        )
    for part in item.parts:
        value: Any = part.value
        if part.frames:
            images = [load_image(frame, item.origin) for frame in part.frames]
            value = images[0] if part.kind == "image" else images
        elif isinstance(value, Path):
            value = str(value.absolute())
        elif part.kind == "video":
            raise ValueError(f"{item.origin}: Sentence Transformers takes a video from a file only. Write it into one.")
        elif part.kind == "audio":
            value = {"array": load_audio(value, AUDIO_RATE, item.origin), "sampling_rate": AUDIO_RATE}
        content.setdefault(part.kind, []).append(value)
    return {kind: values[0] if len(values) == 1 else values for kind, values in content.items()}


def by_instruction(items: Iterable[Item]) -> dict[str | None, list[int]]:
    """Return the places of the items of each instruction: a model is told one at a time."""
    places: dict[str | None, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.instruction, []).append(place)
    return places


def encode_padded(
    served: Any, items: Sequence[Item], inputs: Sequence[dict[str, Any]], role: Role, batch_size: int
) -> list[Tensor]:
    """Encode items, given as `model_input` makes them, by Sentence Transformers, which is told one prompt at a time.

    An embedding (D,) of each comes back, or the vectors (n, D).
    """
    encode = served.encode_query if role == "query" else served.encode_document
    several = type(served).__name__ == "MultiVectorEncoder"
    options = {"batch_size": batch_size, "show_progress_bar": False} | ({} if several else {"convert_to_tensor": True})
    contents: list[Any] = [*inputs]
    if [*served.modalities] == ["text"]:  # Such models need not take a mapping.
        contents = [content["text"] if content.keys() == {"text"} else content for content in inputs]
    encoded: dict[int, Tensor] = {}
    for prompt, rows in by_instruction(items).items():
        encoded |= zip(rows, encode([contents[row] for row in rows], prompt=prompt, **options), strict=True)
    return [encoded[row] for row in range(len(items))]
