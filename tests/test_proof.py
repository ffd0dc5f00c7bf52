"""The flow of a proof: who runs on what, and what becomes of candidates that are wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_export import layers, model, parity, plan, proof, runtime
from lora_export.errors import EnvironmentLacking, InputRefused, MatchError, RuntimeRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime import Arrays

FACTORIES = Path(__file__).parent / "factories.py"


def an_adapter(scale: float = 1.0, module: str = "dense") -> Adapter:
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.standard_normal((2, 8)), b=rng.standard_normal((8, 2)), scale=scale)
    return Adapter(name="a", format="test", pairs={module: pair}, sha256="0a")


@pytest.fixture
def scaled() -> model.Model:
    return model.load(f"{FACTORIES}:scaled")


def folded(base: model.Model, adapter: Adapter, strength: float = 1.0) -> runtime.ModuleRunner:
    module = copy.deepcopy(base.module)
    layers.fold(module, plan.make([adapter], layers.specs(module), strengths=[strength]))
    return runtime.ModuleRunner(module)


def test_a_merged_module_is_the_same_on_shapes_that_were_never_traced(scaled: model.Model) -> None:
    result = proof.prove(folded(scaled, an_adapter()), scaled, [an_adapter()])
    assert result.verdict.outcome is parity.Outcome.SAME
    assert result.exit_code == 0
    shapes = [shape["rows"] for shape in result.about["inputs"].values()]
    assert len(shapes) == 3
    assert (2, 5, 8) not in shapes
    assert {there.input for there in result.verdict.perturbed} == {"rows", "weights"}


def test_the_base_without_its_adapter_is_different(scaled: model.Model) -> None:
    result = proof.prove(runtime.ModuleRunner(scaled.module), scaled, [an_adapter()])
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert result.exit_code == 4
    assert "without its adapters" in str(result.verdict)


def test_a_scale_off_by_a_tenth_is_different(scaled: model.Model) -> None:
    result = proof.prove(folded(scaled, an_adapter(), strength=1.1), scaled, [an_adapter()])
    assert result.verdict.outcome is parity.Outcome.DIFFERENT


def test_an_adapter_too_weak_to_see_is_undecided(scaled: model.Model) -> None:
    result = proof.prove(folded(scaled, an_adapter(1e-8)), scaled, [an_adapter(1e-8)])
    assert result.verdict.outcome is parity.Outcome.UNDECIDED
    assert result.exit_code == 5


def test_strengths_reach_the_reference(scaled: model.Model) -> None:
    half = folded(scaled, an_adapter(), strength=0.5)
    assert proof.prove(half, scaled, [an_adapter()], strengths=[0.5]).verdict.same
    assert not proof.prove(half, scaled, [an_adapter()]).verdict.same


def test_without_adapters_the_model_itself_is_the_same(scaled: model.Model) -> None:
    assert proof.prove(runtime.ModuleRunner(scaled.module), scaled, []).verdict.same


class Deaf(runtime.ModuleRunner):
    """Ignores one of its inputs, as a graph does into which it was folded."""

    def run(self, inputs: Arrays) -> Arrays:
        return super().run({**inputs, "weights": np.full_like(inputs["weights"], 0.5)})


@pytest.mark.fault(45)
def test_an_input_that_was_folded_away_is_different(scaled: model.Model) -> None:
    result = proof.prove(Deaf(folded(scaled, an_adapter()).module), scaled, [an_adapter()])
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert any(there.input == "weights" and not there.candidate_changed for there in result.verdict.perturbed)


class FixedBatch(runtime.ModuleRunner):
    """Takes one batch size only, as a graph that was traced without dynamic axes."""

    def run(self, inputs: Arrays) -> Arrays:
        if len(inputs["rows"]) != 3:
            raise RuntimeRefused("batch 3 is all I know")
        return super().run(inputs)


@pytest.mark.fault(46)
def test_a_candidate_that_refuses_another_batch_is_different_and_says_so(scaled: model.Model) -> None:
    result = proof.prove(FixedBatch(folded(scaled, an_adapter()).module), scaled, [an_adapter()])
    assert result.verdict.outcome is parity.Outcome.DIFFERENT
    assert any("batch 3 is all I know" in note for note in result.verdict.notes)


class Refusing(runtime.ModuleRunner):
    def run(self, inputs: Arrays) -> Arrays:
        raise RuntimeRefused("I never run")


def test_a_candidate_that_runs_on_nothing_has_no_verdict(scaled: model.Model) -> None:
    with pytest.raises(RuntimeRefused, match="I never run"):
        proof.prove(Refusing(scaled.module), scaled, [an_adapter()])


class Misplaced(runtime.ModuleRunner):
    placement = runtime.Placement("CUDAExecutionProvider", {"CPUExecutionProvider": (("m", "MatMul"),)}, {}, "1")


def test_work_done_elsewhere_ends_the_proof_before_any_verdict(scaled: model.Model) -> None:
    with pytest.raises(EnvironmentLacking, match="1 of 1 compute nodes ran elsewhere"):
        proof.prove(Misplaced(scaled.module), scaled, [an_adapter()])


def test_a_size_that_the_candidate_declares_constant_is_kept_and_told(scaled: model.Model) -> None:
    made_for_one_length = folded(scaled, an_adapter())
    made_for_one_length.axes = {"rows": (None, 5, 8), "weights": (None, 5)}
    result = proof.prove(made_for_one_length, scaled, [an_adapter()])
    assert {shape["rows"][1] for shape in result.about["inputs"].values()} == {5}
    assert any("no other was tried" in note for note in result.verdict.notes)


def test_the_users_own_inputs_are_one_more_case(scaled: model.Model, tmp_path: Path) -> None:
    rows, weights = torch.randn(2, 5, 8).numpy(), torch.rand(2, 5).numpy()
    np.savez(tmp_path / "mine.npz", rows=rows, weights=weights)
    result = proof.prove(folded(scaled, an_adapter()), scaled, [an_adapter()], user_inputs=tmp_path / "mine.npz")
    assert "mine.npz" in {there.case for there in result.verdict.comparisons}
    np.savez(tmp_path / "half.npz", rows=rows)
    with pytest.raises(InputRefused, match="the model takes rows, weights"):
        proof.prove(folded(scaled, an_adapter()), scaled, [an_adapter()], user_inputs=tmp_path / "half.npz")


def test_an_adapter_for_another_model_is_a_misfit(scaled: model.Model) -> None:
    with pytest.raises(MatchError, match="no_such_layer"):
        proof.prove(runtime.ModuleRunner(scaled.module), scaled, [an_adapter(module="no_such_layer")])


def bf16_merge(base: model.Model, adapter: Adapter, *, strength: float = 1.0) -> runtime.ModuleRunner:
    """The merged module as a bf16 checkpoint holds it: every weight of the changed layer rounded."""
    module = folded(base, adapter, strength).module
    with torch.no_grad():
        module.dense.weight.copy_(module.dense.weight.bfloat16())
    return runtime.ModuleRunner(module, stored={"dense.weight": "bfloat16", "dense.bias": "float32"})


def test_a_merge_stored_in_bf16_is_judged_by_what_bf16_should_hold(scaled: model.Model) -> None:
    with torch.no_grad():
        scaled.module.dense.weight.copy_(scaled.module.dense.weight.bfloat16())
    result = proof.prove(bf16_merge(scaled, an_adapter()), scaled, [an_adapter()])
    assert result.verdict.same, str(result.verdict)
    losses = [there.figures.merge_loss for there in result.verdict.comparisons]
    assert all(1e-4 < loss < 1e-2 for loss in losses)  # told, though not judged


def test_rounding_is_no_excuse_for_a_wrong_scale(scaled: model.Model) -> None:
    wrong = bf16_merge(scaled, an_adapter(), strength=1.1)
    assert proof.prove(wrong, scaled, [an_adapter()]).verdict.outcome is parity.Outcome.DIFFERENT


def test_a_whole_model_converted_to_bf16_is_judged_by_what_bf16_should_hold(scaled: model.Model) -> None:
    module = folded(scaled, an_adapter()).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # the bias too, which no adapter changes
    candidate = runtime.ModuleRunner(module, stored={"dense.weight": "bfloat16", "dense.bias": "bfloat16"})
    assert not torch.equal(module.dense.bias, scaled.module.dense.bias)
    assert proof.prove(candidate, scaled, [an_adapter()]).verdict.same
