"""`lora-export merge` from door to door: what it writes, says and ends with."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_export import cli
from lora_export.storage.manifest import read_manifest
from support.folder_contents import folder_contents
from support.handmade import base_file, peft_adapter

W = np.arange(6).reshape(2, 3)
A, B = [[1, 2, 3]], [[1], [10]]
BA = np.array([[1, 2, 3], [10, 20, 30]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base and an adapter for it."""
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": W, "norm.weight": [1, 1]})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    peft_adapter(tmp_path / "adapter", {"fc": (A, B)})
    return tmp_path


def run(place: Path, *arguments: object) -> int:
    """`merge` with `base`, `adapter` and `out` standing for the places of these names; returns the exit code."""
    names = {"base", "adapter", "out", "other"}
    return cli.run(["merge", *(str(place / word) if word in names else str(word) for word in arguments)])


def result(folder: Path) -> list[list[float]]:
    return load_file(folder / "model.safetensors")["fc.weight"].tolist()


# --- The layout of square matrices ---

SQUARE = np.arange(4).reshape(2, 2)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with a bare file of a square matrix, and an adapter that records no layout."""
    base_file(tmp_path / "base.safetensors", {"fc.weight": SQUARE, "up.weight": [[1, 1]]})
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2]], [[1], [10]]), "up": ([[1]], [[1], [1]])}, layout="")
    return tmp_path


def test_an_unknown_layout_is_refused_by_name(bare, capsys):
    out = bare / "out.safetensors"
    assert run(bare, bare / "base.safetensors", "adapter", "-o", out) == 3
    output = capsys.readouterr()
    assert (
        "the layout of 1 square matrix is unknown: fc.weight. Neither the base nor the adapter determines" in output.err
    )
    assert "--layout NAME=out_in or --layout NAME=in_out" in output.err
    assert sorted(path.name for path in bare.iterdir()) == ["adapter", "base.safetensors"]


@pytest.mark.parametrize(("layout", "change"), [("out_in", [[1, 2], [10, 20]]), ("in_out", [[1, 10], [2, 20]])])
def test_the_layout_option_decides(bare, capsys, layout, change):
    out = bare / "out.safetensors"
    arguments = (bare / "base.safetensors", "adapter", "-o", out, "--layout", f"f*={layout}")
    assert run(bare, *arguments, "--dry-run") == 0
    output = capsys.readouterr().out
    assert f"fc.weight  [2 x 2 float32, {layout} by option]" in output
    assert "up.weight  [1 x 2 float32, in_out by shape]" in output
    assert not out.exists()
    assert run(bare, *arguments) == 0
    assert load_file(out)["fc.weight"].tolist() == (SQUARE + change).tolist()
    assert load_file(out)["up.weight"].tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("fc=conv", 2, "fc=conv is not NAME=out_in or NAME=in_out"),
        ("fd=in_out", 3, "--layout fd=in_out: no matrix of the base has this name"),
        ("*=out_in", 3, "--layout states that up.weight is out_in, but with the shape (1, 2), the adapter's is in_out"),
    ],
)
def test_a_wrong_layout_option_is_refused(bare, capsys, text, code, message):
    assert run(bare, bare / "base.safetensors", "adapter", "-o", bare / "out.safetensors", "--layout", text) == code
    assert message in " ".join(capsys.readouterr().err.split())


# --- 0 ---


def test_a_merge_writes_the_model_and_says_so(place, capsys):
    before = folder_contents(place)
    assert run(place, "base", "adapter", "-o", "out", "-v") == 0
    assert result(place / "out") == (W + BA).tolist()
    assert {name: content for name, content in folder_contents(place).items() if not name.startswith("out/")} == before
    told = capsys.readouterr()
    assert told.err == ""
    summary, _, row = told.out.splitlines()
    assert summary.startswith("1 weight merged; ") and f"written to {place / 'out'}" in summary
    assert row.split() == ["fc.weight", "5.07", "1.0000", "0", "100.0%"]


def test_a_bare_file_becomes_a_bare_file(place):
    assert run(place, place / "base/model.safetensors", "adapter", "-o", place / "merged.safetensors") == 0
    assert load_file(place / "merged.safetensors")["fc.weight"].tolist() == (W + BA).tolist()
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "merged.safetensors"}


def test_json_is_exactly_one_document_on_stdout(place, capsys):
    (place / "base/pytorch_model.bin").touch()
    assert run(place, "base", "adapter", "-o", "out", "--json") == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert told.out.count("\n") == 1
    assert (document["output"], document["schema"]) == (str(place / "out"), "lora-export/merge-report/1")
    assert document["results"][0]["weight"] == "fc.weight" and document["results"][0]["retention"] == 1
    assert document["bytes"] == (place / "out/model.safetensors").stat().st_size
    assert "pytorch_model.bin" in told.err


def test_what_was_decided_and_what_was_left_out_is_told(place, capsys):
    (place / "base/pytorch_model.bin").touch()
    peft_adapter(place / "adapter", {"model.fc": (A, B)}, {"score.weight": np.ones((2, 3), np.float32)})
    assert run(place, "base", "adapter", "-o", "out") == 0
    assert capsys.readouterr().err.splitlines() == [
        "note: adapter: the adapter's names have the prefix `model.`, which the base's names lack; resolved.",
        "note: the base has no score.weight: it is added.",
        "note: the base's tensors gain the prefix `model.`, so that the added head finds its model.",
        "note: pytorch_model.bin contains weights too, unmerged ones; it is left out",
    ]
    assert not (place / "out/pytorch_model.bin").exists()


def test_weights_multiply_the_adapters_in_order(place):
    peft_adapter(place / "other", {"fc": (A, B)}, lora_alpha=3)
    assert run(place, "base", "adapter", "other", "--weight", "0.5", "--weight", "-1", "-o", "out") == 0
    assert result(place / "out") == (W - 2.5 * BA).tolist()


def test_adapters_of_one_name_are_told_apart_by_a_given_one(place, capsys):
    peft_adapter(place / "sub/adapter", {"fc": (A, B)}, lora_alpha=3)
    assert run(place, "base", "adapter", place / "sub/adapter", "-o", "out") == 3
    assert "2 adapters are called adapter; give them different names" in capsys.readouterr().err
    assert run(place, "base", "adapter", f"second={place / 'sub/adapter'}", "-o", "out") == 0
    manifest = read_manifest(place / "out")
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["adapter", "second"]


def test_a_conversion_is_stored_as_asked(place):
    assert run(place, "base", "adapter", "--dtype", "bfloat16", "-o", "out") == 0
    assert load_file(place / "out/model.safetensors")["norm.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((place / "out/config.json").read_text()) == {"model_type": "llama", "dtype": "bfloat16"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    before = folder_contents(place)
    assert run(place, "base", "adapter", "--dry-run", "-o", "out") == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 weight changed, 1 kept as it is",
        "  fc.weight  [2 x 3 float32]  1 * B A (rank 1, adapter)",
    ]
    assert run(place, "base", "adapter", "--dry-run", "--json", "-o", "out") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lora-export/plan/1"
    assert document["steps"][0]["spec"]["name"] == "fc.weight"
    assert folder_contents(place) == before


def test_a_dry_run_tells_each_note_once(place, capsys):
    peft_adapter(place / "adapter", {"model.fc": (A, B)})
    assert run(place, "base", "adapter", "--dry-run", "-o", "out") == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("have the prefix `model.`") == 1


def test_a_change_that_rounding_thins_out_is_warned_of(place, capsys):
    # 256 + 1 stays 256 in bf16, 256 + 2 is 258: 4 of 5 parts arrive.
    base_file(
        place / "base/model.safetensors", {"fc.weight": [[256, 256]], "fine.weight": [[1, 1]]}, ml_dtypes.bfloat16
    )
    peft_adapter(place / "adapter", {"fc": ([[1, 2]], [[1]]), "fine": ([[1, 1]], [[1]])})
    assert run(place, "base", "adapter", "-o", "out") == 0
    assert capsys.readouterr().err == (
        "warning: rounding took more than a tenth of the change of 1 of 2 weights, most of fc.weight (80% is left); "
        "--dtype float32 keeps it\n"
    )


# --- 2 ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "-o", "out"), "Missing argument '[NAME=]ADAPTER...'"),
        (("base", "adapter"), "Missing option '-o' / '--output'"),
        (("base", "adapter", "-o", "out", "--dtype", "float8"), "'float8' is not one of"),
        (("base", "adapter", "-o", "out", "--weight", "much"), "'much' is not a valid float"),
        (("base", "adapter", "-o", "out", "--min-retention", "2"), "2.0 is not in the range 0<=x<=1"),
        (
            ("base", "adapter", "-o", "out", "--weight", "1", "--weight", "2"),
            "1 adapter but 2 weights; give one --weight",
        ),
        (
            ("base", "adapter", "-o", "out.safetensors"),
            "base is a folder, and so is its merge: -o out.safetensors is the",
        ),
    ],
)
def test_wrong_usage_ends_with_2(place, capsys, arguments, message):
    assert run(place, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


# --- 3 ---


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    before = folder_contents(place)
    assert run(place, *arguments, "-o", "out") == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert folder_contents(place) == before and not (place / "out").exists()
    assert told.err.endswith("\nNothing was written.\n") is ("--dry-run" not in arguments)
    return told.err.removesuffix("Nothing was written.\n")


@pytest.mark.fault(6, 15)
def test_misfits_are_listed_at_once_and_nothing_is_written(place, capsys):
    peft_adapter(place / "adapter", {"fc": ([[1, 2]], B), "gate": (A, B), "norm": (A, B)})
    assert refused(place, capsys, "base", "adapter") == (
        "Error: 3 of 3 targets do not fit the base.\n"
        "  in adapter:\n"
        "    base_model.model.fc.lora_A.weight: fc.weight is (2, 3) (out, in), the adapter was trained on (2, 2)\n"
        "    base_model.model.gate.lora_A.weight: the base has no weight for gate\n"
        "    base_model.model.norm.lora_A.weight: norm.weight (2,) is not the weight of a linear layer, a convolution "
        "or an embedding\n"
    )


def test_swapped_arguments_are_named(place, capsys):
    (place / "base" / "config.json").write_text("{}")
    swapped = f"Error: {place / 'adapter'} is an adapter, and {place / 'base'} is a model. Did you swap them?\n"
    assert refused(place, capsys, "adapter", "base") == swapped
    alone = f"Error: {place / 'adapter'} is an adapter. Name the model that it is for\n"
    assert refused(place, capsys, "adapter", "adapter") == alone
    told = refused(place, capsys, "base", "base")
    assert told == f"Error: {place / 'base'} is a model, and no adapter: it has a config.json, and no adapter's file\n"


def test_a_missing_base_or_adapter_is_named(place, capsys):
    assert refused(place, capsys, "other", "adapter") == f"Error: there is no base model at {place / 'other'}\n"
    assert refused(place, capsys, "base", "other") == f"Error: there is no adapter at {place / 'other'}\n"


@pytest.mark.fault(14)
def test_a_loss_beyond_the_limit_is_refused_and_leaves_nothing(place, capsys):
    base_file(place / "base/model.safetensors", {"fc.weight": [[256, 256]]}, ml_dtypes.bfloat16)
    peft_adapter(place / "adapter", {"fc": ([[1, 2]], [[1]])})
    told = refused(place, capsys, "base", "adapter", "--min-retention", "0.9")
    assert "fc.weight: 80.0% of the change kept, noise 45%" in told
    assert {path.name for path in place.iterdir()} == {"base", "adapter"}
    assert run(place, "base", "adapter", "--min-retention", "0.75", "-o", "out") == 0


@pytest.mark.fault(21)
def test_the_plan_of_a_second_merge_of_one_adapter_is_refused(place, capsys):
    assert run(place, "base", "adapter", "-o", place / "once") == 0
    capsys.readouterr()
    told = refused(place, capsys, place / "once", "adapter", "--dry-run")
    assert "already contains the adapter adapter (merged as adapter" in told


# --- 7 ---


@pytest.mark.fault(34)
def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(place, capsys):
    assert run(place, "base", "adapter", "-o", "out") == 0
    old = folder_contents(place / "out")
    assert run(place, "base", "adapter", "--weight", "2", "-o", "out") == 7
    assert capsys.readouterr().err == f"Error: {place / 'out'} exists already; add --overwrite to replace it\n"
    assert folder_contents(place / "out") == old
    assert run(place, "base", "adapter", "--weight", "2", "--overwrite", "-o", "out") == 0
    assert result(place / "out") == (W + 2 * BA).tolist()


# --- Signals and strange names ---


def test_an_adapters_name_cannot_steer_the_terminal(place, capsys):
    named = f"\x1b[2J={place / 'adapter'}"
    assert run(place, "base", named, "-o", "out", "--dry-run") == 0
    assert r"1 * B A (rank 1, \x1b[2J)" in capsys.readouterr().out
    peft_adapter(place / "adapter", {"gone": (A, B)})
    assert run(place, "base", named, "-o", "out") == 3
    assert r"  in \x1b[2J:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["xxh3_128", "sha256"])
def test_a_merged_folder_is_checked_against_what_was_recorded(place, capsys, name):
    assert run(place, "base", "adapter", "-o", "out", "--hash", name) == 0
    recorded = json.loads((place / "out/lora_export.json").read_text())
    assert list(recorded["base"]["model.safetensors"]) == [name]
    assert cli.run(["inspect", str(place / "out"), "--check"]) == 0
    assert f"note: every file that the record of {place / 'out'} names is what was written" in capsys.readouterr().err
    with (place / "out/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert cli.run(["inspect", str(place / "out")]) == 0  # headers alone do not show it
    capsys.readouterr()
    assert cli.run(["inspect", str(place / "out"), "--check"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        f"Error: {place / 'out'} is not what was written:",
        "  model.safetensors contains other bytes than were written",
    ]
