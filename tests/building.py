"""What many tests build: items, pictures, examples, encoders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from vlmembed.backbones import QueryFirst, Qwen3VL, VisionLanguageModel
from vlmembed.backbones.chat_templates import PairTemplate
from vlmembed.cli import main
from vlmembed.data import Collator, RetrievalDataModule
from vlmembed.encoder import Encoder, MultiVectorEncoder, Scorer
from vlmembed.export.sentence_transformers import write_folder, write_reranker
from vlmembed.gradcache import GradCache
from vlmembed.heads import ScoreHead, YesNo
from vlmembed.losses import BinaryCrossEntropy, InfoNCE, Loss, RankingLoss
from vlmembed.modules import CrossEncoderModule, EmbeddingModule, MultiVectorModule, RetrievalModule
from vlmembed.pooling import LastToken, Pooling, TokenProjection
from vlmembed.trainer import Trainer
from vlmembed.types import Batch, Chunking, Example, Item, Part, RankingBatch, Role


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def damaged(random: np.random.Generator, content: bytes, within: int | None = None) -> bytes:
    """Change one to five places among the first bytes: cut some out, put some in."""
    changed = bytearray(content)
    for place in random.integers(0, min(len(content), within or len(content)), random.integers(1, 6)).tolist():
        length = int(random.choice([0, 1, 4]))
        changed[place : place + length] = random.bytes(int(random.choice([0, 1, 4])))
    return bytes(changed)


def item(*content: str | Image.Image, role: Role = "document") -> Item:
    return Item(role, tuple(Part("text" if isinstance(value, str) else "image", value) for value in content))


def mixed_items() -> list[Item]:
    """Every kind of content, of very different lengths."""
    frames = tuple(picture(64, 64, seed) for seed in range(4))
    return [
        item("a question", role="query"),
        item(picture(96, 64, 1)),
        item(picture(32, 96, 2), "with a caption"),
        item("before", picture(64, 64, 3), "between", picture(96, 32, 4), "after"),
        Item("document", (Part("video", frames),)),
        item("many words " * 30),
    ]


def examples(count: int = 6) -> list[Example]:
    """Texts and pictures, with a shared document, a second positive, and different numbers of hard negatives."""
    shared = item(picture(64, 64, 99))
    rows = []
    for index in range(count):
        query = item(f"query number {index} " * (index % 3 + 1), role="query")
        positive = item(picture(32 + 32 * (index % 3), 64, index), *(["caption"] * (index % 2)))
        positives = (shared, positive) if index % 3 == 0 else (positive,)
        negatives = tuple(item(f"wrong answer {index} {number}") for number in range(index % 3))
        rows.append(Example(query, positives, negatives))
    return rows


def backbone(checkpoint: Path | str, kind: type[VisionLanguageModel] = Qwen3VL, **options: Any) -> Any:
    """A backbone with its weights."""
    built = kind(str(checkpoint), **options)
    built.configure()
    return built


def encoder(
    checkpoint: Path, pooling: Pooling | None = None, kind: type[VisionLanguageModel] = Qwen3VL, **options: Any
) -> Encoder:
    built = Encoder(kind(str(checkpoint), **options), pooling or LastToken())
    built.configure()
    return built


def scorer(
    checkpoint: Path | str,
    head: ScoreHead | None = None,
    template: PairTemplate | None = None,
    kind: type[VisionLanguageModel] = Qwen3VL,
    **options: Any,
) -> Scorer:
    built = Scorer(kind(str(checkpoint), **options), head or YesNo(), template or QueryFirst())
    built.configure()
    return built


def export(built: Encoder | MultiVectorEncoder | Scorer, folder: Path, *options: Any, **named: Any) -> Path:
    """Write the folder that Sentence Transformers opens, and no card."""
    folder.mkdir(parents=True, exist_ok=True)
    write: Callable[..., None] = write_reranker if isinstance(built, Scorer) else write_folder
    write(built, folder, *options, **named)
    return folder


def module(checkpoint: Path, loss: Loss | None = None, **options: Any) -> EmbeddingModule:
    backbone = {"kind": Qwen3VL, **options.pop("backbone", {})}
    model = backbone.pop("kind")(str(checkpoint), **backbone)
    # What is hard is the second pass, and tiny graphs would all be kept.
    options.setdefault("graph_memory", "none")
    built = EmbeddingModule(model, options.pop("pooling", LastToken()), loss or InfoNCE(0.05), **options)
    built.configure_model()
    return built


def multi_vector(checkpoint: Path, loss: Loss | None = None, **options: Any) -> MultiVectorModule:
    """A multi-vector model, with the same weights whenever it is made."""
    backbone = options.pop("backbone", {})
    options = {"graph_memory": "none", "projection": TokenProjection(32), **options}
    built = MultiVectorModule(Qwen3VL(str(checkpoint), **backbone), loss or InfoNCE(0.05), **options)
    torch.manual_seed(0)
    built.configure_model()
    return built


def batch(model: EmbeddingModule | MultiVectorModule, rows: list[Example], chunk_size: int | None = None) -> Batch:
    return collated(model.collator(), rows, chunk_size)


def collated(collator: Collator, rows: list[Example], size: int | None = None, **chunking: Any) -> Any:
    """A batch, in chunks of a size."""
    collator.chunking = Chunking(size, **chunking)
    return collator(rows)


def lists(count: int = 5, largest: float = 1.0) -> list[Example]:
    """Queries and documents of texts and pictures, graded, two to five candidates each; queries share documents."""
    documents = [
        item(picture(64, 64, 1)),
        item("seven"),
        item(picture(64, 96, 2), "seven"),
        item("eight nine " * 5),
        item(picture(64, 64, 1), picture(32, 96, 3)),
        item("seven eight"),
    ]
    rows = []
    for index in range(count):
        query = item(f"query {index} " * (index % 3 + 1), *[picture(64, 32, 50)] * (index % 2), role="query")
        candidates = [documents[(index + place) % len(documents)] for place in range(2 + index % 4)]
        right = 1 + index % 2 if len(candidates) > 2 else 1
        labels = [largest / (1 + place) if place < right else 0.0 for place in range(len(candidates))]
        rows.append(Example(query, tuple(candidates[:right]), tuple(candidates[right:]), labels=tuple(labels)))
    return rows


def ranker(checkpoint: Path, loss: RankingLoss | None = None, **options: Any) -> CrossEncoderModule:
    """A cross-encoder, with the same weights whenever it is made."""
    backbone = options.pop("backbone", {})
    options.setdefault("graph_memory", "none")
    built = CrossEncoderModule(Qwen3VL(str(checkpoint), **backbone), loss or BinaryCrossEntropy(), **options)
    torch.manual_seed(0)
    built.configure_model()
    return built


def ranking_batch(model: CrossEncoderModule, rows: list[Example], chunk_size: int | None = None) -> RankingBatch:
    return collated(model.collator(), rows, chunk_size)


def assert_alone_as_mixed(backbone: VisionLanguageModel, items: list[Item], tolerance: float) -> None:
    """Each item has, alone, the tokens and the hidden states that it has in a padded batch."""
    inputs = backbone.preprocessor(items)
    hidden = backbone(inputs)
    for row, one in enumerate(items):
        alone = backbone.preprocessor([one])
        length = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].equal(inputs["input_ids"][row, :length])
        torch.testing.assert_close(hidden[row, :length], backbone(alone)[0], rtol=0, atol=tolerance)


def step_gradients(
    model: EmbeddingModule | MultiVectorModule, grad_cache: GradCache, data: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The embeddings and the gradients of one step, without a trainer."""
    embeddings = grad_cache.embed(data)
    model.loss(*model.gather_batch(embeddings, data)).backward()
    grad_cache.backward()
    found = gradients(model)
    model.zero_grad()
    return embeddings.detach(), found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The size of the difference over the size of the second, all tensors taken together."""
    assert one.keys() == other.keys()
    difference = sum(((one[name] - other[name]).double() ** 2).sum() for name in one)
    size = sum((other[name].double() ** 2).sum() for name in one)
    return float((difference / size).sqrt())


def write_rows(path: Path, count: int = 9) -> Path:
    """Training rows of pictures and texts, with several right answers, some of them shared."""
    rows = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(32 + 32 * (index % 4), 64, index).save(path.parent / f"{index}.png")
        positive = {"image": f"{index}.png"} if index % 3 else f"an answer {index}"
        also = {"image": f"{(index + 1) % count}.png"} if index % 3 == 1 else "what answers many"
        query = f"question {index} " * (1 + index % 2)
        rows.append({"query": query, "positive": [positive, also], "negative": f"wrong {index}"})
    return Path(jsonl(path, rows))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, put together if the tensor is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[name].double() - other[name].double() for name in one}


def texts(count: int) -> list[Example]:
    """Examples without pictures, none of them in `examples`."""
    return [
        Example(item(f"text query {index} " * (index + 1), role="query"), (item(f"text answer {index}"),))
        for index in range(count)
    ]


class Recorder(Callback):
    """Keeps the loss and the weights of every step, and the gradient before it is clipped."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.weights.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: lightning.LightningModule, optimizer: Any) -> None:
        self.gradients.append(gradients(pl_module))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.logged_metrics["train/loss"]))
        if len(self.gradients) == len(self.weights):
            self.weights.append(weights(pl_module))

    def __getstate__(self) -> dict[str, Any]:
        """Without the methods that Lightning ties to the model, which cannot be sent."""
        return {name: vars(self)[name] for name in ("losses", "gradients", "weights")}

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """What the first steps changed, in float64."""
        return difference(self.weights[step], self.weights[0])


def slow_maxsim(queries: Sequence[torch.Tensor], documents: Sequence[torch.Tensor], mean: bool = False) -> torch.Tensor:
    """MaxSim as it is defined, or its mean over a query's vectors, a pair of items at a time."""
    unit = [[normalize(vectors, dim=1) for vectors in side] for side in (queries, documents)]
    best = [[(query @ document.T).amax(dim=1) for document in unit[1]] for query in unit[0]]
    return torch.stack([torch.stack([each.mean() if mean else each.sum() for each in row]) for row in best])


def allocated(of: Callable[[], Any]) -> int:
    """Bytes of torch that a call allocates at most at a time.

    Not what is resident, which the system may take back and give again meanwhile.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        of()
    # Of the raw ones, as `events` counts what an operator allocates as the operator's.
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def trainer(**options: Any) -> Trainer:
    """Lightning's trainer on the CPU, writing nothing unless told to."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, **fixed, "max_epochs": 1, **options})


def fit(model: RetrievalModule, batches: list[Any], *callbacks: Callback, **options: Any) -> Recorder:
    """Train on each batch once."""
    recorder = Recorder()
    run = trainer(callbacks=[*callbacks, recorder], log_every_n_steps=1, **options)
    run.fit(model, DataLoader(batches, batch_size=None))
    return recorder


def csv_logger(name: str, **options: Any) -> dict[str, Any]:
    """Lightning's own, as a configuration has it."""
    options = {"save_dir": "runs", "name": name, **options}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": options}


def jsonl(path: Path | str, rows: Iterable[Any]) -> str:
    """Write rows as JSON, one a line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def evaluation_folder(
    folder: Path | str, corpus: Iterable[Any], queries: Iterable[Any], qrels: str | Iterable[tuple[Any, ...]]
) -> str:
    """Write an evaluation folder; of judgements the text, or query, document and grade of each."""
    jsonl(Path(folder, "corpus.jsonl"), corpus)
    jsonl(Path(folder, "queries.jsonl"), queries)
    lines = qrels if isinstance(qrels, str) else "".join("\t".join(map(str, judged)) + "\n" for judged in qrels)
    Path(folder, "qrels.tsv").write_text(lines)
    return str(folder)


def run_config(checkpoint: Path, kind: str = "EmbeddingModule", **data: Any) -> dict[str, Any]:
    """A configuration of ``fit``, as its file holds it."""
    loss = "BinaryCrossEntropy" if kind == "CrossEncoderModule" else "InfoNCE"
    model = {
        "backbone": {"class_path": "vlmembed.backbones.Qwen3VL", "init_args": {"checkpoint": str(checkpoint)}},
        "loss": {"class_path": f"vlmembed.losses.{loss}"},
    }
    if kind == "EmbeddingModule":
        model["pooling"] = {"class_path": "vlmembed.pooling.LastToken"}
    return {
        "model": {"class_path": f"vlmembed.modules.{kind}", "init_args": model},
        "data": {"class_path": "vlmembed.data.RetrievalDataModule", "init_args": {"num_workers": 0, **data}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    }


def data_module(**arguments: Any) -> RetrievalDataModule:
    """What YAML makes of a data module's arguments."""
    parser = ArgumentParser()
    parser.add_class_arguments(RetrievalDataModule, "data")
    parsed = parser.parse_object({"data": {"num_workers": 0, **arguments}})
    return parser.instantiate_classes(parsed).data


def call(command: str, config: dict[str, Any], *options: str) -> None:
    """Run a command by a configuration, in this process and the folder that is the current one."""
    Path("run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    main([command, "--config", "run.yaml", *options])


def write_index(
    folder: Path,
    vectors: torch.Tensor | list[torch.Tensor],
    ids: list[str],
    precision: str = "float32",
    shard_size: int = 7,
    **manifest: Any,
) -> Path:
    """An index as ``encode`` writes it: vectors (P, D), or those (n, D) of each item, in shards."""
    folder.mkdir(parents=True)
    is_multi, dimension, shards = isinstance(vectors, list), vectors[0].shape[-1], []
    for number, start in enumerate(range(0, len(ids), shard_size)):
        part = [np.atleast_2d(item.float().numpy()) for item in vectors[start : start + shard_size]]
        columns: dict[str, Any] = {"id": ids[start : start + shard_size]}
        if precision == "int8":
            scales = [float(np.abs(item).max() / 127) for item in part]
            part = [np.rint(item / scale).astype(np.int8) for item, scale in zip(part, scales, strict=True)]
            columns["scale"] = pa.array(scales, pa.float32())
        elif precision == "binary":
            part = [np.packbits(item > 0, axis=1) for item in part]
        else:
            part = [item.astype(precision) for item in part]
        single = pa.list_(pa.from_numpy_dtype(part[0].dtype))
        rows = [[*item] if is_multi else item[0] for item in part]
        columns["embedding"] = pa.array(rows, pa.list_(single) if is_multi else single)
        file = f"shard-{number:05}.parquet"
        pq.write_table(pa.table(columns), folder / file, row_group_size=max(1, shard_size // 2))
        shards.append({"file": file, "rows": len(part), "sha256": ""})
    written = {
        "format": 1, "model": "model", "model_digest": "", "engine": "", "role": "document", "prompt": "",
        "precision": precision, "dimension": dimension, "dimensions": [], "is_multi_vector": is_multi,
        "similarity": "maxsim" if is_multi else "cosine", "count": len(ids), "shard_size": shard_size,
        "shards": shards, "complete": True, **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(written))
    return folder
