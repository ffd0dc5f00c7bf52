"""Which folders have the graphs of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.runtime.encoder_decoder_files import GRAPH_FILES, is_encoder_decoder_folder


def test_folder_with_all_three_graphs_is_one(tmp_path: Path) -> None:
    for name in GRAPH_FILES:
        assert not is_encoder_decoder_folder(tmp_path)
        (tmp_path / name).touch()
    assert is_encoder_decoder_folder(tmp_path)
    assert not is_encoder_decoder_folder(tmp_path / GRAPH_FILES[0])


@pytest.mark.parametrize("name", GRAPH_FILES)
def test_folder_that_lacks_one_is_none(tmp_path: Path, name: str) -> None:
    for other in GRAPH_FILES:
        (tmp_path / other).touch()
    (tmp_path / name).unlink()
    assert not is_encoder_decoder_folder(tmp_path)
