"""Where a sample puts what it makes."""

from __future__ import annotations

import sys
from pathlib import Path


def new_folder(name: str) -> Path:
    """The folder that the command line names, or `name`. Ends the program where something is there."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else name)
    if folder.exists():
        sys.exit(f"{folder} exists already. Remove it, or name another folder: python {sys.argv[0]} FOLDER")
    return folder
