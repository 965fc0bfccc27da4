"""Tables of rows, in files, folders and on the Hub, in each form that `datasets` or `vlmembed.data.records` reads."""

from __future__ import annotations

import glob
import json
import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow.parquet
import yaml
from datasets.iterable_dataset import ArrowExamplesIterable
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.table import table_cast
from huggingface_hub import hf_hub_download, metadata_load

from vlmembed.data.cells import URL, Folder
from vlmembed.data.columns import nearest
from vlmembed.data.records import (
    COMPRESSIONS,
    MAX_LINE_BYTES,
    Delimited,
    JSONLines,
    Records,
    Tar,
    open_json,
    read_lines,
)
from vlmembed.data.sources import read_parts

#: Files that are read in place.
READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": JSONLines,
    ".ndjson": JSONLines,
    ".json": open_json,
    ".csv": Delimited,
    ".tsv": partial(Delimited, delimiter="\t"),
    ".tar": Tar,
}
KINDS = (*READERS, ".parquet")
#: What a streamed JSONL file is to `datasets`: lines, since its JSON reader wants one type per column.
LINES = datasets.Features({"line of JSON": datasets.Value("large_binary")})
#: Bytes of rows that a stream reads at once: few, for which the system need not find new memory.
BYTES_AT_ONCE = 2**20
#: Files that are streamed; not CSV, of whose texts `datasets` makes numbers.
STREAMED = (".jsonl", ".ndjson", ".parquet")
HUB_ID = re.compile(r"(hf://datasets/)?[\w.-]*\w[\w.-]*(/[\w.-]+)?")


class _EncodedAudio(datasets.Audio):
    """Sound as it is stored, for which `datasets` would import torchcodec."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        return {"bytes": None, "path": value}


class Joined:
    """Rows of several tables, or of parts of them, one after the other; each part has the name of its file."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._ends = [*accumulate(len(rows) for _, _, rows in parts)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return read_parts(map(self._place, indices), lambda part, rows: self._parts[part][1].__getitems__(rows))

    @property
    def first(self) -> Records | datasets.Dataset:
        """The first table."""
        return self._parts[0][1]

    @property
    def column_names(self) -> list[str]:
        """The columns of the first table."""
        return list(self.first.column_names)

    def select_columns(self, names: Iterable[str]) -> Joined:
        """Return a table in which others need not be read."""
        names = [*names]
        return Joined([(name, table.select_columns(names), rows) for name, table, rows in self._parts])

    def origins(self, indices: Sequence[int]) -> list[str]:
        """Say where rows stand, for messages."""
        return [f"{self._parts[part][0]}, row {row + 1}" for part, row in map(self._place, indices)]

    def _place(self, index: int) -> tuple[int, int]:
        """Return in which part a row is, and which row of its table."""
        number = bisect_right(self._ends, index)
        rows = self._parts[number][2]
        return number, rows[index - self._ends[number] + len(rows)]


RawTable: TypeAlias = Records | Joined | datasets.Dataset
#: A table, which of its rows are meant, and what messages call it.
Part: TypeAlias = tuple[str, "Records | datasets.Dataset", range]


def open_table(
    path: str | list[str], split: str, subset: str | None, folder: Folder, revision: str | None = None
) -> RawTable:
    """Open what a file's path, a glob, a list of these, a folder or a Hub id stands for.

    Of files, ``split`` matters only if it is a slice (``train[:1%]``), and ``subset`` is the key of the rows in a JSON
    file. A ``ValueError`` says that there is no such file, split, subset or key, or no row.
    """
    name, split = title(path), re.sub(r"\s+", "", split)
    if files := _files_of(path, folder, revision):
        parts = _select({_only_split(split, name): _open_files(files, name, subset)}, split, name)
    else:
        with _named(name):
            is_saved = _is_saved(name)
            parts = _open_saved(name, split, folder) if is_saved else _load(name, split, subset, folder, revision)
    if not sum(len(rows) for _, _, rows in parts):
        raise ValueError(f"{name}: the data set has no rows{f' in split {split!r}' if '[' in split else ''}.")
    _, table, rows = parts[0]
    return table if len(parts) == 1 and len(rows) == len(table) else Joined(parts)


def open_stream(
    path: str | list[str], split: str, subset: str | None, allow_outside: list[str] | None, revision: str | None
) -> datasets.IterableDataset:
    """Open what `open_table` opens as a stream of ``datasets``; a ``ValueError`` says what cannot be streamed."""
    name, folder = title(path), Folder.of(path, allow_outside)
    if "[" in split or "+" in split:
        raise ValueError(f"{name}: split is {split!r}, but a stream has no slices; vlmembed.data.Rows reads them.")
    files = _files_of(path, folder, revision)
    if not files:
        with _named(name):
            return _stream_set(name, split, subset, folder, revision)
    if subset is not None:
        raise ValueError(f"{name}: subset is {subset!r}, but files that are streamed have none.")
    kind, *others = {_kind(file) for file in files}
    if others or kind not in STREAMED:
        raise ValueError(
            f"{name}: a stream has files of one kind, of {', '.join(STREAMED)}; vlmembed.data.Rows reads others."
        )
    with _named(name):
        return _stream_files(files, kind)


def _stream_files(files: Sequence[str], kind: str, features: Any = None) -> datasets.IterableDataset:
    read: Any = _blocks_of_lines
    if kind == ".parquet":
        features = features or datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
        read = partial(_blocks_of_parquet, schema=features.arrow_schema)
    # As of a list of a generator's arguments, each file is a part of its own.
    blocks = ArrowExamplesIterable(read, {"files": [*files]})
    return datasets.IterableDataset(blocks, datasets.DatasetInfo(features=features or LINES))


def _blocks_of_parquet(files: Sequence[str], schema: pyarrow.Schema) -> Iterator[tuple[Any, pyarrow.Table]]:
    for file in files:
        # Mapped, since `datasets` reads by Python, which copies all of it once more.
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as rows:
            groups = map(rows.metadata.row_group, range(rows.num_row_groups))
            size = sum(group.total_byte_size for group in groups) // max(1, rows.metadata.num_rows)
            at_once = min(max(BYTES_AT_ONCE // max(1, size), 8), 1024)
            for number, block in enumerate(rows.iter_batches(at_once, use_threads=False)):
                yield number, table_cast(pyarrow.Table.from_batches([block]), schema)


def _blocks_of_lines(files: Sequence[str]) -> Iterator[tuple[Any, pyarrow.Table]]:
    for file in files:
        lines, size = list[bytes](), 0
        for number, line in enumerate(read_lines(file)):
            lines.append(line)
            size += len(line)
            if size > BYTES_AT_ONCE:
                yield number, pyarrow.table([lines], LINES.arrow_schema)
                lines, size = [], 0
        if lines:
            yield "last", pyarrow.table([lines], LINES.arrow_schema)


def _stream_set(
    path: str, split: str, subset: str | None, folder: Folder, revision: str | None
) -> datasets.IterableDataset:
    """Open a folder or a Hub id, of whose files none lies elsewhere, as a stream."""
    if _is_saved(path):
        raise ValueError(f"{path}: was written by save_to_disk; vlmembed.data.Rows reads it in place.")
    builder, data_files = _checked_builder(path, subset, folder, revision)
    if data_files:
        _refuse_split(split, data_files, path)
    files = data_files.get(split, [])
    kinds = {_kind(file) for file in files}
    if kinds and kinds <= {".jsonl", ".ndjson"}:
        return _stream_files(files, kinds.pop())
    if kinds == {".parquet"} and not any(map(URL.match, files)):
        return _stream_files(files, ".parquet", builder.info.features)
    return builder.as_streaming_dataset(split=split)


def title(path: str | list[str]) -> str:
    """Return what messages call a path, or a list of them."""
    paths = [path] if isinstance(path, str) else path
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Make a ``ValueError`` that begins with the path of whatever a library raises."""
    try:
        yield
    except Exception as error:  # Of many kinds, and often raised from what is the reason.
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise
        reason = error.__cause__ or error
        is_lance = isinstance(reason, ModuleNotFoundError) and reason.name == "lance"
        hint = '; Lance is read with pip install "vlmembed[lance]".' if is_lance else ""
        raise ValueError(f"{path}: cannot be opened: {reason}{hint}") from error


def _kind(path: str | Path) -> str:
    """Return the ending of a file, without that of the compression where it may be compressed."""
    *_, before, last = "", "", *(ending.lower() for ending in Path(path).suffixes)
    return before if last in COMPRESSIONS and before in READERS else last


def _is_pattern(path: str) -> bool:
    return bool({*path} & {*"*?["}) and not os.path.lexists(path)


def _is_file(path: str) -> bool:
    """Tell files, also those that are not there, from folders and Hub ids."""
    return os.path.isfile(path) or _is_pattern(path) or (_kind(path) in KINDS and not os.path.isdir(path))


def _files_of(path: str | list[str], folder: Folder, revision: str | None) -> list[str]:
    """Return the files that are meant; none if it is a folder or a Hub id."""
    paths, name = [path] if isinstance(path, str) else path, title(path)
    if not path:
        raise ValueError(f"path is {path!r}; it is a file, a glob, a list of these, a folder or a Hub id.")
    is_folder, is_file = os.path.isdir(name), len(paths) > 1 or _is_file(name)
    if revision is not None and (is_folder or is_file):
        kind = "file" if is_file else "folder"
        raise ValueError(f"{name}: revision is {revision!r}, but a {kind} has none; it is of a Hub id.")
    if not is_folder and not is_file and not HUB_ID.fullmatch(name):
        raise ValueError(f"{name}: no such file or folder{_beside(name)}, and no Hub id.")
    return [file for one in paths for file in _files(one, folder)] if is_file else []


def _files(path: str, folder: Folder) -> list[str]:
    """Return the files of a path or glob; those of a glob are in the folder, also where they are links."""
    if _is_pattern(path):
        files = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
        for file in files:
            folder.locate(os.path.abspath(file), "data", path)
        if not files:
            raise ValueError(f"{path}: no file matches.")
        return files
    if not os.path.isfile(path):
        what = "a list of paths has files only" if os.path.isdir(path) else f"no such file{_beside(path)}"
        raise ValueError(f"{path}: {what}.")
    return [path]


def _beside(path: str) -> str:
    """Return a question for the name in the same folder that was perhaps meant."""
    folder = Path(path).parent
    return nearest(Path(path).name, os.listdir(folder)) if folder.is_dir() else ""


def _open_files(files: Sequence[str], name: str, subset: str | None) -> list[Part]:
    kinds = {_kind(file): file for file in files}
    if unknown := [*kinds.keys() - {*KINDS}]:
        raise ValueError(
            f"{kinds[unknown[0]]}: unknown kind of file {unknown[0]!r}. Rows are in {', '.join(READERS)} (each also "
            f"with {' or '.join(COMPRESSIONS)} behind it) or .parquet files, or in a folder that load_dataset opens."
        )
    if subset is not None and ".json" not in kinds:
        raise ValueError(f"{name}: subset is {subset!r}, but files of this kind have none.")
    parts: list[Part] = []
    for kind, group in groupby(files, _kind):
        if kind == ".parquet":
            parts += _open_parquet([*group])
            continue
        read = partial(open_json, key=subset) if kind == ".json" else READERS[kind]
        for file in group:
            with _named(file):
                table = read(Path(file))
            parts.append((file, table, range(len(table))))
    return parts


def _open_parquet(files: Sequence[str]) -> list[Part]:
    """Open Parquet files as one table, and divide it by file."""
    counts, columns = {}, {}
    for file in files:
        with _named(file):
            metadata = pyarrow.parquet.read_metadata(file)
            counts[file], columns[file] = metadata.num_rows, metadata.schema.to_arrow_schema().names
        if {*columns[file]} != {*columns[files[0]]}:
            names, first = ", ".join(columns[file]), ", ".join(columns[files[0]])
            raise ValueError(f"{file}: its columns are {names}; those of {files[0]} are {first}.")
    files = [file for file in files if counts[file]]  # `datasets` reads none that is empty.
    if not files:
        return []
    with _named(files[0]):
        table = undecoded(datasets.load_dataset("parquet", data_files=[*map(glob.escape, files)], split="train"))
    ends = accumulate(counts[file] for file in files)
    pieces = [table.select(range(end - counts[file], end)) for file, end in zip(files, ends, strict=True)]
    return [(file, piece, range(len(piece))) for file, piece in zip(files, pieces, strict=True)]


def _is_saved(path: str) -> bool:
    return Path(path, "dataset_dict.json").exists() or Path(path, "state.json").exists()


def _open_saved(path: str, split: str, folder: Folder) -> list[Part]:
    """Open what ``save_to_disk`` wrote; its own files name those that hold the rows."""
    tables = datasets.load_from_disk(path, keep_in_memory=False)
    if not isinstance(tables, datasets.DatasetDict):
        tables = {_only_split(split, path): tables}
    for table in tables.values():
        for file in table.cache_files:
            folder.locate(os.path.abspath(file["filename"]), "data", path)
    splits = {name: [(path, undecoded(table), range(len(table)))] for name, table in tables.items()}
    return _select(splits, split, path)


def _load(path: str, split: str, subset: str | None, folder: Folder, revision: str | None) -> list[Part]:
    """Open a folder or a Hub id as ``load_dataset`` does, of whose files none lies elsewhere."""
    builder, data_files = _checked_builder(path, subset, folder, revision, refuse_long_lines=True)
    for name in _split_names(split) if data_files else ():
        _refuse_split(name, data_files, path)
    if isinstance(builder, WebDataset):  # Not by `datasets`, which makes nulls of what is missing in a tar.
        wanted = data_files if split == "all" else _split_names(split)
        tars = {name: datasets.DownloadManager().download(data_files[name]) for name in wanted}
        return _select({name: _open_files(files, path, None) for name, files in tars.items()}, split, path)
    if isinstance(builder, AudioFolder):
        builder.BASE_FEATURE = _EncodedAudio
    builder.download_and_prepare()
    table = undecoded(builder.as_dataset(split=split))
    if isinstance(builder, FolderBasedBuilder):
        table = _with_class_names(table)
    return [(path, table, range(len(table)))]


def _checked_builder(
    path: str, subset: str | None, folder: Folder, revision: str | None, refuse_long_lines: bool = False
) -> tuple[datasets.DatasetBuilder, dict[str, list[str]]]:
    """Return what builds a folder or a Hub id, and the files of its splits, of which none lies elsewhere."""
    _refuse_other_files(path, folder, revision)
    builder = _builder(path, subset, revision)
    data_files = {str(name): [*files] for name, files in (builder.config.data_files or {}).items()}
    files = [file for files in data_files.values() for file in files]
    local = [file for file in files if not file.startswith(f"hf://datasets/{path.removeprefix('hf://datasets/')}@")]
    prepared = Path(builder.cache_dir).exists()
    for file in local:  # Also links, and what the pages of older releases say.
        located = folder.locate(file if URL.match(file) else os.path.abspath(file), "data", path)
        if refuse_long_lines and not prepared:
            _refuse_long_lines(located)
    return builder, data_files


def _builder(path: str, subset: str | None, revision: str | None) -> datasets.DatasetBuilder:
    try:
        return datasets.load_dataset_builder(path, subset, revision=revision)
    except ValueError as error:
        names: list[str] = []
        with suppress(Exception):  # Of what has been raised already.
            names = datasets.get_dataset_config_names(path, revision=revision)
        if not names or subset in names or (subset is None and len(names) == 1):
            raise
        what = (
            f"no configuration {subset!r}{nearest(subset, names)}"
            if subset
            else "several configurations, and subset chooses none"
        )
        raise ValueError(f"{path}: {what}; it has {', '.join(names)} (choose with subset).") from error


def _only_split(split: str, path: str) -> str:
    """Return what to call all rows of what has no splits."""
    names = {*_split_names(split)}
    if len(names) > 1:
        raise ValueError(f"{path}: split is {split!r}, but there are no splits; a slice is written train[:10%].")
    return names.pop()


def _split_names(split: str) -> list[str]:
    """Return the splits that are added and sliced, in the language of ``datasets``: ``train[:1%]+test``."""
    return [part.partition("[")[0] for part in split.split("+")]


def _refuse_split(split: str, splits: Collection[str], path: str) -> None:
    if split not in (*splits, "all"):
        raise ValueError(f"{path}: no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}.")


def _select(splits: Mapping[str, list[Part]], split: str, path: str) -> list[Part]:
    """Return the parts that splits and slices ask for."""
    if split in splits:
        return splits[split]
    if split == "all":
        return [part for parts in splits.values() for part in parts]
    for name in _split_names(split):
        _refuse_split(name, splits, path)
    lengths = {name: sum(len(rows) for _, _, rows in parts) for name, parts in splits.items()}
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(
            f"{path}: split is {split!r}: {error}; slices are written train[:1%], train[10:20]."
        ) from error
    return [part for piece in pieces for part in _cut(splits[piece.splitname], piece.from_, piece.to)]


def _cut(parts: Iterable[Part], start: int, stop: int) -> list[Part]:
    cut = []
    for name, table, rows in parts:
        cut.append((name, table, rows[max(start, 0) : max(stop, 0)]))
        start, stop = start - len(rows), stop - len(rows)
    return [part for part in cut if part[2]]


def _refuse_other_files(path: str, folder: Folder, revision: str | None) -> None:
    """Refuse a data set whose page names files elsewhere before they are looked for: an address would be asked."""
    for name, config in _configurations(path, revision):
        for pattern in _strings([config.get("data_files"), config.get("data_dir")]):
            # Chained, as in zip://x::http://y, any part may be an address.
            folder.locate(pattern.replace("::", "://"), "data", f"{path}, {name}")


def _configurations(path: str, revision: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the page of a folder or Hub id says of each configuration, and the name of the page."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            page, offline = Path(path, name), datasets.config.HF_HUB_OFFLINE
            if not Path(path).is_dir():
                options: Any = {"repo_type": "dataset", "revision": revision, "local_files_only": offline}
                page = Path(hf_hub_download(path, name, **options))
            metadata = metadata_load(page) if name == "README.md" else yaml.safe_load(page.read_text())
        except OSError:  # There is none, or no Hub; the data set may be in a cache.
            continue
        for config in (metadata or {}).get("configs") or ():
            yield name, config


def configurations(path: str, revision: str | None = None) -> dict[str, list[str]]:
    """Return the configurations that the page of a folder or Hub id names, and the splits of each that it names."""
    splits: dict[str, list[str]] = {}
    for _, config in _configurations(path, revision):
        files = config.get("data_files")
        entries = files if isinstance(files, list) else []
        named = [entry["split"] for entry in entries if isinstance(entry, dict) and "split" in entry]
        splits[str(config.get("config_name", "default"))] = [*map(str, named or (["train"] if files else []))]
    return splits


def splits_of(path: str, folder: Folder) -> list[str]:
    """Return the splits of a folder; none where it is one saved data set."""
    if (Path(path) / "dataset_dict.json").exists():
        return [*json.loads((Path(path) / "dataset_dict.json").read_text())["splits"]]
    return [] if _is_saved(path) else [*_checked_builder(path, None, folder, None)[1]]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _refuse_long_lines(path: Path) -> None:
    """Refuse a file that a library would take into memory whole; a file within the limit has no such line."""
    is_text = _kind(path) in READERS and _kind(path) != ".tar"
    if is_text and (path.stat().st_size > MAX_LINE_BYTES or path.suffix.lower() in COMPRESSIONS):
        deque(read_lines(path), maxlen=0)


def undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """Have media come as they are stored: opened by `datasets`, they could be of any size, or a URL."""
    table.info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})
    return table


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    is_medium = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_medium else feature


def _with_class_names(table: datasets.Dataset) -> datasets.Dataset:
    """Have the labels that `datasets` made of folders come as their names."""
    classes = {name: label for name, label in table.features.items() if isinstance(label, datasets.ClassLabel)}
    return table.with_transform(partial(_named_classes, classes)) if classes else table


def _named_classes(classes: Mapping[str, datasets.ClassLabel], batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    def names(label: datasets.ClassLabel, numbers: list[int | None]) -> list[Any]:
        return [None if number is None or number < 0 else label.int2str(number) for number in numbers]

    return {name: names(classes[name], cells) if name in classes else cells for name, cells in batch.items()}
