"""`python -m megatron_longpo COMMAND ...`, the form that launchers start."""

from __future__ import annotations

import sys

from megatron_longpo.cli import main

# Saving a checkpoint spawns a process that imports this file again.
if __name__ == "__main__":
    sys.exit(main())
