"""The model card: what an exported folder says about itself to people and to the Hub.

Whatever comes from data or configuration passes through ``escape`` on its way into the text, so that nothing in it is
read as Markdown or HTML; the front matter is written by ``huggingface_hub``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("card.md.jinja")

DATA_FILES = {".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Args:
        title: The model's name.
        source: What a user opens: the repository's id, or the folder.
        base_model: The checkpoint that training started from, a Hub id or a folder.
        training: How the model was made, as label → value: its pooling, loss, adapters, …
        datasets: What it was trained on, as named in the run; Hub ids become metadata.
        metrics: Measured values under their logged names, ``val/ndcg@10``, ``val/NAME/ndcg@10/64``, or
            ``val/ndcg@10/before`` of a reranker.
        config: The whole configuration of the run; one with secrets was refused before it ran.
        verification: What was compared with the trained model, how far it was off, and how far it might have been.
        versions: Library → version, of those that took part in the verification.
        opens_with: The Sentence Transformers class that reads the folder.
        trust_remote_code: Whether the folder brings code of its own.
        license: A Hub license id such as ``apache-2.0``, where known.
        pipeline_tag: The Hub's task: ``feature-extraction`` for an embedding model, ``text-ranking`` for a reranker,
            ``visual-document-retrieval`` where documents are page images.
    """

    title: str
    source: str
    base_model: str
    training: Mapping[str, str]
    datasets: Sequence[str]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    verification: str
    versions: Mapping[str, str]
    opens_with: Literal["SentenceTransformer", "MultiVectorEncoder", "CrossEncoder"] = "SentenceTransformer"
    trust_remote_code: bool = False
    license: str | None = None
    pipeline_tag: str = "feature-extraction"


@dataclass(frozen=True)
class Measurement:
    """A metric on one evaluation set; ``dimension`` where embeddings were cut to it.

    ``before`` where it measures the order in which a reranker found the candidates: no result of the reranker.
    """

    evaluation_set: str
    metric: str
    dimension: int | None
    value: float
    before: bool = False

    @classmethod
    def parse(cls, name: str, value: float) -> Measurement:
        """Read a logged name.

        Raises:
            ValueError: If it names no evaluation set.
        """
        parts = name.split("/")
        dimension = int(parts.pop()) if parts[-1].isdecimal() else None
        before = parts[-1:] == ["before"]
        if before:
            parts.pop()
        *evaluation_set, metric = parts or [name]
        if not evaluation_set:
            raise ValueError(f"metric {name!r} has no evaluation set: expected a name such as 'val/ndcg@10'")
        return cls("/".join(evaluation_set), metric, dimension, float(value), before)


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write ``README.md`` into an exported folder, over the one that is there.

    Raises:
        ValueError: If a metric's name does not follow the logged names.
    """
    measurements = [Measurement.parse(name, value) for name, value in facts.metrics.items()]
    environment = Environment(finalize=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        metadata=Markup(_metadata(facts, measurements).to_yaml()),
        # One line of Python cannot close the block it stands in.
        source=Markup(repr(facts.source)),
        # The table's columns: the whole embedding, then ever shorter ones.
        dimensions=sorted({one.dimension for one in measurements}, key=lambda cut: (cut is not None, -(cut or 0))),
        rows=_rows(measurements),
        config=Markup(html.escape(yaml_dump(dict(facts.config), sort_keys=False), quote=False)),
    )
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path


def escape(value: object) -> Markup:
    """Make text that shows as it is: on one line, with marks that mean something to Markdown or HTML as entities."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return Markup(re.sub(r"[^\w\s.,:;/@+()=%?'-]", lambda mark: f"&#{ord(mark.group())};", line))


def _metadata(facts: CardFacts, measurements: Sequence[Measurement]) -> ModelCardData:
    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=measured.evaluation_set,
            dataset_name=measured.evaluation_set,
            metric_type=measured.metric,
            metric_name=measured.metric
            if measured.dimension is None
            else f"{measured.metric} at {measured.dimension} dimensions",
            metric_value=measured.value,
        )
        for measured in measurements
        if not measured.before
    ]
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=facts.pipeline_tag,
        license=facts.license,
        base_model=facts.base_model if _on_hub(facts.base_model) else None,
        datasets=[name for name in facts.datasets if _on_hub(name)] or None,
        tags=["sentence-transformers", "vlmembed"],
        model_name=facts.title if results else None,
        eval_results=results or None,
    )


def _on_hub(name: str) -> bool:
    """Tell a Hub id from a path: the Hub refuses a card whose metadata holds anything else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists() and Path(name).suffix not in DATA_FILES


def _rows(measurements: Sequence[Measurement]) -> dict[tuple[str, str], dict[int | None, float]]:
    rows: dict[tuple[str, str], dict[int | None, float]] = {}
    for measured in measurements:
        metric = f"{measured.metric} before reranking" if measured.before else measured.metric
        rows.setdefault((measured.evaluation_set, metric), {})[measured.dimension] = measured.value
    return rows
