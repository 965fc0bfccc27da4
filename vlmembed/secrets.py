"""Tokens and passwords: refused in configurations, because these are copied, and hidden where one is shown anyway.

A configuration comes to lie in the run's folder, in reports of ablations and in model cards, which people share. So a
secret comes from the environment, where the libraries that want it look for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

#: Names of keys whose values are secrets, or hold them.
SECRET = re.compile(r"secret|passw|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
TOKEN = re.compile(r"token(?!iz)", re.IGNORECASE)
#: A key of a login's token, as opposed to one of a text's: ``hub_token``, but not ``end_token`` nor ``max_tokens``.
LOGIN_TOKEN = re.compile(r"(^|[._])((hf|hub|hugging_?face|wandb|auth|access|api|bearer|git\w*|login)_?)token$", re.I)

#: What the issuers of tokens make them look like, so that they are found: Hugging Face, OpenAI and others, GitHub,
#: GitLab, AWS, Google, Slack, JSON Web Tokens; and what has a login in its address.
ISSUED = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[pousr]_\w{36,}|github_pat_\w{36,}|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}|"
    r"AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,})|://[^/\s:@]+:(?!\$)[^/\s@]+@"
)
#: Long, of letters and digits mixed: no word, and no token of a text such as ``<|im_end|>``.
RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w=+/-]{16,}")

URL_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
MASK = "(hidden)"

#: Files that are configurations, whatever option names them.
CONFIGURATIONS = {".yaml", ".yml"}


def refuse_secrets(config: Any, place: str = "") -> None:
    """Refuse a configuration that holds what looks like a token or a password.

    Args:
        config: Keys and values, nested.
        place: Where it stands: a file, or the key that it is the value of.

    Raises:
        ValueError: Naming the key, and never the value.
    """
    for key, value in _leaves(config):
        if _is_secret(key, value):
            where = f"{place}: {key}" if place and key else place or key
            raise ValueError(
                f"{where} holds what looks like a token, a password or a login. Configurations are copied into run "
                "folders, reports and model cards, so remove it, and set it in the environment: HF_TOKEN for the "
                "Hugging Face Hub, WANDB_API_KEY for Weights & Biases. If it was shared already, have a new one issued."
            )


def refuse_secrets_in(words: Sequence[str]) -> None:
    """Refuse a command line that holds what looks like a token or a password, itself or in a file that it names.

    Called before anything parses it, because a parser's error message quotes what it could not parse.

    Args:
        words: The command line, without the program's name.

    Raises:
        ValueError: Naming the option, or the file and the key, and never the value.
    """
    option = ""
    for word in words:
        is_option = word.startswith("--")
        option, _, value = word[2:].partition("=") if is_option else (option, "", word)
        if is_option and "=" not in word:
            continue
        path = Path(value)
        if (option == "config" or path.suffix in CONFIGURATIONS) and path.is_file():
            refuse_secrets(_parsed(path.read_text(encoding="utf-8", errors="replace")), value)
        else:
            refuse_secrets({option: _parsed(value)}, "The command line")


def mask(value: Any, path: str = "") -> Any:
    """Hide what a configuration keeps under a secret's name, and logins within addresses.

    For configurations that did not come through `refuse_secrets`. It hides more: whatever might be one. Numbers under a
    ``token`` key are counts (``max_tokens``), and stay.
    """
    if isinstance(value, Mapping):
        return {str(key): mask(inner, f"{path}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner, path) for inner in value]
    if isinstance(value, bool | None):
        return value
    is_number = isinstance(value, int | float)
    if SECRET.search(path) or (TOKEN.search(path) and not is_number):
        return MASK
    return value if is_number else ISSUED.sub(MASK, URL_LOGIN.sub(f"{MASK}@", str(value)))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no collection, with its dotted key, and every key as a value too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield path, str(key)
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def _is_secret(path: str, value: Any) -> bool:
    if isinstance(value, bool | None) or value == "":
        return False
    if SECRET.search(path):
        return True
    text = str(value)
    if LOGIN_TOKEN.search(path):
        return not isinstance(value, int | float)
    named = path.rpartition(".")[2].lower()
    return bool(ISSUED.search(text) or (named in ("token", "key") and RANDOM.fullmatch(text)))


def _parsed(text: str) -> Any:
    """Read YAML; what is none stays a text, and the command says so later."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
