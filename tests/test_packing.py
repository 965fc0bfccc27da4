"""Packing, the last layer for the last tokens alone and shared beginnings: all as transformers has each item alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from inspect import isabstract
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from building import encoder, gradients, item, mixed_items, picture, ranker, relative_difference, texts, write_rows
from other_models import qwen3_vl_moe
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights
from videos import film

from vlmembed import pooling
from vlmembed.adapters import LoRA
from vlmembed.backbones import DocumentFirst, QueryFirst, Qwen3VL
from vlmembed.backbones.packing import (
    Bounds,
    LastTokens,
    Packed,
    PackedItems,
    halve,
    packed_attention,
    select,
    shared_lengths,
)
from vlmembed.backbones.preprocessing import PackingPreprocessor
from vlmembed.data import ItemCollator, RetrievalDataModule
from vlmembed.encoder import Encoder, Scorer
from vlmembed.heads import Linear, YesNo
from vlmembed.pooling import (
    Concatenation,
    EarlierLayer,
    FirstToken,
    LastToken,
    LayerMix,
    LearnedTokens,
    Mean,
    MeanOfLast,
    Pooling,
    PoolingWrapper,
    TokenProjection,
)
from vlmembed.types import Batch, Inputs, Item, Pair, Part

#: Sums in float32 in another order, in a few layers.
ROUNDING = 1e-5
#: Neither CLIP's nor the checkpoint's: every channel has its own.
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def video(*seeds: int, size: tuple[int, int] = (64, 64)) -> Item:
    return Item("document", (Part("video", tuple(picture(*size, seed) for seed in seeds)),))


CONTENTS = {
    "texts": [item("a question", role="query"), item("many words " * 20), item("some")],
    "one image": [item(picture(96, 64, 1))],
    "images of many sizes": [item(picture(32 * number, 160 - 32 * number, number)) for number in range(1, 5)],
    "interleaved": [item("before", picture(64, 96, 3), "between", picture(96, 32, 4), "after")],
    "images side by side": [item(picture(64, 32, 1), picture(32, 96, 2), picture(128, 64, 3))],
    "video": [video(0, 1, 2, 3, 4, 5, size=(96, 64))],
    "videos beside images": [video(0, 1, 2, 3), item(picture(96, 64, 1), "words"), video(5, 4, 3, 2, size=(32, 96))],
    "everything": mixed_items(),
}


@pytest.fixture(scope="module")
def backbone(checkpoint: Path) -> Qwen3VL:
    built = Qwen3VL(str(checkpoint))
    built.configure()
    return built


def prepared(backbone: Qwen3VL, items: Sequence[Item]) -> PackedItems:
    found = backbone.preprocessor.prepare(items)
    assert isinstance(found, PackedItems)
    return found


@pytest.mark.parametrize("kind", CONTENTS)
def test_positions_are_those_of_transformers(backbone: Qwen3VL, kind: str) -> None:
    inputs = backbone.preprocessor(CONTENTS[kind])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    expected, _ = backbone.model.get_rope_index(**{name: inputs.get(name) for name in names})
    order = list(range(len(CONTENTS[kind])))[::-1]
    chunk = prepared(backbone, CONTENTS[kind]).chunk(order)
    real = inputs["attention_mask"][order] == 1
    assert torch.equal(chunk["position_ids"], expected[:, order][:, real])
    assert torch.equal(chunk["input_ids"][chunk["attention_mask"] == 1], inputs["input_ids"][order][real])


@torch.no_grad()
def test_vision_positions_and_taps_are_those_that_transformers_computes(checkpoint: Path, backbone: Qwen3VL) -> None:
    stock = AutoModel.from_pretrained(checkpoint)
    items = [item(picture(96, 64, 1)), item(picture(32, 160, 2), picture(480, 32, 3)), item(picture(64, 64, 4))]
    (images,) = prepared(backbone, items).images()
    grids, tower = images["grid_thw"], stock.visual
    assert len({tuple(grid) for grid in grids.tolist()}) == 4
    seen: dict[str, Tensor] = {}
    tower.pos_embed.register_forward_pre_hook(lambda _, arguments: seen.update(taps=arguments[0]))
    tower.rotary_pos_emb.register_forward_pre_hook(lambda _, arguments: seen.update(position_ids=arguments[1]))
    features = tower(normalised(backbone, images), grids)
    assert torch.equal(images["taps"], seen["taps"])
    assert torch.equal(images["position_ids"], seen["position_ids"])
    _, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.spatial_merge_size,
    )
    assert torch.equal(images["weights"], weights)
    expected = torch.stack([features.pooler_output, *features.deepstack_features], dim=1)
    torch.testing.assert_close(torch.cat(list(backbone.encode_images(images))), expected, rtol=0, atol=ROUNDING)


def normalised(backbone: Qwen3VL, images: Inputs) -> Tensor:
    """What the vision tower gets, at all moments in time."""
    given: list[Tensor] = []
    hook = backbone.model.visual.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    backbone.encode_images(images)
    hook.remove()
    vision = backbone.model.config.vision_config
    moments = given[0].unflatten(1, (3, -1, vision.patch_size**2))
    return moments.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)


@pytest.fixture(scope="module", params=["checkpoint's own", "uneven"])
def normalising(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and one whose processor treats every colour differently."""
    if request.param != "uneven":
        return checkpoint
    folder = tmp_path_factory.mktemp("uneven") / "tiny"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor"):
        config[part] |= {"image_mean": MEAN, "image_std": DEVIATION, "rescale_factor": 1 / 250}
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


SIZES = [(96, 64), (33, 47), (130, 95), (601, 402), (50, 200), (1, 150)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bytes_become_the_pixel_values_of_the_processor(normalising: Path, size: tuple[int, int]) -> None:
    backbone = Qwen3VL(str(normalising))
    backbone.configure()
    image = picture(*size, seed=5)
    (images,) = prepared(backbone, [item(image, "and words")]).images()
    expected = AutoProcessor.from_pretrained(normalising).image_processor(images=[image], return_tensors="pt")
    assert torch.equal(images["grid_thw"], expected["image_grid_thw"])
    assert torch.equal(normalised(backbone, images), expected["pixel_values"])  # To the bit: the same operations.
    assert images["pixel_values"].dtype == torch.uint8
    # A byte instead of four, and one moment in time instead of two.
    assert images["pixel_values"].nbytes * 8 == expected["pixel_values"].nbytes


@pytest.mark.parametrize("source", ["frames", "file"])
def test_bytes_become_the_pixel_values_of_a_video(normalising: Path, source: str, tmp_path: Path) -> None:
    backbone = Qwen3VL(str(normalising))
    backbone.configure()
    one = video(3, 1, 4, 1, 5, 9, size=(100, 70)) if source == "frames" else None
    one = one or Item("document", (Part("video", film(tmp_path / "film.mp4")),))
    expected = backbone.preprocessor([one])  # What transformers makes of it: it normalises in the worker.
    (images,) = prepared(backbone, [one]).images()
    assert torch.equal(images["grid_thw"], expected["video_grid_thw"])
    assert torch.equal(normalised(backbone, images), expected["pixel_values_videos"])
    assert images["pixel_values"].nbytes * 4 == expected["pixel_values_videos"].nbytes


def test_an_image_that_items_share_is_one_image_of_the_batch(backbone: Qwen3VL) -> None:
    shared, other = picture(64, 96, 1), picture(96, 96, 2)
    items = [
        item(shared, "as a query", role="query"),
        item("first", other, "then", shared, "and", shared),
        item("no image"),
        item(shared.copy(), "as a document"),
        video(4, 5, 6, 7),
        Item("query", (*video(4, 5, 6, 7).parts, Part("image", other))),
        video(7, 6, 5, 4),
    ]
    packed = prepared(backbone, items)
    images, videos = packed.images()
    assert images["grid_thw"].tolist() == [[1, 6, 6], [1, 6, 4]]  # The larger one first: other, shared.
    assert videos["grid_thw"].tolist() == [[2, 4, 4], [2, 4, 4]]
    assert len({*images["keys"].tolist(), *videos["keys"].tolist()}) == 4
    assert packed.chunk([3, 1, 2, 0])["images"].tolist() == [[0, 1], [1, 0], [1, 1], [1, 1], [3, 1]]
    assert packed.chunk([6, 5, 4])["images"].tolist() == [[0, 3], [1, 2], [1, 0], [2, 2]]
    assert packed.chunk([2])["images"].shape == (0, 2)


def test_select_takes_the_patches_of_its_images(backbone: Qwen3VL) -> None:
    pictures = [picture(96, 64, 1), picture(32, 160, 2), picture(64, 64, 3)]
    (chunk,) = prepared(backbone, [item(*pictures)]).images()
    places = {tuple(grid): place for place, grid in enumerate(chunk["grid_thw"].tolist())}
    order = [places[1, 4, 4], places[1, 4, 6]]
    taken = select(chunk, order)
    alone = [prepared(backbone, [item(pictures[number])]).images()[0] for number in (2, 0)]
    for name, values in taken.items():
        assert torch.equal(values, torch.cat([one[name] for one in alone])), name


@pytest.mark.parametrize("room", [1, 24, 28, 52, 400, None])
def test_images_share_a_chunk_while_there_is_room(backbone: Qwen3VL, room: int | None) -> None:
    """Images of 20, 4, 24, 16 and 12 patches, and two videos of 2 × 16."""
    sizes = [(160, 32), (32, 32), (96, 64), (64, 64), (96, 32)]
    items = [item(picture(*size, seed)) for seed, size in enumerate(sizes)]
    items += [video(0, 1, 2, 3), video(4, 5, 6, 7)]
    packed = prepared(backbone, items)
    found = [images["grid_thw"].prod(dim=1).tolist() for images in packed.images(room)]
    expected = {
        1: [[24], [20], [16], [12], [4], [32], [32]],  # Too large for any chunk, it has one for itself.
        24: [[24], [20], [16], [12, 4], [32], [32]],
        28: [[24], [20], [16, 12], [4], [32], [32]],
        52: [[24, 20], [16, 12, 4], [32], [32]],
        400: [[24, 20, 16, 12, 4], [32, 32]],  # A patch of a video holds more numbers.
        None: [[24, 20, 16, 12, 4], [32, 32]],
    }
    assert found == expected[room]
    keys = [key for images in packed.images(room) for key in images["keys"].tolist()]
    assert keys == [key for images in packed.images() for key in images["keys"].tolist()]


def test_what_an_item_costs(backbone: Qwen3VL) -> None:
    """Its own tokens, and the patches of all that it shows."""
    items = mixed_items()
    packed = prepared(backbone, items)
    inputs = backbone.preprocessor(items)
    assert packed.lengths == inputs["attention_mask"].sum(dim=1).tolist()
    visual = (inputs["mm_token_type_ids"] > 0).sum(dim=1)
    assert packed.patches == (4 * visual).tolist()
    assert packed.patches[0] == 0 < packed.patches[1]


class TwoLayers(Pooling):
    """The last tokens' states, after the first layer and at the end."""

    layers = (1, -1)

    def forward(self, hidden: Tensor, mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
        last = mask.cumsum(dim=1).argmax(dim=1)
        return torch.cat([layer[torch.arange(len(mask)), last] for layer in hidden], dim=-1)


POOLINGS = [
    *(
        one
        for one in vars(pooling).values()
        if isinstance(one, type) and Pooling in one.__bases__ and not isabstract(one) and one is not TokenProjection
    ),
    TwoLayers,
]


def built(kind: type[Pooling]) -> Pooling:
    if kind is Concatenation:
        return kind([Mean(), LastToken()])
    return kind(Mean()) if kind is PoolingWrapper else kind()


@pytest.mark.parametrize("kind", POOLINGS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_packed_items_are_embedded_as_if_each_were_alone(checkpoint: Path, backbone: Qwen3VL, kind: type) -> None:
    """And as transformers' own padded forward does it, also where one chunk has images and the next has none."""
    ours, items = Encoder(backbone, built(kind)), mixed_items()
    ours.pooling.configure(backbone.hidden_size)
    packed = prepared(backbone, items)
    rows = [[3, 1, 4], [5, 0], [2]]  # The second has no images.
    order = list(chain.from_iterable(rows))
    features = ours.encode_images(packed.images(28))
    found = torch.cat([ours(packed.chunk(chunk), features) for chunk in rows])
    expected = torch.cat([alone(ours, items[row]) for row in order])
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    theirs = encoder(checkpoint, attn_implementation="sdpa")
    theirs.pooling = ours.pooling
    inputs = theirs.backbone.preprocessor([items[row] for row in order])
    torch.testing.assert_close(found, theirs(inputs), rtol=0, atol=ROUNDING)


def alone(ours: Encoder, one: Item) -> Tensor:
    packed = prepared(ours.backbone, [one])  # type: ignore[arg-type]
    return ours(packed.chunk([0]), ours.encode_images(packed.images()))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_gradients_are_those_of_the_padded_forward(checkpoint: Path, bidirectional: bool) -> None:
    """Hidden states of three layers, and the gradients of all weights through them."""
    layers, items = (-1, 0, 1), mixed_items()
    hidden, found = {}, {}
    for attention in ("sdpa", "auto"):
        model = Qwen3VL(str(checkpoint), attn_implementation=attention, bidirectional=bidirectional)
        model.configure()
        inputs = model.preprocessor(items)
        mask = inputs["attention_mask"] == 1
        if attention == "auto":
            packed = prepared(model, items)
            features = [image for images in packed.images() for image in model.encode_images(images)]
            hidden[attention] = model(packed.chunk(range(len(items))), layers, features)[:, mask]
        else:
            hidden[attention] = model(inputs, layers)[:, mask]
        noise = torch.randn(hidden[attention].shape, generator=torch.Generator().manual_seed(0))
        (hidden[attention] * noise).sum().backward()
        found[attention] = gradients(model)
    torch.testing.assert_close(hidden["auto"], hidden["sdpa"], rtol=0, atol=ROUNDING)
    assert relative_difference(found["auto"], found["sdpa"]) < ROUNDING
    assert any("visual.patch_embed" in name for name in found["auto"])


def test_halves_of_a_chunk_are_the_chunk(backbone: Qwen3VL) -> None:
    packed = prepared(backbone, mixed_items())
    rows = [3, 0, 1, 5, 4]
    features = [image for images in packed.images() for image in backbone.encode_images(images)]
    whole, halves = packed.chunk(rows), halve(packed.chunk(rows))
    assert [len(half["input_ids"]) for half in halves] == [2, 3]
    states = [backbone(half, features=features)[half["attention_mask"] == 1] for half in halves]
    expected = backbone(whole, features=features)[whole["attention_mask"] == 1]
    torch.testing.assert_close(torch.cat(states), expected, rtol=0, atol=ROUNDING)
    one = packed.chunk([3])
    assert halve(one) == [one]


def test_workers_prepare_what_the_training_process_would(checkpoint: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    found = [loaded(checkpoint, rows, workers) for workers in (2, 0)]
    for one, other in zip(*found, strict=True):
        for ours, expected in zip([*one.chunks, *one.images], [*other.chunks, *other.images], strict=True):
            assert ours.keys() == expected.keys()
            assert all(torch.equal(values, expected[name]) for name, values in ours.items())
    assert any(batch.images for batch in found[0])


def loaded(checkpoint: Path, rows: str, workers: int) -> list[Batch]:
    """All batches of an epoch, through Lightning's loaders."""
    data = RetrievalDataModule(train=rows, batch_size=4, chunk_size=2, num_workers=workers)
    preprocessor = pickle.loads(pickle.dumps(Qwen3VL(str(checkpoint)).make_preprocessor()))
    assert isinstance(preprocessor, PackingPreprocessor)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=strategy,
        global_rank=0,
        world_size=1,
        overfit_batches=0,
    )
    data.collator = ItemCollator(preprocessor)
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"image_mean": [0.4, 0.5, 0.6]}])
def test_pixels_that_the_device_cannot_make_are_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """The images' settings alone: a video would be normalised otherwise than it is served."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    shutil.copytree(checkpoint, tmp_path / "changed")
    processor.save_pretrained(tmp_path / "changed")
    (name,) = change
    with pytest.raises(ValueError, match=f"has {name}=.*rescaled and normalised, both alike"):
        _ = Qwen3VL(str(tmp_path / "changed")).make_preprocessor()


def embedded(encoder: Encoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of every kind of item in two chunks, one of them without images, and gradients."""
    packed = encoder.backbone.preprocessor.prepare(mixed_items())
    features = encoder.encode_images(packed.images(28))
    embeddings = torch.cat([encoder(packed.chunk(rows), features) for rows in ([3, 1, 4, 2], [5, 0])])
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    (embeddings * noise).sum().backward()
    return embeddings.detach(), gradients(encoder)


@pytest.mark.parametrize("tokens", [1, 3, 40], ids=lambda tokens: f"last {tokens}")
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"gradient_checkpointing": True}, {"adapter": True}, {"mixture": True}],
    ids=["causal", "bidirectional", "checkpointing", "LoRA", "mixture of experts"],
)
def test_the_tail_is_what_it_would_be(checkpoint: Path, tmp_path: Path, options: dict[str, Any], tokens: int) -> None:
    adapted, mixture = (options.get(name, False) for name in ("adapter", "mixture"))
    model = qwen3_vl_moe(tmp_path / "moe") if mixture else checkpoint
    options = {name: value for name, value in options.items() if name not in ("adapter", "mixture")}
    encoder = Encoder(Qwen3VL(str(model), **options), MeanOfLast(tokens))
    encoder.configure()
    encoder.pooling.num_last_tokens = None
    if adapted:
        torch.manual_seed(0)
        LoRA(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)).apply(
            encoder.backbone
        )
    counts: list[int] = []  # Of the tokens that the last layer's MLP computes.
    mlp = encoder.backbone.model.language_model.layers[-1].mlp
    mlp.register_forward_hook(lambda _, arguments, __: counts.append(arguments[0].shape[1]))
    expected, expected_gradients = embedded(encoder)
    every = counts[:2]
    counts.clear()
    encoder.pooling.num_last_tokens = tokens
    found, found_gradients = embedded(encoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert relative_difference(found_gradients, expected_gradients) < ROUNDING
    lengths = encoder.backbone.preprocessor.prepare(mixed_items()).lengths
    kept = [min(length, tokens) for length in lengths]
    assert every == [sum(lengths[row] for row in rows) for rows in ([3, 1, 4, 2], [5, 0])]
    assert counts[:2] == [sum(kept[row] for row in rows) for rows in ([3, 1, 4, 2], [5, 0])]


def test_what_is_left_out_is_not_a_number(checkpoint: Path) -> None:
    """A pooling that reads what it said it would not must not go on quietly."""
    backbone = Qwen3VL(str(checkpoint))
    backbone.configure()
    chunk = backbone.preprocessor.prepare([texts(1)[0].query]).chunk([0])
    states = backbone(chunk, num_last_tokens=2)
    assert states.isnan().all(dim=-1).tolist() == [[True] * (states.shape[1] - 2) + [False] * 2]
    assert not backbone(chunk, (-1, 1), num_last_tokens=2).isnan().any()


def test_images_that_enter_behind_the_last_layer_need_all_of_it(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint))
    backbone.configure()
    chunk = backbone.preprocessor.prepare([texts(1)[0].query]).chunk([0])
    vision = backbone.model.config.vision_config
    vision.deepstack_visual_indexes = list(range(len(backbone.model.language_model.layers)))
    assert not backbone(chunk, num_last_tokens=2).isnan().any()


def test_poolings_together_read_what_the_longest_reads() -> None:
    assert Concatenation([LastToken(), MeanOfLast(3)]).num_last_tokens == 3
    assert Concatenation([LastToken(), Mean()]).num_last_tokens is None
    assert (LastToken().num_last_tokens, FirstToken().num_last_tokens) == (1, None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["loop", "kernel"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_last_tokens_attend_as_among_all(device: str, causal: bool, tokens: int) -> None:
    lengths = torch.tensor([7, 7, 2, 5, 1])
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, heads, int(lengths.sum()), 16, generator=draw).to(device, dtype) for heads in (4, 2, 2)
    )
    bounds, tail = Bounds.of(lengths, torch.device(device)), LastTokens.of(lengths, tokens, torch.device(device))
    options: dict[str, Any] = {"attention_mask": None, "is_causal": causal}
    every, _ = packed_attention(nn.Module(), query, key, value, packed=Packed(bounds, bounds), **options)
    packed = Packed(tail.bounds, bounds)
    found, _ = packed_attention(nn.Module(), query[:, :, tail.index], key, value, packed=packed, **options)
    tolerance = 1e-2 if device == "cuda" else ROUNDING
    torch.testing.assert_close(found, every[:, tail.index], rtol=0, atol=tolerance)


QUERIES = [
    item("four zero seven", role="query"),
    item(picture(64, 64, 1), "what is this", role="query"),
    item("four zero nine", role="query"),
]
DOCUMENTS = [
    item(picture(64, 96, 2)),
    item("seven"),
    item(picture(64, 96, 3), "seven"),
    # The first picture again, as a document, and one that another document has.
    item(picture(64, 64, 1), picture(64, 96, 3)),
    item("seven eight"),
]
PAIRS = [Pair(query, document) for query, document in product(QUERIES, DOCUMENTS)]

HEADS = {
    "yes or no": YesNo,
    "mean": lambda: Linear(Mean()),
    "last three": lambda: Linear(MeanOfLast(3)),
    "earlier layer": lambda: Linear(EarlierLayer(LastToken(), -2)),
    "two layers": lambda: Linear(LayerMix(LastToken(), 2)),
    "read-outs": lambda: Linear(LearnedTokens(2, "mean")),
}


def one_by_one(model: Scorer, pairs: list[Pair]) -> torch.Tensor:
    return torch.cat([model(model.backbone.preprocessor([pair])) for pair in pairs])


def shared(model: Scorer, prepared: PackedItems, rows: list[int]) -> torch.Tensor:
    return model(prepared.chunk(rows), model.encode_images(prepared.images()))


@pytest.mark.parametrize("template", [QueryFirst, DocumentFirst])
@pytest.mark.parametrize("head", HEADS)
def test_scores_and_gradients_are_those_of_one_pair_at_a_time(checkpoint: Path, head: str, template: type) -> None:
    model = ranker(checkpoint, head=HEADS[head](), template=template()).encoder.eval()
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    rows = prepared.order
    computed = sum(prepared.lengths) - sum(prepared.shared(rows))
    assert computed < sum(prepared.lengths) / 3
    found, expected = shared(model, prepared, rows), one_by_one(model, [PAIRS[row] for row in rows])
    assert (found - expected).abs().max() <= 1e-5
    weights = torch.arange(1.0, len(PAIRS) + 1)[:, None]
    trained = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad((scores * weights).sum(), trained.values(), allow_unused=True)
        for scores in (found, expected)
    ]
    for name, one, other in zip(trained, *gradients, strict=True):
        assert (one is None) == (other is None), name
        if other is not None:
            # Relative to the whole, because the gradient of a key's bias is nothing but rounding.
            assert (one - other).norm() <= 1e-5 * (other.norm() + 1e-2), name


def test_a_part_of_a_chunk_shares_what_it_can(checkpoint: Path) -> None:
    model = ranker(checkpoint).encoder
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    rows = prepared.order
    chunk, features = prepared.chunk(rows), model.encode_images(prepared.images())
    whole = model(chunk, features)
    halves = [model(half, features) for half in halve(chunk)]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-5)


def test_an_image_of_a_shared_beginning_is_read_once(checkpoint: Path) -> None:
    model = ranker(checkpoint).encoder
    pairs = [Pair(QUERIES[1], document) for document in DOCUMENTS[:3]]
    prepared = model.backbone.preprocessor.prepare(pairs)
    seen = []
    model.backbone.model.language_model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[1][0]))
    shared(model, prepared, prepared.order)
    image = model.backbone.model.config.image_token_id
    # A 64 × 64 query in 4 tokens, once; documents of 6 tokens each.
    assert int((seen[0] == image).sum()) == 4 + 6 + 6


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"attn_implementation": "sdpa"}])
def test_where_nothing_can_be_shared_scores_are_the_same_in_any_batch(checkpoint: Path, options: dict) -> None:
    model = ranker(checkpoint, backbone=options).encoder
    prepared = model.backbone.preprocessor.prepare(PAIRS)
    assert not any(prepared.shared(prepared.order))
    assert "shared" not in prepared.chunk([0, 1])
    rows = prepared.order
    found = model(prepared.chunk(rows), model.encode_images(prepared.images(None)))
    assert torch.allclose(found, one_by_one(model, [PAIRS[row] for row in rows]), atol=1e-5)


def test_sharing_is_that_of_transformers_own_padded_forward(checkpoint: Path) -> None:
    packed, padded = (ranker(checkpoint, backbone=options).encoder for options in ({}, {"attn_implementation": "sdpa"}))
    prepared = packed.backbone.preprocessor.prepare(PAIRS)
    found = shared(packed, prepared, prepared.order)
    for side in ("left", "right"):
        padded.backbone.preprocessor.processor.tokenizer.padding_side = side
        expected = padded(padded.backbone.preprocessor([PAIRS[row] for row in prepared.order]))
        assert torch.allclose(found, expected, atol=1e-5), side


def test_what_two_items_have_in_common() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([1, 2, 5])
    # Something of its own is left to compute, even of an item that is another one's beginning.
    assert shared_lengths([first, second, first, first, first[:2]]) == [0, 2, 2, 3, 1]
