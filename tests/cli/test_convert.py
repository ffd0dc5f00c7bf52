"""`lora-export convert`: what is printed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.api import MODEL, an_adapter
from support.cli import answer, call
from support.handmade import peft_adapter


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    assert call("onnx", MODEL, "--lora", "inputs", "--target", "dense", "--no-verify", "-o", path) == 0
    return path


def test_what_was_written_is_printed(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = an_adapter(tmp_path / "fr"), tmp_path / "fr.onnx_adapter"
    capsys.readouterr()
    assert call("convert", adapter, "--for", graph, "-o", out) == 0
    size = f"{out.stat().st_size:,}"
    assert capsys.readouterr().out == f"wrote {out} ({size} bytes): an adapter for 1 of 1 weights\n"
    code, document = answer(capsys, "convert", adapter, "--for", graph, "-o", out, "--overwrite")
    assert (code, document["output"], document["weights"], document["of"]) == (0, str(out), 1, 1)


def test_the_weight_is_a_factor_on_the_scale(graph: Path, tmp_path: Path) -> None:
    half, one = tmp_path / "half.onnx_adapter", tmp_path / "one.onnx_adapter"
    assert call("convert", an_adapter(tmp_path / "fr"), "--weight", "0.5", "--for", graph, "-o", half) == 0
    assert call("convert", an_adapter(tmp_path / "fr", scale=0.5), "--for", graph, "-o", one) == 0
    line = ("verify", graph, "--model", MODEL, "-a", tmp_path / "fr", "--onnx-adapter")
    assert call(*line, half) == 0 and call(*line, one) == 0


def test_an_adapter_that_does_not_fit_ends_with_3(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = peft_adapter(tmp_path / "other", {"elsewhere": ([[1.0] * 8], [[1.0]] * 8)})
    assert call("convert", other, "--for", graph, "-o", tmp_path / "o.onnx_adapter") == 3
    assert "elsewhere" in capsys.readouterr().err and not (tmp_path / "o.onnx_adapter").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "x.onnx_adapter"), "--to onnx_adapter needs --for MODEL.onnx, and no other format has it"),
        (("--for", "m.onnx"), "Missing option '-o'"),
        (("--for", "m.onnx", "-o", "x", "--to", "tarot"), "Invalid value for '--to'"),
    ],
)
def test_wrong_usage_ends_with_2(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", "fr", *words) == 2
    assert message in capsys.readouterr().err


def test_an_existing_file_is_kept_without_overwrite(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fr.onnx_adapter"
    out.write_bytes(b"old")
    assert call("convert", an_adapter(tmp_path / "fr"), "--for", graph, "-o", out) == 7
    assert out.read_bytes() == b"old" and "--overwrite" in capsys.readouterr().err
