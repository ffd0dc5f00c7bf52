"""Pairs whose effect one backward pass shows to be far above the limits, and modules of which it shows nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.layers.attachments import Branch, attached_modules, attachment_of
from lora_export.lora import Adapter, LoraPair
from lora_export.models import stored_parameter
from lora_export.models.stored_parameter import packed
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification.module_copies import converted_copy, widened
from lora_export.verification.parity import Case, error_weights, judge_missing_part
from lora_export.verification.references import clear_effects as under_test
from lora_export.verification.references import single_pairs
from lora_export.verification.references.clear_effects import clear_effects
from lora_export.verification.references.single_pairs import control_pairs

COUNT = 6
NUMBERS = {"x": np.random.default_rng(1).normal(size=(30, 4))}
FAINT = "layers.2"  # whose pair is far smaller than the others


class Layers(nn.Module):
    """Layers in a row. `between` is what each output goes through."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.between = nn.ModuleList(nn.Linear(4, 4) for _ in range(COUNT)), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return x


class Steep(torch.autograd.Function):
    """A step function whose derivative is that of a line."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 100 * gradient


@pytest.fixture(autouse=True, params=["widened", "in memory", "read again"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "widened":
        monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)
    return str(request.param)


@pytest.fixture
def make(weights: str) -> Callable[..., nn.Module]:
    def made(between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> nn.Module:
        module, rng, pairs = Layers(between).eval(), np.random.default_rng(0), {}
        if weights == "read again":
            module = converted_copy(module, lambda tensor: packed(tensor, torch.float32) if tensor.ndim > 1 else tensor)
        for number in range(COUNT):
            a, b = rng.normal(size=(2, 4)), rng.normal(size=(4, 2)) / 100
            scale = 1e-6 if f"layers.{number}" == FAINT else 0.5
            pairs[f"layers.{number}"] = LoraPair(a.astype(np.float32), b.astype(np.float32), scale)
        given = Adapter(name="a", format="test", pairs=pairs)
        layers.attach(module, plan.make([given], layers.specs(module)))
        return module

    return made


def branches(module: nn.Module) -> dict[str, list[Branch]]:
    return {one.module: [one] for owner in attached_modules(module) for one in attachment_of(owner).branches}


def without(module: nn.Module, name: str) -> Arrays:
    with layers.without_branches(module, branches(module)[name]):
        return Fp64Runner(module).run(NUMBERS)


def case_of(module: nn.Module) -> Case:
    """A case with an error of PyTorch as fp32 makes."""
    (right,) = Fp64Runner(module).run(NUMBERS).values()
    rounded = right + 1e-7 * np.random.default_rng(2).standard_normal(right.shape)
    given = {"output_0": rounded.astype(np.float32)}
    return Case("numbers", "", {"output_0": right}, given, given)


def found_in(module: nn.Module) -> tuple[frozenset[str], list[str]]:
    """The clear ones, and those that were switched off to compare them."""
    case, asked = case_of(module), []

    def change_without(name: str) -> Arrays:
        asked.append(name)
        return {output: value - case.reference[output] for output, value in without(module, name).items()}

    weights = error_weights(case, "float32")
    return clear_effects(Fp64Runner(module), NUMBERS, branches(module), weights, change_without), asked


def test_products_are_those_with_the_changes_of_runs(make: Callable[..., nn.Module]) -> None:
    module = make()
    with widened(module):
        case = case_of(module)
        direction = {"output_0": np.random.default_rng(3).standard_normal(case.reference["output_0"].shape)}
        products = under_test._products(Fp64Runner(module), NUMBERS, branches(module), direction)
        assert len(products) == COUNT
        for name, product in products.items():
            change = case.reference["output_0"] - without(module, name)["output_0"]
            deviation, exact = float(np.linalg.norm(change)), float(np.sum(change * direction["output_0"]))
            assert product == pytest.approx(exact, abs=0.05 * deviation)


def test_the_weakest_clear_pair_is_switched_off(make: Callable[..., nn.Module]) -> None:
    module = make()
    with widened(module):
        clear, asked = found_in(module)
        assert clear == {f"layers.{number}" for number in range(COUNT)} - {FAINT}
        assert len(asked) == 1 and asked[0] in clear


@pytest.mark.parametrize("between", [Steep.apply, torch.Tensor.detach], ids=["steep", "no derivative"])
def test_nothing_is_clear_where_derivatives_show_nothing(between: object, make: Callable[..., nn.Module]) -> None:
    module = make(between)
    with widened(module):
        assert not found_in(module)[0]


def test_nothing_is_clear_where_the_gates_miss_it(make: Callable[..., nn.Module]) -> None:
    module = make()
    with widened(module):
        weights = error_weights(case_of(module), "float32")
        assert not clear_effects(Fp64Runner(module), NUMBERS, branches(module), weights, lambda _: None)


def test_memory_for_the_backward_pass_is_bounded(
    make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runners, "MOST_SAVED", 8 * NUMBERS["x"].size)
    module = make()
    with widened(module):
        assert found_in(module) == (frozenset(), [])


def test_weights_are_not_saved_for_the_backward_pass(
    weights: str, make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer saves its output, and its pair the inner product and some scalars: no W of fp64 numbers."""
    if weights == "widened":
        pytest.skip("a small model has its weights in fp64")
    wide = 200 * np.ones((1, 4))
    monkeypatch.setattr(torch_runners, "MOST_SAVED", COUNT * 8 * 15)  # a W has 16 numbers
    module = make()
    factors = {branch: torch.ones((), requires_grad=True) for off in branches(module).values() for branch in off}
    with layers.switched_branches(module, factors):
        found = Fp64Runner(module).gradients(
            {"x": wide}, lambda outputs: outputs["output_0"].sum(), [*factors.values()]
        )
    assert len(found) == COUNT and any(found)


def test_controls_find_the_same_with_fewer_runs(
    make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    original = Fp64Runner.run

    def run(self: Fp64Runner, inputs: Arrays) -> Arrays:
        runs.append(inputs)
        return original(self, inputs)

    monkeypatch.setattr(Fp64Runner, "run", run)
    monkeypatch.setattr(single_pairs, "LARGEST_BATCH", 1)
    module = make()
    with widened(module):
        case = case_of(module)
        judge = functools.partial(judge_missing_part, [case], dtype="float32")
        found, counts = [], []
        for weigh in (None, functools.partial(error_weights, dtype="float32")):
            del runs[:]
            found.append(control_pairs(module, {"numbers": NUMBERS}, [case], judge, weigh=weigh))
            counts.append(len(runs))
    assert found[0] == found[1] and found[0].missed == (FAINT,)
    assert counts[1] < counts[0]
