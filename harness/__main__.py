"""`python -m harness` is `nemotron-bridge`, for where the command is not on the path."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from harness.cli import main

        main()
    except KeyboardInterrupt:  # while it imports itself
        sys.exit(130)
