"""An exported folder as an engine computes what Sentence Transformers computes from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import item, multi_vector, picture
from other_models import idefics3, qwen2_5_omni, qwen2_5_vl, qwen3_vl_moe
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from test_export import CASES as SINGLE
from test_export import OWN, write_module
from test_export_multi_vector import CASES as MULTI
from test_export_multi_vector import trained

from vlmembed.adapters import LoRA
from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.data.cells import Folder, to_items
from vlmembed.encoder import Encoder
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.export.verify import as_input, make_probes
from vlmembed.late_interaction import MultiVectors
from vlmembed.pooling import LastToken, Mean, TokenSelection
from vlmembed.search.served import ServedModel
from vlmembed.types import Item, Part, Role

#: Of components of unit vectors in float32; what rounding makes.
TOLERANCE = 1e-5
#: In bfloat16, whose numbers have three digits: as exports are verified.
HALF_TOLERANCE = 0.045
PROMPTS = {"pages-query": "Find the page.", "pages-document": "A page."}


def export(checkpoint: Path, folder: Path, pooling: Any = None, **options: Any) -> Path:
    """Write an embedder's folder, without verifying it: other tests do."""
    torch.manual_seed(0)
    truncate_dim, lora = options.pop("truncate_dim", None), options.pop("lora", False)
    built = Encoder(Qwen3VL(str(checkpoint), **{"query_instruction": "Find it.", **options}), pooling or LastToken())
    built.configure()
    if lora:
        from peft import LoraConfig

        LoRA(LoraConfig(r=4, target_modules=["q_proj", "qkv"], init_lora_weights=False)).apply(built.backbone)
    folder.mkdir()
    write_folder(built, folder, truncate_dim, prompts=PROMPTS)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "export")


@dataclass(frozen=True)
class Probes:
    """Inputs of every kind, as Sentence Transformers and as we read them."""

    inputs: Sequence[Any]
    items: Sequence[Item]


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Probes:
    folder = tmp_path_factory.mktemp("probes")
    descriptions = make_probes(folder)
    items = [to_items([(value, "document", name)], Folder(folder))[0] for name, value in descriptions.items()]
    return Probes([*map(as_input, descriptions.values())], items)


def listed(vectors: Any) -> Sequence[torch.Tensor]:
    """The embedding, or the vectors, of each item."""
    return vectors.split() if isinstance(vectors, MultiVectors) else vectors


def assert_same(vectors: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert len(vectors) == len(expected)
    for ours, theirs in zip(listed(vectors), expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs.float().cpu(), rtol=0, atol=tolerance)


def compare(folder: Path, probes: Probes, opener: Any, tolerance: float = TOLERANCE, merges: bool = False) -> None:
    """In both roles and told something else, all items in one window and a part of them in another."""
    theirs = opener(str(folder), device="cpu", trust_remote_code=True)
    options = {} if opener is MultiVectorEncoder else {"convert_to_tensor": True}
    roles: dict[Role, Any] = {"query": theirs.encode_query, "document": theirs.encode_document}
    ours = ServedModel.open(folder, device="cpu", trust_remote_code=True)
    assert ours.engine == "vlmembed"
    assert ours.dimension == theirs.get_embedding_dimension()
    for role, encode in roles.items():
        if merges and role == "document":
            continue
        expected = encode(probes.inputs, batch_size=4, **options)
        assert_same(ours.encode(probes.items, role), expected, tolerance)
        first, rest = ours.stream([probes.items[:3], probes.items[3:]], role)
        assert_same([*listed(first.vectors), *listed(rest.vectors)], expected, tolerance)
        named = encode(probes.inputs[:2], prompt_name=f"pages-{role}", **options)
        told = [replace(probe, instruction=PROMPTS[f"pages-{role}"]) for probe in probes.items[:2]]
        assert_same(ours.encode(told, role), named, tolerance)


SHORT = {"last, LoRA", "last, truncated", "weighted mean", "layer mix", "earlier layer", "mean of the last", "many"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.exhaustive) for name in SINGLE]
)
def test_single_vectors(
    checkpoint: Path, tmp_path: Path, probes: Probes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pooling, stock or by code; LoRA, truncated, bfloat16, texts that are cut."""
    case = SINGLE[name]
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "shifted_pooling", OWN)
    folder = export(
        checkpoint,
        tmp_path / "export",
        case.build(),
        lora=case.lora,
        truncate_dim=case.truncate_dim,
        dtype=case.dtype,
        max_length=case.max_length,
    )
    compare(folder, probes, SentenceTransformer, TOLERANCE if case.dtype == "float32" else HALF_TOLERANCE)


SHORT_MULTI = {"residual MLP, truncated, merged", "images, words skipped", "texts, other words skipped"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT_MULTI else pytest.mark.exhaustive) for name in MULTI]
)
def test_multi_vectors(checkpoint: Path, tmp_path: Path, probes: Probes, name: str) -> None:
    """Skipped words, images only, our own selections, truncated, merged, bfloat16."""
    case = MULTI[name]
    built, folder = trained(checkpoint, case), tmp_path / "export"
    folder.mkdir()
    write_folder(built, folder, case.truncate_dim, prompts=PROMPTS, merging_factor=case.merging_factor)
    if case.left_out:  # Items without a vector have none in both.
        probes = Probes(probes.inputs[1:4], probes.items[1:4])
    merges = case.merging_factor > 1
    compare(folder, probes, MultiVectorEncoder, TOLERANCE if case.dtype == "float32" else HALF_TOLERANCE, merges)
    if merges:
        served = MultiVectorEncoder(str(folder), device="cpu")
        expected = served.encode_document(probes.inputs, batch_size=1)
        # Which vectors are merged is decided by the last bit where they are about as similar; how many are left is not.
        ours = ServedModel.open(folder, device="cpu").encode(probes.items, "document")
        assert [*map(len, listed(ours))] == [*map(len, expected)]


def test_expansion_tokens_stand_behind_queries(checkpoint: Path, tmp_path: Path, probes: Probes) -> None:
    built = multi_vector(checkpoint, query_tokens=TokenSelection("texts"), expansion_tokens=3).encoder
    write_folder(built, tmp_path / "export", prompts=PROMPTS)
    compare(tmp_path / "export", probes, MultiVectorEncoder)


def test_attends_both_ways(checkpoint: Path, tmp_path: Path, probes: Probes) -> None:
    compare(export(checkpoint, tmp_path / "export", bidirectional=True), probes, SentenceTransformer)


@pytest.fixture
def window(tmp_path: Path) -> list[Item]:
    """Images, some of them twice, under another name or in another item; a text; and what cannot be read."""
    for seed, name in enumerate(("one", "two", "three")):
        picture(64, 32 + 32 * seed, seed).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "one.png", tmp_path / "copy.png")
    content = (tmp_path / "three.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    shutil.copy(tmp_path / "cut.png", tmp_path / "cut again.png")
    names = ["one.png", "two.png", "missing.png", "copy.png", "cut.png", "three.png", "cut again.png", "one.png"]
    items = [Item("document", (Part("image", tmp_path / name),), f"corpus.jsonl, {name}") for name in names]
    return [*items, item("a text"), item(picture(64, 32, 0), "a caption")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_left_out_by_name(exported: Path, window: list[Item], num_workers: int) -> None:
    model = ServedModel.open(exported, device="cpu")
    windows = [window[2:3], window, [], window[:2]]
    nothing, encoded, empty, last = model.stream(windows, "document", num_workers=num_workers)
    assert (nothing.rows, len(nothing.vectors), [*nothing.unreadable]) == ([], 0, [0])
    assert (empty.rows, len(empty.vectors), empty.unreadable) == ([], 0, {})
    assert last.rows == [0, 1]
    assert encoded.rows == [0, 1, 3, 5, 7, 8, 9]
    assert [*encoded.unreadable] == [2, 4, 6]
    for row, reason in encoded.unreadable.items():
        assert window[row].origin in reason
    readable = [window[row] for row in encoded.rows]
    alone = torch.cat([model.encode([one], "document") for one in readable])
    torch.testing.assert_close(encoded.vectors, alone, rtol=0, atol=TOLERANCE)
    # The same file, and a copy of it, were encoded once: no rounding is between them.
    assert encoded.vectors[0].equal(encoded.vectors[2])
    assert encoded.vectors[0].equal(encoded.vectors[4])
    with pytest.raises(ValueError, match=r"corpus\.jsonl, missing\.png"):
        model.encode(window, "document")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_equal_items_of_a_group_are_encoded_once(exported: Path, window: list[Item], num_workers: int) -> None:
    """In the second window there is nothing new; in another group everything is."""
    model = ServedModel.open(exported, device="cpu")
    windows = [window, [*window[4:7], *window[:2]], [*window[:1], *window[4:5]]]
    first, second, other = model.stream(
        windows, "document", num_workers=num_workers, group_of=lambda items: items is windows[2]
    )
    assert (second.rows, [*second.unreadable]) == ([1, 3, 4], [0, 2])
    assert "same content as another" in second.unreadable[0]
    assert window[4].origin in second.unreadable[0]
    assert second.vectors[1:].equal(first.vectors[:2])
    assert (other.rows, [*other.unreadable]) == ([0], [1])
    assert "same content" not in other.unreadable[1]


def test_threads_compute_side_by_side(exported: Path, window: list[Item]) -> None:
    model, threads = ServedModel.open(exported, device="cpu"), torch.get_num_threads()
    readable = [window[row] for row in (0, 1, 5, 8, 9)]
    try:
        torch.set_num_threads(3)
        (encoded,) = model.stream([readable], "document", batch_tokens=1)  # A batch for each item.
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([model.encode([one], "document") for one in readable])
    torch.testing.assert_close(encoded.vectors, alone, rtol=0, atol=TOLERANCE)


class Lazy(Sequence[Any]):
    """Reads an item when it is asked for it, and cannot read one."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: Any) -> Any:
        self.asked.append(row)
        if row == 1:
            raise ValueError("corpus.jsonl, row 2: no such cell")
        return self.items[row]


def test_a_sequence_is_read_once(exported: Path) -> None:
    lazy = Lazy([item(f"text {number}") for number in range(4)])
    (encoded,) = ServedModel.open(exported, device="cpu").stream([lazy], "document")
    assert lazy.asked == [0, 1, 2, 3]
    assert (encoded.rows, encoded.unreadable) == ([0, 2, 3], {1: "corpus.jsonl, row 2: no such cell"})


def test_an_items_own_instruction_takes_the_prompts_place(exported: Path) -> None:
    served, model = SentenceTransformer(str(exported), device="cpu"), ServedModel.open(exported, device="cpu")
    told = [replace(item("seven"), instruction=text) for text in ("Find the page.", "", None)]
    prompts = ("Find the page.", "", "Find it.")  # The last is the folder's for queries.
    expected = [served.encode_query("seven", prompt=text, convert_to_tensor=True) for text in prompts]
    assert_same(model.encode(told, "query"), expected)


def test_says_what_it_is(exported: Path, tmp_path: Path) -> None:
    model = ServedModel.open(exported)
    size = json.loads((exported / "processor_config.json").read_text())["image_processor"]["size"]
    assert (model.dimension, model.dimensions, model.is_multi_vector, model.similarity) == (64, [], False, "cosine")
    assert model.pixels == {"min": size["shortest_edge"], "max": size["longest_edge"]}
    assert model.prompt_of("query") == "Find it."
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "README.md").write_text("Another card.")
    assert ServedModel.open(copy).digest == model.digest
    (copy / "config_sentence_transformers.json").write_text(
        (copy / "config_sentence_transformers.json").read_text().replace("Find it.", "Find that.")
    )
    assert ServedModel.open(copy).digest != model.digest


def changed(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """Copy a folder with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    path = target / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("sentence_bert_config.json", {"query_length": 20}, "query_length"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 24}}}, r"text\.max_length"),
        ("1_Pooling/config.json", {"include_prompt": False}, "Pooling"),
    ],
)
def test_what_no_backbone_computes_is_left_to_sentence_transformers(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, values: Any, reason: str
) -> None:
    folder = changed(exported, tmp_path / "export", name, **values)
    model, served = ServedModel.open(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    assert model.engine == "sentence_transformers"
    assert re.search(f"encoded by Sentence Transformers, .*{reason}", capsys.readouterr().out)
    texts = ["one two", "three " * 40, "one two"]
    expected = served.encode_query(texts, convert_to_tensor=True)
    assert_same(model.encode([item(text, role="query") for text in texts], "query"), expected)


def test_a_text_model_is_left_to_sentence_transformers(tmp_path: Path) -> None:
    """A BERT, single vectors and several; an image is refused by name, and the rest is encoded."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = tmp_path / "bert"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(bert)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    transformer = Transformer(str(bert))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(tmp_path / "single"))
    MultiVectorEncoder(str(bert), device="cpu").save(str(tmp_path / "multi"))
    texts = ["one", "two three " * 3, "one", "three"]
    items = [item(text, role="query") for text in texts]
    for name, opener in (("single", SentenceTransformer), ("multi", MultiVectorEncoder)):
        model, served = ServedModel.open(tmp_path / name, device="cpu"), opener(str(tmp_path / name), device="cpu")
        assert model.engine == "sentence_transformers"
        expected = served.encode_query(texts)
        assert_same(model.encode(items, "query"), [torch.as_tensor(vectors) for vectors in expected])
        (encoded,) = model.stream([[*items, Item("query", (Part("image", tmp_path / "no.png"),), "row 9")]], "query")
        assert encoded.rows == [0, 1, 2, 3]
        assert "row 9" in encoded.unreadable[4]


EXHAUSTIVE = [pytest.param(make, marks=pytest.mark.exhaustive) for make in (idefics3, qwen3_vl_moe, qwen2_5_omni)]


@pytest.mark.parametrize("make", [qwen2_5_vl, *EXHAUSTIVE])
def test_other_vision_language_models(tmp_path: Path, probes: Probes, make: Any) -> None:
    """Those that are padded, one with experts, and one that hears."""
    make(tmp_path / "checkpoint")
    packs, hears = make is qwen3_vl_moe, make is qwen2_5_omni
    built = Encoder((Qwen3VL if packs else VisionLanguageModel)(str(tmp_path / "checkpoint")), Mean())
    built.configure()
    (tmp_path / "export").mkdir()
    write_folder(built, tmp_path / "export", prompts=PROMPTS)
    rate = built.preprocessor.audio_rate
    read = Probes(probes.inputs[:3], probes.items[:3])
    if hears:
        described = {name: value for name, value in make_probes(tmp_path, rate).items() if "audio" in name}
        heard = [to_items([(value, "document", name)], Folder(tmp_path))[0] for name, value in described.items()]
        read = Probes([*read.inputs[:2], *map(as_input, described.values())], [*read.items[:2], *heard])
    compare(tmp_path / "export", read, SentenceTransformer)


def test_distinct_images_go_through_the_tower_once(exported: Path) -> None:
    model = ServedModel.open(exported, device="cpu")
    assert model.encoder is not None
    seen: list[int] = []
    model.encoder.backbone.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[1])))
    image, other = picture(64, 64, 1), picture(96, 64, 2)
    items = [item(image), item(image), item(image, "a caption"), item(other), item(image)]
    model.encode(items, "document")
    assert seen == [2]


def test_a_run_stands_for_its_export(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported, run / "export")
    assert ServedModel.open(run).folder == run / "export"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.yaml": "{}"}, "has no export.*python -m vlmembed export --config"),
        ({"config.json": "{}"}, r"has no modules\.json"),
        ({"modules.json": "[", "config_sentence_transformers.json": "{}"}, r"modules\.json is not JSON"),
        ({"modules.json": "[]", "config_sentence_transformers.json": "{"}, r"transformers\.json is not JSON"),
        ({"modules.json": "{}"}, r"modules\.json is not what"),
        ({"modules.json": "[1]"}, r"modules\.json is not what"),
        ({"modules.json": "[]", "config_sentence_transformers.json": "[]"}, r"transformers\.json is not what"),
        ({"modules.json": "[]"}, "cannot open"),
        (
            {"modules.json": "[]", "config_sentence_transformers.json": '{"model_type": "CrossEncoder"}'},
            "is a reranker",
        ),
        ({"modules.json": '[{"type": "served_pooling.ServedPooling", "path": ""}]'}, "trust_remote_code"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ServedModel.open(tmp_path)


@pytest.mark.parametrize("name", ["not/there/at/all", "no-such-model"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ServedModel.open(name)
