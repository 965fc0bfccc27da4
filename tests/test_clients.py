"""The table of clients in the export's page: each gives the folder's vectors, with the arguments that its card names.

Those that are not installed are left out; ``pip install -e ".[clients]"`` has all that can run here. Of servers that
cannot, what their loaders read is computed from the folder as they do.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import encoder, export, picture, ranker
from datasets import Dataset, Features, Image, Value
from jinja2 import Environment
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmembed.export import ModelInfo, SentenceTransformers
from vlmembed.export.card import write_card
from vlmembed.export.verify import TOLERANCE
from vlmembed.files import read_json
from vlmembed.heads import YesNo

QUERY = "total amount due"
DOCUMENTS = ["a page about birds", "an invoice", "seven eight nine", "zero", "one two three four five"]


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose roles have prompts of their own, with its card."""
    built = encoder(checkpoint, query_instruction="Find the page.", document_instruction="Embed it.", max_length=200)
    folder = export(built, tmp_path_factory.mktemp("clients") / "export", dimensions=[64, 32])
    write_card(folder, SentenceTransformers().facts(built, ModelInfo(), "", str(folder)))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def query(model: SentenceTransformer) -> np.ndarray:
    return model.encode_query(QUERY)


@pytest.fixture(scope="module")
def documents(model: SentenceTransformer) -> np.ndarray:
    return model.encode_document(DOCUMENTS)


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=TOLERANCE)


def snippets(folder: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def of_card(folder: Path, client: type) -> Any:
    """Call a client as the card says."""
    calls = [node for node in ast.walk(ast.parse(snippets(folder)[-1])) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", "") == client.__name__]
    return eval(ast.unparse(call), {client.__name__: client})


# Clients that open the folder


def test_sentence_transformers_refuses_to_open_it_below_the_release_that_the_card_names(
    folder: Path, tmp_path: Path
) -> None:
    settings = read_json(folder / "config_sentence_transformers.json")
    required = settings["requirements"]
    (install,) = snippets(folder, "bash")
    assert f'"sentence-transformers{required["sentence_transformers"]}"' in install
    assert f'"transformers{required["transformers"]}"' in install
    for path in folder.iterdir():
        if path.name != "config_sentence_transformers.json":
            (tmp_path / path.name).symlink_to(path)
    settings["requirements"] = {"sentence_transformers": ">=99"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ImportError, match="sentence"):
        SentenceTransformer(str(tmp_path), device="cpu")


def test_transformers_alone(folder: Path, query: np.ndarray) -> None:
    (code,) = [snippet for snippet in snippets(folder) if "AutoModel" in snippet]
    names: dict[str, Any] = {}
    exec(code, names)
    close(names["embedding"][0], query)


def test_langchain(folder: Path, query: np.ndarray, documents: np.ndarray) -> None:
    client = of_card(folder, pytest.importorskip("langchain_huggingface").HuggingFaceEmbeddings)
    close(client.embed_query(QUERY), query)
    close(client.embed_documents(DOCUMENTS), documents)


def test_haystack(folder: Path, query: np.ndarray, documents: np.ndarray) -> None:
    haystack = pytest.importorskip("haystack")
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    clients = [
        of_card(folder, getattr(embedders, f"SentenceTransformers{kind}Embedder")) for kind in ("Text", "Document")
    ]
    for client in clients:
        client.warm_up()
    close(clients[0].run(QUERY)["embedding"], query)
    found = clients[1].run([haystack.Document(content=text) for text in DOCUMENTS])["documents"]
    close([document.embedding for document in found], documents)


def test_llama_index(folder: Path, query: np.ndarray, documents: np.ndarray) -> None:
    client = of_card(folder, pytest.importorskip("llama_index.embeddings.huggingface").HuggingFaceEmbedding)
    close(client.get_query_embedding(QUERY), query)
    close(client.get_text_embedding_batch(DOCUMENTS), documents)


def test_txtai(folder: Path, query: np.ndarray, documents: np.ndarray) -> None:
    """What is indexed is its ``data``, what is sought for its ``query``."""
    client = pytest.importorskip("txtai").Embeddings(path=str(folder), method="sentence-transformers")
    close(client.transform(QUERY, "query"), query)
    close(client.batchtransform(DOCUMENTS, "data"), documents)
    client.index(DOCUMENTS)
    assert [number for number, _ in client.search(QUERY, len(DOCUMENTS))] == ranking(query, documents)


def test_mteb(model: SentenceTransformer, query: np.ndarray) -> None:
    """Images are read only where the model's description says so: without, they are left out with a warning."""
    mteb = pytest.importorskip("mteb")
    wrapper = importlib.import_module("mteb.models.sentence_transformer_wrapper")
    client = wrapper.SentenceTransformerEncoderWrapper(model)
    client.mteb_model_meta = client.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    rows = {"text": DOCUMENTS[:3], "image": [picture(64, 32 * size, size) for size in (1, 2, 3)]}
    pages = Dataset.from_dict(rows, Features({"text": Value("string"), "image": Image()}))
    options = {"task_metadata": mteb.get_task("NFCorpus").metadata, "hf_split": "test", "hf_subset": "default"}
    roles = mteb.types.PromptType
    found = client.encode(DataLoader(pages, 2, collate_fn=in_columns), prompt_type=roles.document, **options)
    close(found, model.encode_document([*pages]))
    queries = Dataset.from_dict({"text": [QUERY]})
    close(client.encode(DataLoader(queries), prompt_type=roles.query, **options)[0], query)


def in_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


# Clients that store vectors


def ranking(query: np.ndarray, documents: np.ndarray) -> list[int]:
    return np.argsort(-(documents @ query)).tolist()


def test_faiss(query: np.ndarray, documents: np.ndarray) -> None:
    index = pytest.importorskip("faiss").IndexFlatIP(documents.shape[1])
    index.add(documents)
    scores, found = index.search(query[None], len(documents))
    assert found[0].tolist() == ranking(query, documents)
    close(scores[0], np.sort(documents @ query)[::-1])


def test_lancedb(tmp_path: Path, query: np.ndarray, documents: np.ndarray) -> None:
    database = pytest.importorskip("lancedb").connect(tmp_path)
    table = database.create_table("pages", [{"id": i, "vector": vector} for i, vector in enumerate(documents)])
    found = table.search(query).distance_type("cosine").limit(len(documents)).to_list()
    assert [row["id"] for row in found] == ranking(query, documents)
    close([1 - row["_distance"] for row in found], np.sort(documents @ query)[::-1])


def test_qdrant(query: np.ndarray, documents: np.ndarray) -> None:
    client = pytest.importorskip("qdrant_client")
    models, store = client.models, client.QdrantClient(":memory:")
    parameters = models.VectorParams(size=documents.shape[1], distance=models.Distance.COSINE)
    store.create_collection("pages", parameters)
    store.upsert("pages", [models.PointStruct(id=i, vector=vector.tolist()) for i, vector in enumerate(documents)])
    found = store.query_points("pages", query.tolist(), limit=len(documents)).points
    assert [point.id for point in found] == ranking(query, documents)
    close([point.score for point in found], np.sort(documents @ query)[::-1])


def test_chroma(query: np.ndarray, documents: np.ndarray) -> None:
    store = pytest.importorskip("chromadb").EphemeralClient()
    pages = store.create_collection("pages", configuration={"hnsw": {"space": "cosine"}})
    pages.add([str(i) for i in range(len(documents))], embeddings=documents)
    found = pages.query(query_embeddings=query[None], n_results=len(documents))
    assert [int(name) for name in found["ids"][0]] == ranking(query, documents)
    close(1 - np.asarray(found["distances"][0]), np.sort(documents @ query)[::-1])


def test_a_cut_embedding_is_normalised_where_it_is_asked_for(folder: Path, query: np.ndarray) -> None:
    cut = SentenceTransformer(str(folder), device="cpu", truncate_dim=32)
    close(cut.encode_query(QUERY, normalize_embeddings=True), query[:32] / np.linalg.norm(query[:32]))
    assert np.linalg.norm(cut.encode_query(QUERY)) < 0.99  # What the page says of leaving it out.


# Servers, by what their loaders read: vLLM 0.33, SGLang 0.5.23, Text Embeddings Inference of July 2026


def test_what_vllm_and_sglang_read_of_an_embedder(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    config, transformer = read_json(folder / "config.json"), read_json(folder / "sentence_bert_config.json")
    # The model by its class, the dimensions that a request may name, the longest input.
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert (config["is_matryoshka"], config["matryoshka_dimensions"]) == (True, [32, 64])
    assert transformer["max_seq_length"] == 200
    # Types of modules: vllm/transformers_utils/config.py; the pooling by its name without "token".
    types = {module["type"].removeprefix("sentence_transformers.") for module in read_json(folder / "modules.json")}
    assert types == {
        "base.modules.transformer.Transformer",
        "sentence_transformer.modules.pooling.Pooling",
        "sentence_transformer.modules.normalize.Normalize",
    }
    assert read_json(folder / "1_Pooling" / "config.json")["pooling_mode"] == "lasttoken"
    # Attention: of layers in the decoder's configuration, of the planner at the top.
    for bidirectional in (False, True):
        export(encoder(checkpoint, bidirectional=bidirectional), tmp_path)
        config = read_json(tmp_path / "config.json")
        assert [part.get("is_causal", True) for part in (config, config["text_config"])] == [not bidirectional] * 2
    assert "max_seq_length" not in read_json(tmp_path / "sentence_bert_config.json")


def test_messages_to_vllm_give_the_tokens_of_the_folder(folder: Path, model: SentenceTransformer) -> None:
    """A chat to its /v1/embeddings; it renders the folder's own template."""
    (request,) = map(json.loads, snippets(folder, "json"))
    processor = AutoProcessor.from_pretrained(folder)
    rendered = processor.apply_chat_template(request.pop("messages"), tokenize=False, **request)
    expected = model.preprocess([QUERY], prompt=model.prompts["query"])["input_ids"][0]
    assert processor.tokenizer(rendered, add_special_tokens=False)["input_ids"] == expected.tolist()


@pytest.mark.parametrize("scoring", ["logits", "dense"])
def test_what_vllm_reads_of_a_reranker(checkpoint: Path, tmp_path: Path, scoring: Any) -> None:
    """With the class and the template that the card names: the difference of two rows at the last token."""
    scorer = ranker(checkpoint, head=YesNo("zero", "one")).encoder
    export(scorer, tmp_path, scoring)
    write_card(tmp_path, SentenceTransformers(reranker_scoring=scoring).facts(scorer, ModelInfo(), "", "folder"))
    config, card = read_json(tmp_path / "config.json"), (tmp_path / "README.md").read_text()
    assert ("Qwen3VLForSequenceClassification" in card) is (scoring == "logits")
    if scoring == "dense":
        assert "classifier_from_token" not in config
        assert "Neither does vLLM" in card
        return
    assert config["is_original_qwen3_reranker"] is True
    options = json.loads(re.search(r'"chat_template_kwargs": (\{.*?\})', card)[1])  # type: ignore[index]
    template = Environment().from_string((tmp_path / "additional_chat_templates" / "reranker.jinja").read_text())
    chat = [{"role": "query", "content": QUERY}, {"role": "document", "content": DOCUMENTS[0]}]
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor.tokenizer(template.render(messages=chat, **options), return_tensors="pt")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    no, yes = processor.tokenizer.convert_tokens_to_ids(config["classifier_from_token"])
    with torch.no_grad():
        state = whole.model(**inputs).last_hidden_state[0, -1]
        score = state @ (whole.lm_head.weight[yes] - whole.lm_head.weight[no])
    served = CrossEncoder(str(tmp_path), device="cpu").predict(
        [(QUERY, DOCUMENTS[0])], activation_fn=torch.nn.Identity()
    )
    assert float(served[0]) == pytest.approx(float(score), abs=TOLERANCE)


def test_text_embeddings_inference_refuses_the_folder(folder: Path) -> None:
    """Its router wants the number of positions at the top level; its backends know no such model_type."""
    config = read_json(folder / "config.json")
    assert "max_position_embeddings" not in config
    assert config["model_type"] == "qwen3_vl"
    assert "Text Embeddings Inference does not know the model." in (folder / "README.md").read_text()
