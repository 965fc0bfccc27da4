"""Code and pickles that come with a checkpoint or a model are not run, unless code is asked for by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import item
from sentence_transformers import CrossEncoder

from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.mining.candidates import Embedder

#: Says that it was run, by making a folder.
CODE = """
import os
os.makedirs({mark!r}, exist_ok=True)
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
class Config(PretrainedConfig): model_type = "foreign"
class Model(PreTrainedModel): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): ...
class Processor(ProcessorMixin): ...
"""
CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoTokenizer": "Tokenizer", "AutoProcessor": "Processor"}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


def with_code(checkpoint: Path, folder: Path, mark: Path, **changes: Any) -> Path:
    """Copy a checkpoint, and have each of its files name a class of a Python file that is put beside it."""
    shutil.copytree(checkpoint, folder)
    (folder / "foreign.py").write_text(CODE.format(mark=str(mark)))
    classes = {auto: f"foreign.{name}" for auto, name in CLASSES.items()}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            content = json.loads(path.read_text()) | {"auto_map": classes}
            path.write_text(json.dumps(content | (changes if name == "config.json" else {})))
    return folder


def test_a_checkpoint_of_a_known_kind_is_opened_without_its_code(checkpoint: Path, tmp_path: Path, mark: Path) -> None:
    folder = with_code(checkpoint, tmp_path / "known", mark)
    backbone = Qwen3VL(str(folder))
    backbone.configure()
    expected = Qwen3VL(str(checkpoint)).make_preprocessor()([item("text")])
    assert torch.equal(backbone.preprocessor([item("text")])["input_ids"], expected["input_ids"])
    assert not mark.exists()


def test_a_checkpoint_of_an_unknown_kind_is_refused(checkpoint: Path, tmp_path: Path, mark: Path) -> None:
    folder = str(with_code(checkpoint, tmp_path / "unknown", mark, model_type="foreign"))
    for opened in (Qwen3VL(folder).configure, VisionLanguageModel(folder).configure, Qwen3VL(folder).open_processor):
        with pytest.raises(ValueError, match=r"(?s)Cannot open the checkpoint .*trust_remote_code=True"):
            opened()
    assert not mark.exists()
    # It would have been.
    VisionLanguageModel(folder, trust_remote_code=True).load_config()
    assert mark.exists()


@pytest.mark.parametrize(
    ("kind", "opened"),
    [
        ("SentenceTransformer", lambda folder: Embedder(folder, 1)),
        ("CrossEncoder", lambda folder: CrossEncoder(folder, trust_remote_code=False)),
    ],
)
def test_a_model_that_brings_modules_is_refused(
    kind: str, opened: Callable[[str], Any], tmp_path: Path, mark: Path
) -> None:
    """What `mine` and `score` open. A module's code lies in the model's own folder."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "foreign.Model"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "foreign.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises((ValueError, ImportError, OSError)):
        opened(str(tmp_path))
    assert not mark.exists()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.mark),)


def test_weights_that_are_a_pickle_are_not_read(checkpoint: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": torch.zeros(1), "more": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled' has no model.safetensors"):
        Qwen3VL(str(folder)).configure()
    assert not mark.exists()
    # It would have been run.
    with (folder / "plain.pkl").open("wb") as file:
        pickle.dump(Payload(mark), file)
    pickle.loads((folder / "plain.pkl").read_bytes())
    assert mark.exists()
