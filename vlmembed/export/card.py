"""The model card: what an exported folder says about itself to people and to the Hub.

Whatever comes from data or configuration passes through ``escape`` on its way into the text, so that nothing in it is
read as Markdown or HTML; the front matter is written by ``huggingface_hub``.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("card.md.jinja")

DATA_FILES = {".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow"}

#: ``val/ndcg@10``, ``val/NAME/ndcg@10/64`` at a dimension, ``/x4`` with four times fewer vectors, ``/two_stage``;
#: ``val/ndcg@10/before`` is the order in which a reranker found candidates.
LOGGED_NAME = re.compile(
    r"(?P<set>.+?)/(?P<metric>[^/]+)(?P<before>/before)?(/(?P<variant>\d+|x\d+|two_stage))?", re.DOTALL
)

#: What columns of the table of results mean, by how they begin.
NOTES = {
    r"\d": "A number above a column is the dimension that embeddings were cut to, as truncate_dim cuts them.",
    "x": "Above x4, documents had four times fewer vectors: give encode_document "
    "token_pooling=HierarchicalTokenPooling(4, num_protected_tokens=0).",
    "two_stage": "In two stages, mean vectors found the candidates that MaxSim ranked.",
}

#: By what the Hub finds models of a class, besides their task.
TAGS = {"MultiVectorEncoder": ("multi-vector", "late-interaction")}

#: Modules by which vLLM pools as Sentence Transformers does. It takes others for the last token, without a word.
VLLM_MODULES = {"Transformer", "Pooling", "Dense", "Normalize"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells, besides what stands in the folder."""

    title: str
    source: str  # What a user opens: the repository's id, or the folder.
    base_model: str  # The checkpoint that training started from, a Hub id or a folder.
    training: Mapping[str, str]  # How the model was made, as label → value: its pooling, loss, adapters, …
    datasets: Sequence[str]  # What it was trained on, as named in the run; Hub ids become metadata.
    metrics: Mapping[str, float]  # Under their logged names.
    config: Mapping[str, Any]  # Of the run; one with secrets was refused before it ran.
    verification: str  # What was compared with the trained model, how far it was off, and how far it might have been.
    versions: Mapping[str, str]  # Library → version, of those that took part in the verification.
    license: str | None = None  # A Hub license id such as ``apache-2.0``, where known.
    pipeline_tag: str | None = None  # The Hub's task, where it is not the one of every embedder or reranker.


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write ``README.md`` into an exported folder, over the one that is there."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    results = []
    for name, value in facts.metrics.items():
        match = LOGGED_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"metric {name!r} has no evaluation set: expected a name such as 'val/ndcg@10'")
        evaluation_set, metric = match["set"], match["metric"]
        variant = match["variant"] or "full"
        label = f"{metric} before reranking" if match["before"] else metric
        rows.setdefault((evaluation_set, label), {})[variant] = value
        # The order before the reranker, and the number of vectors, are no results.
        if not match["before"] and metric != "vectors_per_document":
            label = metric if variant == "full" else f"{metric} {_said(variant)}"
            results.append(
                EvalResult(
                    task_type="information-retrieval",
                    task_name="Information Retrieval",
                    dataset_type=evaluation_set,
                    dataset_name=evaluation_set,
                    metric_type=metric,
                    metric_name=label,
                    metric_value=value,
                )
            )
    served = _served(folder)
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=facts.pipeline_tag or ("text-ranking" if served["ranks"] else "feature-extraction"),
        license=facts.license,
        base_model=facts.base_model if _on_hub(facts.base_model) else None,
        datasets=[name for name in facts.datasets if _on_hub(name)] or None,
        tags=["sentence-transformers", "vlmembed", *TAGS.get(served["opens_with"], ())],
        model_name=facts.title if results else None,
        eval_results=results or None,
    )
    environment = Environment(finalize=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        metadata=Markup(metadata.to_yaml()),
        source=Markup(repr(facts.source)),  # One line of Python cannot close the block it stands in.
        rows=rows,
        # The table's columns: the whole embedding, then ever shorter ones.
        variants=(variants := sorted({variant for row in rows.values() for variant in row}, key=_column)),
        notes=[
            note
            for mark, note in NOTES.items()
            if any(re.match(mark, variant) for variant in variants) and (mark != "x" or served["merging_factor"] == 1)
        ],
        config=Markup(html.escape(yaml_dump(dict(facts.config), sort_keys=False), quote=False)),
        **served,
    )
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path


def _said(variant: str) -> str:
    """Say how a metric was measured, if not as the model is served."""
    if variant == "two_stage":
        return "in two stages"
    return f"with {variant[1:]} times fewer vectors" if variant[0] == "x" else f"at {variant} dimensions"


def _column(variant: str) -> tuple[int, int]:
    """Order columns: what is served, ever fewer dimensions, ever fewer vectors, two stages."""
    if variant.isdigit():
        return 1, -int(variant)
    if variant.startswith("x"):
        return 2, int(variant[1:])
    return (0 if variant == "full" else 3), 0


def escape(value: object) -> Markup:
    """Make text that shows as it is: on one line, with marks that mean something to Markdown or HTML as entities."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return Markup(re.sub(r"[^\w\s.,:;/@+()=%?'-]", lambda mark: f"&#{ord(mark.group())};", line))


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _served(folder: Path) -> dict[str, Any]:
    """Read in an exported folder what opens it, and which other clients serve it rightly."""
    config, modules = (read(folder / name) for name in ("config_sentence_transformers.json", "modules.json"))
    modalities = read(folder / "sentence_bert_config.json")["modality_config"]
    modality = modalities["text"]
    causal = read(folder / "config.json").get("text_config", {}).get("is_causal", True)
    types = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in modules}
    tokens = config["model_type"] == "MultiVectorEncoder"
    mask, selection, merging = (
        read(types[name] / "config.json") if name in types else {}
        for name in ("MultiVectorMask", "ServedSelection", "HierarchicalTokenPooling")
    )
    selections = selection.get("selections", {})
    images_only = [role for role in selections if selections[role]["part"] == "images"]
    dense = [folder / module["path"] for module in modules if module["type"].endswith(".Dense")]
    ranks = config["model_type"] == "CrossEncoder"
    mode = None  # Of pooling the states of a causal model's last layer, which other servers do in their own way.
    if causal and modality["method_output_name"] == "last_hidden_state" and "Pooling" in types:
        mode = read(types["Pooling"] / "config.json")["pooling_mode"]
    prompts = {role: config["prompts"].get(role, "") for role in ("query", "document")}
    return {
        "opens_with": config["model_type"],
        "size": read(dense[-1] / "config.json")["out_features"] if dense and tokens else None,  # Of a token's vector.
        "merging_factor": merging.get("pool_factor", 1),
        "images_only": ["document"] if mask.get("keep_only_token_ids") else images_only,
        "ranks": ranks,
        "hears": "audio" in modalities,
        "trust": any(not module["type"].startswith("sentence_transformers.") for module in modules),
        "prompts": {role: Markup(repr(prompt)) for role, prompt in prompts.items()},
        "named": {name: text for name, text in config["prompts"].items() if name not in prompts},
        "one_prompt": prompts["query"] == prompts["document"],
        "releases": config["requirements"],
        "sglang": not ranks and set(types) <= VLLM_MODULES - {"Dense"} and mode == "lasttoken",
        "vllm": not ranks and set(types) <= VLLM_MODULES and mode in ("lasttoken", "mean"),
    }


def _on_hub(name: str) -> bool:
    """Tell a Hub id from a path: the Hub refuses a card whose metadata holds anything else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists() and Path(name).suffix not in DATA_FILES
