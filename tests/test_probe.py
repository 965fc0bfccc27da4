"""One pass over a test set scores each read-out as a model with that pooling alone would be scored."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from ablating import base_with_model
from building import module, trainer, write_rows
from lightning.pytorch.loggers import CSVLogger

from vlmembed.ablation.command import READ_OUTS, Probe
from vlmembed.backbones import Qwen3VL
from vlmembed.cli import main
from vlmembed.data import RetrievalDataModule
from vlmembed.losses import InfoNCE
from vlmembed.metrics import METRICS
from vlmembed.modules import EmbeddingModule
from vlmembed.pooling import EarlierLayer, LastToken, Mean


def fresh(checkpoint: Path) -> EmbeddingModule:
    return EmbeddingModule(Qwen3VL(str(checkpoint)), LastToken(), InfoNCE())


def probed(model: Probe, folder: Path) -> dict[tuple[str, int, int], dict[str, float]]:
    data = RetrievalDataModule(test=str(write_rows(folder / "rows.jsonl")), eval_batch_size=4, num_workers=0)
    trainer(logger=CSVLogger(folder, name="", version="")).test(model, data, verbose=False)
    table = pd.read_csv(folder / "probe.csv").set_index(["pooling", "layer", "dimension"])
    return table[[*METRICS]].to_dict("index")


def test_numbers_are_those_of_each_pooling_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    measured = probed(Probe(fresh(checkpoint), layers=[-1, 1], dimensions=[16]), tmp_path)
    assert len(measured) == len(READ_OUTS) * 2 * 2
    data = RetrievalDataModule(test=str(tmp_path / "rows.jsonl"), num_workers=0)
    for name, build in READ_OUTS.items():
        for layer in (-1, 1):
            model = module(checkpoint, pooling=EarlierLayer(build(), layer))
            (expected,) = trainer().test(model, data, verbose=False)
            for metric in METRICS:
                # Files have six decimals.
                assert measured[name, layer, 64][metric] == pytest.approx(expected[f"test/{metric}"], abs=1e-6)


def test_weights_of_a_run(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever pooling it was trained with."""
    trained = module(checkpoint, pooling=Mean())
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1.1)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.ckpt")
    measured = probed(Probe(fresh(checkpoint), checkpoint=str(tmp_path / "last.ckpt")), tmp_path)
    data = RetrievalDataModule(test=str(tmp_path / "rows.jsonl"), num_workers=0)
    (expected,) = trainer().test(trained, data, verbose=False)
    assert measured["mean", -1, 64]["map"] == pytest.approx(expected["test/map"], abs=1e-6)


def test_a_file_without_a_backbone_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match=r"empty\.ckpt: The checkpoint lacks weights"):
        Probe(fresh(checkpoint), checkpoint=str(tmp_path / "empty.ckpt")).configure_model()


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """A probe is a run of ``test`` with the base's model inside; its heat map says what it compares."""
    base = base_with_model(checkpoint, {}, test=str(write_rows(tmp_path / "rows.jsonl")))
    changes = {"data.init_args.eval_batch_size": 3}
    file = {"base": "base.yaml", "set": changes, "probe": {"layers": [0, -1], "metric": "map"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(file))
    main(["ablate", "--config", str(tmp_path / "probe.yaml"), "--output_dir", str(tmp_path / "probe")])
    page = (tmp_path / "probe" / "probe.html").read_text()
    assert "map of read-outs" in page
    assert "This compares read-outs of one model." in page
    assert "://" not in page
    texts = [text.strip() for text in re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page)]
    assert {*READ_OUTS} <= {*texts}
    shown = [text for text in texts if re.fullmatch(r"\d\.\d{3}", text)]
    measured = pd.read_csv(tmp_path / "probe" / "probe.csv")
    assert sorted(shown) == sorted(f"{value:.3f}" for value in measured["map"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": []}, "at least one"), ({"layers": [-1, -1]}, "different"), ({"metric": "accuracy"}, "accuracy")],
)
def test_options_that_make_no_sense_are_refused(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(fresh(checkpoint), **options)
