"""What several tests share: genai."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOKENS = 64


def build(base: Path, folder: Path, precision: str, *options: str) -> Path:
    """What the builder makes of a model: q, k and v packed, under names of its own; in fp16 as for a GPU."""
    device = "cuda" if precision == "fp16" else "cpu"
    line = f"-m onnxruntime_genai.models.builder -i {base} -o {folder} -e {device} -p {precision} -c {folder}.cache"
    more = ["--extra_options", *options] if options else []
    subprocess.run([sys.executable, *line.split(), *more], check=True, capture_output=True)
    return folder / "model.onnx"
