"""A program as a model: its axes and the sizes to verify at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuzz.targets import run
from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from lora_export.models.pt2 import program
from support.factories import Wide
from support.hostile_programs import Change, changed
from support.programs import SUBJECTS, VARIES, ProgramFiles, export, noise


def test_the_axes_are_those_that_vary(programs: ProgramFiles) -> None:
    llama = load_model(str(programs.base("llama")))
    assert llama.axes == {name: {0: "batch", 1: "sequence"} for name in SUBJECTS["llama"].inputs}
    assert [sizes["batch"] for sizes in llama.checked_sizes({})] == [1, 3, 4]
    assert [sizes["sequence"] for sizes in llama.checked_sizes({})] == [5, 16, 29]
    cnn = load_model(str(programs.base("cnn")))
    assert cnn.axes == {"picture": {0: "batch"}}
    assert cnn.inputs({"batch": 3}, seed=0)["picture"].shape == (3, 3, 8, 8)


def test_checked_sizes_stay_in_the_programs_range(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=3, max=8)
    path = export(Wide(), {"rows": noise(2, 5, 64)}, tmp_path / "w.pt2", shapes={"rows": {0: VARIES, 1: length}})
    sizes = [each["rows_axis1"] for each in load_model(str(path)).checked_sizes({})]
    assert sizes == [6, 8, 8]


def test_ids_are_in_range_and_masks_have_padding(programs: ProgramFiles) -> None:
    drawn = load_model(str(programs.base("words"))).inputs({"batch": 5, "sequence": 29}, seed=1)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in drawn.items()} == dict.fromkeys(
        SUBJECTS["words"].inputs, (torch.int64, (5, 29))
    )
    assert set(drawn["ids"].unique().tolist()) == set(range(10))
    mask = drawn["mask"]
    assert set(mask.unique().tolist()) == {0, 1}
    assert (mask[:, 0] == 0).any() and (mask[1:] == 0).any(1).all()
    again = load_model(str(programs.base("words"))).inputs({"batch": 5, "sequence": 29}, seed=1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


class Numbers(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return x * n[:, None]


def test_integers_of_unknown_range_are_refused(tmp_path: Path) -> None:
    path = export(Numbers(), {"x": noise(2, 4), "n": torch.tensor([1, 2])}, tmp_path / "numbers.pt2")
    program.load_program(path)
    with pytest.raises(InputRefused, match="the integer input n indexes no embedding table"):
        load_model(str(path))


def hints(value: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        for tensor in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in tensor["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["hint"] = {"as_int": value}

    return change


def sizes(*values: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        for name in ("ids", "mask"):
            tensor = graph["graph_module"]["graph"]["tensor_values"][name]
            tensor["sizes"] = [{"as_int": value} for value in values]

    return change


def ranges(low: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        graph["range_constraints"] = {name: {"min_val": low, "max_val": None} for name in graph["range_constraints"]}

    return change


def no_inputs(graph: dict[str, Any]) -> None:
    inner, specs = graph["graph_module"]["graph"], graph["graph_module"]["signature"]["input_specs"]
    own = [number for number, spec in enumerate(specs) if "user_input" not in spec]
    inner["inputs"], specs[:] = [inner["inputs"][number] for number in own], [specs[number] for number in own]
    inner["nodes"], inner["outputs"] = [], inner["inputs"][:1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [(sizes(1 << 40, 4), "too large to run"), (ranges(1 << 40), "too large to run"), (no_inputs, "takes 0 inputs")],
)
def test_inputs_too_large_or_missing_are_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    path = changed(good, tmp_path, change)
    code, output, message = run("verify", path, "--model", path)
    assert (code, output) == (3, "") and problem in message, message


@pytest.mark.parametrize("hint", [1 << 40, -5, 0])
def test_false_hints_do_not_change_the_sizes(good: Path, tmp_path: Path, hint: int) -> None:
    base = load_model(str(changed(good, tmp_path, hints(hint))))
    assert [sizes["sequence"] for sizes in base.checked_sizes({})] == [5, 16, 29]
    assert all(size > 0 for size in base.traced_sizes.values())
