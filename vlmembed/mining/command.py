"""``python -m vlmembed mine`` and ``python -m vlmembed score``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import auto_cli

from vlmembed.cli import Parser
from vlmembed.mining import COMMANDS


def main(words: Sequence[str]) -> None:
    """Run a command: its name, and the command line after that."""
    name, *args = words
    auto_cli(COMMANDS[name], args=args, prog=f"python -m vlmembed {name}", as_positional=False, parser_class=Parser)
