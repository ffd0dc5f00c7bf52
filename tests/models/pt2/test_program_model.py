"""A program as a model: its axes and the sizes to verify at."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_export.models.load import load_model
from support.factories import Wide
from support.programs import SUBJECTS, VARIES, ProgramFiles, export, noise


def test_the_axes_are_those_that_vary(programs: ProgramFiles) -> None:
    llama = load_model(str(programs.base("llama")))
    assert llama.axes == {name: {0: "batch", 1: "sequence"} for name in SUBJECTS["llama"].inputs}
    assert [sizes["batch"] for sizes in llama.checked_sizes({})] == [1, 3, 4]
    assert [sizes["sequence"] for sizes in llama.checked_sizes({})] == [7, 16, 29]
    cnn = load_model(str(programs.base("cnn")))
    assert cnn.axes == {"picture": {0: "batch"}}
    assert cnn.inputs({"batch": 3}, seed=0)["picture"].shape == (3, 3, 8, 8)


def test_checked_sizes_stay_in_the_programs_range(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=3, max=8)
    path = export(Wide(), {"rows": noise(2, 5, 64)}, tmp_path / "w.pt2", shapes={"rows": {0: VARIES, 1: length}})
    sizes = [each["rows_axis1"] for each in load_model(str(path)).checked_sizes({})]
    assert sizes == [6, 8, 8]
