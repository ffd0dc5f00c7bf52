"""Graphs of onnxruntime-genai's model builder. For the tests of its graphs and of the commands over them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GENERATED_TOKENS = 64


def build_genai_graph(base: Path, folder: Path, precision: str, *options: str) -> Path:
    """The builder's graph of a model, with packed q, k and v, and names of its own. fp16 is built as for a GPU."""
    device = "cuda" if precision == "fp16" else "cpu"
    line = f"-m onnxruntime_genai.models.builder -i {base} -o {folder} -e {device} -p {precision} -c {folder}.cache"
    more = ["--extra_options", *options] if options else []
    subprocess.run([sys.executable, *line.split(), *more], check=True, capture_output=True)
    return folder / "model.onnx"
