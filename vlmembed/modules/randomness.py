"""The random state of a process, as a checkpoint can hold it: tensors and plain values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]


def random_state() -> RandomState:
    """Return the state of all generators that a run may draw from: PyTorch's, Python's and NumPy's."""
    version, words, next_gauss = random.getstate()
    # The global one: what a user's own part may draw from.
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        # This process's own device.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), next_gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss],
    }


def restore_random_state(state: RandomState) -> None:
    """Go on with the numbers that would have come after `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, has_gauss, gauss))  # noqa: NPY002
