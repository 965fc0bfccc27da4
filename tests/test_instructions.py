"""What a model is told to do with an item: from a column, by data set, and by the backbone where neither says."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import torch
import yaml
from building import encoder, item, jsonl, mixed_items, picture, ranker, run_config
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.nn.functional import normalize

from vlmembed.backbones import DocumentFirst, PairTemplate, QueryFirst, Qwen3VL, TemplateFile
from vlmembed.cli import main
from vlmembed.data import EvaluationFolder, GroupByQuery, Mixture, PairCollator, Rows, Source
from vlmembed.data.datamodule import named_prompts
from vlmembed.encoder import Encoder, Scorer
from vlmembed.export.sentence_transformers import Scoring, write_folder, write_reranker
from vlmembed.export.verify import TOLERANCE, expect, verify
from vlmembed.heads import YesNo
from vlmembed.losses.base import LabelSpec
from vlmembed.mining import mine, score
from vlmembed.pooling import LastToken, Mean, MeanWithoutInstruction
from vlmembed.types import Example, Item, Pair, Preprocessor

FIND, SHOW, DEFAULT = "Find the caption.", "Represent the photograph – naïve.", "Represent the user's input."
ROW = {"query": "q", "positive": "p", "negative": "n"}


def told(one: Item, instruction: str | None) -> Item:
    return Item(one.role, one.parts, one.origin, instruction)


# Reading


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_a_column_says_what_to_do_with_queries_and_one_with_documents(tmp_path: Path, form: str) -> None:
    rows = [
        ROW | {"query_instruction": FIND, "document_instruction": SHOW},
        ROW | {"query_instruction": None, "document_instruction": ""},
        ROW | {"query_instruction": "", "document_instruction": None},
    ]
    table, path = datasets.Dataset.from_list(rows), tmp_path / f"rows.{form}"
    writers = {"jsonl": lambda: jsonl(path, rows), "parquet": lambda: table.to_parquet(path)}
    writers.get(form, lambda: table.save_to_disk(path))()
    source = Rows(str(path))
    examples = source.__getitems__([2, 0, 1])
    assert [example.query.instruction for example in examples] == ["", FIND, None]
    assert [[one.instruction for one in example.documents] for example in examples] == [
        [None] * 2,
        [SHOW] * 2,
        [""] * 2,
    ]
    # Three queries of one text: they are told apart, and alike by whoever reads the queries alone.
    ids = [example.query.id for example in examples]
    assert len({*ids}) == 3
    assert source.query_ids([2, 0, 1]) == ids
    assert len(GroupByQuery(source)) == 3


def test_cells_may_make_an_instruction(tmp_path: Path) -> None:
    """The same for all, a template, and part of what a row has; an empty cell of a template is null."""
    rows = [{"q": "a", "p": "x", "task": task, "told": {"document": SHOW}} for task in ("page", None)]
    cells: dict[str, Any] = {"query": "q", "positive": "p"}
    path = jsonl(tmp_path / "rows.jsonl", rows)
    for query, expected in (({"constant": FIND}, [FIND, FIND]), ("Find the {task}.", ["Find the page.", None])):
        source = Rows(path, cells=cells | {"query_instruction": query, "document_instruction": "told.document"})
        examples = source.__getitems__([0, 1])
        assert [example.query.instruction for example in examples] == expected
        assert [example.positives[0].instruction for example in examples] == [SHOW, SHOW]
        assert source.query_ids([0, 1]) == [example.query.id for example in examples]
    source.subset = "page_1K"
    assert named_prompts(Mixture([source])) == {
        "rows-page_1K-query": "Find the page.",
        "rows-page_1K-document": SHOW,
    }


def test_rows_with_labels_have_instructions(tmp_path: Path) -> None:
    row = {
        "query": "q",
        "document": ["a", "b"],
        "label": [0, 1],
        "query_instruction": FIND,
        "document_instruction": SHOW,
    }
    example = Rows(jsonl(tmp_path / "rows.jsonl", [row]))[0]
    assert example.query.instruction == FIND
    assert [one.instruction for one in example.documents] == [SHOW, SHOW]


def test_an_item_without_instruction_is_what_it_was() -> None:
    one = item("a question", picture(32, 32), role="query")
    hashed = hashlib.blake2b(b"query" + b"".join(part.digest for part in one.parts), digest_size=8)
    assert one.id == int.from_bytes(hashed.digest(), "big") >> 1
    others = [told(one, instruction) for instruction in ("", FIND, SHOW, "1 ", " 1")]
    assert len({one.id, *(other.id for other in others)}) == 6
    assert all(other != one for other in others)


@pytest.mark.parametrize("column", ["query_instruction", "document_instruction"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("  ", "the text is empty"),
        (7, "a text is a string, got int 7"),
        (False, "a text is a string, got bool"),
        ([FIND], "a text is a string, got list"),
        ("\ud83d", "what is no character"),
    ],
)
def test_what_is_no_instruction_is_refused_by_its_place(tmp_path: Path, column: str, value: Any, message: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [ROW | {column: FIND}, ROW | {column: value}])
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 2, column '{column}': .*{message}"):
        Rows(path).__getitems__([0, 1])


def evaluation_folder(folder: Path, name: str = "pages") -> Path:
    jsonl(folder / name / "queries.jsonl", [{"id": "1", "text": "a"}, {"id": "2", "text": "b", "instruction": "Own."}])
    jsonl(folder / name / "corpus.jsonl", [{"id": "a", "text": "x", "instruction": ""}, {"id": "b", "text": "y"}])
    (folder / name / "qrels.tsv").write_text("1\ta\t1\n2\tb\t1\n")
    return folder / name


def test_evaluation_items_have_their_own_or_the_sets_instruction(tmp_path: Path) -> None:
    folder = evaluation_folder(tmp_path)
    plain = EvaluationFolder(str(folder)).load()
    assert [[one.instruction for one in items] for items in (plain.queries, plain.corpus)] == [
        [None, "Own."],
        ["", None],
    ]
    named = EvaluationFolder(str(folder), query_instruction=FIND, document_instruction=SHOW).load()
    assert [[one.instruction for one in items] for items in (named.queries, named.corpus)] == [
        [FIND, "Own."],
        ["", SHOW],
    ]
    jsonl(folder / "corpus.jsonl", [{"id": "a", "text": "x"}, {"id": "b", "text": "y", "instruction": 3}])
    with pytest.raises(ValueError, match=r"corpus.jsonl, row 2 \(id 'b'\), key 'instruction': .*got int 3"):
        EvaluationFolder(str(folder)).load()


# Model inputs


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, SentenceTransformer]:
    folder = tmp_path_factory.mktemp("served")
    built = encoder(checkpoint, query_instruction="Ask.", document_instruction=None)
    write_folder(built, folder)
    return built, SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("instruction", [FIND, SHOW, "", None])
@pytest.mark.parametrize("role", ["query", "document"])
def test_inputs_are_those_of_sentence_transformers_with_that_prompt(
    served: tuple[Encoder, SentenceTransformer], role: Any, instruction: str | None
) -> None:
    ours, theirs = served
    shown = picture(64, 96)
    actual = ours.preprocessor([told(item(shown, "a caption", role=role), instruction)])
    prompt = {"query": "Ask.", "document": ""}[role] if instruction is None else instruction
    expected = theirs.preprocess([{"image": shown, "text": "a caption"}], prompt=prompt)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_a_mixed_batch_embeds_each_item_as_alone(served: tuple[Encoder, SentenceTransformer]) -> None:
    """In one packed chunk, images and videos among them."""
    ours = served[0]
    items = [told(one, told_to) for one in mixed_items() for told_to in (FIND, None, "", SHOW)]
    with torch.no_grad():
        prepared = ours.preprocessor.prepare(items)
        features = ours.encode_images(prepared.images(None))
        together = ours(prepared.chunk(range(len(items))), features)
        alone = torch.cat([ours(ours.preprocessor([one])) for one in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    vectors = normalize(alone, dim=1).reshape(-1, 4, alone.shape[1])
    assert (vectors[:, 0] - vectors[:, 1]).norm(dim=1).min() > 1e-3  # The instruction is read.


def test_an_instruction_costs_its_tokens(checkpoint: Path) -> None:
    cost = Qwen3VL(str(checkpoint)).make_preprocessor().cost
    plain = item("a question " * 10, role="query")
    assert cost(told(plain, "word " * 80)) == cost(plain) + 100
    assert cost(told(plain, "")) == cost(plain)
    assert cost(Pair(told(plain, "word " * 80), item("a"))) == cost(Pair(plain, item("a"))) + 100


def refusal(preprocessor: Preprocessor, one: Item | Pair) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        preprocessor([one])
    return str(error.value)


ORIGIN = "rows.jsonl, row 5, column 'query'"


def test_an_instruction_that_would_not_be_read_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    one = Item("query", item("a question").parts, ORIGIN, FIND)
    marked = refusal(Qwen3VL(str(checkpoint)).make_preprocessor(), told(one, "Find <|image_pad|>."))
    assert marked.startswith(f"{ORIGIN} has <|image_pad|> in its instruction 'Find <|image_pad|>.'")
    long = refusal(Qwen3VL(str(checkpoint), max_length=40).make_preprocessor(), told(one, "find it " * 40))
    assert long.startswith(f"{ORIGIN}: max_length=40 has no room for a text")
    assert "Raise max_length" in long
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{% set messages = messages[-1:] %}" + template)
    silent = Qwen3VL(str(folder), query_instruction=None, document_instruction=None).make_preprocessor()
    silent([told(one, None), told(one, "")])
    assert f"{ORIGIN} has the instruction {FIND!r}, and the checkpoint's chat template drops" in refusal(silent, one)
    pooled = Encoder(Qwen3VL(str(checkpoint)), MeanWithoutInstruction()).preprocessor
    assert f"{FIND!r}, and MeanWithoutInstruction knows only the backbone's" in refusal(pooled, one)
    Encoder(Qwen3VL(str(checkpoint)), Mean()).preprocessor([one])


# Pairs


@pytest.mark.parametrize("template", [QueryFirst(SHOW), DocumentFirst(SHOW)])
def test_a_pair_is_read_with_its_querys_instruction(checkpoint: Path, template: PairTemplate) -> None:
    query, document = item("a question", role="query"), item(picture(64, 64))
    built = Scorer(Qwen3VL(str(checkpoint)), YesNo(), template).preprocessor
    other = Scorer(Qwen3VL(str(checkpoint)), YesNo(), type(template)(FIND)).preprocessor
    actual, expected = built([Pair(told(query, FIND), document)]), other([Pair(query, document)])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert built([Pair(query, document)])["input_ids"].shape != actual["input_ids"].shape


def test_what_a_pair_has_no_place_for_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    query, document = (
        Item("query", item("q").parts, ORIGIN),
        Item("document", item("d").parts, "row 6, column 'positive'"),
    )
    built = Scorer(Qwen3VL(str(checkpoint)), YesNo(), QueryFirst()).preprocessor
    message = refusal(built, Pair(query, told(document, SHOW)))
    assert message.startswith(f"row 6, column 'positive' has the instruction {SHOW!r}")
    assert "columns: {document_instruction: null}" in message
    assert f"{ORIGIN} has the instruction '', and a pair's template puts" in refusal(
        built, Pair(told(query, ""), document)
    )
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}{% for p in m.content %}"
        "{{ p.text or '<|vision_start|><|' + p.type + '_pad|><|vision_end|>' }}{% endfor %}{% endfor %}"
    )
    own = Scorer(Qwen3VL(str(checkpoint)), YesNo(), TemplateFile(str(tmp_path / "own.jinja"))).preprocessor
    own([Pair(query, document)])
    message = refusal(own, Pair(told(query, FIND), document))
    assert "TemplateFile" in message
    assert "drops the system message" in message


def test_pairs_of_one_instruction_share_their_beginning(checkpoint: Path) -> None:
    """And the scores of a batch of several instructions are those of its pairs alone."""
    scorer = ranker(checkpoint).encoder
    documents = [item(picture(64, 64, 1)), item("two words"), item("three more words")]
    queries = [told(item("a question " * 5, role="query"), instruction) for instruction in (FIND, None, SHOW)]
    rows = [Example(query, (documents[0],), tuple(documents[1:])) for query in queries]
    batch = PairCollator(scorer.preprocessor, LabelSpec())(rows)
    assert len(batch.queries) == 9
    with torch.no_grad():
        features = scorer.encode_images(batch.images)
        together = torch.cat([scorer(chunk, features) for chunk in batch.chunks])[:, 0]
        pairs = {(query.id, document.id): Pair(query, document) for query in queries for document in documents}
        keys = zip(batch.queries.tolist(), batch.documents.tolist(), strict=True)
        alone = torch.cat([scorer(scorer.preprocessor([pairs[key]])) for key in keys])[:, 0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    shared = torch.cat([chunk["shared"] for chunk in batch.chunks])
    assert (shared > 10).sum() >= 6  # Of each instruction, two pairs begin as another.


# Exports


class Own(list[Example], Source):
    """Examples as they are."""


def test_instructions_are_named_after_their_source(tmp_path: Path) -> None:
    def rows(name: str, *instructions: tuple[str | None, str | None], columns: int = 2) -> Rows:
        """One file for each name and number of rows."""
        (folder := tmp_path / str(len([*tmp_path.iterdir()]))).mkdir()
        names = ("query_instruction", "document_instruction")[:columns]
        table = [
            {"query": f"q{number}", "positive": "p", **dict(zip(names, row, strict=False))}
            for number, row in enumerate(instructions)
        ]
        return Rows(jsonl(folder / f"{name}.jsonl", table))

    broken = Rows(jsonl(tmp_path / "broken.jsonl", [ROW | {"query": "", "query_instruction": FIND}]))
    own = Own([Example(told(item("q", role="query"), FIND), (item("p"),))])
    mixture = Mixture(
        [
            rows("pages", (FIND, SHOW), (FIND, SHOW)),
            rows("plain", (None, None), columns=0),
            GroupByQuery(rows("mixed", ("A.", None), ("B.", ""), ("B.", ""))),
            rows("pages", ("Another.", SHOW)),
            rows("pages", ("A third.", None), columns=1),
            broken,
            own,
        ]
    )
    assert named_prompts(mixture) == {
        "pages-query": FIND,
        "pages-document": SHOW,
        "mixed-query": "B.",
        "mixed-document": "",
        "pages-2-query": "Another.",
        "pages-3-query": "A third.",
    }


PROMPTS = {"pages-query": FIND, "a/b: c-document": SHOW, "none-query": ""}


def test_an_export_serves_each_prompt_and_notices_another(checkpoint: Path, tmp_path: Path) -> None:
    built = encoder(checkpoint, LastToken(), query_instruction="Ask.", max_length=256)
    check = expect(built, tmp_path, [64], prompts=PROMPTS)
    (tmp_path / "good").mkdir()
    write_folder(built, tmp_path / "good", prompts=PROMPTS)
    wrong = shutil.copytree(tmp_path / "good", tmp_path / "wrong")
    config = json.loads((wrong / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == {"query": "Ask.", "document": DEFAULT, **PROMPTS}
    config["prompts"]["pages-query"] = "Ask."
    (wrong / "config_sentence_transformers.json").write_text(json.dumps(config))
    good, bad = verify({tmp_path / "good": check, wrong: check})
    assert good.passed
    assert good.comparisons == (2 * 3 + len(PROMPTS)) * 10  # Roles, batchings; probes.
    assert not bad.passed
    assert "as pages-query" in bad.worst


@pytest.mark.exhaustive
def test_an_exported_reranker_serves_each_prompt(checkpoint: Path, tmp_path: Path) -> None:
    scorer = ranker(checkpoint).encoder
    check = expect(scorer, tmp_path, sides=["left"], prompts={"pages-query": FIND})
    assert (check.expected["pages-query"] - check.expected["pair"]).abs().max() > 100 * TOLERANCE
    checks = {}
    for scoring in get_args(Scoring):
        write_reranker(scorer, tmp_path / scoring, scoring, {"pages-query": FIND})
        checks[tmp_path / scoring] = check
    for verification in verify(checks):
        assert verification.passed
        assert verification.comparisons == 4 * len(check.names)  # Alone, in a batch, ranked; and with the prompt.


@pytest.mark.exhaustive
def test_a_run_exports_the_prompts_of_its_sources(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of ``fit``, and from a checkpoint where the rows are gone; the set is measured with its own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"q{n}", "positive": f"p{n}", "query_instruction": FIND} for n in range(4)]
    source = {"class_path": "vlmembed.data.Rows", "init_args": {"path": jsonl(tmp_path / "pages.jsonl", rows)}}
    measured = {"path": str(evaluation_folder(tmp_path, "judged")), "document_instruction": SHOW}
    test = {"class_path": "vlmembed.data.EvaluationFolder", "init_args": measured}
    config = run_config(checkpoint, train=source, test=test, batch_size=2)
    config["trainer"] |= {"max_steps": 2}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    folder = next(Path().rglob("config_sentence_transformers.json")).parent
    prompts = {"query": DEFAULT, "document": DEFAULT, "pages-query": FIND}
    assert json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"] == prompts
    assert "- <code>pages-query</code>: <code>Find the caption.</code>" in (folder / "README.md").read_text()
    Path("pages.jsonl").unlink()
    last = next(Path().rglob("*.ckpt"))
    main(["export", "--config", "run.yaml", "--ckpt_path", str(last), "--output_dir", "again"])
    assert json.loads(Path("again", "config_sentence_transformers.json").read_text())["prompts"] == prompts
    # The metric is that of the exported model with the prompts that the YAML names.
    model = SentenceTransformer(str(folder), device="cpu")
    queries = torch.stack(
        [model.encode(text, prompt=told, convert_to_tensor=True) for text, told in (("a", DEFAULT), ("b", "Own."))]
    )
    corpus = torch.stack(
        [model.encode(text, prompt=told, convert_to_tensor=True) for text, told in (("x", ""), ("y", SHOW))]
    )
    first = (queries @ corpus.T).argmax(dim=1) == torch.arange(2)
    metrics = next(path for path in Path().rglob("metrics.csv") if "test/recall@1" in path.read_text())
    header, *lines = (line.split(",") for line in metrics.read_text().splitlines())
    recall = [line[header.index("test/recall@1")] for line in lines]
    assert float([value for value in recall if value][-1]) == float(first.float().mean())


# Mining and teachers' scores


def test_mined_rows_keep_their_instructions_and_are_embedded_with_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "embedder"
    folder.mkdir()
    write_folder(encoder(checkpoint), folder)
    told = [{"query_instruction": (FIND, None)[n % 2], "document_instruction": SHOW} for n in range(6)]
    rows = [{"query": f"q{n // 2}", "positive": f"p{n}", **told[n]} for n in range(6)]
    seen: dict[str, list[str | None]] = {"encode_query": [], "encode_document": []}
    for name in seen:
        encode = getattr(SentenceTransformer, name)

        def spy(self: Any, inputs: Any, _encode: Any = encode, _name: str = name, **options: Any) -> Any:
            seen[_name] += [options["prompt"]] * len(inputs)
            return _encode(self, inputs, **options)

        monkeypatch.setattr(SentenceTransformer, name, spy)
    options: Any = {"negatives": 2, "margin": None, "relative_margin": None}
    mine(str(folder), jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "mined.jsonl"), **options)
    assert seen == {"encode_query": [FIND] * 3 + [None] * 3, "encode_document": [SHOW] * 6}
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    for row, before in zip(mined, rows, strict=True):
        assert {name: row[name] for name in told[0]} == {name: before[name] for name in told[0]}
        # Each query is searched by itself: what another instruction's query seeks may be a negative.
        assert len(row["negatives"]) == 2
        assert before["positive"] not in row["negatives"]
    # In the order of the rows, whatever was embedded together.
    model = SentenceTransformer(str(folder), device="cpu")
    documents = model.encode([f"p{n}" for n in range(6)], prompt=SHOW, convert_to_tensor=True)
    for row, before in zip(mined, rows, strict=True):
        query = model.encode(before["query"], prompt=before["query_instruction"] or DEFAULT, convert_to_tensor=True)
        order = [f"p{n}" for n in (documents @ query).argsort(descending=True).tolist()]
        assert row["negatives"] == [name for name in order if name != before["positive"]][:2]


def test_a_teacher_scores_with_the_rows_instruction(checkpoint: Path, tmp_path: Path) -> None:
    scorer = ranker(checkpoint).encoder
    write_reranker(scorer, tmp_path / "reranker")
    told_to = [FIND, None, FIND, SHOW]
    rows = [ROW | {"query": f"q{n}", "query_instruction": instruction} for n, instruction in enumerate(told_to)]
    score(str(tmp_path / "reranker"), jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "scored.jsonl"))
    model = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    for row, before in zip(Rows(str(tmp_path / "scored.jsonl")), rows, strict=False):  # type: ignore[call-overload]
        pairs, prompt = [(before["query"], "p"), (before["query"], "n")], before["query_instruction"]
        expected = model.predict(pairs, prompt=prompt, activation_fn=torch.nn.Identity())
        assert row.query.instruction == prompt
        assert row.scores == pytest.approx(expected.tolist(), abs=TOLERANCE)
