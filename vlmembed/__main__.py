"""``python -m vlmembed``."""

from vlmembed.cli import main

if __name__ == "__main__":
    main()
