"""The files of an encoder-decoder's three graphs in a folder, as optimum names them."""

from __future__ import annotations

from pathlib import Path

ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
GRAPH_FILES = (ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE)


def is_encoder_decoder_folder(path: Path) -> bool:
    """Whether a folder has the three graphs of an encoder-decoder."""
    return path.is_dir() and all((path / name).is_file() for name in GRAPH_FILES)
