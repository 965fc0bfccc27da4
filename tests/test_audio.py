"""Recordings: opened within limits, read by the thinkers of Qwen's Omni models, trained on, measured and served."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import other_models
import pytest
import soundfile
import torch
import yaml
from building import (
    assert_alone_as_mixed,
    backbone,
    batch,
    call,
    damaged,
    encoder,
    evaluation_folder,
    item,
    jsonl,
    module,
    picture,
    relative_difference,
    run_config,
    scorer,
    step_gradients,
)
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_cookbook import png
from torch.nn.functional import normalize
from transformers.audio_utils import load_audio as transformers_audio

from vlmembed import media
from vlmembed.backbones import Qwen3VL, VisionLanguageModel
from vlmembed.data import Rows
from vlmembed.data.cells import Folder, to_items
from vlmembed.files import read_json
from vlmembed.gradcache import GradCache
from vlmembed.media import audio_seconds, load_audio
from vlmembed.mining.candidates import identify
from vlmembed.mining.mining import write_rows
from vlmembed.pooling import MeanOfText
from vlmembed.search.served import model_input
from vlmembed.types import Example, Item, Pair, Part

ROOT = Path(__file__).parents[1]
ORIGIN = "rows.jsonl, row 3, column 'positive'"
RATE = 16_000
#: Hidden states are of size one after the norm, and sums in float32 go in another order.
ROUNDING = 1e-5


def noise(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    return samples.astype(np.float32).clip(-0.9, 0.9)


def encoded(seconds: float = 1.0, rate: int = RATE, channels: int = 1, seed: int = 0, **form: Any) -> bytes:
    return written(noise(seconds, rate, channels, seed), rate, **{"format": "WAV", **form})


def written(samples: np.ndarray, rate: int, **form: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


def heard(seconds: float, seed: int = 0, text: str | None = None) -> Item:
    parts = [Part("audio", encoded(seconds, seed=seed)), *([Part("text", text)] if text else [])]
    return Item("document", tuple(parts), ORIGIN)


# Files


FORMS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "float": {"format": "WAV", "subtype": "FLOAT", "channels": 2},
    "surround": {"format": "WAVEX", "subtype": "PCM_24", "channels": 6, "rate": 48_000},
    "rf64": {"format": "RF64", "subtype": "PCM_16", "rate": 22_050},
    "w64": {"format": "W64", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16", "channels": 2, "rate": 44_100},
    "ogg": {"format": "OGG", "subtype": "VORBIS", "rate": 22_050},
    "opus": {"format": "OGG", "subtype": "OPUS", "rate": 48_000},
    "mp3": {"format": "MP3", "rate": 44_100},
    "aiff": {"format": "AIFF", "subtype": "PCM_16", "rate": 8_000},
    "au": {"format": "AU", "subtype": "PCM_16", "rate": 11_025},
    "caf": {"format": "CAF", "subtype": "PCM_16"},
}


@pytest.mark.parametrize("name", FORMS)
def test_samples_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Known by its content: transformers is given an ending that it knows, and we are given another."""
    content = encoded(5.1, **FORMS[name])  # More than one piece of 65,536 samples.
    path, other = tmp_path / "clip.wav", tmp_path / "clip.raw"
    for file in (path, other):
        file.write_bytes(content)
    expected = transformers_audio(str(path), sampling_rate=RATE, backend="soundfile")
    assert np.array_equal(load_audio(other, RATE), expected)
    assert np.array_equal(load_audio(content, RATE), expected)
    assert audio_seconds(other) == pytest.approx(len(expected) / RATE, abs=1e-3)
    assert load_audio(content, RATE).dtype == np.float32


def with_size(size: int) -> bytes:
    """A WAV file that says another size of its samples."""
    content = encoded()
    place = content.index(b"data") + 4
    return content[:place] + struct.pack("<I", size) + content[place + 4 :]


def with_frames(top: int, rest: bytes) -> bytes:
    """A FLAC file that says another number of samples: 4 and 32 bits of its header."""
    content = bytearray(encoded(format="FLAC"))
    content[21], content[22:26] = content[21] & 0xF0 | top, rest
    return bytes(content)


def with_rate(rate: int) -> bytes:
    content = bytearray(encoded())
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


def not_a_number() -> bytes:
    samples = noise(1)
    samples[77] = np.nan
    return written(samples, RATE, format="WAV", subtype="FLOAT")


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is none of WAV, FLAC"),
    "a text": (lambda: b"hello " * 300, "it is none of WAV, FLAC.*ffmpeg"),
    "an image": (lambda: png(0), "it is an image. Give it under the key 'image'"),
    "a video": (
        lambda: b"\0\0\0\x18ftypmp42" + bytes(600),
        "it is a video, or sound in a video's container. Convert it",
    ),
    "AAC": (lambda: b"\xff\xf1\x50\x80" + bytes(600), "sound of a kind that is not read.*Convert it to FLAC"),
    "M4A": (lambda: b"\0\0\0\x18ftypM4A " + bytes(600), "sound of a kind that is not read.*Convert it to FLAC"),
    "a PDF": (lambda: b"%PDF-1.7" + bytes(600), "it is a PDF document"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "header only": (lambda: encoded()[:20], "Malformed"),
    "no samples": (lambda: encoded(0), "its 0 samples are 0.000 seconds, less than 0.05"),
    "too short": (lambda: encoded(0.03), "its 480 samples are 0.030 seconds, less than 0.05"),
    "cut WAV": (lambda: encoded()[:20_000], "cut or damaged: its header says 32,000 bytes, and 19,956 are there"),
    "cut AIFF": (lambda: encoded(format="AIFF")[:20_000], "cut or damaged: its header says"),
    "cut AU": (lambda: encoded(format="AU")[:20_000], "cut or damaged: its header says"),
    "cut W64": (lambda: encoded(format="W64")[:20_000], "cut or damaged: its header says"),
    "cut RF64": (lambda: encoded(format="RF64")[:20_000], "cut or damaged: its header says"),
    "cut FLAC": (lambda: encoded(format="FLAC")[:9_000], "flac decoder lost sync"),
    "cut Ogg": (lambda: encoded(format="OGG")[:4_000], "malformed|its 0 samples"),
    "cut MP3": (lambda: encoded(format="MP3")[:2_000], "cut or damaged: of 16,000 samples"),
    "says 2 GB": (lambda: with_size(0x7FFFF000), "cut or damaged: its header says 2,147,479,552 bytes, and 32,000"),
    "says 4 GB": (lambda: with_size(0xFFFFFFFF), "cut or damaged: its header says 4,294,967,295 bytes"),
    "says 50 days": (
        lambda: with_frames(15, b"\xff" * 4),
        "says 4,294,967 seconds.*VLMEMBED_MAX_AUDIO_SECONDS",
    ),
    "says nothing": (lambda: with_frames(0, bytes(4)), "seconds .*, more than the limit.*VLMEMBED_MAX_AUDIO_SECONDS"),
    "no number": (not_a_number, "it has samples that are no finite numbers"),
    "no rate": (lambda: with_rate(7), "7 samples a second are not between 1,000 and 192,000"),
    "any rate": (lambda: with_rate(10**9), "1,000,000,000 samples a second are not between 1,000 and 192,000"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_whole_recording_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    content, reason = UNREADABLE[name][0](), UNREADABLE[name][1]
    (tmp_path / "clip.wav").write_bytes(content)
    for source, shown in ((tmp_path / "clip.wav", r".*clip\.wav"), (content, "given as bytes")):
        with pytest.raises(ValueError, match=rf"{ORIGIN}: cannot read the audio {shown}.*{reason}.*remove the row"):
            load_audio(source, RATE, ORIGIN)


def test_limits_hold_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(3)
    monkeypatch.setattr(media, "MAX_AUDIO_SECONDS", 2)
    with pytest.raises(ValueError, match=r"says 3 seconds .*, more than the limit of 2; VLMEMBED_MAX_AUDIO_SECONDS"):
        audio_seconds(content)
    monkeypatch.setattr(media, "MAX_AUDIO_BYTES", 1000)
    with pytest.raises(ValueError, match=r"96,044 bytes are more than the limit of 1,000; VLMEMBED_MAX_AUDIO_BYTES"):
        load_audio(content, RATE)


@pytest.mark.filterwarnings("ignore")  # Of soundfile's callbacks, where a file leads before its beginning.
def test_a_damaged_recording_is_read_or_refused_with_its_row() -> None:
    random = np.random.default_rng(0)
    refusals = []
    for number in range(240):
        form = FORMS[[*FORMS][number % len(FORMS)]]
        content = damaged(random, encoded(0.5, **form), within=200 if number % 24 < 12 else None)
        try:
            assert np.isfinite(load_audio(content, RATE, ORIGIN)).all()
        except ValueError as error:
            refusals.append(str(error))
    assert 50 < len(refusals) < 230
    assert all(refusal.startswith(f"{ORIGIN}: cannot read the audio given as bytes") for refusal in refusals)


def test_without_its_packages_audio_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ImportError, match=r'pip install "vlmembed\[audio\]"'):
        load_audio(encoded(), RATE)


def test_sound_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "clip.png").write_bytes(encoded())
    with pytest.raises(ValueError, match=r"clip\.png: it is sound\. Give it under the key 'audio'"):
        media.load_image(tmp_path / "clip.png")


# Cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "media").mkdir()
    for index in range(3):
        (tmp_path / "media" / f"{index}.wav").write_bytes(encoded(1 + index / 4, seed=index))
    return tmp_path / "media"


CELLS: dict[str, tuple[Any, list[Any]]] = {
    "a path": ({"audio": "0.wav"}, ["0.wav"]),
    "several": ({"audio": ["0.wav", "1.wav"]}, ["0.wav", "1.wav"]),
    "before a text": ({"audio": "0.wav", "text": "a"}, ["0.wav", "a"]),
    "behind a text": ({"text": "a", "audio": "0.wav", "image": None}, ["a", "0.wav"]),
    "chat parts": ([{"type": "audio", "audio": "0.wav"}, {"type": "text", "text": "a"}], ["0.wav", "a"]),
    "a chat message": ({"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}, ["0.wav"]),
    "a column of datasets": ({"bytes": None, "path": "0.wav"}, ["0.wav"]),
    "a key and a column of datasets": ({"audio": {"bytes": None, "path": "0.wav"}}, ["0.wav"]),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells(folder: Path, name: str) -> None:
    cell, expected = CELLS[name]
    (read_item,) = to_items([(cell, "document", ORIGIN)], Folder(folder))
    values = [part.value.name if isinstance(part.value, Path) else part.value for part in read_item.parts]
    assert values == expected
    assert all((part.kind == "audio") == isinstance(part.value, Path) for part in read_item.parts)


def test_content_and_samples_are_read_as_the_file_is(folder: Path) -> None:
    content = (folder / "0.wav").read_bytes()
    samples, rate = soundfile.read(folder / "0.wav", dtype="float32")
    decoded = {"array": samples.tolist(), "sampling_rate": rate, "path": "0.wav"}
    for cell in ({"bytes": content, "path": None}, {"audio": {"bytes": content}}, {"audio": decoded}):
        (read_item,) = to_items([(cell, "document", ORIGIN)], Folder(folder))
        assert read_item.parts[0].kind == "audio"
        assert np.array_equal(load_audio(read_item.parts[0].value, RATE), load_audio(folder / "0.wav", RATE))


REFUSED: dict[str, tuple[Any, str]] = {
    "missing": ({"audio": "9.wav"}, r"the audio file .*9\.wav does not exist"),
    "outside": ({"audio": "../clip.wav"}, r"leads out of the data set's folder"),
    "a URL": ({"audio": "https://x.org/a.wav"}, "is a URL, and nothing is downloaded"),
    "a number": ({"audio": 7}, "expected the path of an audio file, got int 7"),
    "samples alone": ({"audio": [0.1, 0.2]}, r"expected the path of an audio file, got float 0\.1"),
    "an open image": ({"audio": picture(8, 8)}, "expected the path of an audio file, got Image"),
    "no rate": ({"audio": {"array": [0.1] * 2000}}, r"an audio is a path.*KeyError: 'sampling_rate'"),
    "two channels": ({"audio": {"array": [[0.1] * 2000] * 2, "sampling_rate": 16000}}, "samples have 2 dimensions"),
    "words": ({"audio": {"array": "abc", "sampling_rate": 16000}}, "an audio is a path.*could not convert"),
    "bytes that are none": ({"audio": {"bytes": "abc", "path": None}}, "the bytes of audio None are str 'abc'"),
    "an empty list": ({"audio": []}, "every item needs one of text, image, video, audio"),
    "a misspelt key": ({"Audio": "0.wav"}, "unknown key 'Audio'.*use text, image, video, audio"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cells_that_are_refused(folder: Path, name: str) -> None:
    cell, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{ORIGIN}: .*{reason}"):
        to_items([(cell, "document", ORIGIN)], Folder(folder))


def saved(folder: Path) -> str:
    """What ``save_to_disk`` writes of an ``Audio`` column; cast, as `datasets` encodes one with torchcodec only."""
    cells = [{"bytes": (folder / f"{index}.wav").read_bytes(), "path": f"{index}.wav"} for index in range(3)]
    table = datasets.Dataset.from_dict({"query": ["a", "b", "c"], "positive": cells})
    table.cast_column("positive", datasets.Audio()).save_to_disk(folder / "saved")
    return str(folder / "saved")


def parquet(folder: Path) -> str:
    datasets.load_from_disk(saved(folder)).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("write", [saved, parquet])
def test_audio_columns_are_kept_encoded(folder: Path, write: Callable[[Path], str]) -> None:
    rows = Rows(write(folder))
    for index in range(3):
        (part,) = rows[index].positives[0].parts
        assert part.kind == "audio"
        assert np.array_equal(load_audio(part.value, RATE), load_audio(folder / f"{index}.wav", RATE))


PAGE = (ROOT / "vlmembed/data/README.md").read_text().split("\n## Audio\n")[1].split("\n## ")[0]


def test_rows_of_the_cookbook(folder: Path) -> None:
    block = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert block
    (folder / "rows.jsonl").write_text(block[1])
    for name in re.findall(r"\w+\.(?:flac|wav|mp3)", block[1]):
        shutil.copy(folder / "0.wav", folder / name)
    kinds = [
        [part.kind for one in (row.query, *row.positives) for part in one.parts] for row in Rows(f"{folder}/rows.jsonl")
    ]
    assert kinds == [["text", "audio"], ["audio", "text", "audio", "audio"]]


def test_metadata_of_an_audio_folder_is_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cookbook shows it."""
    block = re.search(r"```yaml\n(train:.*?)```", PAGE, re.DOTALL)
    assert block
    arguments = yaml.safe_load(block[1])["train"]["init_args"]
    monkeypatch.chdir(folder.parent)
    folder.rename(Path(arguments["path"]).parent)
    jsonl(arguments["path"], [{"file_name": f"{index}.wav", "transcription": word} for index, word in enumerate("abc")])
    rows = [*Rows(**arguments)]
    assert [row.query.parts[0].value for row in rows] == ["a", "b", "c"]
    assert [row.positives[0].parts[0].value for row in rows] == [Path(f"recordings/{index}.wav") for index in range(3)]


# Models


OMNI = {"Qwen2.5-Omni": other_models.qwen2_5_omni, "Qwen3-Omni": other_models.qwen3_omni}


@pytest.fixture(scope="module", params=OMNI)
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return backbone(OMNI[request.param](tmp_path_factory.mktemp("omni") / "tiny"), VisionLanguageModel).eval()


def mixed(*seconds: float) -> list[Item]:
    """Recordings alone, with texts and images, twice in one item; and items without any."""
    recordings = [heard(length, seed) for seed, length in enumerate(seconds)]
    both = Item("query", (*heard(1.1, 7).parts, Part("text", "then"), *heard(1.3, 8).parts), ORIGIN)
    seen = Item("document", (*item(picture(64, 64)).parts, *heard(1.2, 9, "a caption").parts), ORIGIN)
    return [*recordings, both, item("a question", role="query"), seen, item(picture(64, 96))]


@torch.no_grad()
def test_an_item_alone_is_as_in_a_mixed_batch(thinker: VisionLanguageModel) -> None:
    items = mixed(1.0, 2.9, 1.7)
    assert_alone_as_mixed(thinker, items, ROUNDING)


@torch.no_grad()
def test_inputs_are_those_of_transformers(thinker: VisionLanguageModel, tmp_path: Path) -> None:
    """Its processor opens the file itself; of what it makes the model reads what the mask says."""
    (tmp_path / "clip.flac").write_bytes(encoded(2.2, 44_100, 2, format="FLAC"))
    chat = [
        {"role": "system", "content": [{"type": "text", "text": thinker.instructions["document"]}]},
        {"role": "user", "content": [{"type": "audio", "audio": str(tmp_path / "clip.flac")}]},
    ]
    expected = thinker.preprocessor.processor.apply_chat_template(
        [chat],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"audio_kwargs": {"padding": "max_length"}},
    )
    inputs = thinker.preprocessor([Item("document", (Part("audio", tmp_path / "clip.flac"),))])
    assert inputs["input_ids"].equal(expected["input_ids"])
    read_frames = [
        part["input_features"][0][:, part["feature_attention_mask"][0].bool()] for part in (inputs, expected)
    ]
    torch.testing.assert_close(*read_frames, rtol=0, atol=1e-6)


@torch.no_grad()
def test_recordings_are_heard(thinker: VisionLanguageModel) -> None:
    """Two of one length differ in no token, so their difference comes through the audio tower."""
    one, other = (thinker.preprocessor([heard(1.5, seed, "a caption")]) for seed in (0, 1))
    assert one["input_ids"].equal(other["input_ids"])
    assert (thinker(one) - thinker(other))[0, -1].abs().max() > 100 * ROUNDING


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (heard(3.2), r"has an audio of 3\.2 seconds, and this checkpoint reads 3\. Cut it"),
        (item("see <|audio_pad|>"), r"An item has <\|audio_pad\|> in its text"),
        (Item("document", (Part("audio", Path("gone.wav")),), ORIGIN), rf"{ORIGIN}: cannot read the audio gone\.wav"),
    ],
    ids=["too long", "a mark", "gone"],
)
def test_what_a_thinker_refuses(thinker: VisionLanguageModel, refused: Item, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        thinker.preprocessor([item("fine"), refused])


def test_short_recordings(thinker: VisionLanguageModel) -> None:
    """Of less than a second, Qwen3-Omni's tower makes something else beside longer ones."""
    if hasattr(thinker.preprocessor.processor, "n_window"):
        with pytest.raises(ValueError, match=rf"{ORIGIN} has an audio of 0\.30 seconds, and of less than 1 .*apad"):
            thinker.preprocessor([heard(0.3)])
    else:
        with torch.no_grad():
            alone, together = (thinker(thinker.preprocessor(items))[0] for items in ([heard(0.06)], mixed(0.06, 2)))
        torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=ROUNDING)


def test_max_length_never_cuts_audio(thinker: VisionLanguageModel) -> None:
    short, reason = VisionLanguageModel(thinker.checkpoint, max_length=20), "could cut through an image or audio"
    with pytest.raises(ValueError, match=rf"{ORIGIN} has \d+ tokens, more than max_length=20.*{reason}"):
        short.make_preprocessor()([heard(2)])


def test_cost_is_about_the_tokens(thinker: VisionLanguageModel) -> None:
    one = heard(2.8)
    tokens = (thinker.preprocessor([one])["input_ids"] == thinker.preprocessor.processor.audio_token_id).sum()
    assert tokens <= thinker.preprocessor.cost(one) <= 2.2 * tokens


def test_audio_tokens_are_no_text(thinker: VisionLanguageModel) -> None:
    template, inputs = thinker.preprocessor.template, thinker.preprocessor([heard(1.5, text="words")])
    weights = MeanOfText().part(inputs["input_ids"], inputs["attention_mask"], template)
    assert ((~weights).sum() == (inputs["input_ids"] == thinker.preprocessor.processor.audio_token_id).sum()).all()


@pytest.mark.parametrize("name", OMNI)
def test_a_whole_omni_is_opened_as_its_thinker(tmp_path: Path, name: str) -> None:
    folder = OMNI[name](tmp_path / "whole", whole=True)
    assert "thinker_config" in read_json(folder / "config.json")
    model = backbone(folder, VisionLanguageModel)
    file = load_file(folder / "model.safetensors")
    for part, ours in (("thinker.audio_tower.", "audio_tower."), ("thinker.model.norm.", "language_model.norm.")):
        saved_weights = {key.removeprefix(part): weight for key, weight in file.items() if key.startswith(part)}
        state = model.model.state_dict()
        assert saved_weights
        assert all(state[ours + key].equal(weight) for key, weight in saved_weights.items())
    assert model.lm_head_rows([3, 5]).equal(file["thinker.lm_head.weight"][[3, 5]])


@pytest.mark.parametrize("text", [None, "a caption"])
def test_a_deaf_backbone_refuses_by_name(checkpoint: Path, folder: Path, text: str | None) -> None:
    positive = {"audio": "0.wav"} | ({"text": text} if text else {})
    document = Rows(jsonl(folder / "rows.jsonl", [{"query": "a", "positive": positive}]))[0].positives[0]
    refused = r"rows\.jsonl, row 1, column 'positive' has an audio, and this checkpoint's processor.*Qwen2\.5-Omni"
    for deaf in (Qwen3VL(str(checkpoint)), VisionLanguageModel(str(checkpoint))):
        preprocessor = deaf.make_preprocessor()
        for read_it in (preprocessor.cost, lambda one, read=preprocessor: read.prepare([one]).chunk([0])):
            with pytest.raises(ValueError, match=refused):
                read_it(document)


def test_a_template_that_drops_audio_is_refused(thinker: VisionLanguageModel, tmp_path: Path) -> None:
    folder = shutil.copytree(thinker.checkpoint, tmp_path / "deaf")
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}", ""))
    with pytest.raises(ValueError, match="drops audios of the user"):
        VisionLanguageModel(str(folder)).make_preprocessor()


def test_pairs(thinker: VisionLanguageModel) -> None:
    model = scorer(thinker.checkpoint, kind=VisionLanguageModel).eval()
    pairs = [Pair(item("seven", role="query"), heard(1.5, seed)) for seed in (0, 1)]
    with torch.no_grad():
        scores, alone = model(model.preprocessor(pairs)), model(model.preprocessor(pairs[1:]))
    assert (scores[0] - scores[1]).abs() > 3 * ROUNDING
    torch.testing.assert_close(scores[1:], alone, rtol=0, atol=ROUNDING)


# Training, measuring, serving


def rows_of_audio(folder: Path) -> str:
    """Rows of texts and recordings: of several rates and channels, some with texts, and one row without audio."""
    lines = []
    for index in range(8):
        name = f"clip{index}.flac"
        rate = [8000, 44_100][index % 2]
        (folder / name).write_bytes(encoded(1 + index / 5, rate, 1 + index % 2, index, format="FLAC"))
        positive = {"audio": name} | ({"text": f"note {index}"} if index % 3 == 0 else {})
        lines.append({"query": f"number {index}", "positive": positive if index != 5 else "no sound"})
    return jsonl(folder / "rows.jsonl", lines)


def test_chunks_have_the_gradient_of_the_whole(thinker: VisionLanguageModel, tmp_path: Path) -> None:
    model = module(Path(thinker.checkpoint), backbone={"kind": VisionLanguageModel})
    examples = [*Rows(rows_of_audio(tmp_path))]
    whole, chunked = (
        step_gradients(model, GradCache(model.encoder), batch(model, examples, size)) for size in (None, 3)
    )
    torch.testing.assert_close(chunked[0], whole[0], rtol=0, atol=ROUNDING)
    assert relative_difference(chunked[1], whole[1]) < 1e-4
    assert any("audio_tower" in name for name in whole[1])


@pytest.mark.parametrize("name", ["Qwen2.5-Omni", pytest.param("Qwen3-Omni", marks=pytest.mark.exhaustive)])
def test_fit_measures_and_exports_what_sentence_transformers_serves(here: Path, name: str) -> None:
    """All by YAML: two steps of a whole checkpoint, an evaluation folder, and the export's own round trip."""
    checkpoint, rows = OMNI[name](here / "tiny", whole=True), rows_of_audio(here)
    corpus = [{"id": f"d{index}", "audio": f"../clip{index}.flac"} for index in range(3)]
    queries = [{"id": f"q{index}", "text": f"number {index}"} for index in range(3)]
    evaluation_folder("val", corpus, queries, [(f"q{index}", f"d{index}", 1) for index in range(3)])
    val = {"class_path": "vlmembed.data.EvaluationFolder", "init_args": {"path": "val", "allow_outside": ["."]}}
    config = run_config(checkpoint, train=rows, val=val, batch_size=4, chunk_size=2)
    config["model"]["init_args"]["backbone"]["class_path"] = "vlmembed.backbones.VisionLanguageModel"
    config["model"]["init_args"]["backbone"]["init_args"]["max_length"] = 512
    config["trainer"] |= {"max_steps": 2, "default_root_dir": "run"}
    call("fit", config)
    (exported,) = here.glob("run/**/export")
    modalities = read_json(exported / "sentence_bert_config.json")["modality_config"]
    assert [*modalities] == ["text", "image", "video", "audio", "message"]
    assert '`{"audio": "clip.wav"}`' in (exported / "README.md").read_text()
    opened = encoder(exported, kind=VisionLanguageModel).eval()
    served = SentenceTransformer(str(exported))
    paths = [str(here / f"clip{index}.flac") for index in range(4)]
    with torch.no_grad():
        items = [Item("document", (Part("audio", Path(path)),)) for path in paths]
        ours = normalize(opened(opened.preprocessor(items)), dim=-1)
    for inputs in ([{"audio": path} for path in paths], paths):
        theirs = served.encode_document(inputs, batch_size=3, convert_to_tensor=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=ROUNDING)
    assert (ours[0] - ours[1]).abs().max() > 10 * ROUNDING


def test_mining_and_rows_that_are_written(folder: Path) -> None:
    """Copies are one; content that is in no file is written as one."""
    shutil.copy(folder / "0.wav", folder / "copy.wav")
    content = (folder / "0.wav").read_bytes()
    in_file, copied, in_table, other = (
        Item("document", (Part("audio", value),))
        for value in (folder / "0.wav", folder / "copy.wav", content, folder / "1.wav")
    )
    assert identify(in_file) == identify(copied) == identify(in_table) != identify(other)
    assert model_input(in_file) == {"audio": str(folder / "0.wav")}
    given = model_input(in_table)["audio"]
    assert given["sampling_rate"] == RATE
    assert np.array_equal(given["array"], load_audio(content, RATE))
    write_rows(folder / "mined.jsonl", [Example(item("a", role="query"), (in_table,), (other,))])
    (row,) = Rows(str(folder / "mined.jsonl"))
    assert [document.parts[0].kind for document in row.documents] == ["audio", "audio"]
    assert Path(row.positives[0].parts[0].value).read_bytes() == content


@pytest.mark.exhaustive
def test_training_on_audio_learns(tmp_path: Path) -> None:
    """The quick experiment, in little: of 50 numbers that were never heard, by chance 0.09 (4.54 / 50) is reached."""
    losses, metrics = runpy.run_path(str(ROOT / "experiments/audio/dialling.py"))["run"](tmp_path / "run", steps=80)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert metrics["val/ndcg@10"] > 0.3
