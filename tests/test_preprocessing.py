"""Items become the inputs that Sentence Transformers makes of them, with the tokens that a pooling appends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from building import encoder, gradients, item, mixed_items, picture, relative_difference
from sentence_transformers import SentenceTransformer

from vlmembed.adapters import Freeze
from vlmembed.backbones import QueryFirst, Qwen3VL
from vlmembed.backbones.preprocessing import ChatPreprocessor
from vlmembed.encoder import Encoder, Scorer
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.heads import YesNo
from vlmembed.media import image_size
from vlmembed.pooling import EndToken, LastToken, LearnedTokens, Mean, Pooling, Projection
from vlmembed.types import Inputs, Item, Part, Role

ORIGIN = "train.jsonl, row 17, column 'positive'"
INSTRUCTIONS = {"query": "Find the page.", "document": "Represent the user's input."}
#: Above the short texts and the images of these tests, below the long text.
MAX_LENGTH = 70
#: Sums in float32 in another order.
ROUNDING = 1e-5


def preprocessor(checkpoint: Path, **options: Any) -> ChatPreprocessor:
    return Qwen3VL(str(checkpoint), **options).make_preprocessor()


def rendered(preprocessor: ChatPreprocessor, one: Item) -> str:
    return preprocessor.processor.tokenizer.decode(preprocessor([one])["input_ids"][0])


@pytest.mark.parametrize(
    ("role", "options", "expected"),
    [
        ("query", {}, "<|im_start|>system\nAsk.<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"),
        ("document", {}, "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"),
        (
            "document",
            {"document_instruction": "Answer."},
            "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("document", {"generation_prompt": False}, "<|im_start|>user\nyes<|im_end|>\n"),
        ("document", {"document_instruction": ""}, "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_each_role_has_its_own_system_message(
    checkpoint: Path, role: Role, options: dict[str, Any], expected: str
) -> None:
    given = {"query_instruction": "Ask.", "document_instruction": None, **options}
    assert rendered(preprocessor(checkpoint, **given), item("yes", role=role)) == expected


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatPreprocessor, SentenceTransformer]:
    """A preprocessor, and Sentence Transformers on the folder exported with it."""
    folder = tmp_path_factory.mktemp("exported")
    options = {f"{role}_instruction": instruction for role, instruction in INSTRUCTIONS.items()}
    built = encoder(checkpoint, max_length=MAX_LENGTH, **options)
    write_folder(built, folder)
    return built.backbone.preprocessor, SentenceTransformer(str(folder), device="cpu")


WIDE, TALL = picture(96, 64, 1), picture(32, 128, 2)
LONG = "naïve Bilder 数字 42 — " * 30
SAME_MESSAGES = {
    "text": (["four zero seven"], "four zero seven"),
    "image": ([WIDE], {"image": WIDE}),
    "image and text": ([WIDE, "a caption"], {"image": WIDE, "text": "a caption"}),
    "text and image": (["a caption", WIDE], {"text": "a caption", "image": WIDE}),
    "two images": ([WIDE, TALL, "both"], {"image": [WIDE, TALL], "text": "both"}),
    "long text": ([LONG], LONG),
}


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("kind", SAME_MESSAGES)
def test_inputs_are_those_of_sentence_transformers(
    exported: tuple[ChatPreprocessor, SentenceTransformer], kind: str, role: Role
) -> None:
    ours, theirs = exported
    content, message = SAME_MESSAGES[kind]
    actual = ours([item(*content, role=role)])
    expected = theirs.preprocess([message], prompt=INSTRUCTIONS[role])
    assert set(actual) <= set(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_a_batch_of_short_and_long_texts_is_that_of_sentence_transformers(
    exported: tuple[ChatPreprocessor, SentenceTransformer],
) -> None:
    ours, theirs = exported
    contents = ["a word", LONG, "a few more words", "many words " * 80]
    actual = ours([item(content) for content in contents])
    expected = theirs.preprocess(contents, prompt=INSTRUCTIONS["document"])
    assert actual["input_ids"].shape == (4, MAX_LENGTH)
    assert torch.equal(actual["input_ids"], expected["input_ids"])
    assert torch.equal(actual["attention_mask"], expected["attention_mask"])


def test_a_cut_text_keeps_its_beginning_and_the_templates_end(checkpoint: Path) -> None:
    whole = preprocessor(checkpoint)([item(LONG)])["input_ids"][0].tolist()
    cut = preprocessor(checkpoint, max_length=40)([item(LONG)])["input_ids"][0].tolist()
    tail = preprocessor(checkpoint).processor.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    assert cut == whole[: 40 - len(tail)] + tail


def test_a_text_that_just_fits_is_left_alone(checkpoint: Path) -> None:
    whole = preprocessor(checkpoint)([item(LONG)])
    fitted = preprocessor(checkpoint, max_length=whole["input_ids"].shape[1])([item(LONG)])
    assert all(torch.equal(fitted[name], value) for name, value in whole.items())


def test_cutting_through_an_image_is_refused_by_the_items_name(checkpoint: Path) -> None:
    too_long = Item("document", (Part("image", picture(256, 256)), Part("text", "a caption")), ORIGIN)
    length = preprocessor(checkpoint)([too_long])["input_ids"].shape[1]
    message = rf"{ORIGIN} has {length} tokens, more than max_length=60.*lower max_pixels"
    with pytest.raises(ValueError, match=message):
        preprocessor(checkpoint, max_length=60)([item("short"), too_long])
    preprocessor(checkpoint, max_length=60, max_pixels=128 * 128)([too_long])


@pytest.mark.parametrize(
    ("size", "options", "tokens"),
    [
        ((128, 96), {}, 4 * 3),
        ((130, 95), {}, 4 * 3),  # To the nearest multiple of 32.
        ((256, 256), {"max_pixels": 128 * 128}, 4 * 4),
        ((256, 64), {"max_pixels": 128 * 32}, 4 * 1),
        ((32, 32), {"min_pixels": 96 * 96}, 3 * 3),
        ((64, 32), {"min_pixels": 128 * 64}, 4 * 2),
        ((64, 64), {"min_pixels": 32 * 32, "max_pixels": 128 * 128}, 2 * 2),
    ],
)
def test_an_image_takes_a_token_per_32_by_32_pixels(
    checkpoint: Path, size: tuple[int, int], options: dict[str, int], tokens: int
) -> None:
    ours = preprocessor(checkpoint, **options)
    inputs = ours([item(picture(*size), "a caption")])
    assert (inputs["input_ids"] == ours.processor.image_token_id).sum() == tokens
    assert inputs["image_grid_thw"].prod() == 4 * tokens  # Patches of 16 × 16.


def test_contradicting_pixel_limits_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="min_pixels=2000 is above max_pixels=1000"):
        Qwen3VL(str(checkpoint), min_pixels=2000, max_pixels=1000)
    with pytest.raises(ValueError, match=r"min_pixels=999999 is above max_pixels=262144 .*the checkpoint's own"):
        preprocessor(checkpoint, min_pixels=999_999)
    with pytest.raises(ValueError, match=r"min_pixels=1024 is above max_pixels=500 .*the checkpoint's own"):
        preprocessor(checkpoint, max_pixels=500)


def test_cost_grows_with_the_text_and_the_picture(checkpoint: Path) -> None:
    cost = preprocessor(checkpoint).cost
    texts = [cost(item("word " * number)) for number in range(1, 50, 4)]
    pictures = [cost(item(picture(32 * number, 64))) for number in range(1, 9)]
    videos = [cost(Item("query", (Part("video", (picture(64, 64),) * number),))) for number in range(1, 5)]
    for costs in (texts, pictures, videos):
        assert costs == sorted(set(costs))
    assert cost(item(picture(64, 64), "word " * 20)) == cost(item(picture(64, 64))) + cost(item("word " * 20))


def test_cost_follows_the_tokens_of_a_picture(checkpoint: Path) -> None:
    ours = preprocessor(checkpoint)
    for size in ((64, 64), (96, 256), (320, 32)):
        tokens = (ours([item(picture(*size))])["input_ids"] == ours.processor.image_token_id).sum()
        assert ours.cost(item(picture(*size))) == tokens


def test_cost_decodes_no_file(checkpoint: Path, tmp_path: Path) -> None:
    """A file that breaks off behind its header has a size and no pixels."""
    path = tmp_path / "page.png"
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    cost = preprocessor(checkpoint).cost
    assert image_size(path) == (64, 64)
    assert cost(item(path)) == cost(item(picture(64, 64)))
    assert cost(Item("document", (Part("video", tmp_path / "never_opened.mp4"),))) > cost(item("word " * 100))


def test_cost_names_the_row_of_a_missing_image(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{ORIGIN}: cannot read the image {tmp_path}/no.png"):
        preprocessor(checkpoint).cost(Item("document", (Part("image", tmp_path / "no.png"),), ORIGIN))


def last_tokens(built: Encoder, inputs: Inputs, count: int) -> list[list[str]]:
    tokenizer = built.backbone.preprocessor.processor.tokenizer
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [tokenizer.convert_ids_to_tokens(ids[mask])[-count:] for ids, mask in rows]


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_every_item_ends_with_them(checkpoint: Path, max_length: int | None, generation_prompt: bool) -> None:
    """Also one that is cut."""
    options = {"max_length": max_length, "generation_prompt": generation_prompt}
    for pooling, expected in (
        (EndToken(), ["<|endoftext|>"]),
        (LearnedTokens(2), ["<|read_out_0|>", "<|read_out_1|>"]),
        (Projection(EndToken("<|im_end|>"), 8), ["<|im_end|>"]),
    ):
        built = encoder(checkpoint, pooling, **options)
        items = [item("many words " * 40), item("few", role="query")] if max_length else mixed_items()
        inputs = built.backbone.preprocessor(items)
        assert last_tokens(built, inputs, len(expected)) == [expected] * len(items)
        assert max_length is None or inputs["input_ids"].shape[1] == max_length


def test_nothing_else_changes(checkpoint: Path) -> None:
    plain, ended = (encoder(checkpoint, pooling) for pooling in (LastToken(), EndToken()))
    before, after = (built.backbone.preprocessor(mixed_items()) for built in (plain, ended))
    for row, mask in enumerate(before["attention_mask"].bool()):
        count = int(mask.sum())
        assert torch.equal(before["input_ids"][row, :count], after["input_ids"][row, :count])
        assert int(after["attention_mask"][row].sum()) == count + 1


def test_learned_embeddings_learn_where_all_else_is_frozen(checkpoint: Path) -> None:
    built = encoder(checkpoint, LearnedTokens(2))
    Freeze(["vision", "merger", "language"]).apply(built.backbone)
    built(built.backbone.preprocessor(mixed_items())).square().sum().backward()
    found = gradients(built)
    assert list(found) == ["pooling.learned"]
    assert (found["pooling.learned"].norm(dim=1) > 0).all()


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_learned_embeddings_are_as_rows_of_the_checkpoints_own_table(checkpoint: Path, attention: str) -> None:
    """Packed or padded: what is read, and its gradient."""
    torch.manual_seed(0)
    built = encoder(checkpoint, LearnedTokens(3, "concatenation"), attn_implementation=attention)
    inputs = built.preprocessor(mixed_items())
    found = built(inputs)
    found.square().sum().backward()
    learned = built.pooling.token_embeddings.grad.clone()
    table = built.backbone.model.get_input_embeddings()
    first = built.preprocessor.processor.tokenizer.convert_tokens_to_ids("<|read_out_0|>")
    with torch.no_grad():
        table.weight[first : first + 3] = built.pooling.token_embeddings
    table._forward_hooks.clear()
    built.zero_grad()
    expected = built(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    expected.square().sum().backward()
    assert relative_difference({"": learned}, {"": table.weight.grad[first : first + 3]}) < ROUNDING


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (EndToken("<|no_such_token|>"), r"appends \['<\|no_such_token\|>'\] .* does not have"),
        (EndToken("two words"), "does not have"),
    ],
)
def test_tokens_that_the_checkpoint_lacks_are_refused(checkpoint: Path, pooling: Pooling, message: str) -> None:
    built = Encoder(Qwen3VL(str(checkpoint)), pooling)
    with pytest.raises(ValueError, match=message):
        _ = built.preprocessor


def test_learned_tokens_are_new_ones(checkpoint: Path) -> None:
    pooling = LearnedTokens(1)
    pooling.appended = ("<|endoftext|>",)
    built = Encoder(Qwen3VL(str(checkpoint)), pooling)
    with pytest.raises(ValueError, match=r"has already\. Rename"):
        built.configure()


def test_making_an_encoder_or_a_scorer_changes_no_backbone(checkpoint: Path) -> None:
    backbone = Qwen3VL(str(checkpoint))
    before = {name: copy.copy(value) for name, value in vars(backbone).items()}
    Encoder(backbone, LearnedTokens(1))
    Scorer(backbone, YesNo(), QueryFirst())
    assert vars(backbone) == before
    tokens = Encoder(backbone, Mean()).preprocessor([item("text")])["input_ids"]
    assert torch.equal(tokens, backbone.make_preprocessor()([item("text")])["input_ids"])
