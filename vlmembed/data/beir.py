"""Where corpus, queries and judgements are in a folder or on the Hub, as BEIR, MTEB and ViDoRe lay them out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmembed.data.cells import Folder
from vlmembed.data.rows import Table
from vlmembed.data.tables import configurations, splits_of

#: A configuration: ``corpus``, ``english-queries``, ``qrels_fr``; MTEB calls judgements ``default``.
CONFIGURATION = re.compile(r"(?:(.+)[-_])?(corpus|quer(?:ies|y)|qrels)(?:[-_](.+))?|(default)")

#: What holds judgements line by line.
LINES = (".tsv", ".txt", ".trec", ".qrels")

#: Other names of a split.
SPLITS = {"validation": ("validation", "dev", "val", "valid")}


@dataclass(frozen=True)
class Place:
    """Where a table is: a file, a folder, or a configuration of a folder or Hub id."""

    path: str
    configuration: str | None = None
    named_splits: tuple[str, ...] = ()

    def splits(self, root: Folder) -> tuple[str, ...]:
        """The splits that there are; nothing for what is read whole."""
        path = Path(self.path)
        if self.configuration is not None or not path.is_dir():
            return self.named_splits
        return tuple(sorted(file.stem for file in self.lines)) or tuple(splits_of(self.path, root))

    @property
    def lines(self) -> list[Path]:
        """The files of judgements, line by line, of a folder, by split; or the only one."""
        path = Path(self.path)
        files = path.iterdir() if path.is_dir() else [path]
        return [file for file in files if file.suffix in LINES] if self.configuration is None else []

    def check(self, root: Folder) -> None:
        """Refuse links that lead out of the folder."""
        for path in [Path(self.path), *self.lines] if self.configuration is None else []:
            root.locate(str(path.relative_to(root.path)), "data", str(root.path))

    def file_of(self, split: str) -> Path | None:
        """Return the judgements of a split, line by line."""
        path = Path(self.path)
        return next((file for file in self.lines if file.stem == split or file == path), None)

    def choose(self, root: Folder, wanted: str, is_exact: bool) -> str:
        """Return the split that is wanted, or, if that need not be exact, the only one there is."""
        splits = self.splits(root)
        if is_exact and not splits and self.configuration is None:
            raise ValueError(f"{self.path}: it has no splits, so none is called {wanted!r}; leave 'split' out.")
        for name in SPLITS.get(wanted, (wanted,)):
            if name in splits or not splits:
                return name
        if len(splits) == 1 and not is_exact:
            return splits[0]
        what = self.path + (f", {self.configuration}" if self.configuration else "")
        raise ValueError(
            f"{what}: no split {wanted!r}; it has {', '.join(splits)}. Choose with vlmembed.data.EvaluationFolder and "
            "its 'split'."
        )

    def open(self, split: str, revision: str | None, allow_outside: list[str] | None) -> Table:
        """Return what is there."""
        return Table(self.path, split, self.configuration, revision=revision, allow_outside=allow_outside)


#: Of one evaluation set: ``corpus``, ``queries`` and ``qrels``.
Places = dict[str, Place]


def find_sets(path: str, revision: str | None = None) -> dict[str, Places]:
    """Return the evaluation sets of a folder or Hub id by their subset, which is empty for the one without.

    Nothing where the path is no evaluation set. Of a folder, its own files count before what its page names.
    """
    folder = Path(path)
    own = _on_disk(folder) if folder.is_dir() else None
    try:
        sets = _configured(path, revision)
    except Exception as error:  # Of many kinds: a page may be anything, and an id no id.
        if own is None:
            raise ValueError(f"{path}: what its page says of configurations cannot be read: {error}") from error
        sets = {}
    if own is not None and (not sets or Path(own["qrels"].path).exists()):
        sets[""] = own
    return sets


def _on_disk(folder: Path) -> Places | None:
    """Look for files and folders of the known names."""
    corpus = _entry(folder, "corpus")
    queries = _entry(folder, "queries") or _entry(folder, "query")
    is_usual = any((folder / name).exists() for name in ("corpus.jsonl", "queries.jsonl"))
    if not is_usual and (corpus is None or queries is None):
        return None
    places = {
        "corpus": corpus or folder / "corpus.jsonl",
        "queries": queries or folder / "queries.jsonl",
        "qrels": _entry(folder, "qrels") or folder / "qrels.tsv",
    }
    return {role: Place(str(place)) for role, place in places.items()}


def _entry(folder: Path, name: str) -> Path | None:
    """Return the file of a name, whatever its suffix, or the folder of that name."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name.partition(".")[0] == name)
    usual = [entry for entry in entries if entry.name in (f"{name}.jsonl", f"{name}.tsv")]
    files = usual[:1] or [entry for entry in entries if not entry.is_dir()]
    if len(files) > 1:
        raise ValueError(f"{folder}: {' and '.join(file.name for file in files)} are two forms of the same; keep one.")
    return next(iter(files or entries), None)


def _configured(path: str, revision: str | None) -> dict[str, Places]:
    """Sort the configurations that a page names."""
    sets: dict[str, Places] = {}
    for name, splits in configurations(path, revision).items():
        if match := CONFIGURATION.fullmatch(name):
            before, role, after, is_default = match.groups()
            role = "qrels" if is_default else "queries" if role == "query" else role
            places = sets.setdefault("-".join(filter(None, (before, after))), {})
            if not is_default or role not in places:
                places[role] = Place(path, name, tuple(splits))
    shared = {role: place for role, place in sets.get("", {}).items() if role == "corpus"}
    complete = {subset: shared | places for subset, places in sets.items()}
    return {subset: places for subset, places in complete.items() if len(places) == 3}
