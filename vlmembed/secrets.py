"""Tokens and passwords are refused in configurations, which are copied into run folders, reports and model cards."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

#: A ``key=value``: by the key (``hub_token``, not ``end_token``), by what issuers put first, by a login in an address.
SECRET = r"""(?x) ^[^=]*(?i:(secret|passw|credential|(api|access|private)_?key)[^=]*|(hf|hub|hugging_?face|(?<!di)git
    |gitlab|wandb|auth|access|api|bearer|login)_?token)= | ^([^=]*\.)?(token|key)=(?=\S*\d)(?=\S*[a-zA-Z])[\w=+/-]{16,}$
    | \b(hf_[a-zA-Z0-9]{30} | sk-[\w-]{32} | gh[pousr]_\w{36} | github_pat_\w{36} | glpat-[\w-]{20} | AKIA[0-9A-Z]{16}
    | AIza[\w-]{30} | xox[abprs]-[\w-]{10} | eyJ[\w-]{10,}\.[\w-]{10}) | ://[^/\s:@]+:(?!\$)[^/\s@]+@"""


def refuse_secrets(config: object, file: str = "", key: str = "") -> None:
    """Raise a ValueError that names the dotted key, and never the value, where a configuration holds a secret."""
    if isinstance(config, Mapping | list | tuple):
        for name, value in config.items() if isinstance(config, Mapping) else (("", value) for value in config):
            refuse_secrets(str(name), file, key)  # A token may be a key.
            refuse_secrets(value, file, f"{key}.{name}".strip("."))
    elif not isinstance(config, bool | None) and config != "" and re.search(SECRET, f"{key}={config}"):
        raise ValueError(
            f"{f'{file}: {key}'.strip(': ')} holds what looks like a token, a password or a login. Remove it, and set "
            "HF_TOKEN or WANDB_API_KEY in the environment; if it was shared already, have a new one issued."
        )


def refuse_secrets_in(words: Sequence[str]) -> None:
    """Check a command line, and the YAML files that it names, before a parser's error message could quote it."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option, _, word = word[2:].partition("=")
        is_file = (option == "config" or word.endswith((".yaml", ".yml"))) and Path(word).is_file()
        config = text = Path(word).read_text(encoding="utf-8", errors="replace") if is_file else word
        with suppress(yaml.YAMLError):  # The parser says later what is wrong with it.
            config = yaml.safe_load(text)
        refuse_secrets(config if is_file else {option: config}, word if is_file else "The command line")
