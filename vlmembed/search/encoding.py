"""A corpus of any size, encoded into a folder of Parquet files: an index.

    corpus → shards of rows → windows of items → ServedModel.stream → DIR/shard-00000.parquet, …

A shard is written whole or not at all, and is the same to the byte whoever writes it, and when. What is known of all of
them is in ``manifest.json``, which says ``complete`` once all are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vlmembed.files import clear_drafts, write_whole
from vlmembed.search.corpus import Corpus, CorpusSource, files_of, is_media_folder, open_corpus
from vlmembed.search.index import FORMAT, MANIFEST, SIDE_FILE, Precision
from vlmembed.search.served import ServedModel
from vlmembed.search.shards import Encoding, Executor, Job, Local, Shard
from vlmembed.types import Role

#: What a manifest says, and may not be another when the encoding is resumed.
SETTINGS = (
    *("format", "model_digest", "engine", "dtype", "role", "prompt", "pixels", "precision", "shard_size", "window"),
    "corpus_digest",
)


def encode(
    model: str,
    corpus: CorpusSource,
    output: str,
    role: Role = "document",
    precision: Precision = "float32",
    shard_size: int = 16_384,
    window: int = 1024,
    batch_tokens: int | None = None,
    num_workers: int = 0,
    shards: str | None = None,
    executor: Executor | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Encode a corpus with an exported model into a folder of Parquet files, in memory that does not grow with it.

    The files have columns ``id`` and ``embedding``; ``manifest.json`` says what made them. The same command again
    resumes what was ended before, and repeats no file that is whole. An item that cannot be read is named in
    ``unreadable.jsonl``; the others are encoded, and the exit status is 1.

    Args:
        model: The folder of an export, the folder of a run that has one, or a Hub id.
        corpus: What to encode: an evaluation folder's corpus, a file of items (``id`` and any of ``text``, ``image``,
            ``video``), training rows' documents, a folder of images and PDFs, a Hub id; or a ``vlmembed.data.Table``,
            ``Pages``, source of rows (also a stream) or source of evaluation sets.
        output: The folder to write.
        role: Whether items are documents or queries: of an evaluation folder or training rows, those are encoded.
        precision: How vectors are stored: float32, float16, int8 (with a scale for each item), or binary (signs).
        shard_size: Items of a file, and what a kill costs at most. Equal ones are encoded once if they have one vector.
        window: Items that are looked at together: similar ones go through the model together, equal images once.
        batch_tokens: The most tokens that go through the model at once; null for what is usual for the device.
        num_workers: Processes that read and decode ahead.
        shards: Which share of the files this process writes, ``3/8``, of several that write the same folder; null for
            the one that torchrun's or SLURM's environment says, or else all.
        executor: Where: ``Local``, ``Ray``, or your own; ``--executor Ray --executor.workers 8 --executor.gpus 1``.
        device: The device of the model, such as ``cuda:1``; null for the best one, one for each process.
        dtype: The type of the weights, such as ``bfloat16``; null for that of the folder.
        trust_remote_code: Whether to run code that the model brings.
    """
    _check_arguments(corpus, output, shard_size, window)
    share = _share(shards)
    if share[1] > 1 and executor is not None and not isinstance(executor, Local):
        raise ValueError(
            f"shards is {share[0]}/{share[1]}, which is for several processes; an executor shares out itself."
        )
    job = Job(
        *(model, corpus, output, role, precision, shard_size, window, batch_tokens, num_workers),
        *(device or _device_of_process(), dtype, trust_remote_code, os.getcwd()),
    )
    with _locked(Path(output), *share):
        clear_drafts(Path(output))
        unreadable = _encode(job, share, executor or Local())
    if unreadable:
        sys.exit(
            f"{unreadable} of the items could not be read; {output}/{SIDE_FILE} says which, and why. The others are "
            "encoded. Once images are mended, delete the files of their shards, and run this again; rows that are "
            "mended make another corpus, for another output."
        )


def _check_arguments(corpus: Any, output: str, shard_size: int, window: int) -> None:
    if shard_size < 1 or window < 1:
        raise ValueError(f"shard_size and window are 1 or more, got {shard_size} and {window}.")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output} is a file; output is the folder to write.")
    if not (folder / MANIFEST).exists() and any(folder.glob("*.parquet")):
        raise ValueError(f"{output} has Parquet files, and no {MANIFEST}: it is no index. Name another output.")
    if isinstance(corpus, str) and is_media_folder(corpus) and folder.resolve().is_relative_to(Path(corpus).resolve()):
        raise ValueError(f"{output} is in the folder {corpus} that is to be encoded. Name an output outside of it.")


def _encode(job: Job, share: tuple[int, int], executor: Executor) -> int:
    """Write what is missing of a share of the shards; return how many items of it could not be read."""
    corpus = open_corpus(job.corpus, job.role)
    corpus_digest = scan(corpus)  # Which also finds out how long a stream is.
    print(f"{_name(job.corpus)}: {len(corpus):,} items.", flush=True)
    encoding, path = Encoding(job, corpus), Path(job.output, MANIFEST)
    manifest = _manifest(job, encoding.model, corpus_digest)
    known = _resumed(path, manifest)
    numbers = range(-(-len(corpus) // job.shard_size))
    mine, done = numbers[share[0] - 1 :: share[1]], _whole(job, numbers)
    _refuse_rewritten(encoding, [number for number in mine if number in done])
    if known is None or (known["complete"] and len(done) < len(numbers)):
        write_whole(path, _as_json(manifest))
    _run(executor, encoding, [number for number in mine if number not in done], done)
    written = _whole(job, numbers)
    if len(written) == len(numbers):
        _complete(job, manifest, [*written.values()])
    else:
        print(f"{job.output}: the files of share {share[0]}/{share[1]} are whole; others are not yet.")
    return sum(len(written[number].unreadable) for number in mine)


def _whole(job: Job, numbers: range) -> dict[int, Shard]:
    """Return those shards that are there, and whole, by number."""
    return {number: shard for number in numbers if (shard := Shard.read(job.path(number))) is not None}


def _refuse_rewritten(encoding: Encoding, done: Sequence[int]) -> None:
    """Refuse images that have been written again since they were encoded."""
    for number in done:
        shard, files = encoding.job.path(number), {*encoding.corpus.files()}
        for row in encoding.rows(number):
            with suppress(ValueError):  # It could not be read then, either.
                files |= {*files_of(encoding.corpus.read(row)[1])}
        written = shard.stat().st_mtime_ns
        for file in files:
            if file.exists() and file.stat().st_mtime_ns > written:
                raise ValueError(
                    f"{encoding.job.output}: the corpus has changed: {file} was written after {shard.name}, which has "
                    "what it was before. Delete that file to have it encoded anew, or name another output."
                )


def _run(executor: Executor, encoding: Encoding, shards: Sequence[int], done: dict[int, Shard]) -> None:
    total, before = len(encoding.corpus), sum(len(encoding.rows(number)) for number in done)
    if done:
        print(f"Resuming: {before:,} of {total:,} items are encoded.", flush=True)
    if shards:
        interval = 0.5 if sys.stderr.isatty() else 10.0  # Seconds between the lines of an unattended log.
        with tqdm(total=total, initial=before, unit=" items", desc="Encoding", mininterval=interval) as bar:
            executor.run(encoding, shards, bar.update)


def _complete(job: Job, manifest: dict[str, Any], written: Sequence[Shard]) -> None:
    """Write down what cannot be read, and that all is done."""
    folder = Path(job.output)
    clear_drafts(folder)  # Of workers that were killed.
    unreadable = [entry for shard in written for entry in shard.unreadable]
    count = sum(shard.rows for shard in written)
    if not count:
        raise ValueError(
            f"{_name(job.corpus)}: none of the {len(unreadable):,} items could be encoded. The first: "
            f"{unreadable[0]['error']}"
        )
    if unreadable:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in unreadable)
        write_whole(folder / SIDE_FILE, "".join(lines).encode(errors="backslashreplace"))
    else:
        (folder / SIDE_FILE).unlink(missing_ok=True)
    shards = [
        {"file": job.path(number).name, "rows": shard.rows, "sha256": _sha256(job.path(number))}
        for number, shard in enumerate(written)
        if shard.rows
    ]
    write_whole(folder / MANIFEST, _as_json({**manifest, "count": count, "shards": shards, "complete": True}))
    print(f"{folder}: {count:,} items in {len(shards):,} files.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The corpus


def scan(corpus: Corpus) -> str:
    """Go through all rows; return what is another for other ids or texts. A ``ValueError`` names an id given twice."""
    hashed, ids = hashlib.blake2b(digest_size=16), array("Q")  # Of an id, eight bytes: ten million are 80 MB.
    for name, content in chain.from_iterable(corpus.blocks()):
        hashed.update(f"{name!r} {len(content)} {content}\n".encode(errors="surrogatepass"))
        key = f"unreadable {len(ids)}" if name is None else f"id {name}"
        short = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
        ids.append(int.from_bytes(short, "big"))
    if not ids:
        raise ValueError("The corpus has no items.")
    _refuse_repeated(corpus, np.frombuffer(ids, np.uint64))
    return hashed.hexdigest()


def _refuse_repeated(corpus: Corpus, ids: np.ndarray) -> None:
    """Refuse an id that two rows have, given the hashes of all (P,)."""
    order = ids.argsort(kind="stable")
    for place in np.flatnonzero(ids[order][1:] == ids[order][:-1]).tolist():
        first, second = order[place : place + 2].tolist()
        names = [corpus.scan(range(row, row + 1))[0][0] for row in (first, second)]
        if names[0] == names[1] and names[0] is not None:  # Not two ids with the same hash, nor unreadable rows.
            raise ValueError(
                f"{corpus.origin(second)}: id {names[0]!r} is given twice; first at {corpus.origin(first)}. Give each "
                "item an id of its own."
            )


def _name(corpus: Any) -> str:
    """Return what a manifest and messages call a corpus."""
    if isinstance(corpus, str):
        return corpus
    named = fields(corpus) if is_dataclass(corpus) else ()
    arguments = (f"{field.name}={value!r}" for field in named if (value := getattr(corpus, field.name)) is not None)
    return f"{type(corpus).__name__}({', '.join(arguments)})"


# The manifest


def _manifest(job: Job, model: ServedModel, corpus_digest: str) -> dict[str, Any]:
    """Return what is known before anything is encoded."""
    return {
        "format": FORMAT,
        "model": job.model,
        "model_digest": model.digest,
        "engine": model.engine,
        "dtype": job.dtype or "",
        "role": job.role,
        "prompt": model.prompt_of(job.role),
        "precision": job.precision,
        "dimension": model.dimension,
        "dimensions": model.dimensions,
        "is_multi_vector": model.is_multi_vector,
        "similarity": model.similarity,
        "corpus": _name(job.corpus),
        "corpus_digest": corpus_digest,
        "count": 0,
        "shard_size": job.shard_size,
        "window": job.window,
        "shards": [],
        "pixels": model.pixels,
        "versions": {name: version(name) for name in ("vlmembed", "sentence-transformers", "torch", "transformers")},
        "complete": False,
    }


def _as_json(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def _resumed(path: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest that is there, if any; a ``ValueError`` says what of it has changed."""
    if not path.exists():
        return None
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in SETTINGS if known.get(name) != manifest[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest: {error}. Delete the folder, or name another output.") from error
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path.parent} was begun with another {name.removesuffix('_digest').replace('_', ' ')}: {name} is "
            f"{known.get(name)!r} in {MANIFEST}, and now {manifest[name]!r}. Give it what it was begun with, or name "
            "another output; what is written stays."
        )
    manifest["versions"] = known.get("versions", manifest["versions"])
    return known


# Several processes


def _share(shards: str | None) -> tuple[int, int]:
    """Return which share of the shards this process writes, from 1, of how many."""
    if shards is None:
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
                return int(os.environ[rank]) + 1, int(os.environ[size])
        return 1, 1
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", shards)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shards is K/N, with K from 1 to N, such as 1/8; got {shards!r}.")
    return int(match[1]), int(match[2])


def _device_of_process() -> str | None:
    """Return the GPU of one of several processes of this machine; None where the best device is its own."""
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    count = torch.cuda.device_count()
    return f"cuda:{int(number) % count}" if number.isdecimal() and count > 1 else None


@contextmanager
def _locked(folder: Path, share: int, shares: int) -> Iterator[None]:
    """Have a folder: for oneself, or beside the processes of other shares."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not flock's: loader workers would inherit it, and hold it a while after this process has been killed.
    wanted = [(".encode.lock", fcntl.LOCK_SH if shares > 1 else fcntl.LOCK_EX)]
    wanted += [(f".encode-{share}-of-{shares}.lock", fcntl.LOCK_EX)] if shares > 1 else []
    with ExitStack() as files:
        for name, kind in wanted:
            lock = files.enter_context((folder / name).open("a+"))
            try:
                fcntl.lockf(lock, kind | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f"{folder}: another process is encoding into it. Let it finish, or end it.") from error
        yield
