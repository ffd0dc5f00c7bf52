"""A model as an argument: a path, a name or an object in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lora_export.api import load_model
from lora_export.errors import InputRefused
from support import FACTORIES
from support.api import MODEL
from support.small_layers import a_model
from support.small_models import small_model

if TYPE_CHECKING:
    from support.stores import Stored


def test_a_model_is_resolved_from_a_factory_a_module_or_itself() -> None:
    from_factory = load_model.resolve_model(MODEL)
    assert from_factory.source == MODEL and load_model.resolve_model(from_factory) is from_factory
    module = a_model()
    of_module = load_model.resolve_model((module, torch.ones(2, 3)))
    assert type(of_module.module) is type(module) and torch.equal(of_module.module[0].weight, module[0].weight)
    half = load_model.resolve_model(MODEL, dtype="float16")
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float16}
    with pytest.raises(InputRefused, match="a model in memory is used in its own precision, not in float16"):
        load_model.resolve_model((module, torch.ones(2, 3)), dtype="float16")


@pytest.mark.parametrize(
    ("source", "named"),
    [(a_model(), "Sequential"), ([a_model(), 1], "list"), ((a_model(), 1, 2), "tuple"), ((len, 1), "builtin_function")],
)
def test_what_is_no_model_is_refused(source: object, named: str) -> None:
    with pytest.raises(InputRefused, match=f"{named}.* is no model: give a path, \\(module, example_inputs\\), or"):
        load_model.resolve_model(source)


def test_the_paths_of_a_model_are_those_that_exist(tmp_path: Path) -> None:
    assert load_model.model_paths(MODEL) == [FACTORIES]
    assert load_model.model_paths(tmp_path) == [tmp_path]
    assert (
        load_model.model_paths("package.module:factory") == load_model.model_paths((a_model(), torch.ones(2, 3))) == []
    )


@pytest.mark.parametrize("model", ["m.pt2", Path("m.pt2")])
def test_a_program_is_no_model_to_export(model: str | Path) -> None:
    with pytest.raises(InputRefused, match=r"m\.pt2 is an exported program already"):
        load_model.refuse_pt2(model)
    load_model.refuse_pt2("base")


def test_inputs_of_a_model_may_be_in_a_store(tmp_path: Path, stored: Stored) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.full((2, 5), 3))
    stored.put("x.npz", (tmp_path / "x.npz").read_bytes())
    folder = small_model("bert", tmp_path / "base")
    on_disk, in_store = (
        load_model.resolve_model(folder, inputs=inputs, export=True)
        for inputs in (tmp_path / "x.npz", str(stored / "x.npz"))
    )
    assert in_store.input_names == on_disk.input_names
