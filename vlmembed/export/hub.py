"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

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
