"""How the tests check annotations: shapes and types of tensors, and nothing else.

The rest is the package's own to refuse, with a better message than a type checker's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

#: An int is a float to everyone else.
configured = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function where its annotations speak of tensors."""
    annotations = getattr(function, "__annotations__", {})
    return configured(function) if any("Tensor" in str(annotation) for annotation in annotations.values()) else function
