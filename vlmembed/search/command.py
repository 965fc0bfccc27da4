"""``python -m vlmembed encode`` and ``python -m vlmembed search``."""

from collections.abc import Callable, Sequence

from jsonargparse import auto_cli

from vlmembed.cli import Parser
from vlmembed.search.encoding import encode

COMMANDS: dict[str, Callable[..., None]] = {"encode": encode}


def main(words: Sequence[str]) -> None:
    """Run a command: its name, and the command line after that."""
    name, *args = words
    auto_cli(COMMANDS[name], args=args, prog=f"python -m vlmembed {name}", as_positional=False, parser_class=Parser)
