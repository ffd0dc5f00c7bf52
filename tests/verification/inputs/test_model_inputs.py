"""The cases of a proof against a PyTorch model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from lora_export.isolation.process import IsolatedProcess
from lora_export.lora import Adapter, TokenRows
from lora_export.models.load import from_module, load_model
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.inputs.model_inputs import case_inputs, in_stated_batch, notes_on_sizes
from support.small_models import small_model

LAYER = torch.nn.Linear(4, 2)
MODEL = from_module(LAYER, {"input": torch.ones(3, 7, 4)})
ANY_SIZE = ModuleRunner(LAYER)


@dataclass
class OfOneLength:
    """A candidate that declares the second axis constant."""

    axes: dict[str, Any] = field(default_factory=lambda: {"input": (3, 7, 4)})
    names_known: bool = True

    def run(self, inputs: Any) -> Any:
        raise AssertionError


def test_three_seeded_cases_of_different_sizes() -> None:
    cases = case_inputs(MODEL, ANY_SIZE)
    shapes = [arrays["input"].shape for arrays in cases.values()]
    assert len(set(shapes)) == 3 and {shape[2] for shape in shapes} == {4}
    again, other = case_inputs(MODEL, ANY_SIZE), case_inputs(MODEL, ANY_SIZE, seed=7)
    for name, arrays in cases.items():
        assert np.array_equal(arrays["input"], again[name]["input"])
        assert not np.array_equal(arrays["input"], other[name]["input"])


def test_a_stated_batch_of_a_model_without_other_sizes_has_three_draws() -> None:
    model = in_stated_batch(from_module(LAYER, {"input": torch.ones(3, 4)}), {"batch": 2})
    cases = case_inputs(model, ANY_SIZE)
    assert list(cases) == ["batch 2", "batch 2, draw 2", "batch 2, draw 3"]
    assert len({arrays["input"].tobytes() for arrays in cases.values()}) == 3


def test_constant_sizes_are_used_and_noted_but_the_batch_varies() -> None:
    shapes = [arrays["input"].shape for arrays in case_inputs(MODEL, OfOneLength()).values()]
    assert {shape[1] for shape in shapes} == {7} and len({shape[0] for shape in shapes}) == 3
    assert notes_on_sizes(OfOneLength(), MODEL) == [
        "the candidate was made for one size of input_axis1, 7: no other was tried"
    ]


def test_declared_limits_are_kept_to_and_noted() -> None:
    limited = ModuleRunner(LAYER, limits={"input": ((0, None), (2, 5), (0, None))})
    shapes = [arrays["input"].shape for arrays in case_inputs(MODEL, limited).values()]
    assert all(2 <= shape[1] <= 5 for shape in shapes)
    assert notes_on_sizes(limited, MODEL) == ["the candidate takes input_axis1 sizes of 2 to 5: no other was tried"]


@pytest.mark.parametrize("plans_memory", [False, True])
def test_the_batch_has_limits_where_memory_is_planned(plans_memory: bool, tmp_path: Path) -> None:
    header = {"axes": {}, "limits": {"input": [[0, 2], [0, 5], [4, 4]]}, "notes": [], "cannot_give": []}
    process = SimpleNamespace(answer=lambda seconds: ({**header, "plans_memory": plans_memory}, {}))
    (tmp_path / "m.pte").write_bytes(b"")
    runner = RegisteredRunner("theirs", open_artifact(tmp_path / "m.pte"), process=cast(IsolatedProcess, process))
    shapes = [arrays["input"].shape for arrays in case_inputs(MODEL, runner).values()]
    assert max(shape[1] for shape in shapes) <= 5
    assert (max(shape[0] for shape in shapes) <= 2) is plans_memory


def test_user_inputs_are_one_more_case(tmp_path: Path) -> None:
    array = np.zeros((1, 2, 4), np.float32)
    np.savez(tmp_path / "mine.npz", input=array)
    cases = case_inputs(MODEL, ANY_SIZE, user_inputs=tmp_path / "mine.npz")
    assert len(cases) == 4 and np.array_equal(cases["mine.npz"]["input"], array)
    np.savez(tmp_path / "other.npz", x=array)
    with pytest.raises(InputRefused, match=r"other.npz contains x; the model takes input"):
        case_inputs(MODEL, ANY_SIZE, user_inputs=tmp_path / "other.npz")
    np.savez(tmp_path / "empty.npz", input=array[:0])
    with pytest.raises(InputRefused, match=r"empty.npz: input has no rows, so that nothing would be compared"):
        case_inputs(MODEL, ANY_SIZE, user_inputs=tmp_path / "empty.npz")


def test_rows_of_an_adapter_are_drawn_beside_the_images_of_a_text(tmp_path: Path) -> None:
    """A model refuses a text with fewer placeholders than its images have features."""
    model = load_model(str(small_model("llava", tmp_path)))
    rows = TokenRows(np.array([5, 41, 42]), np.zeros((3, 32), np.float32))
    adapter = Adapter(name="a", format="test", pairs={}, token_rows={"model.language_model.embed_tokens": rows})
    cases = case_inputs(model, ModuleRunner(model.module), adapters=[adapter])
    plain = case_inputs(model, ModuleRunner(model.module))
    for name, arrays in cases.items():
        is_image = arrays["input_ids"] == model.placeholders[0]
        assert np.array_equal(is_image, plain[name]["input_ids"] == model.placeholders[0])
        assert {41, 42} <= set(arrays["input_ids"][~is_image].tolist())


def test_user_texts_without_images_are_a_case_of_a_model_with_images(tmp_path: Path) -> None:
    model = load_model(str(small_model("llava", tmp_path / "base")))
    np.savez(tmp_path / "texts.npz", input_ids=np.full((2, 6), 7), attention_mask=np.ones((2, 6), np.int64))
    cases = case_inputs(model, ModuleRunner(model.module), user_inputs=tmp_path / "texts.npz")
    assert list(cases["texts.npz"]) == ["input_ids", "attention_mask"]
    assert all("pixel_values" in arrays for name, arrays in cases.items() if name != "texts.npz")
