"""Late interaction's inputs: which tokens have a vector, what stands behind queries, and what is refused."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
import yaml
from building import item, mixed_items, picture, run_config, write_rows
from sentence_transformers import MultiVectorEncoder
from test_audio import heard
from torch.nn.functional import gelu

from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.cli import main
from vlmembed.encoder import Encoder
from vlmembed.export.sentence_transformers import write_folder
from vlmembed.heads import Linear, YesNo
from vlmembed.losses import InfoNCE, MergedTokens, WeightedSum
from vlmembed.modules import EmbeddingModule, MultiVectorModule
from vlmembed.pooling import Concatenation, LastToken, Projection, TokenProjection, TokenSelection
from vlmembed.types import Item

#: Hidden states are of size one after the norm, and sums in float32 go in another order.
ROUNDING = 1e-5
ENDING = "<|endoftext|>"
#: Stand for an image, a video or an audio.
MARKS = {"<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<image>"}
SELECTIONS = {
    "all": TokenSelection(),
    "images": TokenSelection("images"),
    "texts": TokenSelection("texts"),
    "without instruction": TokenSelection("without_instruction"),
    "skip": TokenSelection("texts", ["Ċ", "<|im_start|>"]),
}


def late(backbone: VisionLanguageModel, projection: Any = None, **options: Any) -> MultiVectorModule:
    torch.manual_seed(0)
    return MultiVectorModule(backbone, InfoNCE(0.05), projection or TokenProjection(16), **options)


@pytest.fixture(scope="module")
def open_family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a name to a backbone whose tiny checkpoint is written once."""
    makers = {"idefics3": other_models.idefics3, "omni": other_models.qwen2_5_omni}

    @cache
    def folder(name: str) -> Path:
        return makers[name](tmp_path_factory.mktemp(name) / "tiny") if name in makers else checkpoint

    def open_(name: str, **options: Any) -> VisionLanguageModel:
        backbones = {"packed": Qwen3VL, "padded": Qwen3VL}
        options |= {"attn_implementation": "sdpa"} if name == "padded" else {}
        return backbones.get(name, VisionLanguageModel)(str(folder(name)), **options)

    return open_


FAMILIES = ["packed", "padded", "idefics3", "omni"]


def items_of(family: str) -> list[Item]:
    """What each reads: texts and images, pairs of both, queries with images, a video or a recording."""
    items = [
        *mixed_items(),
        item(picture(64, 32, 8), "and this?", role="query"),
        item(picture(64, 64, 9), role="query"),
    ]
    if family == "idefics3":
        return [one for one in items if all(part.kind != "video" for part in one.parts)]
    return [*items, heard(1.1, text="a caption"), Item("query", heard(1.3).parts)] if family == "omni" else items


def slow_selection(
    tokens: list[str], selection: TokenSelection, instruction: list[str], num_expansion_tokens: int
) -> list[bool]:
    """The definition, token by token."""
    kept = []
    for index, token in enumerate(tokens):
        instructed = tokens[: len(instruction)] == instruction and index < len(instruction)
        wanted = {
            "all": True,
            "images": token in MARKS,
            "texts": token not in MARKS,
            "without_instruction": not instructed,
        }[selection.part]
        wanted = wanted and token not in selection.skip
        kept.append(wanted or index >= len(tokens) - num_expansion_tokens)
    return kept


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_definition(open_family: Any, family: str, name: str) -> None:
    """In the chunks that a model reads, of queries and documents together."""
    selection = SELECTIONS[name]
    backbone = open_family(family, document_instruction="Represent this page.")
    module = late(backbone, query_tokens=selection, document_tokens=selection, expansion_tokens=2)
    tokenizer = module.preprocessor.processor.tokenizer
    items = items_of(family)
    if name == "images":  # A document without any has no vector, and is refused.
        items = [one for one in items if one.role == "query" or any(part.kind != "text" for part in one.parts)]
    prepared = module.preprocessor.prepare(items)
    chunk = prepared.chunk(list(reversed(range(len(items)))))
    texts = {"query": "Represent the user's input.", "document": "Represent this page."}
    for row, one in enumerate(reversed(items)):
        mask = chunk["attention_mask"][row].bool()
        tokens = tokenizer.convert_ids_to_tokens(chunk["input_ids"][row][mask].tolist())
        instruction = tokenizer.tokenize(f"<|im_start|>system\n{texts[one.role]}<|im_end|>\n")
        assert tokens[: len(instruction)] == instruction
        assert (tokens[-2:] == [ENDING] * 2) == (one.role == "query")
        expected = slow_selection(tokens, selection, instruction, 2 if one.role == "query" else 0)
        assert chunk["kept"][row][mask].tolist() == expected
        assert not chunk["kept"][row][~mask].any()


PROJECTIONS = {
    "linear": TokenProjection(16),
    "residual": TokenProjection(16, inner_size=24, residual=True),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.exhaustive
def test_vectors_are_those_of_an_item_alone(open_family: Any, family: str, name: str) -> None:
    """Of its states, as the backbone makes them of it alone, one matrix product after the other."""
    module = late(open_family(family), PROJECTIONS[name], document_tokens=TokenSelection("texts"), expansion_tokens=3)
    module.configure_model()
    encoder = module.encoder.eval()
    items = items_of(family)
    prepared = encoder.preprocessor.prepare(items)
    features = encoder.encode_images(images) if (images := prepared.images(None)) else ()
    chunk = prepared.chunk(range(len(items)))
    vectors = encoder.by_item(encoder(chunk, features), [chunk]).split()
    weights = {key: tensor for key, tensor in encoder.pooling.named_parameters()}
    for one, vector in zip(items, vectors, strict=True):
        alone = encoder.preprocessor([one])
        kept = alone.pop("kept")[0]
        states = encoder.backbone(alone)[0][kept]
        if name == "residual":
            inner = gelu(states @ weights["inner.weight"].T + weights["inner.bias"])
            inner += states @ weights["inner_residual.weight"].T
            expected = inner @ weights["outer.weight"].T + weights["outer.bias"]
            expected += inner @ weights["outer_residual.weight"].T
        else:
            expected = states @ weights["outer.weight"].T
        torch.testing.assert_close(vector, expected, rtol=0, atol=ROUNDING)


LONG = item("many words " * 40, role="query")


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_long_query_keeps_its_expansion_tokens(open_family: Any, generation_prompt: bool) -> None:
    module = late(
        open_family("packed", max_length=40, generation_prompt=generation_prompt),
        query_tokens=TokenSelection("images"),
        expansion_tokens=["<|im_end|>", ENDING],
    )
    inputs = module.preprocessor([LONG, replace(LONG, role="document"), item("short", role="query")])
    tokens = [module.preprocessor.processor.tokenizer.convert_ids_to_tokens(ids) for ids in inputs["input_ids"]]
    end = ["<|im_end|>", "Ċ", *(["<|im_start|>", "assistantĊ"] if generation_prompt else [])]
    joined = ["".join(row).rstrip() for row in tokens]
    assert joined[0].endswith("".join([*end, "<|im_end|>", ENDING]))
    assert joined[1].endswith("".join(end))
    assert inputs["kept"][0].nonzero()[:, 0].tolist() == [38, 39]
    assert inputs["kept"][2].sum() == 2


SERVED: dict[str, dict[str, Any]] = {
    "stock": {"expansion_tokens": 3, "document_tokens": TokenSelection(skip=["Ċ"])},
    "code": {"expansion_tokens": [ENDING, "<|im_end|>"], "query_tokens": TokenSelection("texts", ["Ċ"])},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED)
def test_sentence_transformers_serves_expansion_tokens(open_family: Any, tmp_path: Path, name: str) -> None:
    """It gives the template the task of a call; of none is a document. Texts, images, both, and what is too long."""
    module = late(open_family("packed", max_length=60), **SERVED[name])
    module.configure_model()
    encoder = module.encoder.eval()
    contents = [[picture(64, 64, 1)], ["a question"], ["read", picture(96, 64, 2)], ["many words " * 60]]
    chunks = {
        role: [encoder.preprocessor([item(*content, role=role)]) for content in contents]  # type: ignore[arg-type]
        for role in ("query", "document")
    }
    expected = {
        role: [torch.nn.functional.normalize(encoder(chunk), dim=-1) for chunk in rows] for role, rows in chunks.items()
    }
    inputs: list[Any] = [one[0] if len(one) == 1 else {"text": one[0], "image": one[1]} for one in contents]
    write_folder(encoder, tmp_path / "served")
    served: Any = MultiVectorEncoder(str(tmp_path / "served"), device="cpu", trust_remote_code=name == "code")
    document_prompt = {"prompt_name": "document"}
    for encode, role, options in (
        (served.encode_query, "query", {}),
        (served.encode_document, "document", {}),
        (served.encode, "document", document_prompt),
    ):
        vectors = encode(inputs, show_progress_bar=False, **options)
        for vector, reference in zip(vectors, expected[role], strict=True):
            torch.testing.assert_close(vector, reference, rtol=0, atol=ROUNDING)


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion_tokens": ["<mask>"]}, r"expansion_tokens has '<mask>', which the checkpoint's tokenizer does not"),
        ({"expansion_tokens": [ENDING, ""]}, r"expansion_tokens has '', which the checkpoint's tokenizer does not"),
        ({"expansion_tokens": ["yes"]}, r"has 'yes', which the tokenizer would split.*such as '<\|endoftext\|>'"),
        ({"expansion_tokens": ["<|image_pad|>"]}, r"'<\|image_pad\|>', which stands for an image"),
        (
            {"document_tokens": TokenSelection(skip=["two words"])},
            r"document_tokens\.skip: 'two words' is not one",
        ),
        ({"query_tokens": TokenSelection(skip=[" yes"])}, r"query_tokens\.skip: ' yes' is not one token.*Ġ"),
        (
            {"query_tokens": TokenSelection(skip=[ENDING]), "expansion_tokens": 2},
            r"query_tokens\.skip has .*Remove",
        ),
        ({"projection": TokenProjection(65)}, r"size=65 is above the backbone's hidden size, 64.*allow_larger: true"),
    ],
)
def test_what_a_checkpoint_lacks_is_refused(open_family: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        late(open_family("packed"), **options).configure_model()


def test_a_larger_projection_may_be_meant(open_family: Any) -> None:
    module = late(open_family("packed"), TokenProjection(65, allow_larger=True))
    module.configure_model()
    assert module.encoder.dimension == 65


def test_a_template_that_expands_queries_is_not_given_more(open_family: Any, checkpoint: Path, tmp_path: Path) -> None:
    """A second stage begins with an exported folder, whose template does it already; both stages read the same."""
    first: Any = late(open_family("packed"), expansion_tokens=2).preprocessor
    folder = shutil.copytree(checkpoint, tmp_path / "first")
    first.processor.save_pretrained(folder)
    rows = [item("a question", role="query"), item("an answer")]
    second = late(Qwen3VL(str(folder))).preprocessor
    assert second(rows)["input_ids"].equal(first(rows)["input_ids"])
    with pytest.raises(ValueError, match=r"expansion_tokens: the checkpoint's chat template reads task already"):
        _ = late(Qwen3VL(str(folder)), expansion_tokens=1).preprocessor


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_item_without_vectors_is_named(open_family: Any, role: Any) -> None:
    module = late(open_family("packed"), **{f"{role}_tokens": TokenSelection("images")})
    texts = [replace(item(picture(64, 64), role=role), origin="a"), replace(item("x", role=role), origin="rows, row 2")]
    with pytest.raises(ValueError, match=rf"rows, row 2 has no token that {role}_tokens keeps.*images.*remove the row"):
        module.preprocessor.prepare(texts)


def test_an_instruction_of_a_row_is_refused_where_it_would_be_kept(open_family: Any) -> None:
    row = replace(item("x"), origin="rows, row 2", instruction="Find it.")
    module = late(open_family("packed"), query_tokens=TokenSelection("without_instruction"))
    with pytest.raises(ValueError, match=r"row 2 has the instruction 'Find it\.'.*without_instruction knows only"):
        module.preprocessor([row])
    assert late(open_family("packed")).preprocessor([row])["kept"].all()


MERGED = MergedTokens(InfoNCE(), [1, 2])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda backbone: EmbeddingModule(backbone, TokenProjection(16), InfoNCE()), "MultiVectorModule"),
        (lambda backbone: Encoder(backbone, Projection(TokenProjection(16), 8)), "in Projection"),
        (lambda backbone: Encoder(backbone, Concatenation([LastToken(), TokenProjection(16)])), "in Concatenation"),
        (lambda backbone: Encoder(backbone, Linear(TokenProjection(16))), "in Linear"),
        (lambda backbone: EmbeddingModule(backbone, YesNo(), InfoNCE()), "YesNo is a head of .*CrossEncoderModule"),
        (lambda backbone: late(backbone, LastToken()), "in LastToken"),
        (lambda backbone: late(backbone, expansion_tokens=-1), "expansion_tokens is 0 or more.*-1"),
        (lambda backbone: late(backbone, similarity="cosine"), "similarity is maxsim or meanmaxsim, got 'cosine'"),
        (lambda backbone: TokenSelection("image"), "part is all, images,.*got part='image'"),  # type: ignore[arg-type]
        (lambda backbone: TokenSelection(skip="Ċ"), r"skip a list of tokens; got part='all', skip='Ċ'"),
        *[
            (
                lambda backbone, loss=loss: EmbeddingModule(backbone, LastToken(), loss).configure_model(),
                "MergedTokens is for vlmembed.modules.MultiVectorModule",
            )
            for loss in (MERGED, WeightedSum([InfoNCE(), MERGED]))
        ],
    ],
)
def test_parts_of_another_kind_of_model_are_refused(open_family: Any, build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(open_family("packed"))


# The command line


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlmembed"])
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    config = run_config(checkpoint, train=rows, val=rows, test=rows, batch_size=4)
    model = config["model"]
    model["class_path"] = "vlmembed.modules.MultiVectorModule"
    del model["init_args"]["pooling"]
    model["init_args"]["projection"] = {"class_path": "vlmembed.pooling.TokenProjection", "init_args": {"size": 16}}
    config["trainer"] |= {"exporter": None, "max_epochs": 2}
    return config


def call(config: dict[str, Any], *options: str, command: str = "fit") -> None:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main([command, "--config", "config.yaml", *options])


TOKEN_PROJECTION = "vlmembed.pooling.TokenProjection"


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--model.pooling=vlmembed.pooling.LastToken"],
            ["Module has no pooling. It takes backbone", "projection"],
        ),
        (["--model.head=vlmembed.heads.YesNo"], ["MultiVectorModule has no head. It takes"]),
        (["--model.query_tokens.parts=texts"], ["TokenSelection has no parts. It takes part, skip."]),
        (["--model.query_tokens.part=image"], ["without_instruction", "Got value: image"]),
        (
            ["--model.projection=vlmembed.pooling.EndToken"],
            ["a subclass of TokenProjection", "EndToken"],
        ),
        (
            ["--model.loss=vlmembed.losses.BinaryCrossEntropy"],
            ["a subclass of Loss", "BinaryCross"],
        ),
        (["--model.expansion_tokens=<|endoftext|>"], ["expansion_tokens", "Expected a <class 'int'>"]),
        (
            ["--model=vlmembed.modules.EmbeddingModule", f"--model.projection={TOKEN_PROJECTION}"],
            ["EmbeddingModule has no projection. It takes backbone, pooling"],
        ),
    ],
)
def test_options_that_are_refused(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    with pytest.raises(SystemExit):
        call(run, *options)
    errors = capsys.readouterr().err
    assert [message for message in messages if message not in errors] == []


@pytest.mark.parametrize("val", ["rows.jsonl", None], ids=["measured", "trained"])
def test_a_document_without_vectors_stops_a_run_before_its_first_step(run: dict[str, Any], val: str | None) -> None:
    run["data"]["init_args"] |= {"val": val, "test": None}
    with pytest.raises(ValueError, match=r"rows\.jsonl, row \d+, column '(positive'\[\d\]|negative') has no token"):
        call(run, "--model.document_tokens.part=images")
    assert not [*Path().rglob("metrics.csv")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.loss={class_path: vlmembed.losses.Matryoshka, init_args: "
             "{dimensions: [17, 8], loss: {class_path: vlmembed.losses.InfoNCE}}}"],
            r"truncates to \[17\] dimensions, and the model's vectors have 16.*a larger projection",
        ),
        (
            ["--trainer.exporter=vlmembed.export.SentenceTransformers", "--trainer.exporter.truncate_dim=17"],
            "truncate_dim=17 is not between 1 and the vectors' 16",
        ),
        # Nothing of the parser's stands around what a class says.
        (["--model.projection.size=0"], r"^TokenProjection: sizes are 1 or more, got size=0, inner_size=None\.$"),
        (["--model.merging_factors=[1]"], r"^merging_factors are 2 or more, as .* measured anyway: \[1\]\.$"),
        (["--model.two_stage=0"], "^two_stage is the number of documents that MaxSim ranks, or null; got 0.$"),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(run: dict[str, Any], options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(run, *options)


@pytest.mark.exhaustive
def test_commands_and_options(run: dict[str, Any]) -> None:
    options = ["--model.query_tokens.part=images", "--model.expansion_tokens=2", "--model.document_tokens.skip=['Ċ']"]
    for command in ("validate", "test", "predict"):
        call(run, *options, command=command)


def losses() -> list[float]:
    (path,) = Path().rglob("metrics.csv")
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


FEATURES = [None, "vlmembed.features.InMemory", "vlmembed.features.OnDisk"]


@pytest.mark.exhaustive
def test_a_frozen_tower_s_features_may_be_kept(run: dict[str, Any]) -> None:
    """With LoRA in a language model that sees both ways, and a rate of its own for what is new."""
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    run["data"]["init_args"] |= {"val": None, "test": None}
    run["model"]["init_args"]["backbone"]["init_args"]["bidirectional"] = True
    run["model"]["init_args"] |= {
        "adapters": [{"class_path": "vlmembed.adapters.LoRA", "init_args": {"config": lora}}],
        "learning_rates": {"projection": 1e-2},
        "document_tokens": {"skip": ["Ċ"]},
        "expansion_tokens": 2,
    }
    runs = []
    for features in FEATURES:
        run["model"]["init_args"]["features"] = features and {
            "class_path": features,
            "init_args": {"limit_gib": 1.0} | ({"folder": "features"} if features.endswith("OnDisk") else {}),
        }
        call(run)
        runs.append(losses())
        shutil.rmtree("runs")
    assert len(runs[0]) == 4
    # In the second epoch images come from other chunks: sums in float32 go in another order, and Adam makes more of it.
    assert runs[1] == runs[2] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("name", ["projection", "pooling"])
def test_the_projection_has_a_rate_of_its_own(open_family: Any, name: str) -> None:
    module = late(open_family("packed"), learning_rates={name: 1e-2, "vision": 1e-4})
    module.configure_model()
    rates = {
        id(parameter): group["lr"]
        for group in module.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    for key, parameter in module.named_parameters():
        vision = any(parameter is other for _, other in module.encoder.backbone.vision_parameters())
        expected = 1e-2 if key.startswith("encoder.pooling.") else 1e-4 if vision and "merger" not in key else 1e-3
        assert rates[id(parameter)] == expected
