"""``python -m vlmembed``."""

import logging
import warnings

from vlmembed.cli import main


def quiet_libraries() -> None:
    """Keep advertisements and warnings that only developers of other libraries can act on off the console."""
    # What Lightning says of its own code, and of tools that it sells.
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", ".*`is_gradient_checkpointing` is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


if __name__ == "__main__":
    quiet_libraries()
    main()
