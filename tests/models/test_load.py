"""What MODEL may name, its dtype, and weights from a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.load import from_module, load_model, module_with_weights, with_inputs_from
from lora_export.models.model import Model
from support import FACTORIES


def test_a_model_and_its_float_inputs_are_converted_to_the_dtype() -> None:
    loaded = load_model(f"{FACTORIES}:worded", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in loaded.example_inputs().values()} == {torch.int64}
    floats = load_model(f"{FACTORIES}:scaled", dtype=torch.float16).example_inputs()
    assert {value.dtype for value in floats.values()} == {torch.float16}
    assert loaded.notes == ("the model runs in bfloat16, and its weights are rounded to it (dtype=)",)


class Doubled(nn.Linear):
    """2 x, of the name that a wrapper's forward does not have."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * values)


ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)


def with_lora(module: nn.Module, *names: str) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(OrderedDict(inner=module)), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # as wrapped as by another backend, and nothing else is looked at


def second(module: nn.Module) -> nn.Module:
    model = with_lora(module, "one", "two")
    model.set_adapter("two")
    return model


def without_adapter(module: nn.Module) -> nn.Module:
    model = with_lora(module, "one")
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    "wrapped",
    [compiled, nn.DataParallel, lambda module: compiled(nn.DataParallel(module)), second, without_adapter],
    ids=["compiled", "parallel", "both", "second adapter of PEFT", "disabled adapter of PEFT"],
)
def test_what_is_around_a_module_is_left_out(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(1)
    given = wrapped(Doubled(4, 2).double())
    loaded = from_module(given, ROWS.double())
    inner = getattr(given, "_orig_mod", given)
    expected = getattr(inner, "module", inner)(ROWS.double())  # without a compiler and devices
    assert list(loaded.axes) in (["values"], ["input"]) and loaded.example_inputs().popitem()[1].dtype == torch.float32
    torch.testing.assert_close(loaded.module(ROWS), expected.float())


@pytest.mark.parametrize(
    ("module", "example", "reason"),
    [
        (torch.jit.script(nn.Linear(4, 2)), ROWS, "is a module of TorchScript: give the module that it was made from"),
        (nn.Linear(4, 2, device="meta"), ROWS, "Linear has weights on the device meta, which have no values"),
        (nn.Linear(4, 2), ROWS.to("meta"), "the example inputs are on the device meta"),
        (nn.Linear(4, 2), ROWS.to_sparse(), "example inputs are dense tensors"),
        (nn.Linear(4, 2), ROWS[:, :3], r"Linear itself fails on the inputs \(input\): mat1 and mat2 shapes"),
    ],
)
def test_a_module_that_does_not_run_is_refused_with_the_reason(
    module: nn.Module, example: torch.Tensor, reason: str
) -> None:
    with pytest.raises(InputRefused, match=reason):
        from_module(module, example)


class Turned(nn.Linear):
    """Rows of 4 numbers, turned as two complex ones (Llama's rotary positions), with a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("angles", torch.polar(torch.ones(2), torch.tensor([1.0, 2.0])), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        pairs = super().forward(rows).float().unflatten(-1, (2, 2))
        return torch.view_as_real(torch.view_as_complex(pairs) * self.angles).flatten(-2)


def test_complex_buffers_keep_their_imaginary_part() -> None:
    turned = Turned()
    loaded = from_module(turned.double(), ROWS)
    torch.testing.assert_close(loaded.module(ROWS), turned.float()(ROWS))


def test_a_state_that_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    loaded = from_module(Turned(), ROWS)
    assert len(loaded.fingerprint()) == 64
    other = Turned()
    save_file({"weight": other.weight, "bias": other.bias}, tmp_path / "own.safetensors")
    torch.testing.assert_close(module_with_weights(loaded, tmp_path / "own.safetensors")(ROWS), other(ROWS))


class Masked(nn.Linear):
    """Rows (batch, length, 4) that attend to those before them, times a number."""

    def forward(self, rows: torch.Tensor, mask: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        own = super().forward(rows)
        return nn.functional.scaled_dot_product_attention(own, own, own, attn_mask=mask) * times


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1.0])
def test_masks_of_floats_are_drawn_from_the_examples_rows(hidden: float) -> None:
    mask = torch.zeros(2, 3, 3)
    mask[0, 0, 1:] = mask[1, :, 2] = hidden
    loaded = from_module(Masked(4, 4), (torch.randn(2, 3, 4), mask, torch.tensor(3)))
    drawn = loaded.inputs({"batch": 5, "rows_axis1": 4}, seed=1)
    assert drawn["mask"].shape == (5, 4, 4)
    assert set(drawn["mask"].flatten().tolist()) == {0.0, hidden}
    assert drawn["rows"].unique().numel() == 80
    assert drawn["times"] == 3
    assert loaded.module(**drawn).isfinite().all()


def test_adapters_are_loaded_before_the_model() -> None:
    with pytest.raises(InputRefused, match=r"give it load_adapter\(PATH\) in place of a path"):
        load_model(f"{FACTORIES}:scaled", ["adapter"])


def test_a_program_takes_no_dtype(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"model\.pt2 has one precision, which its graph names: leave out dtype="):
        load_model(str(tmp_path / "model.pt2"), dtype=torch.float16)


def test_a_file_of_weights_must_have_them_all(tmp_path: Path) -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    weights = {name: tensor + 1 for name, tensor in loaded.module.state_dict().items()}
    save_file(weights, tmp_path / "whole.safetensors")
    changed = module_with_weights(loaded, tmp_path / "whole.safetensors")
    assert torch.equal(changed.dense.weight, loaded.module.dense.weight + 1)
    del weights["dense.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputRefused, match=r"dense\.bias"):
        module_with_weights(loaded, tmp_path / "part.safetensors")


class Listed(nn.Module):
    """Multiplies by a weight that it has in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.weights = [self.fc.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[0]


def test_a_weight_in_a_list_is_that_of_the_file(tmp_path: Path) -> None:
    loaded = from_module(Listed(), torch.ones(2, 4))
    weight = torch.arange(16.0).reshape(4, 4)
    save_file({"fc.weight": weight}, tmp_path / "w.safetensors")
    changed = module_with_weights(loaded, tmp_path / "w.safetensors")
    assert changed(torch.eye(4)).tolist() == weight.tolist()


class Pair(nn.Module):
    """Adds a projection of `left`, and of `right` where it is there: (batch, length, 4)."""

    def __init__(self, needs_right: bool = False) -> None:
        super().__init__()
        self.fc, self.needs_right = nn.Linear(4, 4), needs_right

    def forward(self, left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
        if self.needs_right and right is None:
            raise ValueError("right is missing")
        return self.fc(left) + (0 if right is None else right)


def generated(module: nn.Module) -> Model:
    """A model whose generated inputs are `left` alone."""
    axes = {"left": {0: "batch"}}
    return Model("pair", module, axes, lambda sizes, _: {"left": torch.ones(sizes["batch"], 3, 4)}, {"batch": 2}, True)


def file(path: Path, *names: str, shape: tuple[int, ...] = (2, 5, 4)) -> Path:
    rng = np.random.default_rng(0)
    np.savez(path, **{name: rng.standard_normal(shape).astype(np.float32) for name in names})
    return path


def test_generated_inputs_that_run_are_kept(tmp_path: Path) -> None:
    model = generated(Pair())
    assert with_inputs_from(file(tmp_path / "a.npz", "left"), model) is model
    assert with_inputs_from(file(tmp_path / "b.npz", "unknown"), model) is model


@pytest.mark.parametrize("needs_right", [True, False])
def test_a_file_with_more_inputs_is_the_example(needs_right: bool, tmp_path: Path) -> None:
    path = file(tmp_path / "x.npz", "right", "left")
    model = with_inputs_from(path, generated(Pair(needs_right)))
    assert model.axes == {"left": {0: "batch", 1: "left_axis1"}, "right": {0: "batch", 1: "left_axis1"}}
    assert {
        name: tuple(value.shape) for name, value in model.inputs({"batch": 3, "left_axis1": 7}, seed=0).items()
    } == {"left": (3, 7, 4), "right": (3, 7, 4)}
    assert model.notes == (f"the generated inputs are like those in {path}",)


def test_generated_inputs_that_fail_are_replaced(tmp_path: Path) -> None:
    module = Pair(needs_right=True)
    model = replace(generated(module), axes={"left": {}, "right": {}})
    assert with_inputs_from(file(tmp_path / "x.npz", "left", "right"), model).axes["left"] == {
        0: "batch",
        1: "left_axis1",
    }


def test_undetermined_inputs_come_from_the_file_alone(tmp_path: Path) -> None:
    model = replace(generated(Pair()), axes={})
    assert with_inputs_from(file(tmp_path / "x.npz", "left"), model).input_names == ("left",)
    with pytest.raises(InputRefused, match=r"b.npz contains unknown; the model takes left, right"):
        with_inputs_from(file(tmp_path / "b.npz", "unknown"), model)


def test_inputs_on_which_the_model_fails_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path / "x.npz", "left", "right", shape=(2, 5, 3))
    with pytest.raises(RuntimeRefused, match=r"Pair itself fails on the inputs in .*x.npz \(left, right\): .*mat1"):
        with_inputs_from(path, generated(Pair()))
