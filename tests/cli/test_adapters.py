"""`lora-export combine`, `extract`, `resize` and `convert` from door to door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.api import MODEL, an_adapter
from support.cli import Capture, answer, call
from support.handmade import base_file, peft_adapter

A, B = [[1, 2, 3]], [[1], [10]]
C, D = [[0, 1, 0]], [[2], [0]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base_file(tmp_path / "zeros.safetensors", {"fc.weight": np.zeros((2, 3))})
    peft_adapter(tmp_path / "one", {"fc": (A, B)})
    peft_adapter(tmp_path / "two", {"fc": (C, D)})
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((3, 3)), "norm.weight": [1]})
    base_file(tmp_path / "tuned.safetensors", {"fc.weight": np.diag([3, 2, 1]), "norm.weight": [2]})
    diagonal = np.diag([3.0, 2.0, 1.0])  # shares of ‖·‖²: 9, 4 and 1 of 14
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), diagonal), "up": (np.eye(3), 2 * diagonal)})
    peft_adapter(tmp_path / "wide", {"fc": (np.eye(3)[:2], np.ones((2, 2)))})
    (tmp_path / "text.txt").write_text("a text")
    return tmp_path


COMBINE = ("combine", "one", "two", "-o")
MERGE = ("merge", "zeros.safetensors", "one", "two", "-o")
EXTRACT = ("extract", "base.safetensors", "tuned.safetensors", "-o", "adapter", "--layout", "*=out_in")
AS_LORA = ("convert", "big", "-o", "x", "--to", "peft", "--as", "lora", "--rank", "1")
RESIZE = ("resize", "big", "-o", "small")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((*COMBINE, "x", "--method", "ties"), 2, "--combine ties needs --density"),
        ((*COMBINE, "x", "--density", "0.5"), 2, "--combine cat does not use it"),
        (("combine", "one", "-o", "x", "--method", "svd"), 3, "combines several adapters, and there is one"),
        (("combine", "one", "two=one", "-o", "x"), 3, "two is the same adapter as one"),
        (("combine", "one", "wide", "-o", "x", "--method", "linear"), 3, "ranks"),
        (("combine", "-o", "x"), 2, "Missing argument"),
        (("fleet",), 2, "Missing argument 'plan|run|status'. Choose from: plan, run, status\n"),
        (("inspect", "text.txt"), 3, "text.txt is no adapter, checkpoint or graph in a known format"),
        (("combine", "one", "nowhere", "-o", "x"), 3, "nowhere"),
        ((*MERGE, "x.safetensors", "--combine-seed", "1"), 2, "does not use it"),
        ((*MERGE, "x.safetensors", "--combine", "mean"), 2, "mean"),
        ((*MERGE, "x.safetensors", "--combine", "ties"), 2, "--combine ties needs --density"),
        ((*MERGE[:3], "wide", "-o", "x.safetensors", "--combine", "linear"), 3, "ranks"),
        (EXTRACT, 2, "give --rank, or --energy"),
        ((*EXTRACT, "--rank", "2", "--layout", "x"), 2, "x is not NAME=out_in"),
        (("extract", "base.safetensors", "base.safetensors", "-o", "x", "--rank", "1"), 3, "nothing to extract"),
        ((*EXTRACT[:3], "-o", "x", "--rank", "1"), 3, "fc.weight: how it is stored is unknown"),
        (("extract", "base.safetensors", "nowhere", "-o", "x", "--rank", "1"), 3, "no tuned model at nowhere"),
        ((*EXTRACT[:3], "-o", "base.safetensors", "--rank", "1"), 7, "base"),
        (RESIZE, 2, "give --rank, or --energy"),
        (("resize", "nowhere", "-o", "small", "--rank", "1"), 3, "nowhere"),
        ((*RESIZE, "--rank", "0"), 2, "Invalid value for '--rank': 0 is not in the range x>=1"),
        ((*RESIZE, "--energy", "1.1"), 2, "Invalid value for '--energy': 1.1 is not in the range 0<x<=1"),
        ((*RESIZE, "--rank", "2", "-o", "big"), 7, "big"),
        ((*AS_LORA, "--min-kept", "0.65"), 3, "fc: 0.6429 of its change at rank 1"),
        (AS_LORA, 3, "of each layer by --min-kept\nNothing was written.\n"),
        ((*AS_LORA[:-2],), 2, "--as lora needs --rank R"),
        ((*AS_LORA[:6], "--rank", "1"), 2, "--rank is for --as lora"),
        (("convert", "fr", "-o", "x.onnx_adapter"), 2, "--to onnx_adapter needs --for MODEL.onnx, or a .pte"),
        (
            ("convert", "fr", "--for", "m.pte", "--to", "peft", "-o", "x"),
            2,
            "--for m.pte determines the format of the file, so --to peft cannot be chosen beside it",
        ),
        (("convert", "fr", "--for", "m.onnx"), 2, "Missing option '-o'"),
        (("convert", "fr", "--for", "m.onnx", "-o", "x", "--to", "tarot"), 2, "Invalid value for '--to'"),
    ],
)
def test_an_error_has_its_exit_code_and_leaves_nothing(
    place: Path, capsys: Capture, words: tuple[str, ...], code: int, message: str
) -> None:
    before = sorted(place.iterdir())
    assert call(*words) == code
    assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before


def test_combine_prints_one_line(place: Path, capsys: Capture) -> None:
    assert call(*COMBINE, "both", "--weight", "1", "--weight", "2") == 0
    assert capsys.readouterr().out == "wrote both: 1 pair of rank 2 or less, 1 from several adapters\n"
    assert call("merge", "zeros.safetensors", "both", "-o", "out.safetensors") == 0
    assert load_file(place / "out.safetensors")["fc.weight"].tolist() == [[1, 6, 3], [10, 20, 30]]


def test_a_combination_is_one_document(place: Path, capsys: Capture) -> None:
    assert call(*COMBINE, "both", "--combine", "linear", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": "both",
        "modules": 1,
        "shared": 1,
        "largest_rank": 1,
        "notes": [],
    }


def test_merge_combines_by_name(place: Path, capsys: Capture) -> None:
    assert call(*MERGE, "out.safetensors", "--combine", "magnitude_prune", "--density", "0.5") == 0
    assert "note: the pairs of each weight are combined by magnitude_prune (density 0.5), as PEFT" in (
        capsys.readouterr().err
    )
    # Of one: A (0, 0, 3), B (0, 10). Of two: A (0, 1, 0) or the first zero of two equal ones; B (2, 0).
    assert load_file(place / "out.safetensors")["fc.weight"].tolist() == [[0, 2, 6], [0, 10, 30]]


def test_pairs_and_whole_tensors_are_printed(place: Path, capsys: Capture) -> None:
    assert call(*EXTRACT, "--rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["wrote adapter: 1 pair of rank 2, 92.9% of ‖ΔW‖²", "1 tensor saved whole: norm.weight"]
    assert lines[3].split() == ["fc", "3", "x", "3", "2", "3", "3.742", "92.9%"]


def test_an_extraction_is_one_document(place: Path, capsys: Capture) -> None:
    assert call(*EXTRACT, "--energy", "0.6", "--exclude", "norm", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lora-export/extract-result/1"
    assert [(layer["module"], layer["rank"]) for layer in document["layers"]] == [("fc", 1)]
    assert (document["whole"], document["excluded"]) == ([], ["norm.weight"])


def test_the_share_of_each_layer_is_printed(place: Path, capsys: Capture) -> None:
    assert call(*RESIZE, "--rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote small: 2 pairs of rank 2, 92.9% of ‖ΔW‖²"
    assert lines[2].split() == ["fc", "3", "x", "3", "2", "3", "3.742", "92.9%"]


def test_json_has_every_layer(place: Path, capsys: Capture) -> None:
    assert call(*RESIZE, "--energy", "0.6", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lora-export/resize-result/1" and document["output"] == "small"
    assert [tuple(layer[name] for name in ("module", "rank", "of_rank")) for layer in document["layers"]] == [
        *(("fc", 1, 3), ("up", 1, 3))
    ]
    assert document["share"] == pytest.approx(9 / 14)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    assert call("onnx", MODEL, "--lora", "inputs", "--target", "dense", "--no-verify", "-o", path) == 0
    return path


def test_what_was_written_is_printed(graph: Path, tmp_path: Path, capsys: Capture) -> None:
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


def test_an_adapter_that_does_not_fit_ends_with_3(graph: Path, tmp_path: Path, capsys: Capture) -> None:
    other = peft_adapter(tmp_path / "other", {"elsewhere": ([[1.0] * 8], [[1.0]] * 8)})
    assert call("convert", other, "--for", graph, "-o", tmp_path / "o.onnx_adapter") == 3
    assert "elsewhere" in capsys.readouterr().err and not (tmp_path / "o.onnx_adapter").exists()


def test_an_existing_file_is_kept_without_overwrite(graph: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "fr.onnx_adapter"
    out.write_bytes(b"old")
    assert call("convert", an_adapter(tmp_path / "fr"), "--for", graph, "-o", out) == 7
    assert out.read_bytes() == b"old" and "--overwrite" in capsys.readouterr().err


def test_a_conversion_to_lora_reports_what_each_layer_keeps(place: Path, capsys: Capture) -> None:
    code, document = answer(capsys, *AS_LORA, "--min-kept", "0.64")
    assert (code, document["pairs"], document["share"]) == (0, 2, pytest.approx(9 / 14))
    assert [(layer["module"], layer["rank"], layer["of_rank"]) for layer in document["layers"]] == [
        ("fc", 1, 3),
        ("up", 1, 3),
    ]
    assert json.loads((place / "x/lora_export.json").read_text())["settings"]["min_kept"] == 0.64
    assert call(*AS_LORA[:3], "y", *AS_LORA[4:], "--min-kept", "0.64") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote y: 2 pairs of rank 1, 64.3% of ‖ΔW‖²" and lines[1].startswith(
        "layers with the least share"
    )
    assert load_file(place / "y/adapter_model.safetensors")["base_model.model.fc.lora_A.weight"].shape == (1, 3)
