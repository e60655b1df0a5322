"""`python -m harness` is `nemotron-bridge`, for where the command is not on the path."""

from __future__ import annotations

from harness.cli import main

if __name__ == "__main__":
    main()
