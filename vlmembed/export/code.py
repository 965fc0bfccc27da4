"""The code of a pooling, with all that it needs, as one Python file that runs where vlmembed is not installed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmembed.pooling import Pooling

HEADER = '''"""The pooling that this model was trained with, as Sentence Transformers reads it."""

from __future__ import annotations

'''


def describe(pooling: Pooling) -> dict[str, Any]:
    """Return a pooling's class and arguments, as JSON has them.

    Raises:
        ValueError: If an argument was not kept as an attribute of its name, or is of another kind than JSON knows.
    """
    arguments = {}
    for name, parameter in inspect.signature(type(pooling).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(pooling, name):
            raise ValueError(
                f"{type(pooling).__name__} cannot be exported: its constructor should keep the argument {name!r} as "
                f"self.{name}, for the export to write it down."
            )
        arguments[name] = _as_json(getattr(pooling, name), f"{type(pooling).__name__}.{name}")
    template = pooling.template and [pooling.template.visual, pooling.template.instructions]
    return {"class": type(pooling).__name__, "arguments": arguments, "template": template}


def _as_json(value: Any, name: str) -> Any:
    if isinstance(value, Pooling):
        return describe(value)
    if isinstance(value, list | tuple):
        return [_as_json(each, name) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} cannot be exported: it is a {type(value).__name__}, not a number, text, list or pooling.")


def standalone_code(pooling: Pooling) -> str:
    """Return a Python file with the classes of a pooling and those inside it, and the module that serves them.

    Raises:
        ValueError: If the code needs other parts of vlmembed than poolings, or is in no file.
    """
    code = _Code()
    for each in pooling.modules():
        if isinstance(each, Pooling):
            code.add(type(each).__module__, type(each).__name__)
    code.add("vlmembed.export.trained_pooling", "TrainedPooling")
    return code.text()


class _Code:
    """Statements picked out of Python files, each behind those that it needs."""

    def __init__(self) -> None:
        self._imports: dict[str, None] = {}
        self._statements: dict[str, tuple[str, str]] = {}

    def text(self) -> str:
        """Return them as one file."""
        statements = [text for _, text in self._statements.values()]
        return HEADER + "\n\n\n".join(["\n".join(self._imports), *statements]) + "\n"

    def add(self, module: str, name: str) -> None:
        """Add what a module calls by a name; nothing if that is a builtin."""
        source = _read(module, name)
        statement = {bound: each for each in ast.parse(source).body for bound in _bound(each)}.get(name)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self._import(statement, name)
        elif name in self._statements:
            self._refuse_other(name, module)
        elif statement is not None:
            self._statements[name] = (module, "")  # Two functions may call each other.
            for needed in _names(statement):
                self.add(module, needed)
            lines = source.splitlines()[_first_line(statement) - 1 : statement.end_lineno]
            del self._statements[name]
            self._statements[name] = (module, "\n".join(lines))

    def _import(self, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        alias = next(each for each in statement.names if (each.asname or each.name.split(".")[0]) == name)
        origin = (statement.module or "") if isinstance(statement, ast.ImportFrom) else alias.name
        if origin.split(".")[0] != "vlmembed":
            alone = ast.Import([alias]) if isinstance(statement, ast.Import) else ast.ImportFrom(origin, [alias], 0)
            self._imports[ast.unparse(alone)] = None
        elif isinstance(statement, ast.ImportFrom) and origin.startswith("vlmembed.pooling") and alias.asname is None:
            self.add(origin, name)
        else:
            raise ValueError(
                f"The pooling cannot be exported: its code needs `{ast.unparse(statement)}`, and a folder can bring "
                "along no more of vlmembed than `from vlmembed.pooling import …`."
            )

    def _refuse_other(self, name: str, module: str) -> None:
        origin, _ = self._statements[name]
        if origin != module:
            raise ValueError(
                f"The pooling cannot be exported: {name} is something else in {origin} than in {module}, and both go "
                "into one file. Rename one."
            )


def _read(module: str, name: str) -> str:
    """Return a module's source."""
    try:
        spec = find_spec(module)
    except ValueError:  # A script or a notebook.
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(f"{name} cannot be exported: its module {module} is no file that can be imported.")
    return Path(spec.origin).read_text(encoding="utf-8")


def _bound(statement: ast.stmt) -> Sequence[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement reads, annotations left out: they are never evaluated."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child.id
            if isinstance(child, ast.AST):
                yield from _names(child)


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(each.lineno for each in decorators)])
