"""Programs of torch.export as candidates and as models: PyTorch, PEFT and NumPy's fp64 are the oracles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.lora import Adapter
from lora_export.models import model
from lora_export.models.load import from_module, load_model
from lora_export.models.pt2 import program, reader
from lora_export.runtime.open_artifact import HowToOpen, open_candidate
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove
from support.programs import SUBJECTS, VARIES, ProgramFiles, Subject, export, noise
from support.proofs import attached_copy

SMALL = ("mlp", "cnn", "words")


EVERY = [*SMALL, "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))]


def verdict(path: Path, base: model.Model, adapters: list[Adapter], **how: Any) -> Proof:
    return prove(open_candidate(open_artifact(path), HowToOpen(base)), PyTorchReferences(base, adapters, **how))


# --- The reference ---


@pytest.mark.parametrize(
    ("name", "decomposed"),
    [
        *((name, decomposed) for name in SMALL for decomposed in (False, True)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("llama", False), ("bert", False), ("bert", True))),
    ],
)
def test_the_reference_computes_as_the_eager_model_in_fp64(
    programs: ProgramFiles, tmp_path: Path, name: str, decomposed: bool
) -> None:
    subject = SUBJECTS[name]
    base = load_model(str(subject.export(subject.base, tmp_path / "base.pt2", decomposed=decomposed)))
    arrays = {key: value.numpy() for key, value in base.inputs({"batch": 3, "sequence": 8}, seed=1).items()}
    module = attached_copy(base, [programs.adapter(name)]).double()
    reference = Fp64Runner(module)
    own = reference.run(arrays)
    theirs = Fp64Runner(copy.deepcopy(subject.adapted).double()).run(arrays)
    plain = Fp64Runner(copy.deepcopy(subject.base).double()).run(arrays)
    for key, value in theirs.items():
        assert np.abs(value - plain[key]).max() > 1e-3
        np.testing.assert_allclose(own[key], value, rtol=1e-10, atol=1e-10)
    assert reference.narrow_operators == set()


def test_reference_outputs_are_cached_by_program(programs: ProgramFiles, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        base = load_model(str(programs.base("mlp")))
        assert verdict(programs.merged("mlp"), base, [programs.adapter("mlp")], cache=cache).verdict.same
        assert len(list(cache.iterdir())) == 1
    other = copy.deepcopy(base.module)
    assert repr(other) == repr(base.module) and base.module.description.graph_sha256 in repr(other)


def test_an_adapter_for_another_model_lists_its_misfits(programs: ProgramFiles) -> None:
    base = load_model(str(programs.base("cnn")))
    with pytest.raises(InputRefused, match="targets do not fit the base"):
        verdict(programs.base("cnn"), base, [programs.adapter("mlp")])


# --- Right candidates ---


@pytest.mark.parametrize("name", EVERY)
def test_pefts_merge_is_same_as_the_program_with_its_adapter(programs: ProgramFiles, name: str) -> None:
    result = verdict(programs.merged(name), load_model(str(programs.base(name))), [programs.adapter(name)])
    assert result.verdict.outcome is Outcome.SAME, str(result.verdict)
    assert "the reference ran in fp64 throughout" in result.verdict.notes
    assert len(result.cases) == 3 and len({case.inputs_summary for case in result.cases}) == 3


@pytest.mark.parametrize("name", ["mlp", "words", pytest.param("cnn", marks=pytest.mark.slow)])
def test_pefts_merge_is_same_as_the_module_with_its_adapter(programs: ProgramFiles, name: str) -> None:
    base = from_module(SUBJECTS[name].base, dict(SUBJECTS[name].inputs))
    assert verdict(programs.merged(name), base, [programs.adapter(name)]).verdict.outcome is Outcome.SAME


@pytest.mark.parametrize("name", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_decomposed_program_is_same(programs: ProgramFiles, tmp_path: Path, name: str) -> None:
    subject = SUBJECTS[name]
    path = subject.export(subject.merged(), tmp_path / "decomposed.pt2", decomposed=True)
    assert not any(".linear." in node.target for node in reader.read(path).graph.nodes)
    assert verdict(path, load_model(str(programs.base(name))), [programs.adapter(name)]).verdict.outcome is Outcome.SAME


def test_an_unmerged_exported_adapter_is_same(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    attached = subject.export(subject.adapted.base_model.model, tmp_path / "attached.pt2")
    assert any("lora_A" in tensor.name for tensor in reader.read(attached).tensors)
    assert (
        verdict(attached, load_model(str(programs.base("mlp"))), [programs.adapter("mlp")]).verdict.outcome
        is Outcome.SAME
    )


def test_safetensors_and_torchscript_are_verified_against_a_program(programs: ProgramFiles, tmp_path: Path) -> None:
    base, merged = load_model(str(programs.base("words"))), SUBJECTS["words"].merged()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    with torch.no_grad():
        torch.jit.trace(merged, tuple(SUBJECTS["words"].inputs.values())).save(str(tmp_path / "merged.pt"))
    for name in ("merged.safetensors", "merged.pt"):
        assert verdict(tmp_path / name, base, [programs.adapter("words")]).verdict.outcome is Outcome.SAME
    save_file(SUBJECTS["words"].base.state_dict(), tmp_path / "base.safetensors")
    result = verdict(tmp_path / "base.safetensors", base, [programs.adapter("words")])
    assert result.verdict.outcome is Outcome.DIFFERENT


# --- Wrong candidates ---


def targets(adapted: peft.PeftModel) -> list[Any]:
    return [layer for layer in adapted.modules() if hasattr(layer, "lora_B") and len(layer.lora_B)]


def zeroed(adapted: peft.PeftModel) -> None:
    targets(adapted)[-1].lora_B["default"].weight.zero_()


def scaled(adapted: peft.PeftModel) -> None:
    for layer in targets(adapted):
        layer.scaling["default"] *= 1.1


def doubled(adapted: peft.PeftModel) -> None:
    for layer in targets(adapted):
        layer.scaling["default"] *= 2


def transposed(adapted: peft.PeftModel) -> None:
    layer = targets(adapted)[0]
    weight = layer.get_base_layer().weight
    delta = layer.get_delta_weight("default")
    square = min(delta.shape)
    weight[:square, :square] += delta[:square, :square].T - delta[:square, :square]


def not_finite(adapted: peft.PeftModel) -> None:
    targets(adapted)[0].get_base_layer().weight.view(-1)[3] = float("nan")


DEFECTS = [zeroed, scaled, doubled, transposed, not_finite]


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        *(("mlp", defect) for defect in DEFECTS),
        *(pytest.param("cnn", defect, marks=pytest.mark.slow) for defect in (zeroed, scaled)),
        *(pytest.param(name, defect, marks=pytest.mark.slow) for name in ("llama", "bert") for defect in DEFECTS),
    ],
)
def test_a_wrong_merge_is_different(
    programs: ProgramFiles, tmp_path: Path, name: str, defect: Callable[[peft.PeftModel], None]
) -> None:
    subject = SUBJECTS[name]
    wrong = subject.export(subject.merged(defect), tmp_path / "wrong.pt2")
    result = verdict(wrong, load_model(str(programs.base(name))), [programs.adapter(name)])
    assert result.verdict.outcome is Outcome.DIFFERENT, str(result.verdict)


class ConstantMask(nn.Module):
    """Uses a constant in place of its mask."""

    def __init__(self, inner: nn.Module, constant: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("constant", constant)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(ids, self.constant[:1, :1] + 0 * mask)


def test_a_constant_in_place_of_an_input_is_different(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["words"]
    constant = subject.export(ConstantMask(subject.merged(), torch.ones(2, 5).long()), tmp_path / "constant.pt2")
    result = verdict(constant, load_model(str(programs.base("words"))), [programs.adapter("words")])
    assert result.verdict.outcome is Outcome.DIFFERENT
    ignored = {entry.input for entry in result.verdict.sensitivity if entry.peer_changed - entry.candidate_changed}
    assert ignored == {"mask"}


def test_the_layer_that_differs_is_named(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    wrong = subject.export(subject.merged(zeroed), tmp_path / "wrong.pt2")
    result = verdict(wrong, load_model(str(programs.base("mlp"))), [programs.adapter("mlp")])
    assert result.diagnosis is not None and result.diagnosis.first == "down"
    assert "its adapter is missing" in result.diagnosis.why


@pytest.mark.slow
def test_a_diagnosis_needs_recovered_layers(programs: ProgramFiles) -> None:
    base = load_model(str(programs.base("gpt2")))
    result = verdict(programs.base("gpt2"), base, [programs.adapter("gpt2")])
    assert (result.verdict.outcome, result.diagnosis) == (Outcome.DIFFERENT, None)
    assert any("modules were not compared" in note for note in result.verdict.notes)


# --- Sizes ---


def static(subject: Subject, module: nn.Module, path: Path, *, batch: Any = VARIES) -> Path:
    return export(module, subject.inputs, path, shapes={name: {0: batch} for name in subject.inputs})


def test_a_candidate_of_one_length_is_verified_at_it_with_a_note(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    path = static(subject, subject.merged(), tmp_path / "static.pt2")
    result = verdict(path, load_model(str(programs.base("mlp"))), [programs.adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert "the candidate was made for one size of rows_axis1, 5: no other was tried" in result.verdict.notes


def test_a_candidate_of_one_batch_size_is_refused(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    path = export(subject.merged(), subject.inputs, tmp_path / "static.pt2", dynamic=0)
    with pytest.raises(RuntimeRefused, match="axis 0 of rows is 1, and the program was exported for 2 alone"):
        verdict(path, load_model(str(programs.base("mlp"))), [programs.adapter("mlp")])


def test_sizes_stay_in_the_candidates_range_with_a_note(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    length = torch.export.Dim("length", min=4, max=7)
    path = export(subject.merged(), subject.inputs, tmp_path / "ranged.pt2", shapes={"rows": {0: VARIES, 1: length}})
    result = verdict(path, load_model(str(programs.base("mlp"))), [programs.adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert "the candidate takes rows_axis1 sizes of 4 to 7: no other was tried" in result.verdict.notes
    module = program.load_program(path)
    with torch.no_grad():
        for size in (3, 8):
            with pytest.raises(RuntimeRefused, match="4 to 7"):
                module(rows=noise(2, size, 64))
        module(rows=noise(2, 4, 64))


def test_a_model_of_one_size_has_a_note(programs: ProgramFiles, tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    base = export(subject.base, subject.inputs, tmp_path / "base.pt2", dynamic=0)
    merged = export(subject.merged(), subject.inputs, tmp_path / "merged.pt2", dynamic=0)
    result = verdict(merged, load_model(str(base)), [programs.adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert any(note.startswith("the model was exported for one size of every axis") for note in result.verdict.notes)


# --- Half precision ---


def in_half(subject: Subject, module: nn.Module, dtype: torch.dtype, path: Path) -> Path:
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in subject.inputs.items()}
    return export(copy.deepcopy(module).to(dtype), inputs, path, dynamic=subject.dynamic)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mlp", torch.bfloat16), pytest.param("cnn", torch.float16, marks=pytest.mark.slow)]
)
def test_a_half_precision_candidate_is_compared_in_its_precision(
    programs: ProgramFiles, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    subject, spelled = SUBJECTS[name], str(dtype).removeprefix("torch.")
    merged = in_half(subject, subject.merged(), dtype, tmp_path / "merged.pt2")
    base = load_model(str(in_half(subject, subject.base, dtype, tmp_path / "base.pt2")))
    assert {parameter.dtype for parameter in base.module.parameters()} == {torch.float32}
    result = verdict(merged, base, [programs.adapter(name)])
    assert (result.verdict.outcome, result.verdict.dtype) == (Outcome.SAME, spelled), str(result.verdict)
    assert f"the model's .pt2 stores its weights in {spelled}" in result.verdict.notes
    assert all(case.deployed["output_0"].dtype.name == spelled for case in result.cases)
    eager = from_module(subject.base, dict(subject.inputs))
    assert verdict(merged, eager, [programs.adapter(name)]).verdict.outcome is Outcome.SAME
    wrong = in_half(subject, subject.merged(zeroed), dtype, tmp_path / "wrong.pt2")
    assert verdict(wrong, base, [programs.adapter(name)]).verdict.outcome is Outcome.DIFFERENT
    with pytest.raises(InputRefused, match=f"candidate computes in {spelled}, and .* was exported in float32"):
        verdict(merged, load_model(str(programs.base(name))), [programs.adapter(name)])
