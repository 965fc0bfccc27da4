"""``python -m vlmembed mine`` and ``python -m vlmembed score``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jsonargparse import auto_cli

from vlmembed.cli import Parser
from vlmembed.mining.mining import mine
from vlmembed.mining.scoring import score
from vlmembed.secrets import refuse_secrets_in

COMMANDS: dict[str, Callable[..., None]] = {"mine": mine, "score": score}


def run(name: str, args: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: Which.
        args: The command line after its name; ``--config FILE`` and ``--help`` among others.

    Raises:
        ValueError: If it holds what looks like a token or a password.
    """
    refuse_secrets_in(args)
    auto_cli(COMMANDS[name], args=[*args], prog=f"python -m vlmembed {name}", as_positional=False, parser_class=Parser)
