"""The flow of a proof: what runs on which inputs, and the verdict on candidates that are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import EnvironmentLacking, InputRefused, MatchError, RuntimeRefused
from lora_export.models import model
from lora_export.models.load import from_module, load_model
from lora_export.runtime import runner, torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from support import FACTORIES
from support.proofs import an_adapter, folded


@pytest.fixture
def scaled() -> model.Model:
    return load_model(f"{FACTORIES}:scaled")


def test_merged_module_is_same_on_untraced_shapes(scaled: model.Model) -> None:
    result = prove(folded(scaled, an_adapter()), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.SAME
    assert "the reference ran in fp64 throughout" in result.verdict.notes
    assert result.exit_code == 0
    shapes = [shape["rows"] for shape in result.about["inputs"].values()]
    assert len(shapes) == 3
    assert (2, 5, 8) not in shapes
    assert {tested.input for tested in result.verdict.sensitivity} == {"rows", "weights"}


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (lambda model: torch_runners.ModuleRunner(model.module), "without its adapters"),
        (lambda model: folded(model, an_adapter(), strength=1.1), "with every adapter scale × 1.1"),
    ],
    ids=["the base", "stronger"],
)
def test_the_base_itself_and_another_strength_are_different(
    scaled: model.Model, candidate: Callable[[model.Model], runner.Runner], says: str
) -> None:
    result = prove(candidate(scaled), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.DIFFERENT and result.exit_code == 4
    assert f"The candidate matches the model {says}" in str(result.verdict)


def test_adapter_too_weak_to_detect_is_undecided(scaled: model.Model) -> None:
    result = prove(folded(scaled, an_adapter(1e-8)), PyTorchReferences(scaled, [an_adapter(1e-8)]))
    assert result.verdict.outcome is parity.Outcome.UNDECIDED
    assert result.exit_code == 5


def test_strengths_reach_the_reference(scaled: model.Model) -> None:
    half = folded(scaled, an_adapter(), strength=0.5)
    assert prove(half, PyTorchReferences(scaled, [an_adapter()], strengths=[0.5])).verdict.same
    assert not prove(half, PyTorchReferences(scaled, [an_adapter()])).verdict.same


class IgnoresAnInput(torch_runners.ModuleRunner):
    """Ignores one of its inputs, as a graph does into which it was folded."""

    def run(self, inputs: Arrays) -> Arrays:
        return super().run({**inputs, "weights": np.full_like(inputs["weights"], 0.5)})


@pytest.mark.fault(45)
def test_input_that_was_folded_away_is_different(scaled: model.Model) -> None:
    result = prove(IgnoresAnInput(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert any(tested.input == "weights" and not tested.candidate_changed for tested in result.verdict.sensitivity)


class FixedBatch(torch_runners.ModuleRunner):
    """Accepts one batch size only, as a graph that was traced without dynamic axes."""

    def run(self, inputs: Arrays) -> Arrays:
        if len(inputs["rows"]) != 3:
            raise RuntimeRefused("the batch size must be 3")
        return super().run(inputs)


@pytest.mark.fault(46)
def test_candidate_that_refuses_a_batch_size_is_different(scaled: model.Model) -> None:
    result = prove(FixedBatch(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert any("the batch size must be 3" in part for part in result.verdict.not_judged)


class Refusing(torch_runners.ModuleRunner):
    def run(self, inputs: Arrays) -> Arrays:
        raise RuntimeRefused("this candidate never runs")


def test_candidate_that_refuses_all_inputs_has_no_verdict(scaled: model.Model) -> None:
    with pytest.raises(RuntimeRefused, match="this candidate never runs"):
        prove(Refusing(scaled.module), PyTorchReferences(scaled, [an_adapter()]))


class Misplaced(torch_runners.ModuleRunner):
    placement = runner.Placement("CUDAExecutionProvider", {"CPUExecutionProvider": (("m", "MatMul"),)}, {}, "1")


def test_work_on_another_provider_ends_the_proof(scaled: model.Model) -> None:
    with pytest.raises(EnvironmentLacking, match="1 of 1 compute nodes ran elsewhere"):
        prove(Misplaced(scaled.module), PyTorchReferences(scaled, [an_adapter()]))


def test_user_inputs_are_one_more_case(scaled: model.Model, tmp_path: Path) -> None:
    rows, weights = torch.randn(2, 5, 8).numpy(), torch.rand(2, 5).numpy()
    np.savez(tmp_path / "mine.npz", rows=rows, weights=weights)
    references = PyTorchReferences(scaled, [an_adapter()], user_inputs=tmp_path / "mine.npz")
    result = prove(folded(scaled, an_adapter()), references)
    assert "mine.npz" in {comparison.case for comparison in result.verdict.comparisons}
    np.savez(tmp_path / "half.npz", rows=rows)
    with pytest.raises(InputRefused, match="the model takes rows, weights"):
        prove(folded(scaled, an_adapter()), PyTorchReferences(scaled, user_inputs=tmp_path / "half.npz"))


def test_adapter_for_another_model_is_a_misfit(scaled: model.Model) -> None:
    with pytest.raises(MatchError, match="no_such_layer"):
        adapter = an_adapter(module="no_such_layer")
        prove(torch_runners.ModuleRunner(scaled.module), PyTorchReferences(scaled, [adapter]))


class LosesItsAdapter(torch_runners.ModuleRunner):
    """Right in three runs, and wrong in every later one."""

    calls = 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        outputs = super().run(inputs)
        return outputs if self.calls <= 3 else {name: 0.5 * value for name, value in outputs.items()}


def test_candidate_with_other_outputs_when_run_again_is_different(scaled: model.Model) -> None:
    result = prove(LosesItsAdapter(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert any("run again" in reason.case for reason in result.verdict.reasons)


class OtherLastBit(torch_runners.ModuleRunner):
    """Another last bit on each call, as atomic sums on a GPU give it."""

    calls = 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        up = np.float32(1 + 2.0**-23 * (self.calls > 3))
        return {name: value * up for name, value in super().run(inputs).items()}


def test_candidate_may_return_other_bits_when_run_again(scaled: model.Model) -> None:
    result = prove(OtherLastBit(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.same
    assert any("returns other bits" in note for note in result.verdict.notes)


class WithoutOutputs(torch_runners.ModuleRunner):
    def run(self, inputs: Arrays) -> Arrays:
        return {}


def test_candidate_without_outputs_is_different_and_not_diagnosed(scaled: model.Model) -> None:
    result = prove(WithoutOutputs(scaled.module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.outcome is parity.Outcome.DIFFERENT and result.diagnosis is None
    assert "the candidate lacks this output" in str(result.verdict)


class OnCuda(torch_runners.ModuleRunner):
    """A candidate whose provider runs with more exact settings than its own."""

    placement = runner.Placement(
        "CUDAExecutionProvider", {"CUDAExecutionProvider": (("m", "MatMul"),)}, {"use_tf32": "0"}, "1"
    )

    def with_provider_defaults(self) -> torch_runners.ModuleRunner:
        return Coarse(self.module)


class Coarse(torch_runners.ModuleRunner):
    def run(self, inputs: Arrays) -> Arrays:
        return {name: np.float32(1.001) * value for name, value in super().run(inputs).items()}


class OutOfMemory(torch_runners.ModuleRunner):
    def run(self, inputs: Arrays) -> Arrays:
        raise RuntimeRefused("out of memory", "somewhere")


def test_error_with_the_providers_own_settings_is_not_judged(
    scaled: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = prove(OnCuda(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.same, str(result.verdict)
    (note,) = [text for text in result.verdict.not_judged if text.startswith("CUDAExecutionProvider's own settings")]
    assert result.strictly().exit_code == 5
    pattern = r"the error of output_1 is (\S+) \((\S+) as judged\), (\S+) % of the adapter effect"
    match = re.search(pattern, note)
    assert match and "in place of use_tf32=0, as judged: the error of output_0 is" in note, note
    error, judged, relative = map(float, match.groups())
    reference = np.concatenate([case.reference["output_1"].ravel() for case in result.cases])
    base = np.concatenate([case.base["output_1"].ravel() for case in result.cases if case.base])
    assert error == pytest.approx(1e-3 * parity.rms(reference), rel=1e-2) and judged < 1e-2 * error
    assert relative == pytest.approx(100 * error / parity.rms(reference - base), rel=6e-2)

    monkeypatch.setattr(OnCuda, "with_provider_defaults", lambda self: OutOfMemory(self.module))
    result = prove(OnCuda(folded(scaled, an_adapter()).module), PyTorchReferences(scaled, [an_adapter()]))
    assert result.verdict.same and any(
        text.endswith("it did not run: out of memory") for text in result.verdict.not_judged
    )


class Noisy(nn.Linear):
    """As VITS, which draws its noise, with an output that has none."""

    def __init__(self, noise: float) -> None:
        super().__init__(3, 3)
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.noise * torch.randn_like(x)


@pytest.mark.parametrize(("noise", "shift", "outcome"), [(1, 0, "undecided"), (1, 9, "different"), (0, 0, "same")])
def test_a_model_that_draws_random_numbers_is_no_measure(noise: float, shift: float, outcome: str) -> None:
    made, other = (from_module(Noisy(noise).eval(), torch.ones(2, 3)) for _ in range(2))
    other.module.load_state_dict({name: value + shift for name, value in made.module.state_dict().items()})
    result = prove(torch_runners.ModuleRunner(other.module), PyTorchReferences(made))
    assert result.verdict.outcome == outcome
    noted = [note for note in result.verdict.notes if "the model draws random numbers in its forward" in note]
    assert len(noted) == (outcome != "same")
