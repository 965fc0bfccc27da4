"""The checks that are not about behaviour: style, types, and who may import whom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: It has a command but no ``python -m``.
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["importlinter"],
    ],
    ids=lambda command: " ".join(command),
)
def test_check_passes(command: list[str]) -> None:
    command = ["-c", LINT_IMPORTS] if command == ["importlinter"] else ["-m", *command]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_config_says_how_to_run_it() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"python -m vlmembed fit --config {path.relative_to(ROOT)}" in path.read_text(), path


def test_few_private_attributes_of_lightning_are_used_and_in_one_file() -> None:
    """Those of the trainer, its loops, callbacks and loggers: each may change in any release."""
    private = re.compile(
        r"(?:trainer|loop|logger|callback|optimization|progress)\.(_[a-z]\w*)|[\"'](_last_\w+|_defer_\w+)[\"']"
    )
    found = {
        (path.name, name)
        for path in (ROOT / "vlmembed").rglob("*.py")
        for match in private.finditer(path.read_text())
        if (name := match[1] or match[2])
    }
    assert {file for file, _ in found} <= {"checkpointing.py"}, found
    assert 0 < len(found) <= 5, found
