"""How large chunks are, which graphs are kept, and what happens when memory runs out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from building import (
    batch,
    examples,
    gradients,
    item,
    module,
    picture,
    relative_difference,
    step_gradients,
    trainer,
    write_rows,
)
from lightning.pytorch.loggers import CSVLogger

from vlmembed.adapters import Freeze
from vlmembed.data import RetrievalDataModule
from vlmembed.gradcache import GradCache, GraphBudget, forward_chunks
from vlmembed.modules import EmbeddingModule
from vlmembed.training import memory
from vlmembed.types import Example

# Sums of float32 in another order.
EXACT = 1e-5
CPU = torch.device("cpu")
FROZEN: dict[str, Any] = {"adapters": [Freeze(["vision", "merger"])]}


def fit(model: EmbeddingModule, folder: Path, **options: int | str | None) -> RetrievalDataModule:
    data = RetrievalDataModule(str(write_rows(folder / "rows.jsonl")), batch_size=4, num_workers=0, **options)
    trainer(max_epochs=2, logger=CSVLogger(folder, name="", version=""), log_every_n_steps=1).fit(model, data)
    return data


# Chunks


def test_auto_measures_says_and_writes_down(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = fit(module(checkpoint), tmp_path, chunk_size="auto")
    assert data.chunk_tokens == memory.MOST_TOKENS["cpu"]  # There is memory enough for a tiny model.
    assert "A chunk may have 8,192 tokens" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "chunks.yaml").read_text()) == {"tokens": 8192}


def test_auto_takes_a_share_of_what_is_free(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(checkpoint)
    encoder, collator = model.encoder, model.collator()
    taken = dict(memory._try(encoder, collator, tokens) for tokens in (1024, 2048))
    (few, small), (many, large) = taken.items()
    per_token = (large - small) / (many - few)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5000 * per_token / memory.CHUNK_SHARE)
    assert memory.tokens_per_chunk(encoder, collator) == pytest.approx(5000, abs=1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.0)
    assert memory.tokens_per_chunk(encoder, collator) == memory.FEWEST_TOKENS


def test_probing_leaves_nothing_behind(checkpoint: Path) -> None:
    model = module(checkpoint)
    encoder, collator = model.encoder, model.collator()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    memory.tokens_per_chunk(encoder, collator)
    assert torch.equal(torch.rand(3), expected)
    assert not gradients(encoder)


@pytest.mark.parametrize("frozen", [False, True])
def test_patches_cost_nothing_where_no_activations_are_kept(checkpoint: Path, tmp_path: Path, frozen: bool) -> None:
    data = fit(module(checkpoint, **(FROZEN if frozen else {})), tmp_path, chunk_size=2)
    assert data.patch_cost == (0.0 if frozen else 0.5)


def test_auto_without_a_module_that_measures_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = RetrievalDataModule(str(write_rows(tmp_path / "rows.jsonl")), batch_size=4, chunk_size="auto")
    data.collator, data.trainer = module(checkpoint).collator(), SimpleNamespace(overfit_batches=0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="chunk_size: auto needs a vlmembed module"):
        data.train_dataloader()


def test_a_checkpoint_remembers_the_size_of_chunks() -> None:
    data, resumed = RetrievalDataModule(chunk_size="auto"), RetrievalDataModule(chunk_size="auto")
    data.chunk_tokens = 640
    resumed.load_state_dict(data.state_dict())
    assert resumed.chunk_tokens == 640


# Graphs


@pytest.mark.parametrize(("kept", "calls"), [(0, 4 + 3), (1, 4 + 2), (2, 4 + 1), (3, 4 + 0)])
def test_a_graph_is_kept_where_there_is_room_for_it(kept: int, calls: int) -> None:
    """Of four chunks; the last one's graph is kept in any case."""
    layer = torch.nn.Linear(64, 64)
    counted: list[int] = []

    def encode(chunk: dict[str, torch.Tensor]) -> torch.Tensor:
        counted.append(1)
        return layer(chunk["numbers"]).tanh()

    chunks = [{"numbers": torch.randn(4, 64)} for _ in range(4)]
    one_graph = 2 * 4 * 64 * 4  # The inputs, and what tanh returned, in float32.
    step = forward_chunks(lambda chunk: (encode(chunk),), chunks, GraphBudget(kept * one_graph, layer.parameters()))
    step.embeddings.sum().backward()
    step.backward()
    assert len(counted) == calls


def test_a_graph_is_what_it_owns() -> None:
    """Weights, and what was counted already, take no more memory."""
    layer = torch.nn.Linear(64, 64)
    room = GraphBudget(1e9, layer.parameters())
    chunk = torch.randn(4, 64)
    with room.measured():
        (layer(chunk) * layer(chunk)).sum()
    assert room.taken == 3 * chunk.nbytes


@pytest.mark.parametrize(("wanted", "bytes"), [("none", 0), (0.5, 2**29), (2, 2**31), ("auto", 0.5 * 1000)], ids=str)
def test_room_for_graphs(monkeypatch: pytest.MonkeyPatch, wanted: memory.GraphMemory, bytes: float) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000.0)
    assert memory.graph_bytes(wanted, CPU) == bytes


def test_auto_on_a_gpu_waits_for_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000.0)
    gpu = torch.device("cuda")
    assert memory.graph_bytes("auto", gpu) == 0
    assert memory.graph_bytes("auto", gpu, step=400) == pytest.approx(0.9 * 600)
    assert memory.graph_bytes("auto", gpu, step=4000) == 0


@pytest.mark.parametrize("wanted", [-1, "lots", None])
def test_other_answers_are_refused(wanted: object) -> None:
    with pytest.raises(ValueError, match=f"auto, none, or a number of GiB, got {wanted!r}"):
        memory.graph_bytes(wanted, CPU)  # type: ignore[arg-type]


# Out of memory


class Scarce:
    """An encoder that has no memory for chunks above so many tokens."""

    def __init__(self, model: EmbeddingModule, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        forward = model.encoder.forward

        def limited(inputs: dict[str, torch.Tensor], features: object = ()) -> torch.Tensor:
            if inputs["input_ids"].numel() > most:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(inputs, features)

        monkeypatch.setattr(model.encoder, "forward", limited)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_halving_saves_the_step_and_those_after_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], frozen: bool
) -> None:
    model = module(checkpoint, **(FROZEN if frozen else {}))
    data = batch(model, examples(), 4)
    largest = max(chunk["input_ids"].numel() for chunk in data.chunks)
    _, expected = step_gradients(model, GradCache(model.encoder), data)
    scarce = Scarce(model, largest - 1, monkeypatch)
    grad_cache = GradCache(model.encoder, 1e9)
    for _ in range(2):
        assert relative_difference(step_gradients(model, grad_cache, data)[1], expected) < EXACT
    assert scarce.refused == 1
    assert capsys.readouterr().out.count("Chunks are halved, and no graphs are kept, from now on.") == 1


def test_too_little_memory_for_half_a_chunk_fails_with_advice(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module(checkpoint)
    Scarce(model, 10, monkeypatch)
    with pytest.raises(RuntimeError, match=r"Out of memory in \d+ chunks.*Lower data.chunk_size"):
        step_gradients(model, GradCache(model.encoder), batch(model, examples(), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [FROZEN, {}], ids=["frozen", "trainable"])
def test_memory_hardly_grows_with_the_batch(checkpoint: Path, options: dict[str, Any]) -> None:
    """Beyond the embeddings, and the features of a frozen tower; no graphs are kept."""
    model = module(checkpoint, **options).cuda()
    peaks, kept = {}, {}
    for size in (8, 64):
        pages = [item(picture(256, 256, number), f"page {number:03}") for number in range(size)]
        rows = [Example(item(f"query {number:03}", role="query"), (page,)) for number, page in enumerate(pages)]
        data = batch(model, rows, chunk_size=4).pin_memory()
        for _ in range(2):  # The first time, gradients are allocated.
            torch.cuda.reset_peak_memory_stats()
            embeddings, _ = step_gradients(model, GradCache(model.encoder), data)
        peaks[size] = torch.cuda.max_memory_allocated()
        features = sum(image.nbytes for image in model.encoder.encode_images(data.images)) if options else 0
        # Embeddings come with their gradients, in several copies while the loss is computed.
        kept[size] = 8 * embeddings.nbytes + features
    assert peaks[64] - kept[64] < 1.1 * (peaks[8] - kept[8])
