"""What the pre-commit hook runs: read every adapter among the files that are committed, as a merge would."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lora_export import formats
from lora_export.errors import InputRefused

OF_A_FOLDER = ("adapter_config.json", "adapter_model")  # beginnings of names of files that are an adapter together


def main(names: Sequence[str]) -> int:
    """Print what is wrong with each adapter. Returns 1 where something is, else 0."""
    paths = map(Path, names)
    adapters = dict.fromkeys(path.parent if path.name.startswith(OF_A_FOLDER) else path for path in paths)
    refused = 0
    for path in adapters:
        try:
            if formats.load(path).is_identity:
                raise InputRefused(f"{path} has no effect: every B (or A, or scale) is zero, as before training")
        except InputRefused as error:
            print(error, file=sys.stderr)
            refused += 1
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
