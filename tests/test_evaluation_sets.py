"""Evaluation sets as they are published, on replicas; what is measured on them equals pytrec_eval's on a conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import pytrec_eval
import torch
from building import data_module, jsonl, module, trainer
from hub_server import Repository, connect_datasets, serve
from test_cookbook import content, hub, images, png, stored, table
from test_hub import connect
from test_metrics import MEASURES

from vlmembed.data import EvaluationFolder, EvaluationRows, EvaluationTables, Rows, Table
from vlmembed.data.evaluation import as_evaluation, as_reranking
from vlmembed.metrics import METRICS, RerankingMetrics, RetrievalMetrics
from vlmembed.types import EvaluationSet


@dataclass
class Conversion:
    """A data set as one would convert it by hand: contents, and of each query grades, candidates and group."""

    corpus: list[list[Any]]
    queries: list[tuple[list[Any], dict[int, int]]]  # Grades by the number of the document.
    candidates: list[list[int]] | None = None
    groups: list[str] | None = None

    def measure(self, scores: torch.Tensor) -> dict[str, float]:
        """What pytrec_eval says of scores (Q, P): means over queries, or over the means of groups."""
        numbers = [f"{number:04d}" for number in range(len(self.corpus))]
        run, qrels = {}, {}
        for number, (_, grades) in enumerate(self.queries):
            columns = range(len(self.corpus)) if self.candidates is None else self.candidates[number]
            run[str(number)] = {numbers[column]: float(scores[number, column]) for column in columns}
            qrels[str(number)] = {numbers[column]: grade for column, grade in grades.items()}
        best = {query: dict(sorted(row.items(), key=lambda pair: pair[::-1])[-10:]) for query, row in run.items()}
        measured = pytrec_eval.RelevanceEvaluator(qrels, {*MEASURES.values()}).evaluate(run)
        cut = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(best)
        values = [measured[str(number)] | cut[str(number)] for number in range(len(self.queries))]
        groups = self.groups or [""] * len(values)
        means: dict[str, float] = {}
        for ours, theirs in {**MEASURES, "mrr@10": "recip_rank"}.items():
            for group in {*groups} - {""}:
                own = [value[theirs] for value, other in zip(values, groups, strict=True) if other == group]
                means[f"{group}/{ours}"] = float(np.mean(own))
            parts = [means[f"{group}/{ours}"] for group in {*groups} - {""}]
            means[ours] = float(np.mean(parts or [value[theirs] for value in values]))
        return means


# Each writes a replica into the working directory, and returns its conversion.


def vidore_v2() -> Conversion:
    corpus = [{"corpus-id": 10 + n, "image": stored(n), "doc-id": "report.pdf"} for n in range(5)]
    queries = [{"query-id": 3 * n, "query": f"q{n}", "language": "english", "answer": "x"} for n in range(4)]
    qrels = [
        {"query-id": query, "corpus-id": document, "answer": "x", "score": grade}
        for query, document, grade in ((0, 12, 1), (0, 14, 2), (6, 10, 1), (9, 13, 1), (9, 10, 0))
    ]
    tables = {("corpus", "test"): corpus, ("queries", "test"): queries, ("qrels", "test"): qrels}
    hub("vidore/esg_reports_v2", {**tables, ("docs", "test"): [{"doc-id": "report.pdf"}]}, "image")
    judged = [(["q0"], {2: 1, 4: 2}), (["q2"], {0: 1}), (["q3"], {3: 1, 0: 0})]  # Nobody has judged q1.
    return Conversion([[png(n)] for n in range(5)], judged)


def vidore_v3() -> Conversion:
    languages = ["english", "french", "french", "english", "french"]
    corpus = [
        {"corpus_id": n, "image": stored(n), "doc_id": "a", "markdown": f"# {n}", "page_number_in_doc": n}
        for n in range(6)
    ]
    queries = [
        {"query_id": n, "query": f"q{n}", "language": language, "query_types": ["open"], "raw_answers": None}
        for n, language in enumerate(languages)
    ]
    qrels = [
        {"query_id": n, "corpus_id": (n + shift) % 6, "score": grade, "content_type": ["text"], "bounding_boxes": []}
        for n in range(5)
        for shift, grade in ((1, 2), (3, 1))
    ]
    tables = {("corpus", "test"): corpus, ("queries", "test"): queries, ("qrels", "test"): qrels}
    hub("vidore/vidore_v3_hr", {**tables, ("documents_metadata", "test"): [{"doc_id": "a"}]}, "image")
    judged = [([f"q{n}"], {(n + 1) % 6: 2, (n + 3) % 6: 1}) for n in range(5)]
    return Conversion([[png(n)] for n in range(6)], judged, groups=languages)


def question_in_each_row() -> Conversion:
    rows = [{"query": None if n == 2 else f"q{n}", "image": stored(n), "image_filename": f"{n}"} for n in range(5)]
    hub("vidore/docvqa_test_subsampled", {("default", "test"): rows}, "image")
    return Conversion([[png(n)] for n in (0, 1, 3, 4)], [([f"q{n}"], {k: 1}) for k, n in enumerate((0, 1, 3, 4))])


def multilingual() -> list[Conversion]:
    numbers = {"de": range(4), "en": range(10, 13)}
    rows = {
        (language, "train"): [
            {"id": f"{language}_{n}", "query": f"{language} {n}", "image": stored(n), "language": language} for n in own
        ]
        for language, own in numbers.items()
    }
    hub("llamaindex/vdr-multilingual-test", rows, "image")
    return [
        Conversion([[png(n)] for n in own], [([f"{language} {n}"], {k: 1}) for k, n in enumerate(own)])
        for language, own in numbers.items()
    ]


def mteb_images() -> Conversion:
    """What an item lacks is null, or empty."""
    corpus = [
        {"id": f"2:{n}", "modality": "image,text", "text": text, "image": image}
        for n, (text, image) in enumerate([(None, stored(0)), ("", stored(1)), ("a text", stored(2)), ("only", None)])
    ]
    queries = [{"id": f"9:{n}", "modality": "text", "text": f"q{n}", "image": None} for n in range(3)]
    queries.append({"id": "9:3", "modality": "image", "text": None, "image": stored(7)})
    qrels = [{"query-id": f"9:{n}", "corpus-id": f"2:{3 - n}", "score": 1} for n in (3, 0, 2)]
    tables = {("corpus", "test"): corpus, ("query", "test"): queries, ("qrels", "test"): qrels}
    hub("MRBench/mbeir_webqa_task1", tables, "image")
    judged = [(["q0"], {3: 1}), (["q2"], {1: 1}), ([png(7)], {0: 1})]
    return Conversion([[png(0)], [png(1)], ["a text", png(2)], ["only"]], judged)


def languages_in_rows() -> Conversion:
    languages = ["it", "es", "it", "fr", "es"]
    rows = [
        {"id": f"p{n}", "query": None if n == 3 else f"q{n}", "image": stored(n), "language": language}
        for n, language in enumerate(languages)
    ]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet("pages.parquet")
    numbers = [0, 1, 2, 4]
    judged = [([f"q{n}"], {n: 1}) for n in numbers]
    return Conversion([[png(n)] for n in range(5)], judged, groups=[languages[n] for n in numbers])


def texts(prefix: str, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    corpus = [
        {"_id": f"{prefix}{n}", "title": "" if n == 1 else f"T{n}", "text": f"{prefix} {n}"} for n in range(count)
    ]
    return corpus, [{"_id": f"{n}", "text": f"{prefix} query {n}"} for n in range(count)]


def contents(prefix: str, count: int) -> list[list[Any]]:
    return [[f"{prefix} {n}" if n == 1 else f"T{n} {prefix} {n}"] for n in range(count)]


def mteb() -> Conversion:
    corpus, queries = texts("m", 7)
    test = [{"query-id": f"{n}", "corpus-id": f"m{n + 2}", "score": 1.0} for n in (4, 1, 3)]
    tables = {("default", "train"): [{**test[0], "query-id": "0"}], ("default", "test"): test}
    hub("mteb/scifact", {**tables, ("corpus", "corpus"): corpus, ("queries", "queries"): queries})
    return Conversion(contents("m", 7), [([f"m query {n}"], {n + 2: 1}) for n in (1, 3, 4)])


def mteb_languages() -> Conversion:
    """Ids are the same in each language: only its own documents are looked for."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for language, count in (("ar", 4), ("de", 6)):
        corpus, queries = texts(language, count)
        for row in corpus:
            row["_id"] = row["_id"].removeprefix(language)
        tables[f"{language}-corpus", "dev"], tables[f"{language}-queries", "dev"] = corpus, queries
        qrels = [{"query-id": f"{n}", "corpus-id": f"{(n + 1) % count}", "score": n + 1} for n in range(count - 1)]
        tables[f"{language}-qrels", "dev"] = qrels
    hub("mteb/MIRACLRetrieval", tables)
    return Conversion(
        contents("ar", 4) + contents("de", 6),
        [([f"ar query {n}"], {n + 1: n + 1}) for n in range(3)]
        + [([f"de query {n}"], {4 + n + 1: n + 1}) for n in range(5)],
        [[*range(4)]] * 3 + [[*range(4, 10)]] * 5,
        ["ar"] * 3 + ["de"] * 5,
    )


def beir() -> Conversion:
    images("datasets/nfcorpus/pages", ["a.png"])
    corpus, queries = texts("b", 6)
    corpus[3] |= {"metadata": {"url": "x"}, "url": "https://x", "markdown": "#"}
    corpus.append({"_id": "b6", "title": None, "text": "", "image": "pages/a.png"})
    for row in queries:
        row["metadata"] = {}
    jsonl("datasets/nfcorpus/corpus.jsonl", corpus)
    jsonl("datasets/nfcorpus/queries.jsonl", queries)
    Path("datasets/nfcorpus/qrels").mkdir()
    for split, grade in (("train", "7"), ("dev", "1.0"), ("test", "9")):
        lines = ["query-id\tcorpus-id\tscore", f"2\tb0\t{grade}", f"5\tb6\t{grade}", "5\tb1\t2"]
        Path(f"datasets/nfcorpus/qrels/{split}.tsv").write_text("\n".join(lines))
    judged = [(["b query 2"], {0: 1}), (["b query 5"], {6: 1, 1: 2})]
    return Conversion([*contents("b", 6), ["a.png"]], judged)


def beir_on_the_hub() -> Conversion:
    corpus, queries = texts("h", 5)
    hub("BeIR/scifact", {("corpus", "corpus"): corpus, ("queries", "queries"): queries})
    rows = [{"query-id": n, "corpus-id": f"h{n}", "score": 1} for n in (3, 0)]
    hub("BeIR/scifact-qrels", {("default", "train"): rows[:1], ("default", "test"): rows})
    return Conversion(contents("h", 5), [([f"h query {n}"], {n: 1}) for n in (0, 3)])


def mbeir() -> Conversion:
    images("mbeir_images", ["1.png", "2.png", "3.png"])
    pool = [
        {"did": f"2:{n}", "txt": text, "img_path": path, "modality": "image,text", "src_content": None}
        for n, (text, path) in enumerate(
            (("A page.", "mbeir_images/1.png"), ("No image.", None), ("", "mbeir_images/2.png"))
        )
    ]
    jsonl("cand_pool/webqa.jsonl", pool)
    queries = [
        {"qid": f"9:{n}", "query_txt": text, "query_img_path": path, "pos_cand_list": documents, "neg_cand_list": []}
        for n, (text, path, documents) in enumerate(
            (("Which?", None, ["2:1", "2:2"]), (None, "mbeir_images/3.png", ["2:0"]), ("Why?", "", ["2:2"]))
        )
    ]
    jsonl("query/test/webqa.jsonl", queries)
    Path("qrels/test").mkdir(parents=True)
    lines = [f"{row['qid']} 0 {document} 1 6\n" for row in queries for document in row["pos_cand_list"]]
    Path("qrels/test/webqa.txt").write_text("".join(lines))
    judged = [(["Which?"], {1: 1, 2: 1}), (["3.png"], {0: 1}), (["Why?"], {2: 1})]
    return Conversion([["A page.", "1.png"], ["No image."], ["2.png"]], judged)


def mmeb() -> Conversion:
    """Two rows ask the same, and one candidate is another's right answer."""
    images("TIGER-Lab/MMEB-eval/images", ["OK-VQA/1.png", "OK-VQA/2.png", "OK-VQA/3.png"])
    answers = [["crane", "goose", "duck"], ["goose", "crane", "owl", "kite"], ["rook", "owl"]]
    rows = [
        {
            "qry_text": "<|image_1|>\nWhich bird?\n",
            "qry_img_path": f"OK-VQA/{number}.png",
            "tgt_text": listed,
            "tgt_img_path": ["OK-VQA/3.png" if text == "owl" else "" for text in listed],
        }
        for number, listed in zip((1, 1, 2), answers, strict=True)
    ]
    hub("TIGER-Lab/MMEB-eval", {("OK-VQA", "test"): rows, ("MSCOCO", "test"): rows[:1]})
    corpus = ["crane", "goose", "duck", "owl", "kite", "rook"]
    columns = [[corpus.index(text) for text in listed] for listed in answers]
    queries = [
        ([f"{number}.png", "\nWhich bird?\n"], {column: int(k == 0) for k, column in enumerate(own)})
        for number, own in zip((1, 1, 2), columns, strict=True)
    ]
    return Conversion([[text, "3.png"] if text == "owl" else [text] for text in corpus], queries, columns)


REPLICAS: dict[str, Callable[[], Conversion | list[Conversion]]] = {
    "ViDoRe v1 and v2, in BEIR's form": vidore_v2,
    "ViDoRe v3, by language": vidore_v3,
    "ViDoRe v1, a query in each row": question_in_each_row,
    "llamaindex/vdr-multilingual-test": multilingual,
    "rows of query, page and language": languages_in_rows,
    "MTEB": mteb,
    "MTEB, texts and images": mteb_images,
    "MTEB, a configuration for each language": mteb_languages,
    "a folder of BEIR, its development split": beir,
    "BEIR on the Hub": beir_on_the_hub,
    "M-BEIR": mbeir,
    "M-BEIR, judged by its lists": mbeir,
    "TIGER-Lab/MMEB-eval": mmeb,
}


def converted(found: EvaluationSet) -> Conversion:
    columns = {name: column for column, name in enumerate(found.document_names)}
    queries = [
        (content(item), {columns[document]: grade for document, grade in found.qrels[name].items()})
        for item, name in zip(found.queries, found.query_names, strict=True)
    ]
    candidates = None if found.candidates is None else [[*row] for row in found.candidates]
    return Conversion([*map(content, found.corpus)], queries, candidates, found.subsets and [*found.subsets])


def test_every_evaluation_set_of_the_page_has_a_replica() -> None:
    assert table("evaluation sets").keys() == REPLICAS.keys()


@pytest.mark.parametrize("name", REPLICAS)
def test_measured(name: str, checkpoint: Path, here: Path) -> None:
    conversions = REPLICAS[name]()
    conversions = conversions if isinstance(conversions, list) else [conversions]
    model, data = module(checkpoint), data_module(val=table("evaluation sets")[name])
    runner = trainer()
    runner.validate(model, datamodule=data, verbose=False)
    sets = data.evaluations["val"]
    assert [*map(converted, sets)] == conversions
    expected = []
    for found, conversion, metric in zip(sets, conversions, model.metrics, strict=True):
        embeddings = torch.nn.functional.normalize(metric.gather_embeddings().double(), dim=1)
        queries, corpus = embeddings.split([len(found.queries), len(found.corpus)])
        expected.append(conversion.measure(queries @ corpus.T))
    if len(sets) == 1:
        (named,) = expected
    else:
        named = {
            f"{one.name}/{key}": value for one, own in zip(sets, expected, strict=True) for key, value in own.items()
        }
        named |= {f"mean/{key}": float(np.mean([own[key] for own in expected])) for key in expected[0]}
    logged = {key.removeprefix("val/"): float(value) for key, value in runner.callback_metrics.items()}
    assert logged == pytest.approx(named, abs=1e-6)


# The same small set, laid out in every way.

SMALL = Conversion(contents("s", 4), [(["s query 0"], {1: 1}), (["s query 2"], {0: 2, 3: 1})])
JUDGED = [("0", "s1", 1), ("2", "s0", 2), ("2", "s3", 1)]


def tables_of(
    document: str = "_id", query: str = "_id", judged: tuple[str, str, str] = ("query-id", "corpus-id", "score")
):
    corpus, queries = texts("s", 4)
    rename = (
        [{document: row.pop("_id"), **row, "url": "x"} for row in corpus],
        [{query: int(row.pop("_id")), "modality": "text", **row} for row in queries],
    )
    return [*rename, [dict(zip(judged, row, strict=True)) for row in JUDGED]]


def save(layout: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write corpus, queries and qrels into the folder ``set``."""
    for role, own in rows.items():
        folder = Path("set", role)
        folder.mkdir(parents=True)
        one = datasets.Dataset.from_list(own)
        if layout == "parquet folders":
            one.to_parquet(folder / "test-00000-of-00001.parquet")
        elif layout == "parquet files":
            folder.rmdir()
            one.to_parquet(folder.with_suffix(".parquet"))
        elif layout == "jsonl folders":
            jsonl(str(folder / "test.jsonl"), own)
        elif layout == "saved":
            one.save_to_disk(folder)
        else:
            datasets.DatasetDict({"test": one, "train": one.select([0])}).save_to_disk(folder)


@pytest.mark.parametrize("layout", ["parquet folders", "parquet files", "jsonl folders", "saved", "saved splits"])
@pytest.mark.parametrize(
    "names",
    [
        ("_id", "_id", ("query-id", "corpus-id", "score")),
        ("id", "query_id", ("query_id", "corpus_id", "relevance")),
        ("corpus_id", "qid", ("qid", "did", "grade")),
        ("docid", "Query-ID", ("Query-ID", "Corpus-ID", "Score")),
    ],
)
def test_layouts_and_spellings(layout: str, names: Any, here: Path) -> None:
    corpus, queries, qrels = tables_of(*names)
    save(layout, {"corpus": corpus, "queries": queries, "qrels": qrels})
    assert converted(as_evaluation("set")) == SMALL


LINES = {
    "a header": "query-id\tcorpus-id\tscore\n0\ts1\t1\n2\ts0\t2.0\n2\ts3\t1\n",
    "a header in another order": "score corpus_id query_id notes\n1 s1 0 x\n2 s0 2 x\n1 s3 2 x\n",
    "a header without grades": "qid\tdid\n0\ts1\n2\ts3\n2\ts0\n",
    "four columns": "0 0 s1 1\n2 0 s0 2\n2\tQ0\ts3\t1\n".replace("\t", " "),
    "five columns": "0\t0\ts1\t1\t8\n2\t0\ts0\t2\t8\n2\t0\ts3\t1\t8\n",
    "a header of TREC": "qid iter did rel\n0 0 s1 1\n2 0 s0 2\n2 0 s3 1\n",
    "spaces": "\n0 s1 1\n2  s0  2\n2 s3 1.0 \n\n",
}


@pytest.mark.parametrize("form", LINES)
def test_lines_of_judgements(form: str, tmp_path: Path) -> None:
    corpus, queries, _ = tables_of()
    jsonl(f"{tmp_path}/corpus.jsonl", corpus)
    jsonl(f"{tmp_path}/queries.jsonl", queries)
    (tmp_path / "qrels.txt").write_text(LINES[form])
    grade = 1 if "without" in form else 2
    expected = Conversion(SMALL.corpus, [SMALL.queries[0], (["s query 2"], {0: grade, 3: 1})])
    assert converted(as_evaluation(str(tmp_path))) == expected


def test_a_page_names_what_is_in_files_of_other_names(here: Path) -> None:
    """Beside other configurations; a corpus is shared, and read once, where languages have none of their own."""
    corpus, queries, qrels = tables_of()
    tables = {("corpus", "test"): corpus, ("top_ranked", "test"): qrels}
    for language, rows in (("en", slice(0, 1)), ("zh-Hant", slice(1, 3))):
        tables[f"queries-{language}", "test"] = queries
        tables[f"{language}_qrels", "test"] = qrels[rows]
    hub("shared", tables)
    found = as_evaluation("shared")
    assert converted(found) == Conversion(SMALL.corpus, SMALL.queries, None, ["en", "zh-Hant"])
    assert found.query_names == ["en/0", "zh-Hant/2"]
    alone = EvaluationFolder("shared", subset="zh-Hant").load()
    assert converted(alone) == Conversion(SMALL.corpus, SMALL.queries[1:])
    with pytest.raises(ValueError, match=r"shared: no subset 'zh_hant' .did you mean 'zh-Hant'.*it has en, zh-Hant"):
        EvaluationFolder("shared", subset="zh_hant").load()
    with pytest.raises(ValueError, match="it has subsets en, zh-Hant; choose one, or drop group_by"):
        EvaluationFolder("shared", group_by="language").load()


SPLITS = {"train": ["s0"], "dev": ["s1"], "test": ["s2", "s3"]}


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_which_split_is_judged(suffix: str, tmp_path: Path) -> None:
    corpus, queries, _ = tables_of()
    jsonl(f"{tmp_path}/corpus.jsonl", corpus)
    jsonl(f"{tmp_path}/queries.jsonl", queries)
    for split, documents in SPLITS.items():
        rows = [{"query-id": "1", "corpus-id": name, "score": 1} for name in documents]
        if suffix == ".jsonl":
            jsonl(f"{tmp_path}/qrels/{split}.jsonl", rows)
        else:
            (tmp_path / "qrels").mkdir(exist_ok=True)
            (tmp_path / "qrels" / f"{split}.tsv").write_text("".join(f"1\t{name}\t1\n" for name in documents))

    def judged(split: str) -> list[str]:
        return [*EvaluationFolder(str(tmp_path), split=split).load().qrels["1"]]

    def usual(split: str) -> list[str]:
        return [*as_evaluation(str(tmp_path), split).qrels["1"]]

    assert usual("validation") == judged("validation") == ["s1"]
    assert usual("test") == judged("test") == ["s2", "s3"]
    assert judged("train") == ["s0"]
    with pytest.raises(ValueError, match=r"qrels: no split 'eval'; it has .*train"):
        judged("eval")
    if suffix == ".tsv":  # `datasets` calls the file dev.jsonl of a folder validation.
        (tmp_path / "qrels" / "dev.tsv").unlink()
        with pytest.raises(ValueError, match=r"qrels: no split 'validation'; it has test, train"):
            usual("validation")
        (tmp_path / "qrels" / "train.tsv").unlink()
        assert usual("validation") == ["s2", "s3"]  # The only one there is.
        with pytest.raises(ValueError, match=r"qrels: no split 'dev'; it has test"):
            judged("dev")


def write_tables(**changed: Any) -> dict[str, Any]:
    """Write the small set as JSONL, with other rows for some of it; return what EvaluationTables takes."""
    names = ("corpus", "queries", "qrels")
    for name, rows in (dict(zip(names, tables_of(), strict=True)) | changed).items():
        jsonl(f"{name}.jsonl", rows)
    return {name: f"{name}.jsonl" for name in names}


Q = {"_id": "0", "text": "q"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"qrels": [{"query-id": 0, "corpus-id": "s1", "score": 0.5}]},
            r"qrels.jsonl, row 1: expected .*'0', 's1', 0.5",
        ),
        ({"qrels": [{"query-id": None, "corpus-id": "s1", "score": 1}]}, "row 1, column 'query-id': an id is .*None"),
        ({"qrels": [{"query": 0, "corpus-id": "s1"}]}, "qrels.jsonl: judgements have no column of the query id"),
        ({"qrels": [{"query-id": 0, "query_id": 0, "corpus-id": "s1"}]}, "expected one 'query-id'; there are"),
        ({"qrels": [{"query-id": "00", "corpus-id": "s1"}]}, "qrels.jsonl: query '00' is not in queries.jsonl .*'0'"),
        (
            {"qrels": [{"query-id": 0, "corpus-id": "S1"}]},
            "none of the 1 judged documents .such as 'S1'. is in corpus.jsonl, .*'s0'",
        ),
        ({"corpus": [{"_id": "s1", "text": "x", "document": "y"}]}, "'document' says all of it, and there is text"),
        ({"queries": [{"_id": "0", "question": "x"}]}, "has none of query, text, .*there are _id, question"),
        ({"queries": [{**Q, "lang": "en"}], "group_by": "language"}, "no column 'language' .*it has _id, text, lang"),
        (
            {"queries": [{**Q, "lang": None}], "group_by": "lang"},
            "queries.jsonl, row 1, column 'lang': queries are grouped",
        ),
        ({"queries": [{**Q, "positives": ["s1"]}]}, "judgements are both in qrels and in a column 'positives'"),
        ({"queries": [Q], "qrels": None}, "judgements are neither in qrels nor in a column 'positives'"),
        ({"queries": [{**Q, "positives": []}], "qrels": None}, "column 'positives': no query is judged"),
        (
            {"queries": [{**Q, "positives": ["s1", "s9"]}], "qrels": None},
            "query '0', column 'positives': .*'s9' is not in",
        ),
        ({"queries": [{**Q, "positives": "s1", "candidates": []}], "qrels": None}, "query '0', .*has no candidates"),
        (
            {"queries": [{**Q, "positives": "s1", "candidates": ["s"]}], "qrels": None},
            "'candidates': the id 's' is not in",
        ),
        (
            {"queries": [{**Q, "positives": "s1", "candidates": ["s1"] * 2}], "qrels": None},
            "'candidates': 's1' is there twice",
        ),
    ],
)
def test_bad_tables_are_refused(given: dict[str, Any], message: str, here: Path) -> None:
    rows = {name: value for name, value in given.items() if isinstance(value, list)}
    options = {name: value for name, value in given.items() if name not in rows}
    with pytest.raises(ValueError, match=message):
        EvaluationTables(**write_tables(**rows) | options).load()


def test_what_is_no_evaluation_set_is_refused(here: Path) -> None:
    corpus, queries, _ = tables_of()
    hub("halved", {("corpus", "test"): corpus, ("queries", "test"): queries})
    Path("bare").mkdir()
    for path, message in (
        ("halved", "qrels.tsv: no such file"),
        ("bare", "no evaluation set"),
        ("org/gone", "no evaluation"),
    ):
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            EvaluationFolder(path).load()
    hub("other", {("en", "test"): queries, ("de", "test"): queries})
    with pytest.raises(ValueError, match=r"other: no evaluation set.*, and this one has en, de\."):
        EvaluationFolder("other").load()
    Path("bare/README.md").write_text("---\nconfigs: [1]\n---\n")
    with pytest.raises(ValueError, match="bare: what its page says of configurations cannot be read"):
        EvaluationFolder("bare").load()
    save("parquet files", {"corpus": corpus, "queries": queries})
    jsonl("set/corpus.json", corpus)
    with pytest.raises(ValueError, match=r"set: corpus.json and corpus.parquet are two forms of the same; keep one"):
        EvaluationFolder("set").load()


def test_a_file_of_judgements_has_no_splits(here: Path) -> None:
    corpus, queries, qrels = tables_of()
    save("parquet files", {"corpus": corpus, "queries": queries, "qrels": qrels})
    with pytest.raises(ValueError, match=r"set/qrels.parquet: it has no splits, so none is called 'dev'"):
        EvaluationFolder("set", split="dev").load()


def test_pages_of_pdfs_are_a_corpus(here: Path) -> None:
    pytest.importorskip("pypdfium2")
    from test_pages import BOX, QUARTERS, document

    Path("reports").mkdir()
    Path("reports/a b.pdf").write_bytes(document((BOX, QUARTERS), (BOX, QUARTERS)))
    jsonl("queries.jsonl", [{"id": 1, "query": "which?"}])
    Path("qrels.tsv").write_text("1\ta b.pdf#page=2\t1\n")
    pages = {"class_path": "vlmembed.data.Pages", "init_args": {"path": "reports"}}
    tables = {"corpus": pages, "queries": "queries.jsonl", "qrels": "qrels.tsv", "document_instruction": "Read."}
    data = data_module(val={"class_path": "vlmembed.data.EvaluationTables", "init_args": tables})
    found = as_evaluation(data.val)
    assert (found.document_names, found.qrels) == (["a b.pdf#page=1", "a b.pdf#page=2"], {"1": {"a b.pdf#page=2": 1}})
    assert [item.parts[0].value.number for item in found.corpus] == [1, 2]
    assert [item.instruction for item in (*found.queries, *found.corpus)] == [None, "Read.", "Read."]


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    corpus, queries, _ = tables_of()
    jsonl(f"{tmp_path}/set/corpus.jsonl", corpus)
    jsonl(f"{tmp_path}/set/queries.jsonl", queries)
    (tmp_path / "set/qrels").mkdir()
    (tmp_path / "secret.tsv").write_text("0\ts1\t1\n")
    (tmp_path / "set/qrels/test.tsv").symlink_to(tmp_path / "secret.tsv")
    with pytest.raises(ValueError, match=r"set: the data file 'qrels/test.tsv' leads out"):
        as_evaluation(str(tmp_path / "set"))


def test_a_filter_of_the_queries_leaves_their_judgements_out(here: Path) -> None:
    paths = write_tables()
    queries = Table("queries.jsonl", where={"_id": {"min": 1}})
    assert converted(EvaluationTables(**paths | {"queries": queries}).load()) == Conversion(
        SMALL.corpus, SMALL.queries[1:]
    )


def test_images_in_tables_are_read_when_they_are_asked_for(here: Path) -> None:
    vidore_v2()
    found = as_evaluation("vidore/esg_reports_v2")
    one, again = (found.corpus[3].parts[0].value for _ in range(2))
    assert one == again == png(3)
    assert one is not again  # Nobody holds it.
    assert found.corpus[3].origin == "vidore/esg_reports_v2/corpus, row 4 (id '13')"
    assert [*map(content, found.corpus[1:3])] == [[png(1)], [png(2)]]


def test_rows_of_a_corpus_have_different_keys(here: Path) -> None:
    """A key that comes up late, and image and text that are empty where the other is."""
    images(".", ["a.png"])
    corpus = [{"id": f"s{n}", "text": f"x{n}"} for n in range(400)]
    corpus += [
        {"id": "late", "image": "a.png", "text": ""},
        {"id": "both", "text": "y", "image": "a.png", "video": None},
    ]
    paths = write_tables(corpus=corpus)
    assert [*map(content, EvaluationTables(**paths).load().corpus[398:])] == [
        ["x398"],
        ["x399"],
        ["a.png"],
        ["y", "a.png"],
    ]
    with pytest.raises(ValueError, match="row 401 has a column 'image' that is not in row 1"):
        EvaluationTables(**paths | {"corpus": Table("corpus.jsonl", columns={"id": "corpus-id"})}).load()


def test_candidates_by_id_for_embedders_and_rerankers(here: Path) -> None:
    rows = [
        {"_id": "a", "text": "qa", "candidates": ["s3", "s0"], "kind": "x"},
        {"_id": "b", "text": "qb", "candidates": ["s1", "s2", "s3"], "kind": "y"},
    ]
    qrels = [
        {"query-id": "a", "corpus-id": "s0"},
        {"query-id": "a", "corpus-id": "s1"},
        {"query-id": "b", "corpus-id": "s2"},
    ]
    source = EvaluationTables(**write_tables(queries=rows, qrels=qrels), group_by="kind")
    found = source.load()
    expected = Conversion(SMALL.corpus, [(["qa"], {0: 1, 1: 1}), (["qb"], {2: 1})], [[3, 0], [1, 2, 3]], ["x", "y"])
    assert converted(found) == expected
    reranking = as_reranking(source)
    assert (reranking.candidates, reranking.evaluation.candidates) == (expected.candidates, expected.candidates)
    with pytest.raises(
        ValueError, match="EvaluationTables: a cross-encoder reads each query with each of its candidates"
    ):
        as_reranking(EvaluationTables(**write_tables()))
    metrics = RetrievalMetrics(found)
    embeddings = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    metrics.update(torch.arange(6), embeddings)
    normal = torch.nn.functional.normalize(embeddings.double(), dim=1)
    cosines = normal[:2] @ normal[2:].T
    measured = pytest.approx(expected.measure(cosines), abs=1e-6)
    assert {name: float(value) for name, value in metrics.compute().items()} == measured
    reranked = RerankingMetrics(reranking)
    reranked.update(reranked.pairs, cosines[reranked.pairs[:, 0], reranked.pairs[:, 1]])
    after = {name: float(value) for name, value in reranked.compute().items() if not name.endswith("/before")}
    assert after == measured


def test_each_row_is_a_query_for_a_reranker_too(here: Path) -> None:
    rows = [
        {"query": "q", "positive": "a", "negatives": ["b", "a", "c"]},
        {"query": "q", "positive": ["c", "d"], "negatives": ["a"]},
        {"query": "q", "positive": "a", "negatives": []},
    ]
    jsonl("rows.jsonl", rows)
    reranking = as_reranking(EvaluationRows(Rows("rows.jsonl"), within_row=True))
    corpus = [text for (text,) in map(content, reranking.evaluation.corpus)]
    assert [[corpus[column] for column in own] for own in reranking.candidates] == [
        ["a", "b", "c"],
        ["c", "d", "a"],
        ["a"],
    ]
    assert reranking.evaluation.query_names == ["1", "2", "3"]
    assert [grades for _, grades in converted(reranking.evaluation).queries] == [
        {0: 1, 1: 0, 2: 0},
        {2: 1, 3: 1, 0: 0},
        {0: 1},
    ]


def test_a_set_is_not_called_what_the_mean_is(tmp_path: Path, checkpoint: Path) -> None:
    jsonl(f"{tmp_path}/mean.jsonl", [{"query": "q", "positive": "a"}])
    jsonl(f"{tmp_path}/other.jsonl", [{"query": "q", "positive": "a"}])
    data = data_module(val=[f"{tmp_path}/mean.jsonl", f"{tmp_path}/other.jsonl"])
    with pytest.raises(ValueError, match="An evaluation set is called 'mean'"):
        trainer().validate(module(checkpoint), datamodule=data, verbose=False)


def test_metric_names_and_predictions_of_candidates(checkpoint: Path, here: Path) -> None:
    conversion = mmeb()
    data = data_module(val=table("evaluation sets")["TIGER-Lab/MMEB-eval"])
    trainer(default_root_dir=here).predict(module(checkpoint), datamodule=data)
    lines = [line.split() for line in next(here.rglob("OK-VQA.trec")).read_text().splitlines()]
    found = data.evaluations["predict"][0]
    for number, columns in enumerate(conversion.candidates or []):
        ranked = [line for line in lines if line[0] == str(number + 1)]
        assert {line[2] for line in ranked} == {found.document_names[column] for column in columns}
        assert [int(line[3]) for line in ranked] == [*range(1, len(columns) + 1)]
    assert {*METRICS} >= {"hit@1", "ndcg@10"}


def test_a_hub_id(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP: what it holds is known by its page, before anything else is downloaded."""
    corpus, queries, qrels = tables_of("corpus-id", "query-id")
    hub("local", {("corpus", "test"): corpus, ("queries", "test"): queries, ("default", "test"): qrels})
    files = {str(path.relative_to("local")): path.read_bytes() for path in Path("local").rglob("*") if path.is_file()}
    datasets.Dataset.from_list(qrels[:1]).to_parquet("old.parquet")
    with serve("token") as server:
        server.repositories["org/pages.v1"] = repository = Repository(private=False)
        (judged,) = [name for name in files if "default" in name]
        repository.commit("old", {**files, judged: Path("old.parquet").read_bytes()})
        repository.commit("main", files)
        connect(monkeypatch, server.url, "token")
        connect_datasets(monkeypatch, server.url, here)
        found = as_evaluation("org/pages.v1", "validation")
        assert (converted(found), found.name) == (SMALL, "pages.v1")
        with pytest.raises(ValueError, match=r"org/pages.v1: no subset 'french'; it has none, but is a single set"):
            EvaluationFolder("org/pages.v1", subset="french").load()
        assert EvaluationFolder("org/pages.v1", revision="old").load().qrels == {"0": {"s1": 1}}
        assert server.requests[1].endswith("README.md")
