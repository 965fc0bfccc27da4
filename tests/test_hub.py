from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, serve
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from vlmembed.export.exporter import PushError, push

TOKEN = "hf_rightTokenOfSomeone"
WRONG_TOKEN = "hf_refusedTokenOfNobody"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "an export"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    (folder / "served_pooling.py").write_text("class ServedPooling: ...\n")
    save_file({"weight": torch.arange(70_000.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(TOKEN) as hub:
        connect(monkeypatch, hub.url)
        yield hub


def connect(monkeypatch: pytest.MonkeyPatch, url: str, token: str = TOKEN) -> None:
    """Do what a new process does for HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET: they are read at import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)


PUSH_TWICE = """
import os, sys
from pathlib import Path
from vlmembed.export.exporter import push
print(push(Path(sys.argv[1]), "org/model"))
os.environ["HF_TOKEN"] = sys.argv[2]
push(Path(sys.argv[1]), "org/second")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_arrives_and_reads_back_byte_for_byte(hub: Hub, folder: Path, tmp_path: Path) -> None:
    url = push(folder, "org/model")
    repository = hub.repositories["org/model"]
    assert url == f"{hub.url}/org/model/commit/{repository.branches['main']}"
    assert not repository.private
    assert list(hub.objects.values()) == [(folder / "model.safetensors").read_bytes()]  # the weights came by LFS
    assert contents(Path(snapshot_download("org/model", cache_dir=tmp_path / "cache"))) == contents(folder)


def test_privacy_and_revision_arrive_and_a_second_push_replaces_what_changed(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    push(folder, "org/model", private=True, revision="v1/late")
    repository = hub.repositories["org/model"]
    assert repository.private
    assert repository.commits[repository.branches["main"]] == {}
    copy = snapshot_download("org/model", revision="v1/late", cache_dir=tmp_path / "cache")
    assert contents(Path(copy)) == contents(folder)
    (folder / "README.md").write_text("# Better\n")
    push(folder, "org/model", private=True, revision="v1/late")
    assert repository.commits[repository.branches["v1/late"]] == contents(folder)


def test_a_name_alone_goes_to_the_tokens_own_user(hub: Hub, folder: Path) -> None:
    push(folder, "model")
    repository = hub.repositories["someone/model"]
    assert repository.commits[repository.branches["main"]] == contents(folder)


def test_private_is_refused_where_the_repository_is_public(hub: Hub, folder: Path) -> None:
    push(folder, "org/model")
    before = dict(hub.repositories["org/model"].commits)
    with pytest.raises(PushError, match="org/model exists and is public"):
        push(folder, "org/model", private=True)
    assert hub.repositories["org/model"].commits == before


def test_a_refused_token_leaves_the_folder_whole(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, hub.url, WRONG_TOKEN)
    before = contents(folder)
    with pytest.raises(PushError) as caught:
        push(folder, "org/model", private=True, revision="v2")
    message = str(caught.value)
    first, second, command = message.splitlines()
    assert first.startswith(f"Upload to org/model at {hub.url} failed: the token was refused; run `hf auth login`")
    assert "401" in first
    assert str(folder) in second
    assert "whole and untouched" in second
    assert command.strip() == f"hf upload org/model '{folder}' --private --revision v2"
    # The server quotes the token in its answer; we do not pass that on.
    assert WRONG_TOKEN not in message
    assert "[token]" in first
    assert contents(folder) == before
    assert hub.repositories == {}


def test_a_missing_token_is_told_from_a_refused_one(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("vlmembed.export.exporter.get_token", lambda: None)
    with pytest.raises(PushError, match="no token was found; run `hf auth login`"):
        push(folder, "org/model")


@pytest.mark.parametrize(("answers", "message"), [(False, "Connection refused"), (True, "timed out")])
def test_a_server_that_is_not_there_is_given_up_within_seconds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: bool, message: str
) -> None:
    """A closed port, or one that takes the connection and never answers."""
    monkeypatch.setattr("vlmembed.export.exporter.PATIENCE", 0.3)
    before, start = contents(folder), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if not answers:
            silent.close()
        connect(monkeypatch, url)
        with pytest.raises(PushError, match=f"Upload to org/model at {url} failed: .*{message}"):
            push(folder, "org/model")
    assert time.monotonic() - start < 5
    assert contents(folder) == before


def test_offline_mode_and_xet_storage_are_named(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    for constant, value, message in (
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE"),
        ("HF_HUB_DISABLE_XET", False, "HF_HUB_DISABLE_XET=1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(constants, constant, value)
            with pytest.raises(PushError, match=message):
                push(folder, "org/model")
        assert ("POST /api/repos/create" in hub.requests) is (constant == "HF_HUB_DISABLE_XET")


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/", "/name", "org/na me", "org/na--me", "org/model.git", ""])
def test_a_bad_name_is_refused_before_any_request(hub: Hub, folder: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match=r"[Rr]epo"):
        push(folder, repo_id)
    with pytest.raises(ValueError, match="nothing to upload to org/model"):
        push(folder / "absent", "org/model")
    assert hub.requests == []


def test_a_process_needs_only_its_environment_and_logs_no_token(hub: Hub, folder: Path) -> None:
    off = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH_TWICE, str(folder), WRONG_TOKEN],
        env={**os.environ, **off, "HF_ENDPOINT": hub.url, "HF_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert list(hub.repositories) == ["org/model"]
    repository = hub.repositories["org/model"]
    assert repository.commits[repository.branches["main"]] == contents(folder)
    assert done.stdout.strip() == f"{hub.url}/org/model/commit/{repository.branches['main']}"
    assert done.returncode != 0
    assert f"PushError: Upload to org/second at {hub.url} failed: the token was refused" in done.stderr
    assert "authorization: <TOKEN>" in done.stderr  # the client's log was on, or the next lines say nothing
    assert TOKEN not in done.stdout + done.stderr
    assert WRONG_TOKEN not in done.stdout + done.stderr
