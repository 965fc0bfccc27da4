"""How the tests check annotations: shapes and types of tensors, and nothing else.

The rest is the package's own to refuse, with a better message than a type checker's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function where its annotations speak of tensors."""
    annotations = getattr(function, "__annotations__", {})
    return beartype(function) if any("Tensor" in str(annotation) for annotation in annotations.values()) else function
