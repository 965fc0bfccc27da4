"""The gradient cache: gradients of ordinary autograd, each image encoded once, no wait for the device."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from building import (
    Recorder,
    batch,
    encoder,
    examples,
    fit,
    item,
    mixed_items,
    module,
    picture,
    relative_difference,
    step_gradients,
    trainer,
    write_rows,
)
from kept_features import on_disk, opened
from peft import LoraConfig
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmembed import gradcache
from vlmembed.adapters import Adapter, Freeze, LoRA
from vlmembed.data import RetrievalDataModule
from vlmembed.features import FeatureCache, InMemory
from vlmembed.gradcache import GradCache, forward_chunks
from vlmembed.losses import BinaryCrossEntropy, InfoNCE, Matryoshka
from vlmembed.modules import EmbeddingModule
from vlmembed.modules.embedding import gather_batch
from vlmembed.training.guards import CollapseMonitor, embedding_likeness, score_likeness
from vlmembed.types import Batch, Example, Inputs

#: Chunks only change the order of float32 sums.
EXACT = 1e-5
ALL = math.inf
FROZEN: dict[str, Any] = {"adapters": [Freeze(["vision", "merger"])]}


def test_what_has_no_gradient() -> None:
    """Nothing trainable is no error; a backward before the loss's is one; without gradients it only embeds."""
    layer, numbers = nn.Linear(6, 4), torch.randn(10, 6)
    chunks = [{"numbers": part} for part in numbers.split(3)]
    with pytest.raises(RuntimeError, match="backward"):
        forward_chunks(lambda chunk: (layer(chunk["numbers"]),), chunks).backward()
    with torch.no_grad():
        embeddings = forward_chunks(lambda chunk: (layer(chunk["numbers"]),), chunks).embeddings
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, layer(numbers))
    layer.requires_grad_(False)
    cached = forward_chunks(lambda chunk: (layer(chunk["numbers"]),), chunks)
    cached.embeddings.sum().backward()
    cached.backward()
    assert layer.weight.grad is None


# Of whole models

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "qkv"], "init_lora_weights": False}


@pytest.mark.parametrize(
    ("size", "graph_bytes"),
    # The graph of the last chunk, and so of one alone, is kept in any case.
    [(size, graph_bytes) for size in (1, 5) for graph_bytes in (0.0, 2e6, 1e12)] + [(None, 0.0)],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full"),
        pytest.param({"adapters": [LoRA(LoraConfig(**LORA))]}, id="LoRA"),
        pytest.param({"adapters": [LoRA(LoraConfig(**LORA, lora_dropout=0.3))]}, id="LoRA with dropout"),
        pytest.param({"adapters": [Freeze(["vision", "merger"])]}, id="frozen vision"),
        pytest.param({"backbone": {"gradient_checkpointing": True}}, id="activation checkpointing"),
        pytest.param({"temperature": True}, id="learnable temperature"),
    ],
)
def test_whole_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], size: int | None, graph_bytes: float
) -> None:
    """Texts, pictures, several positives, shared documents: the module's step against autograd through every chunk.

    Random numbers go on as if nothing had been replayed.
    """
    torch.manual_seed(0)
    options = dict(options)
    loss = Matryoshka(InfoNCE(0.05, learnable_temperature=options.pop("temperature", False)), [64, 16])
    model = module(checkpoint, loss, **options)
    data = batch(model, examples(), size)

    def step() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        return step_gradients(model, GradCache(model.encoder, graph_bytes), data)[1], torch.rand(3)

    actual, drawn = step()
    monkeypatch.setattr(gradcache, "forward_chunks", ordinary_autograd)
    expected, drawn_then = step()
    assert relative_difference(actual, expected) < EXACT
    assert torch.equal(drawn, drawn_then)


def ordinary_autograd(forward: Any, chunks: list[Any], budget: Any = None) -> SimpleNamespace:
    """The gradient cache's interface, without a cache."""
    outputs = [output for chunk in chunks for output in forward(chunk)]
    embeddings = torch.cat(outputs) if outputs and outputs[0].ndim == 2 else None
    return SimpleNamespace(outputs=outputs, embeddings=embeddings, backward=lambda: None)


def rows() -> list[Example]:
    """Some images are in several items, of which some are in one chunk and some are not; items show up to two."""
    pages = [picture(32 + 32 * number, 64, number) for number in range(4)]
    return [
        *examples(),
        Example(item(pages[0], "which is it?", role="query"), (item(pages[0]),), (item(pages[1], pages[2]),)),
        Example(item(pages[3], role="query"), (item("words " * 9, pages[1]),), (item(pages[0], "again", pages[3]),)),
        page(1),
        page(2),
    ]


def page(number: int) -> Example:
    """A query and a large page, of one size for all numbers."""
    return Example(item(f"query {number:03}", role="query"), (item(picture(256, 256, number), f"page {number:03}"),))


class Counts:
    """How many patches go into the vision tower, and of how many a gradient comes back out of it."""

    def __init__(self, model: EmbeddingModule) -> None:
        self.forward = self.backward = 0
        tower = model.encoder.backbone.model.visual
        tower.register_forward_hook(self._seen)
        tower.patch_embed.register_forward_hook(self._embedded)

    def _seen(self, tower: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
        self.forward += len(arguments[0])

    def _embedded(self, layer: nn.Module, arguments: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._returned)

    def _returned(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def patches(model: EmbeddingModule, data: list[Example]) -> int:
    """Of all distinct images, by the Hugging Face processor."""
    items = [each for row in data for each in (row.query, *row.positives, *row.negatives)]
    images = {part.digest: part.value for each in items for part in each.parts if part.kind == "image"}
    found = model.preprocessor.processor.image_processor(images=list(images.values()), return_tensors="pt")
    return int(found["image_grid_thw"].prod(dim=1).sum())


MODES = [
    pytest.param(FROZEN, 0.0, id="frozen, no graphs"),
    pytest.param(FROZEN, ALL, id="frozen, all graphs"),
    pytest.param({}, 0.0, id="trainable, no graphs"),
    pytest.param({}, 1.0, id="trainable, little room"),
    pytest.param({}, ALL, id="trainable, all graphs"),
]


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize(("options", "graph_bytes"), MODES)
def test_how_often_the_tower_sees_an_image(
    checkpoint: Path, options: dict[str, Any], graph_bytes: float, chunk_size: int | None
) -> None:
    """Once, and it goes back once. Where graphs are not kept, it sees all but the last chunk twice.

    Without any graphs it sees what each chunk shows; then no features wait for the other chunks.
    """
    model = module(checkpoint, **options)
    counts = Counts(model)
    data = batch(model, rows(), chunk_size)
    step_gradients(model, GradCache(model.encoder, graph_bytes), data)
    sizes = [images["grid_thw"].prod(dim=1) for images in data.images]
    chunks = [int(size.sum()) for size in sizes]
    assert sum(chunks) == patches(model, rows())
    if not options and not graph_bytes:
        chunks = [int(torch.cat(sizes)[chunk["images"][:, 1].unique()].sum()) for chunk in data.chunks]
    again = 0 if options or graph_bytes == ALL else sum(chunks[:-1])
    assert counts.forward == sum(chunks) + again
    assert counts.backward == (0 if options else sum(chunks))


@pytest.mark.parametrize("graph_bytes", [0.0, ALL])
@pytest.mark.parametrize("options", [FROZEN, {}], ids=["frozen", "trainable"])
def test_features_are_gone_after_the_step(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], graph_bytes: float
) -> None:
    """Else the next step would hold those of two batches, and measuring would hold those of one."""
    model = module(checkpoint, **options)
    encode_images, seen = model.encoder.backbone.encode_images, []

    def watched(images: Inputs) -> Sequence[Tensor]:
        features = encode_images(images)
        seen.extend(StorageWeakRef(each.untyped_storage()) for each in features)
        return features

    monkeypatch.setattr(model.encoder.backbone, "encode_images", watched)
    grad_cache = GradCache(model.encoder, graph_bytes)
    step_gradients(model, grad_cache, batch(model, rows(), 3))
    gc.collect()
    assert seen
    assert all(storage.expired() for storage in seen)


# Features that are kept from step to step


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureCache:
    return opened(InMemory(1.0)) if request.param == "memory" else on_disk(tmp_path / "features")


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_kept_features_are_never_computed_again(checkpoint: Path, cache: FeatureCache, chunk_size: int | None) -> None:
    model = module(checkpoint, **FROZEN)
    counts = Counts(model)
    data = batch(model, rows(), chunk_size)
    without = step_gradients(model, GradCache(model.encoder), data)
    counts.forward = 0
    grad_cache = GradCache(model.encoder, features=cache, steps=1)
    first = step_gradients(model, grad_cache, data)
    assert counts.forward == patches(model, rows())
    second = step_gradients(model, grad_cache, batch(model, rows()[::-1], chunk_size))
    again = step_gradients(model, grad_cache, data)
    assert counts.forward == patches(model, rows())
    for embeddings, found in (first, again):
        assert torch.equal(embeddings, without[0])
        assert all(torch.equal(found[name], without[1][name]) for name in without[1])
    assert relative_difference(second[1], without[1]) < EXACT
    assert (cache.hits, cache.misses) == (2 * cache.misses, cache.misses)


def test_only_new_images_are_seen(checkpoint: Path, cache: FeatureCache) -> None:
    model = module(checkpoint, **FROZEN)
    grad_cache = GradCache(model.encoder, features=cache, steps=1)
    step_gradients(model, grad_cache, batch(model, examples(), 2))
    expected = step_gradients(model, GradCache(model.encoder), batch(model, rows(), 2))
    counts = Counts(model)
    embeddings, found = step_gradients(model, grad_cache, batch(model, rows(), 2))
    assert counts.forward == patches(model, rows()) - patches(model, examples())
    # Images were seen in other company, which changes the order of sums.
    torch.testing.assert_close(embeddings, expected[0], rtol=0, atol=1e-5)
    assert relative_difference(found, expected[1]) < 1e-5


def test_the_first_step_predicts_what_an_epoch_will_take(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token has several vectors: its own, and one for each DeepStack layer."""
    model = module(checkpoint, **FROZEN)
    cache, given = opened(InMemory(1.0)), []
    monkeypatch.setattr(cache, "predict", lambda *numbers, announce: given.append(numbers))
    grad_cache = GradCache(model.encoder, features=cache, steps=7)
    data = batch(model, rows(), 2)
    for _ in range(2):
        step_gradients(model, grad_cache, data)
    levels = 1 + len(model.encoder.backbone.model.visual.deepstack_visual_indexes)
    floats = patches(model, rows()) // 4 * levels * 64
    assert given == [(4 * floats / len(rows()), 7 * len(rows()))]


def test_other_pixel_limits_make_other_keys(checkpoint: Path) -> None:
    """Of an image that they resize; one that fits both is the same to the tower."""
    large, small = picture(256, 192, 1), picture(64, 64, 2)
    keys = []
    for options in ({}, {"max_pixels": 128 * 128}, {"min_pixels": 96 * 96}):
        model = encoder(checkpoint, **options)
        prepared = model.backbone.preprocessor.prepare([item(large), item(small)])
        (images,) = prepared.images(None)
        keys.append(set(images["keys"].tolist()))
    assert [len(both) for both in keys] == [2, 2, 2]
    assert [len(keys[0] & other) for other in keys[1:]] == [1, 1]
    assert not keys[1] & keys[2]


@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param([], id="all"),
        pytest.param([Freeze(["vision"])], id="merger"),
        pytest.param([LoRA(LoraConfig(r=2, target_modules=["q_proj", "qkv"]))], id="LoRA"),
    ],
)
def test_features_of_a_trained_tower_are_not_kept(checkpoint: Path, adapters: list[Adapter]) -> None:
    model = module(checkpoint, adapters=adapters, features=InMemory(1.0))
    with pytest.raises(ValueError, match=r"needs a frozen vision tower, but '\S*visual\.\S*' is trained"):
        fit(model, [batch(model, examples())])


def test_features_need_images_in_chunks_of_their_own(checkpoint: Path) -> None:
    options = {"backbone": {"attn_implementation": "sdpa"}, "features": InMemory(1.0)}
    model = module(checkpoint, **FROZEN, **options)
    with pytest.raises(ValueError, match="features: Qwen3VL reads images together with their text"):
        fit(model, [batch(model, examples())])


def test_the_tower_rests_from_the_second_epoch_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a whole run, which learns what one without a cache does; LoRA in the language model leaves the tower alone."""
    rows, runs = write_rows(tmp_path / "rows.jsonl"), []
    for features in (None, InMemory(1.0)):
        torch.manual_seed(0)
        adapters = [LoRA(LoraConfig(r=2, target_modules=["q_proj"]))]
        model = module(checkpoint, adapters=adapters, features=features)
        counts, before = Counts(model), []
        model.on_train_epoch_start = lambda before=before, counts=counts: before.append(counts.forward)
        runs.append(Recorder())
        data = RetrievalDataModule(str(rows), batch_size=3, chunk_size=2, num_workers=0)
        trainer(max_epochs=3, callbacks=[runs[-1]], log_every_n_steps=1).fit(model, data)
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=EXACT)
    assert before[0] == 0
    assert before[1] == before[2] == counts.forward > 0
    assert "Feature cache: about" in capsys.readouterr().out


# Waiting


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait until the device has done all its work.

    Made for a model on the "meta" device, where the numbers of a tensor do not exist: what asks for them (``item``,
    ``tolist``, ``cpu``, ``nonzero``, ``unique``, a mask as an index) fails by itself. Left are copies to the device
    that wait for themselves.
    """

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        given, results = self.places(arguments), function(*arguments, **options)
        waiting = given == {"cpu"} and self.places(results) == {"meta"} and not options.get("non_blocking")
        assert not waiting, f"{function} copies to the device, and waits: pass non_blocking=True"
        assert len(given) < 2, f"{function} on the device takes a tensor of the host's"
        return results

    @staticmethod
    def places(values: Any) -> set[str]:
        return {each.device.type for each in tree_leaves(values) if isinstance(each, Tensor) and each.ndim}


class NothingMade(TorchFunctionMode):
    """Refuses tensors made on the device from the host's numbers, which no dispatch mode sees on "meta"."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        made = function in (torch.tensor, torch.as_tensor) and result.device.type == "meta" and result.ndim
        assert not made, f"{function} copies to the device, and waits: make it on the host, and copy non_blocking"
        return result


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    with NothingMade(), NoWaiting():
        yield


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know the device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(("options", "graph_bytes"), MODES)
def test_a_step_never_waits_for_the_device(checkpoint: Path, options: dict[str, Any], graph_bytes: float) -> None:
    """Through the encoder, the joining of the batch, the loss, and back."""
    model = module(checkpoint, Matryoshka(InfoNCE(0.05), [64, 16]), **options)
    data = batch(model, [*rows(), Example(mixed_items()[0], (mixed_items()[4],))], 3)
    model.to("meta")
    grad_cache = GradCache(model.encoder, graph_bytes)
    with no_waiting():
        model.loss(*gather_batch(grad_cache.embed(data), data)).backward()
        grad_cache.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.usefixtures("on_meta")
def test_watching_never_waits_for_the_device() -> None:
    """But once in a hundred steps; see `test_guards` for what a step asks."""
    scores, mask = (torch.zeros(4, 5, device="meta", dtype=dtype) for dtype in (torch.float32, torch.bool))
    embeddings = torch.zeros(4, 8, device="meta")
    fitting: Any = SimpleNamespace(
        global_step=0,
        trainer=SimpleNamespace(
            precision_plugin=SimpleNamespace(train_step_context=contextlib.nullcontext),
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        ),
    )
    for likeness, loss, given in (
        (embedding_likeness, InfoNCE(), (embeddings, embeddings, torch.eye(4, dtype=torch.int8))),
        (score_likeness, BinaryCrossEntropy(), (scores, scores, mask)),
    ):
        watched = CollapseMonitor("Outputs", likeness)
        with no_waiting():
            watched.note(0, given, embeddings.sum())
            watched.check(fitting, loss)
        assert len(watched._looks) == 1


def on_device(data: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries and documents there, and on the host who answers whom."""
    relevance = torch.zeros(len(data.queries), len(data.documents), dtype=torch.int8)
    places = [{int(key): row for row, key in enumerate(ids)} for ids in (data.query_ids, data.document_ids)]
    for (query, document), label in zip(data.pairs.tolist(), data.labels.tolist(), strict=True):
        relevance[places[0][query], places[1][document]] = label
    return data.queries.to(device), data.documents.to(device), relevance


QUESTIONS = {
    "item": lambda states: states.sum().item(),
    "tolist": lambda states: states[0].tolist(),
    "cpu": lambda states: states.cpu(),
    "bool": lambda states: bool((states > 0).all()),
    "nonzero": lambda states: states.nonzero(),
    "mask": lambda states: states[states > 0],
    "unique": lambda states: states.unique(),
    "new tensor": lambda states: torch.tensor([1.0, 2.0], device=states.device),
    "copy": lambda states: torch.ones(3).to(states.device),
    "index": lambda states: states[torch.tensor([0])],
}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", QUESTIONS)
def test_waiting_would_be_noticed(name: str) -> None:
    """Planted one by one."""
    states = nn.Linear(4, 4, device="meta")(torch.ones(2, 4, device="meta"))
    waits = pytest.raises((RuntimeError, NotImplementedError, AssertionError))
    with waits, no_waiting():
        QUESTIONS[name](states)
    with no_waiting():
        torch.ones(3).to(states.device, non_blocking=True) + states[:, :3]


@pytest.fixture
def _no_waiting_on_a_gpu() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("options", "graph_bytes"), MODES)
def test_a_step_never_waits_for_a_gpu(
    checkpoint: Path, options: dict[str, Any], graph_bytes: float, precision: str, request: pytest.FixtureRequest
) -> None:
    loss = Matryoshka(InfoNCE(0.05), [64, 16])
    model = module(checkpoint, loss, backbone={"dtype": precision}, **options).cuda()
    data = batch(model, rows(), 3).pin_memory()
    queries, documents, relevance = on_device(data, "cuda")
    relevance = relevance.pin_memory()
    grad_cache = GradCache(model.encoder, graph_bytes)
    step_gradients(model, grad_cache, data)  # What is set up once may wait.
    request.getfixturevalue("_no_waiting_on_a_gpu")
    embeddings = grad_cache.embed(data)
    model.loss(embeddings[queries], embeddings[documents], relevance).backward()
    grad_cache.backward()
