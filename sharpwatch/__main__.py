"""`python -m sharpwatch` is the `sharpwatch` command."""

from __future__ import annotations

import sys

from sharpwatch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
