"""Exporters: from a trained encoder to a verified folder, and from there to the Hugging Face Hub."""

from __future__ import annotations

import os
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from vlmembed.encoder import Encoder, MultiVectorEncoder, Scorer
from vlmembed.export.card import CardFacts, logged_at, on_hub, origin_of, public, write_card
from vlmembed.export.modules import check_head, check_servable, yes_no_head
from vlmembed.export.sentence_transformers import Scoring, write_folder, write_reranker
from vlmembed.export.verify import ExportError, Verification, brings_code, expect, role_of, verify
from vlmembed.files import read_json
from vlmembed.heads import ScoreHead
from vlmembed.pooling import Pooling, TokenProjection

LIBRARIES = ("vlmembed", "sentence-transformers", "transformers", "torch", "datasets", "tokenizers")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model besides its weights."""

    name: str = "model"
    address: str | None = None  # What users will open: a Hub repository, or None for the folder.
    dimensions: Sequence[int] = ()  # That embeddings were trained to be truncated to.
    metrics: Mapping[str, float] = field(default_factory=dict)  # Under their logged names.
    config: Mapping[str, Any] = field(default_factory=dict)  # Of the run.
    prompts: Mapping[str, str] = field(default_factory=dict)  # Instructions of its training sources, ``NAME-ROLE``.
    rows: int | None = None  # Of training, where known.
    steps: int | None = None  # Of the optimizer.
    log: Path | None = None  # What Lightning's CSVLogger wrote of the run.


class Exporter(ABC):
    """Writes a trained encoder as a folder that others open."""

    def check(self, pooling: Pooling) -> None:  # noqa: B027
        """Refuse with a ``ValueError``, before training, what could not be exported after it."""

    @abstractmethod
    def export(self, encoder: Encoder, folder: Path, info: ModelInfo) -> Verification:
        """Write and verify a folder that is empty or not there yet. The encoder's adapters are merged, for good.

        Raises:
            FileExistsError: If the folder is not empty.
            ExportError: If it cannot be written; or does not serve what was trained, and is left under another name.
        """


class SentenceTransformers(Exporter):
    """Writes a folder that stock Sentence Transformers opens: an embedder's, or a cross-encoder's.

    It is written as a draft beside its final path, opened in a process that cannot import vlmembed, compared with the
    trained model, and moved to its path if the two agree.

    Args:
        truncate_dim: Export this many leading dimensions of an embedder only, normalised anew; null for all.
        reranker_scoring: How a reranker's folder scores. ``dense`` serves every head, and is cheaper: one layer on what
            is pooled. ``logits`` keeps the whole language-model head and takes the difference of the two words' logits,
            for those who want the language model too; of ``vlmembed.heads.YesNo`` only, to the same scores.
        merging_factor: Export a multi-vector model whose documents have so many times fewer vectors, merged by
            similarity; 1 for all.
        license: The model's license for its card, as the Hub names it, such as apache-2.0.
        language: Codes of the languages of its training data for its card, such as [en, de].
        base_model: The Hub id of what the checkpoint is or was made of, for the card; null for what the checkpoint's
            folder says of itself.
        pipeline_tag: The task under which the Hub lists the model, such as visual-document-retrieval for images of
            pages; null for feature-extraction of an embedder, and text-ranking of a reranker.
    """

    def __init__(
        self,
        truncate_dim: int | None = None,
        reranker_scoring: Scoring = "dense",
        merging_factor: int = 1,
        license: str | None = None,
        pipeline_tag: str | None = None,
        language: list[str] | None = None,
        base_model: str | None = None,
    ) -> None:
        self.truncate_dim = truncate_dim
        self.reranker_scoring = reranker_scoring
        self.merging_factor = merging_factor
        self.license = license
        self.pipeline_tag = pipeline_tag
        self.language = language
        self.base_model = base_model

    def check(self, pooling: Pooling) -> None:
        """Refuse poolings whose code no folder can bring along, and what a reranker lacks; see `Exporter.check`."""
        if self.base_model is not None and not on_hub(self.base_model):
            raise ValueError(
                f"base_model={self.base_model!r} is no id of a model on the Hub, such as Qwen/Qwen3-VL-2B."
            )
        ranks = isinstance(pooling, ScoreHead)
        if ranks and self.truncate_dim is not None:
            raise ValueError(f"truncate_dim={self.truncate_dim} is for embeddings, and a reranker has none. Remove it.")
        if not ranks and self.reranker_scoring != "dense":
            raise ValueError(f"reranker_scoring={self.reranker_scoring} is for rerankers, not embedders. Remove it.")
        if self.merging_factor < 1 or (self.merging_factor > 1 and not isinstance(pooling, TokenProjection)):
            raise ValueError(
                f"merging_factor={self.merging_factor} is 1 or more, and above 1 for multi-vector models only."
            )
        if isinstance(pooling, TokenProjection):
            if type(pooling) is not TokenProjection:
                raise ValueError(
                    f"{type(pooling).__name__} cannot be exported: Sentence Transformers' layers serve TokenProjection "
                    "and no class made of it. Set trainer.exporter to null."
                )
            if self.truncate_dim is not None and not 0 < self.truncate_dim <= pooling.size:
                raise ValueError(f"truncate_dim={self.truncate_dim} is not between 1 and the vectors' {pooling.size}.")
        elif isinstance(pooling, ScoreHead):
            (check_head if self.reranker_scoring == "dense" else yes_no_head)(pooling)
        else:
            check_servable(pooling)

    def export(self, encoder: Encoder, folder: Path, info: ModelInfo) -> Verification:
        """Write and verify the folder; see `Exporter.export`."""
        self.check(encoder.pooling)
        refuse_used(folder)
        final = folder.resolve()
        draft = final.with_name(final.name + ".unverified")
        if draft.is_dir():
            print(f"Removing {draft}, which an export that failed or was killed has left.", flush=True)
            shutil.rmtree(draft)
        print(f"Writing {folder}", flush=True)
        try:
            draft.mkdir(parents=True)
            verification = self._write(encoder, draft, info)
            write_card(draft, self.facts(encoder, info, str(verification), info.address or folder.name))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)  # What is half written is of no use.
            raise ExportError(
                f"The export to {folder} stopped: {error}. The run's checkpoints are whole. Make room, or give "
                "permission, and export one: python -m vlmembed export --config … --ckpt_path … --output_dir …"
            ) from error
        if not verification.passed:
            raise ExportError(f"The export does not serve what was trained. {verification}. It is left in {draft}.")
        code = brings_code(draft)
        try:
            if final.exists():
                final.rmdir()
            draft.rename(final)
        except OSError as error:  # Such as where a volume is mounted.
            raise ExportError(
                f"The export is verified, but cannot take its place ({error}): it is in {draft}."
            ) from error
        opener = read_json(folder / "config_sentence_transformers.json")["model_type"]
        print(
            f"Verified: {verification}\n\n"
            + ("It brings the pooling's code along, and is opened with trust_remote_code=True.\n\n" if code else "")
            + f"from sentence_transformers import {opener}\n"
            f"model = {opener}({str(folder)!r}{', trust_remote_code=True' if code else ''})\n\n"
            f"{folder / 'README.md'} says more."
        )
        return verification

    def _write(self, encoder: Encoder, draft: Path, info: ModelInfo) -> Verification:
        with TemporaryDirectory() as scratch, ExitStack() as stack:
            if transformers_logging.is_progress_bar_enabled():  # Its bars, over a file or two, stay off the console.
                stack.callback(transformers_logging.enable_progress_bar)
                transformers_logging.disable_progress_bar()
            # What is expected is computed first: writing merges the adapters into the weights.
            if isinstance(encoder, Scorer):
                # Logits are taken at the last position, where a token has to be.
                sides = ("left", "right") if self.reranker_scoring == "dense" else ("left",)
                # A pair has one instruction, its query's.
                prompts = {name: text for name, text in info.prompts.items() if role_of(name) == "query"}
                expected = expect(encoder, Path(scratch), sides=sides, prompts=prompts)
                write_reranker(encoder, draft, self.reranker_scoring, prompts)
            else:
                full, factor = self.truncate_dim or encoder.dimension, self.merging_factor
                # The dimensions that vectors may be cut to, with the whole ones first.
                dimensions = [full, *(size for size in info.dimensions if size < full)] if info.dimensions else []
                compared = [full] if isinstance(encoder, MultiVectorEncoder) else dimensions or [full]
                expected = expect(encoder, Path(scratch), compared, prompts=info.prompts, merging_factor=factor)
                write_folder(encoder, draft, self.truncate_dim, dimensions, info.prompts, factor)
            return verify({draft: expected})[0]

    def facts(self, encoder: Encoder, info: ModelInfo, verification: str, source: str) -> CardFacts:
        """Return what the card tells of a model that users open at ``source``."""
        config = public(info.config)
        model, data = (config.get(part, {}).get("init_args", {}) for part in ("model", "data"))
        labels = "pooling", "projection", "head", "template", "loss", "losses", "adapters", "optimizer", "lr_scheduler"
        parts = {part.replace("_", " ").capitalize(): model.get(part) for part in labels}
        parts |= {"Batch size": data.get("batch_size"), "Training rows": info.rows, "Steps": info.steps}
        full = None if isinstance(encoder, Scorer) else encoder.dimension
        return CardFacts(
            title=info.name,
            source=source,
            base_model=self.base_model or origin_of(encoder.backbone.checkpoint),
            training={label: summarize(part) for label, part in parts.items() if part},
            datasets=[*dict.fromkeys(data_sets(data.get("train")))],
            # A process that only exports has measured nothing; the run did.
            metrics=info.metrics or logged_at(info.log, info.steps),
            config=config,
            verification=verification,
            versions={"Python": python_version()} | {library: version(library) for library in LIBRARIES},
            license=self.license,
            pipeline_tag=self.pipeline_tag,
            language=self.language or (),
            losses=[*dict.fromkeys(losses(model.get("loss")) + losses(model.get("losses")))],
            rows=info.rows,
            dimension=self.truncate_dim or full,
            full_dimension=full,
            dimensions=info.dimensions if full else (),
            log=info.log,
        )


def data_sets(value: Any) -> list[str]:
    """Name what the configuration of training data reads: paths and Hub ids, and classes that have neither."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [name for item in value for name in data_sets(item)]
    if not isinstance(value, Mapping):
        return []
    arguments = value.get("init_args", {})
    return [name for key in ("path", "rows", "sources") for name in data_sets(arguments.get(key))] or [summarize(value)]


def losses(value: Any) -> list[str]:
    """Name the classes of a loss and of those in it, outer ones first."""
    if isinstance(value, list):
        return [name for item in value for name in losses(item)]
    if not isinstance(value, Mapping):
        return []
    if "class_path" not in value:
        return losses([*value.values()])
    return [value["class_path"].rsplit(".", 1)[-1], *losses([*value.get("init_args", {}).values()])]


def summarize(value: Any) -> str:
    """Say in one line what a part of a configuration builds: ``InfoNCE(temperature=0.05)``."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (f"{name}={summarize(argument)}" for name, argument in value.get("init_args", {}).items())
        return f"{value['class_path'].rsplit('.', 1)[-1]}({', '.join(arguments)})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {summarize(part)}" for name, part in value.items())
    return f"[{', '.join(map(summarize, value))}]" if isinstance(value, list) else str(value)


def refuse_used(folder: Path) -> None:
    """Refuse to write where something is, with a ``FileExistsError``, or where nothing can be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty. Export into another folder, or move this one away.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PermissionError(
            f"{folder} cannot be made: {parent} is no folder to write into. Name another with --output_dir."
        )


#: Seconds to wait for the Hub's first answer.
PATIENCE = 10


class PushError(RuntimeError):
    """An upload that did not happen. The message says why, and how to go on from the folder, which is whole."""


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload every file of a folder to a model repository, which is created where there is none.

    The token and the server are those that ``huggingface_hub`` finds. A repository that exists and is public is refused
    where it should be private; a branch is created where there is none. Returns the address of the commit.
    """
    validate_repo_id(repo_id)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"{folder} is not a folder with files in it: there is nothing to upload to {repo_id}")
    api = HfApi(library_name="vlmembed")
    try:
        # Of the client's calls only this one can be told to give up; any answer at all means that the Hub is there.
        with suppress(HfHubHTTPError):
            api.model_info(repo_id, timeout=PATIENCE)
        # None, not False: False would override an organization's own rule.
        full_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and api.model_info(full_id).private is False:
            raise ValueError(f"{full_id} exists and is public: make it private in its settings, or choose another name")
        if revision and revision != "main":
            api.create_branch(full_id, branch=revision, exist_ok=True)
        message = "Export with vlmembed"
        commit = api.upload_folder(repo_id=full_id, folder_path=folder, revision=revision, commit_message=message)
        return commit.commit_url
    except Exception as error:  # The HTTP client, the Hub's client and its storage client share no error class.
        retry = ["hf", "upload", repo_id, str(folder.absolute())]
        retry += ["--private"] * private + (["--revision", revision] if revision else [])
        # No chained traceback: it would show the server's answer as it came, and that may quote the token.
        raise PushError(
            f"Upload to {repo_id} at {api.endpoint} failed: {_reason(error)}\n"
            f"The exported folder {folder} is whole and untouched. To upload it, once that is put right:\n"
            f"    {shlex.join(retry)}"
        ) from None


def _reason(error: Exception) -> str:
    """Say in one line what went wrong, without the token."""
    root: BaseException = error
    while root.__cause__ is not None and not isinstance(root, HfHubHTTPError):
        root = root.__cause__
    reason = f"{type(root).__name__}: {' '.join(str(root).split())}"
    token = get_token()
    if isinstance(root, HfHubHTTPError) and root.response.status_code in (401, 403):
        refused = "the token was refused" if token else "no token was found"
        reason = f"{refused}; run `hf auth login`, or set HF_TOKEN to one that may write there. {reason}"
    if "xet-write-token" in reason:
        reason += " (a server without Xet storage needs HF_HUB_DISABLE_XET=1)"
    return reason.replace(token, "[token]") if token else reason
