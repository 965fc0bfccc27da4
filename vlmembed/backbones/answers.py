"""The two rows of a language-model head that a yes and a no are scored by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, stack
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HEAD = "lm_head.weight"


def answer_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the token of each word.

    Raises:
        ValueError: If a word is not one token, or two words are the same one.
    """
    tokens = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, ids in zip(words, tokens, strict=True):
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"The answer {word!r} is {len(ids)} tokens of this checkpoint ({pieces}), and a score needs one. "
                "Choose another word for the head's yes or no."
            )
    if len({ids[0] for ids in tokens}) < len(words):
        raise ValueError(f"The answers {list(words)} are the same token; a score is the difference of two.")
    return [ids[0] for ids in tokens]


def head_rows(checkpoint: str, tokens: Sequence[int], **source: Any) -> Float[Tensor, "tokens H"]:
    """Read rows of a checkpoint's language-model head, where it is not its token embeddings, and nothing else.

    Args:
        checkpoint: A folder, or a Hub id.
        tokens: Which rows.
        **source: As for ``from_pretrained``.

    Raises:
        ValueError: If there is no such head.
    """
    source.pop("trust_remote_code", None)
    index = cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **source)
    name = SAFE_WEIGHTS_NAME
    if index is not None:
        name = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(HEAD, SAFE_WEIGHTS_NAME)
    path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **source)
    if path is not None:
        with safe_open(path, framework="pt") as file:
            if HEAD in [*file.keys()]:
                rows = file.get_slice(HEAD)
                return stack([rows[token] for token in tokens])
    raise ValueError(
        f"The checkpoint {checkpoint!r} has no {HEAD} in safetensors, so there are no logits of yes and no. Use "
        "another score head, such as vlmembed.heads.Linear."
    )
