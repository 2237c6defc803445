"""`python -m jaxinfer.serve`: the same as `jaxinfer serve`.

The command line's own entry point is found by name, not imported, because this package stands below it; it reads the flags before
anything heavy is imported.
"""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("jaxinfer.__main__").main(["serve", *sys.argv[1:]]))
