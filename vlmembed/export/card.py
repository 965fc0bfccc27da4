"""The model card: what an exported folder says about itself to people and to the Hub.

Whatever comes from data or configuration passes through ``escape`` on its way into the text, so that nothing in it is
read as Markdown or HTML; the front matter is written by ``huggingface_hub``.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from yaml import YAMLError

from vlmembed.files import read_json

TEMPLATE = Path(__file__).with_name("card.md.jinja")

DATA_FILES = {".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow"}

#: ``val/ndcg@10``, ``val/NAME/ndcg@10/64`` at a dimension, ``/x4`` with four times fewer vectors, ``/two_stage``;
#: ``val/ndcg@10/before`` is the order in which a reranker found candidates.
LOGGED_NAME = re.compile(
    r"(?P<set>.+?)/(?P<metric>[^/]+)(?P<before>/before)?(/(?P<variant>\d+|x\d+|two_stage))?", re.DOTALL
)

#: What Sentence Transformers' own cards call a model of a class, the words by which the Hub finds it, and its task.
KINDS = {
    "SentenceTransformer": (
        "Sentence Transformer",
        ("sentence-similarity", "feature-extraction", "dense"),
        "feature-extraction",
    ),
    "CrossEncoder": ("Cross Encoder", ("cross-encoder", "reranker"), "text-ranking"),
    "MultiVectorEncoder": (
        "Multi-Vector Encoder",
        ("multi-vector", "colbert", "late-interaction"),
        "feature-extraction",
    ),
}

SIMILARITIES = {"cosine": "Cosine Similarity", "maxsim": "MaxSim", "meanmaxsim": "MeanMaxSim"}

#: Modules by which vLLM pools as Sentence Transformers does. It takes others for the last token, without a word.
VLLM_MODULES = {"Transformer", "Pooling", "Dense", "Normalize"}

#: Models whose tokens vLLM lets attend to those behind them, where the configuration says so.
VLLM_BIDIRECTIONAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

#: By name of the class that it is about.
CITATIONS = {
    entry.split("{")[1].split(",")[0]: entry.strip()
    for entry in Path(__file__).with_name("citations.bib").read_text(encoding="utf-8").split("\n\n")
}


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
    language: Sequence[str] = ()  # Codes, such as ``en``.
    losses: Sequence[str] = ()  # Names of their classes, outer ones first.
    rows: int | None = None  # Of training.
    dimension: int | None = None  # Of an embedding, or of a multi-vector model's vectors, as it is served.
    full_dimension: int | None = None  # As it was trained, and measured where a metric's name has no dimension.
    dimensions: Sequence[int] = ()  # That embeddings were trained to be truncated to.
    log: Path | None = None  # Of the run, as Lightning's CSVLogger writes it.


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write ``README.md`` into an exported folder, over the one that is there."""
    served = _served(folder)
    rows = _table(facts, served["merging_factor"])
    kind, tags, task = KINDS[served["opens_with"]]
    results = _results(rows, facts.dimension)
    size = [f"dataset_size:{facts.rows}"] if facts.rows else []
    losses = [f"loss:{name}" for name in facts.losses]
    base_model = facts.base_model if on_hub(facts.base_model) else None
    metadata = ModelCardData(
        language=[*facts.language] or None,
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag=facts.pipeline_tag or task,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[name for name in facts.datasets if on_hub(name)] or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=["sentence-transformers", *tags, "vlmembed", "generated_from_trainer", *size, *losses],
        model_name=facts.title if results else None,
        eval_results=results or None,
    )
    history = _history(facts.log)
    cited = ["SentenceTransformers", served["opens_with"], *facts.losses]
    cited += [name for name in ("LoRA",) if f"{name}(" in facts.training.get("Adapters", "")]
    environment = Environment(finalize=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        kind=kind,
        base_model=base_model,
        base_name=Path(facts.base_model).name,
        data_sets=[(name, on_hub(name)) for name in map(public, facts.datasets)],
        metadata=Markup(metadata.to_yaml()),
        source=Markup(repr(facts.source)),  # One line of Python cannot close the block it stands in.
        shell_source=Markup(shlex.quote(" ".join(facts.source.split()))),
        rows=rows,
        # The table's columns: the whole embedding, then ever shorter ones.
        variants=sorted({variant for row in rows.values() for variant in row}, key=_column),
        vectors=next((row["full"] for (_, name), row in rows.items() if name == VECTORS and "full" in row), None),
        history=[["step", *history.columns], *history.itertuples(name=None)] if len(history) else [],
        config=Markup(html.escape(yaml_dump(public(facts.config), sort_keys=False), quote=False)),
        citations={name: Markup(CITATIONS[name]) for name in dict.fromkeys(cited) if name in CITATIONS},
        **served,
    )
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path


#: How often a run was measured, of which the card tells the last.
MEASUREMENTS = 20


def read_log(log: Path | None) -> Any:
    """Return what was logged by step, as a pandas table; an empty one where there is no log, or nothing in it."""
    import pandas  # Takes a second.

    try:
        return pandas.read_csv(log or "").groupby("step").last()
    except (OSError, ValueError, KeyError):
        return pandas.DataFrame()


def logged_at(log: Path | None, step: int | None) -> dict[str, float]:
    """Return the metrics that were logged of the model after a step."""
    table = read_log(log)
    row = table.loc[step].dropna() if step in table.index else {}
    return {name: float(value) for name, value in row.items() if name.startswith(("val/", "test/"))}


def _history(log: Path | None) -> Any:
    """Return loss and metrics, of the whole model, by the step at which it was measured, as a pandas table."""
    table = read_log(log)
    matches = {name: LOGGED_NAME.fullmatch(name) for name in table if name.startswith("val/")}
    names = [name for name, match in matches.items() if match and not (match["variant"] or match["before"])]
    logged = table.filter(["train/loss", *names])
    if "train/loss" in logged:
        logged = logged.assign(**{"train/loss": logged["train/loss"].ffill()})
    return logged.dropna(subset=names, how="all").tail(MEASUREMENTS)


#: A metric that counts, and is no result.
VECTORS = "vectors_per_document"


def _table(facts: CardFacts, merging_factor: int) -> dict[tuple[str, str], dict[str, float]]:
    """Return the metrics by evaluation set and metric, then by what of the model was measured: ``full`` as served."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in facts.metrics.items():
        match = LOGGED_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"metric {name!r} has no evaluation set: expected a name such as 'val/ndcg@10'")
        label = f"{match['metric']}{BEFORE}" if match["before"] else match["metric"]
        variant = match["variant"] or ("full" if facts.full_dimension == facts.dimension else str(facts.full_dimension))
        if merging_factor > 1 and variant[0] != "x":
            variant = "x1" if variant == "full" else variant
        if variant in (str(facts.dimension), f"x{merging_factor}"):
            variant = "full"
        rows.setdefault((match["set"], label), {})[variant] = value
    return rows


#: Ends the name of what a reranker's candidates had before it.
BEFORE = " before reranking"


def _results(rows: Mapping[tuple[str, str], Mapping[str, float]], dimension: int | None) -> list[EvalResult]:
    """Return what the folder serves as the Hub lists it: a metric once for each set and size."""
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=evaluation_set,
            dataset_name=evaluation_set,
            dataset_config=None if variant == "full" else _said(variant),
            metric_type=metric,
            metric_name=metric if variant == "full" else f"{metric} {_said(variant)}",
            metric_value=value,
        )
        for (evaluation_set, metric), values in rows.items()
        if metric != VECTORS and not metric.endswith(BEFORE)
        for variant, value in values.items()
        if variant != "x1" and not (dimension and variant.isdigit() and int(variant) > dimension)
    ]


def public(value: Any) -> Any:
    """Return part of a configuration without the machine's folders: of an absolute path, its last part."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    is_path = isinstance(value, str) and ABSOLUTE.match(value)
    return "…/" + SEPARATOR.split(value.rstrip("/"))[-1] if is_path else value


ABSOLUTE, SEPARATOR = re.compile(r"/|~|file:|[A-Za-z]:[\\/]"), re.compile(r"[\\/]")


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


def _served(folder: Path) -> dict[str, Any]:
    """Read in an exported folder what opens it, and which other clients serve it rightly."""
    config, modules = (read_json(folder / name) for name in ("config_sentence_transformers.json", "modules.json"))
    transformer, tokenizer, checkpoint = (
        read_json(folder / name) for name in ("sentence_bert_config.json", "tokenizer_config.json", "config.json")
    )
    modalities = transformer["modality_config"]
    modality = modalities["text"]
    text_config = checkpoint.get("text_config", checkpoint)
    causal = text_config.get("is_causal", True)
    folders = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in modules}
    types = {*folders}

    def settings(name: str) -> dict[str, Any]:
        """Of the last module of a class; nothing where there is none."""
        found: dict[str, Any] = read_json(folders[name] / "config.json") if name in folders else {}
        return found

    selections = settings("ServedSelection").get("selections", {})
    images_only = [role for role in selections if selections[role]["part"] == "images"]
    ranks, has_vectors = (config["model_type"] == kind for kind in ("CrossEncoder", "MultiVectorEncoder"))
    # Of pooling the states of the last layer, which other servers do in their own way.
    mode = settings("Pooling").get("pooling_mode") if modality["method_output_name"] == "last_hidden_state" else None
    prompts = {role: config["prompts"].get(role, "") for role in ("query", "document")}
    chat = {"system": prompts["query"], "user": "total amount due"}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat.items() if text]
    return {
        "messages": {"python": Markup(repr(messages)), "json": Markup(json.dumps(messages))},
        "by_hand": types <= {"Transformer", "Pooling", "Normalize"} and mode == "lasttoken",
        "opens_with": config["model_type"],
        "size": settings("Dense").get("out_features") if has_vectors else None,  # Of a token's vector.
        "merging_factor": settings("HierarchicalTokenPooling").get("pool_factor", 1),
        "images_only": ["document"] if settings("MultiVectorMask").get("keep_only_token_ids") else images_only,
        "ranks": ranks,
        "modalities": [name for name in modalities if name != "message"],
        "max_length": min(
            tokenizer.get("model_max_length", math.inf), text_config.get("max_position_embeddings", math.inf)
        ),
        "similarity": SIMILARITIES.get(config.get("similarity_fn_name")),
        "architecture": Markup(_architecture(folder, config["model_type"], modules)),
        "turn": transformer.get("processing_kwargs", {}).get("chat_template", {}).get("add_generation_prompt", False),
        "trust": any(not module["type"].startswith("sentence_transformers.") for module in modules),
        "prompts": {role: Markup(repr(prompt)) for role, prompt in prompts.items()},
        "named": {name: text for name, text in config["prompts"].items() if name not in prompts},
        "one_prompt": prompts["query"] == prompts["document"],
        "releases": config["requirements"],
        "sglang": causal and not ranks and types <= VLLM_MODULES - {"Dense"} and mode == "lasttoken",
        "vllm": (causal or checkpoint["model_type"] in VLLM_BIDIRECTIONAL)
        and ("classifier_from_token" in checkpoint if ranks else mode in ("lasttoken", "mean"))
        and (ranks or types <= VLLM_MODULES),
    }


def _architecture(folder: Path, model_type: str, modules: Sequence[Mapping[str, Any]]) -> str:
    """Return the modules and their settings, as Sentence Transformers prints a model."""
    lines = []
    for module in modules:
        name = "config.json" if module["path"] else "sentence_bert_config.json"
        settings = html.escape(str(read_json(folder / module["path"] / name)), quote=False)
        lines.append(f"  ({module['idx']}): {module['type'].rsplit('.', 1)[-1]}({settings})")
    return "\n".join([f"{model_type}(", *lines, ")"])


def on_hub(name: str) -> bool:
    """Tell a Hub id from a path: the Hub refuses a card whose metadata holds anything else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists() and Path(name).suffix not in DATA_FILES


#: Where the Hub's client keeps a model that it has downloaded.
SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/")


def origin_of(checkpoint: str) -> str:
    """Return the Hub id of the model that a checkpoint is or was made of, as far as it is known; else the checkpoint.

    A folder's card may name it, or its configuration. What cannot be read there is nothing that stops an export.
    """
    if on_hub(checkpoint):
        return checkpoint
    names = [match[1].replace("--", "/") for match in [SNAPSHOT.search(checkpoint)] if match]
    with suppress(OSError, ValueError, YAMLError):
        base = (metadata_load(Path(checkpoint, "README.md")) or {}).get("base_model")
        names += base if isinstance(base, list) else [base]
    with suppress(OSError, ValueError, AttributeError):
        names.append(read_json(Path(checkpoint, "config.json")).get("_name_or_path"))
    return next((name for name in names if isinstance(name, str) and on_hub(name)), checkpoint)
