"""Exported folders as `mteb` asks for models: an embedder, a multi-vector model, a reranker.

mteb takes a folder that it does not know for a model of text, and scores pages without their images. Here its
``ModelMeta`` says what the folder reads, and a row of a data set becomes an item with all that the task shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import datasets
import torch
from mteb._create_dataloaders import create_dataloader  # Not public, and what mteb's own searches read rows by.
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import Modalities, PromptType
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm, trange

from vlmembed.data.tables import undecoded
from vlmembed.files import digest
from vlmembed.late_interaction import MultiVectors
from vlmembed.metrics.functions import BestDocuments
from vlmembed.search.searching import PAIRS, logits, open_reranker
from vlmembed.search.served import ServedModel, find_folder, folder_digest, read_settings
from vlmembed.types import Item, Pair, Part, Role

#: What a model may read, as mteb names it.
MODALITIES = get_args(Modalities)

#: Items that are encoded together, and whose scores are in memory together.
WINDOW = 1024

#: The most documents whose vectors are held for the next subset of a task.
REUSED = 20_000


class Items:
    """Queries or documents of ours, where mteb has a table with a column of ids."""

    def __init__(self, names: Sequence[str], items: Any) -> None:
        self.names = names
        self.items = items

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, column: str) -> Sequence[str]:
        return {"id": self.names}[column]

    def select(self, rows: Sequence[int]) -> Items:
        """Return some of them, in the order of their rows."""
        return Items([self.names[row] for row in rows], Subset(self.items, rows))


class TableItems:
    """The rows that a loader of mteb's has, as items: all that a row shows, in the order of the columns."""

    def __init__(self, inputs: DataLoader[Any], role: Role, instruction: str | None, task: str) -> None:
        self.table, names = _rows(inputs)
        self.names = [name for name in names if name in MODALITIES]
        self.role, self.instruction, self.task = role, instruction, task
        if not self.names:
            raise ValueError(f"{task}: a {role} has none of {', '.join(MODALITIES)}; it has {', '.join(names)}.")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Item:
        row = self.table[index]
        origin = f"{self.task}, {self.role} {row.get('id', index)!r}"
        parts = [part for name in self.names for part in _parts(name, row[name])]
        # As in our own data sets, an empty text beside an image is none.
        parts = [part for part in parts if part.value != ""] or parts
        if not parts:
            raise ValueError(f"{origin}: it has none of {', '.join(self.names)}.")
        return Item(self.role, tuple(parts), origin, self.instruction)


def _rows(inputs: DataLoader[Any]) -> tuple[Any, list[str]]:
    """Return rows and the names of their columns; images in tables are not decoded, which is done as in training."""
    table = inputs.dataset
    if isinstance(table, datasets.Dataset):
        return undecoded(table.with_format(None)), table.column_names
    # Images are open, in batches.
    rows = [dict(zip(batch, row, strict=True)) for batch in inputs for row in zip(*batch.values(), strict=True)]
    return rows, [*rows[0]] if rows else []


def _parts(kind: Any, value: Any) -> Iterator[Part]:
    if isinstance(value, list):
        for single in value:
            yield from _parts(kind, single)
    elif isinstance(value, Mapping):
        yield Part(kind, value["bytes"] if value.get("bytes") else Path(value["path"]))
    elif value is not None:
        yield Part(kind, value)


@dataclass(frozen=True)
class Request:
    """What mteb asks for in a search."""

    task: TaskMetadata
    queries: Any
    corpus: Any
    names: Sequence[str]  #: Of the documents.
    candidates: Sequence[Sequence[int]] | None  #: Rows of the corpus, of each query; None for all.
    top_k: int

    @property
    def excluded(self) -> Tensor | None:
        """(Q, P) which documents are no candidates of a query; None where all are."""
        if self.candidates is None:
            return None
        excluded = torch.ones(len(self.queries), len(self.corpus), dtype=torch.bool)
        for row, columns in enumerate(self.candidates):
            excluded[row, columns] = False
        return excluded


class Model:
    """A folder that mteb searches with (its ``SearchProtocol``): what all kinds have."""

    #: As mteb calls it.
    kind: str

    def __init__(
        self, model: Any, folder: Path, name: str, settings: Mapping[str, Any], weights: torch.nn.Module
    ) -> None:
        self.model = model  #: As Sentence Transformers has opened it.
        self.folder = folder
        # What it reads is as the folder says, or else Sentence Transformers.
        known = read_settings(folder / "sentence_bert_config.json").get("modality_config") or model.modalities
        # A Hub's commit; or what changes with the folder's content, but not with its card.
        revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else folder_digest(folder)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "modalities": [kind for kind in MODALITIES if kind in known],
                "model_type": [self.kind],
                "framework": ["Sentence Transformers", "PyTorch"],
                "use_instructions": any(model.prompts.values()),
                "n_parameters": sum(parameter.numel() for parameter in weights.parameters()),
                "experiment_kwargs": dict(settings) or None,
            }
        )
        self._corpus: Any = None

    @property
    def modalities(self) -> list[str]:
        """What it reads."""
        return [*self.mteb_model_meta.modalities]

    def index(self, corpus: Any, **_: Any) -> None:
        """Take a corpus; it is read while searching."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Return the scores of each query's best documents, among its candidates (``top_ranked``) if it has some."""
        names: list[str] = [*self._corpus["id"]]
        candidates: list[list[int]] | None = None
        asked = self._items(queries, task_metadata, PromptType.query)
        corpus = self._items(self._corpus, task_metadata, PromptType.document)
        self._corpus = None
        if top_ranked is not None:
            wanted, candidates = _candidates(queries["id"], names, top_ranked, task_metadata)
            names, corpus = [names[row] for row in wanted], Subset(corpus, wanted)
        ranked = self._search(Request(task_metadata, asked, corpus, names, candidates, top_k))
        return {
            query: {names[column]: score for column, score in best}
            for query, best in zip(queries["id"], ranked, strict=True)
        }

    def _items(self, table: Any, task: TaskMetadata, prompt: PromptType) -> Any:
        """Return a table's items; mteb puts titles, instructions and conversations into their texts."""
        if isinstance(table, Items):
            return table.items
        loader = create_dataloader(table, task_metadata=task, prompt_type=prompt)
        return TableItems(loader, cast(Role, prompt.value), self._instruction(task, prompt), task.name)

    def _instruction(self, task: TaskMetadata, prompt: PromptType | None) -> str | None:
        """Return the text of the prompt that the model has for a task or its type; None leaves it to the role's."""
        prompts = self.model.prompts
        name = get_prompt_name(prompts, task, prompt)
        if prompt is None:  # As ``encode`` does, which knows no role.
            return prompts.get(name or self.model.default_prompt_name) or ""
        return None if name in (None, prompt.value) else prompts[name]

    def _search(self, request: Request) -> list[list[tuple[int, float]]]:
        """Return column and score of each query's best documents."""
        raise NotImplementedError


def _candidates(
    queries: Sequence[str], corpus: Sequence[str], ranked: Mapping[str, Sequence[str]], task: TaskMetadata
) -> tuple[list[int], list[list[int]]]:
    """Return the rows of all candidates, and which of them each query has: none where nothing was found for it."""
    rows, lists = {name: row for row, name in enumerate(corpus)}, [[*ranked.get(query, ())] for query in queries]
    for query, names in zip(queries, lists, strict=True):
        if missing := [name for name in names if name not in rows]:
            raise ValueError(f"{task.name}: candidate {missing[0]!r} of query {query!r} is not in the corpus.")
    wanted = sorted({rows[name] for names in lists for name in names})
    places = {corpus[row]: place for place, row in enumerate(wanted)}
    return wanted, [[*dict.fromkeys(places[name] for name in names)] for names in lists]


class Retriever(Model):
    """A model that gives every item vectors; by itself, one with several vectors an item, compared by MaxSim."""

    kind = "late-interaction"

    def __init__(self, served: ServedModel, name: str, settings: Mapping[str, Any], num_workers: int = 0) -> None:
        super().__init__(served.served, served.folder, name, settings, served.encoder or served.served)
        self.served = served
        self.num_workers = num_workers
        similarity = ScoringFunction.MAX_SIM if served.is_multi_vector else ScoringFunction(served.similarity)
        self.mteb_model_meta = self.mteb_model_meta.model_copy(
            update={"embed_dim": served.dimension, "similarity_fn_name": similarity}
        )
        #: The last corpus that was short, by its content.
        self._last: tuple[str, list[Any]] = ("", [])

    def _search(self, request: Request) -> list[list[tuple[int, float]]]:
        task, names, start = request.task, request.names, 0
        by_name = sorted(range(len(names)), key=names.__getitem__)
        order = torch.tensor(by_name).argsort()
        queries = _together([vector for block in self._encode(request.queries, "query", task) for vector in block])
        excluded = request.excluded
        best = BestDocuments(len(queries), max(1, min(request.top_k, len(names))))
        for documents in self._documents(request.corpus, task):
            block = slice(start, start + len(documents))
            scores = self.similarity(queries, documents)  # (Q, p)
            if not scores.isfinite().all():
                raise ValueError(f"{task.name}: similarities to documents {start} and after are not finite numbers.")
            if excluded is not None:
                scores = scores.masked_fill(excluded[:, block], -torch.inf)
            best.add(0, scores, order[block])
            start = block.stop
        return [
            [(by_name[position], score) for score, position in zip(*row, strict=True) if position >= 0]
            for row in zip(*(column.tolist() for column in best.ranked()), strict=True)
        ]

    def _documents(self, corpus: Any, task: TaskMetadata) -> Iterable[Any]:
        """Encode a corpus; that of a task's next subset is often the same, as where questions are translated."""
        if len(task.hf_subsets) == 1 or len(corpus) > REUSED:
            return self._encode(corpus, "document", task)
        key = digest(str(item.id) for item in corpus)
        if key != self._last[0]:
            self._last = key, [*self._encode(corpus, "document", task)]
        return self._last[1]

    def _encode(self, items: Any, role: Role, task: TaskMetadata) -> Iterator[Any]:
        """Encode items, a window at a time; a ``ValueError`` names what cannot be read."""
        rows = range(len(items))
        windows: Any = (Subset(items, rows[start : start + WINDOW]) for start in rows[::WINDOW])
        with tqdm(total=len(items), desc=f"{task.name}, {role}", leave=False) as bar:
            for encoded in self.served.stream(windows, role, num_workers=self.num_workers):
                for reason in encoded.unreadable.values():
                    raise ValueError(f"{task.name}: {reason}")
                bar.update(len(encoded.rows))
                yield encoded.vectors.split() if isinstance(encoded.vectors, MultiVectors) else encoded.vectors

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        """Compare all with all, as the folder says: (Q, P), in float32 on the host."""
        device, both = self.served.device, (_together(queries), _together(documents))
        if self.served.is_multi_vector:
            scores = self.model.similarity(*both, device=device)
        else:
            scores = self.model.similarity(*(vectors.to(device) for vectors in both))
        return cast(Tensor, scores).float().cpu()


class Embedder(Retriever):
    """A model with one vector an item: mteb's ``EncoderProtocol`` as well, for tasks that are no retrieval."""

    kind = "dense"

    def encode(
        self, inputs: DataLoader[Any], *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **_: Any
    ) -> Any:
        """Return the vectors (N, D) of a loader's rows, as an array."""
        role = cast(Role, prompt_type.value if prompt_type else "document")
        items = TableItems(inputs, role, self._instruction(task_metadata, prompt_type), task_metadata.name)
        return torch.cat([*self._encode(items, role, task_metadata)]).numpy()

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        """Compare each with its own: (N,)."""
        return cast(Tensor, self.model.similarity_pairwise(_together(queries), _together(documents)))


def _together(vectors: Any) -> Any:
    """One matrix of single vectors; lists of multi-vectors stay as they are."""
    if not isinstance(vectors, list):
        return torch.as_tensor(vectors)
    return torch.stack(vectors) if vectors and vectors[0].ndim == 1 else vectors


class Reranker(Model):
    """A cross-encoder: it puts each query's candidates in order, by logits."""

    kind = "cross-encoder"

    def __init__(self, model: Any, folder: Path, name: str, settings: Mapping[str, Any], batch_size: int) -> None:
        super().__init__(model, folder, name, settings, model)
        self.batch_size = batch_size

    def _search(self, request: Request) -> list[list[tuple[int, float]]]:
        if request.candidates is None:
            raise ValueError(f"{request.task.name}: a reranker needs candidates; give a first stage.")
        pairs = [(row, column) for row, columns in enumerate(request.candidates) for column in columns]
        ranked: list[list[tuple[int, float]]] = [[] for _ in request.queries]
        for start in trange(0, len(pairs), PAIRS, desc=f"{request.task.name}, pairs", leave=False):
            block = pairs[start : start + PAIRS]
            content = [Pair(request.queries[row], request.corpus[column]) for row, column in block]
            for (row, column), logit in zip(block, logits(self.model, content, self.batch_size), strict=True):
                ranked[row].append((column, logit))
        return ranked


def open_model(
    model: str,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    trust_remote_code: bool = False,
) -> Model:
    """Open a folder, a run that has one, or a model of the Hub; ``settings`` tell apart results of one model.

    A ``ValueError`` says that it cannot be opened, or what is wrong with a ``name``.
    """
    folder = find_folder(model)
    name = name or name_of(model, folder)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", name):
        raise ValueError(f"name {name!r}: mteb's names of models are two words with a slash, such as someone/birds.")
    if read_settings(folder / "config_sentence_transformers.json").get("model_type") == "CrossEncoder":
        reranker = open_reranker(str(folder), trust_remote_code=trust_remote_code)
        return Reranker(reranker, folder, name, settings or {}, batch_size)
    served = ServedModel.open(folder, trust_remote_code=trust_remote_code)
    kind = Retriever if served.is_multi_vector else Embedder
    return kind(served, name, settings or {}, num_workers)


def name_of(model: str, folder: Path) -> str:
    """Return what mteb calls a model: the Hub's id, or the names of the folder and of the one that it is in.

    An ``export`` takes the names of its run.
    """
    if not Path(model).exists():
        return model
    folder = folder.resolve()
    run = folder.parent if folder.name == "export" else folder
    return "/".join(re.sub(r"\s+", "_", part) for part in (run.parent.name or "local", run.name))
