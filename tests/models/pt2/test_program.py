"""Programs of torch.export as candidates and as models: PyTorch, PEFT and NumPy's fp64 say what is right.

What torch.export.load makes of the same file is the oracle of the interpreter, bit for bit; it is trusted here, since
the file was written a moment ago.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_export import cli, layers, plan
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.models import factory, model
from lora_export.models.load import load_model
from lora_export.models.output_names import named_outputs
from lora_export.models.pt2 import program, reader
from lora_export.runtime import open_artifact
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import pytorch
from support import FACTORIES
from support.factories import Pictures, Spotter, Wide
from support.programs import SUBJECTS, VARIES, Subject, export, graph_of, noise, rewritten

SMALL = ("mlp", "cnn", "words")
EVERY = [*SMALL, "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def made(place: Path) -> Callable[[str, str], Path]:
    """The base or PEFT's merge of a subject, exported once."""
    paths: dict[tuple[str, str], Path] = {}

    def path(name: str, what: str) -> Path:
        if (name, what) not in paths:
            subject = SUBJECTS[name]
            module = subject.base if what == "base" else subject.merged()
            paths[name, what] = subject.export(module, place / f"{name}-{what}.pt2")
        return paths[name, what]

    return path


@pytest.fixture(scope="module")
def adapter(place: Path) -> Callable[[str], Adapter]:
    return lambda name: SUBJECTS[name].adapter(place / f"{name}-adapter")


def verdict(path: Path, base: model.Model, adapters: list[Adapter], **how: Any) -> Proof:
    return prove(open_artifact.open_candidate(path, base), PyTorchReferences(base, adapters, **how))


def drawn(path: Path, **sizes: int) -> dict[str, Tensor]:
    return load_model(str(path)).inputs(sizes, seed=3)


# --- what a program computes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_program_computes_what_torch_makes_of_its_file_bit_for_bit(
    made: Callable[[str, str], Path], name: str
) -> None:
    path = made(name, "merged")
    ours, torchs = program.load(path), torch.export.load(path).module()
    for batch, length in ((1, 4), (5, 13)):
        inputs = drawn(path, batch=batch, sequence=length, rows_axis1=length)
        with torch.no_grad():
            own, theirs = named_outputs(ours(**inputs)), named_outputs(torchs(**inputs))
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) and own[key].dtype == theirs[key].dtype for key in theirs)


class Switches(nn.Module):
    """Blocks under a switch, which are graphs of their own in a program, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            y = torch.cos(x) * self.table
            z = y.sum(-1)
        with torch.autocast("cpu", enabled=False):
            w = self.first(x) + y
        half = torch.full((x.shape[0] * 2 + x.shape[1] // 2,), 1.5) + x.mean()
        return {"sum": self.second(w) + z[..., None], "parts": (half, list(x.split(2, -1)))}


class Changes(nn.Module):
    """Operators that write into what they are given, all of it values of the program's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(inplace=True)
        self.norm, self.groups = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.groups(self.relu(self.norm(self.conv(x))))
        y[:, 0] = 0
        return nn.functional.interpolate(y.add_(1), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(
    ("module", "shape", "decomposed"),
    [
        *((Switches, (2, 4), decomposed) for decomposed in (False, True)),
        *((Changes, (2, 3, 6, 6), decomposed) for decomposed in (False, True)),
        (Spotter, (2, 4, 9), False),
        pytest.param(Spotter, (2, 4, 9), True, marks=pytest.mark.slow),
    ],
)
def test_odder_programs_compute_what_their_module_computes(
    tmp_path: Path, module: Callable[[], nn.Module], shape: tuple[int, ...], decomposed: bool
) -> None:
    torch.manual_seed(0)
    eager = module().eval()
    (name,) = {"x": 0} if module is not Spotter else {"signal": 0}
    path = export(eager, {name: noise(*shape)}, tmp_path / "odd.pt2", decomposed=decomposed)
    targets = {node.target for node in reader.read(path).graph.nodes}
    if module is Switches and not decomposed:
        blocks = {target.rpartition(".")[2] for target in targets if "higher_order" in target}
        assert blocks == {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
    if module is Changes and not decomposed:
        assert any(re.fullmatch(r"torch\.ops\.aten\.\w*[a-z]_\.\w+", target) for target in targets)
    given = {name: torch.randn(5, *shape[1:])}
    before = given[name].clone()
    with torch.no_grad():
        own, theirs = named_outputs(program.load(path)(**given)), named_outputs(eager(**given))
    assert torch.equal(given[name], before)
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(own[key], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "decomposed"),
    [
        *((name, decomposed) for name in SMALL for decomposed in (False, True)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("llama", False), ("bert", False), ("bert", True))),
    ],
)
def test_the_reference_is_the_eager_model_in_fp64_with_its_adapter_attached(
    adapter: Callable[[str], Adapter], tmp_path: Path, name: str, decomposed: bool
) -> None:
    subject = SUBJECTS[name]
    base = load_model(str(subject.export(subject.base, tmp_path / "base.pt2", decomposed=decomposed)))
    arrays = {key: value.numpy() for key, value in base.inputs({"batch": 3, "sequence": 8}, seed=1).items()}
    module = pytorch.adapted(base, [adapter(name)]).double()
    reference = Fp64Runner(module)
    own = reference.run(arrays)
    theirs = Fp64Runner(copy.deepcopy(subject.adapted).double()).run(arrays)
    plain = Fp64Runner(copy.deepcopy(subject.base).double()).run(arrays)
    for key, value in theirs.items():
        assert np.abs(value - plain[key]).max() > 1e-3
        np.testing.assert_allclose(own[key], value, rtol=1e-10, atol=1e-10)
    assert reference.narrow_operators == set()


def test_a_reference_multiplies_by_the_factors_and_never_by_their_sum(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter]
) -> None:
    module = program.load(made("mlp", "base"))
    layers.attach(module, plan.make([adapter("mlp")], layers.specs(module)))
    assert isinstance(module.up, nn.Linear) and module.unobserved_weights == ()
    seen: list[tuple[int, ...]] = []
    module.up.register_forward_hook(lambda _, given, y: seen.append(tuple(given[0].shape)))
    original = module.up.lora_B["mlp_adapter"].clone()
    with torch.no_grad():
        module.up.lora_B["mlp_adapter"].zero_()
        off = module(rows=noise(2, 5, 64))
        module.up.lora_B["mlp_adapter"].copy_(original)
        on = module(rows=noise(2, 5, 64))
    assert len(seen) == 2 and (on - off).abs().max() > 0.1


def test_layers_are_found_by_what_reads_their_weights(made: Callable[[str, str], Path]) -> None:
    module = program.load(made("cnn", "base"))
    first = module.get_submodule("first")
    assert isinstance(first, nn.Conv2d) and (first.stride, first.padding) == ((1, 1), (1, 1))
    second = module.get_submodule("second")
    assert isinstance(second, nn.Conv2d) and (second.stride, second.padding) == ((2, 2), (1, 1))
    assert type(module.get_submodule("norm")) is nn.Module
    specs = {spec.name: spec.layout for spec in layers.specs(module)}
    assert specs == {spec.name: spec.layout for spec in layers.specs(Pictures())} | {
        "norm.num_batches_tracked": specs["norm.num_batches_tracked"]
    }
    words = program.load(made("words", "base")).get_submodule("words")
    assert isinstance(words, nn.Embedding) and words.padding_idx is None


@pytest.mark.slow
def test_a_weight_that_lies_in_out_is_known_by_its_product(made: Callable[[str, str], Path]) -> None:
    module = program.load(made("gpt2", "base"))
    layouts = {spec.name: spec.layout for spec in layers.specs(module)}
    assert {layout.name for name, layout in layouts.items() if "c_attn.weight" in name} == {"IN_OUT"}
    assert "transformer.h.0.attn.c_attn.weight" in module.unobserved_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_a_table_that_is_the_head_too_takes_no_adapter(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    eager = Tied()
    module = program.load(export(eager, {"ids": ids}, tmp_path / "tied.pt2"))
    with torch.no_grad():
        assert torch.equal(module(ids=ids), eager(ids))
    pairs = {
        "head": LoraPair(a=np.ones((1, 4)), b=np.ones((7, 1)), scale=1.0),
        "words": LoraPair(a=np.ones((1, 7)), b=np.ones((4, 1)), scale=1.0, embedding=True),
    }
    for name, pair in pairs.items():
        adapter = Adapter(name="a", format="test", pairs={name: pair})
        with pytest.raises(InputRefused, match=rf"{name}"):
            layers.attach(module, plan.make([adapter], layers.specs(module)))


# --- candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_pefts_merge_is_the_same_as_the_programs_model_with_its_adapter(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], name: str
) -> None:
    result = verdict(made(name, "merged"), load_model(str(made(name, "base"))), [adapter(name)])
    assert result.verdict.outcome is Outcome.SAME, str(result.verdict)
    assert "the reference ran in fp64 throughout" in result.verdict.notes
    assert len(result.cases) == 3 and len({case.inputs_summary for case in result.cases}) == 3


@pytest.mark.parametrize("name", ["mlp", "words", pytest.param("cnn", marks=pytest.mark.slow)])
def test_pefts_merge_is_the_same_as_the_module_it_came_from(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], name: str
) -> None:
    base = factory.from_module(SUBJECTS[name].base, dict(SUBJECTS[name].inputs))
    assert verdict(made(name, "merged"), base, [adapter(name)]).verdict.outcome is Outcome.SAME


@pytest.mark.parametrize("name", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_decomposed_program_is_the_same_too(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path, name: str
) -> None:
    subject = SUBJECTS[name]
    path = subject.export(subject.merged(), tmp_path / "decomposed.pt2", decomposed=True)
    assert not any(".linear." in node.target for node in reader.read(path).graph.nodes)
    assert verdict(path, load_model(str(made(name, "base"))), [adapter(name)]).verdict.outcome is Outcome.SAME


def test_an_adapter_that_was_exported_beside_its_weights_is_the_same_too(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["mlp"]
    attached = subject.export(subject.adapted.base_model.model, tmp_path / "attached.pt2")
    assert any("lora_A" in there.name for there in reader.read(attached).tensors)
    assert verdict(attached, load_model(str(made("mlp", "base"))), [adapter("mlp")]).verdict.outcome is Outcome.SAME


def targets(adapted: peft.PeftModel) -> list[Any]:
    return [layer for layer in adapted.modules() if hasattr(layer, "lora_B") and len(layer.lora_B)]


def left_out(adapted: peft.PeftModel) -> None:
    targets(adapted)[-1].lora_B["default"].weight.zero_()


def scaled(adapted: peft.PeftModel) -> None:
    for layer in targets(adapted):
        layer.scaling["default"] *= 1.1


def doubled(adapted: peft.PeftModel) -> None:
    for layer in targets(adapted):
        layer.scaling["default"] *= 2


def turned(adapted: peft.PeftModel) -> None:
    layer = targets(adapted)[0]
    weight = layer.get_base_layer().weight
    delta = layer.get_delta_weight("default")
    square = min(delta.shape)
    weight[:square, :square] += delta[:square, :square].T - delta[:square, :square]


def not_finite(adapted: peft.PeftModel) -> None:
    targets(adapted)[0].get_base_layer().weight.view(-1)[3] = float("nan")


DEFECTS = [left_out, scaled, doubled, turned, not_finite]


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        *(("mlp", defect) for defect in DEFECTS),
        *(pytest.param("cnn", defect, marks=pytest.mark.slow) for defect in (left_out, scaled)),
        *(pytest.param(name, defect, marks=pytest.mark.slow) for name in ("llama", "bert") for defect in DEFECTS),
    ],
)
def test_a_merge_that_is_wrong_is_different(
    made: Callable[[str, str], Path],
    adapter: Callable[[str], Adapter],
    tmp_path: Path,
    name: str,
    defect: Callable[[peft.PeftModel], None],
) -> None:
    subject = SUBJECTS[name]
    wrong = subject.export(subject.merged(defect), tmp_path / "wrong.pt2")
    result = verdict(wrong, load_model(str(made(name, "base"))), [adapter(name)])
    assert result.verdict.outcome is Outcome.DIFFERENT, str(result.verdict)


class Deaf(nn.Module):
    """Has one of its inputs baked in."""

    def __init__(self, inner: nn.Module, baked: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("baked", baked)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(ids, self.baked[:1, :1] + 0 * mask)


def test_an_input_that_was_baked_in_is_different(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["words"]
    deaf = subject.export(Deaf(subject.merged(), torch.ones(2, 5).long()), tmp_path / "deaf.pt2")
    result = verdict(deaf, load_model(str(made("words", "base"))), [adapter("words")])
    assert result.verdict.outcome is Outcome.DIFFERENT
    unheard = {there.input for there in result.verdict.sensitivity if there.peer_changed - there.candidate_changed}
    assert unheard == {"mask"}


def test_what_differs_is_followed_to_the_layer(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["mlp"]
    wrong = subject.export(subject.merged(left_out), tmp_path / "wrong.pt2")
    result = verdict(wrong, load_model(str(made("mlp", "base"))), [adapter("mlp")])
    assert result.diagnosis is not None and result.diagnosis.first == "down"
    assert "its adapter is missing" in result.diagnosis.why


@pytest.mark.slow
def test_where_weights_are_no_layers_the_verdict_says_that_it_was_not_followed(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter]
) -> None:
    base = load_model(str(made("gpt2", "base")))
    result = verdict(made("gpt2", "base"), base, [adapter("gpt2")])
    assert (result.verdict.outcome, result.diagnosis) == (Outcome.DIFFERENT, None)
    assert any("where it differs was not looked for" in note for note in result.verdict.notes)


def test_outputs_have_the_names_that_the_module_gave_them(tmp_path: Path) -> None:
    path = export(Switches(), {"x": noise(2, 4)}, tmp_path / "named.pt2")
    runner = open_artifact.open_candidate(path, None)  # type: ignore[arg-type]
    answer = runner.run({"x": np.ones((3, 4), np.float32)})
    assert list(answer) == ["sum", "parts.0", "parts.1.0", "parts.1.1"]
    assert [value.shape for value in answer.values()] == [(3, 4), (8,), (3, 2), (3, 2)]


def static(subject: Subject, module: nn.Module, path: Path, *, batch: Any = VARIES) -> Path:
    return export(module, subject.inputs, path, shapes={name: {0: batch} for name in subject.inputs})


def test_a_candidate_of_one_length_is_judged_at_it_and_the_verdict_says_so(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["mlp"]
    path = static(subject, subject.merged(), tmp_path / "static.pt2")
    result = verdict(path, load_model(str(made("mlp", "base"))), [adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert "the candidate was made for one size of rows_axis1, 5: no other was tried" in result.verdict.notes


def test_a_candidate_of_one_batch_is_refused_as_an_onnx_of_one_is(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["mlp"]
    path = export(subject.merged(), subject.inputs, tmp_path / "static.pt2", dynamic=0)
    with pytest.raises(RuntimeRefused, match="axis 0 of rows is 1, and the program was exported for 2 alone"):
        verdict(path, load_model(str(made("mlp", "base"))), [adapter("mlp")])


def test_a_range_is_respected_and_told(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    subject = SUBJECTS["mlp"]
    length = torch.export.Dim("length", min=4, max=7)
    path = export(subject.merged(), subject.inputs, tmp_path / "ranged.pt2", shapes={"rows": {0: VARIES, 1: length}})
    result = verdict(path, load_model(str(made("mlp", "base"))), [adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert "the candidate takes a rows_axis1 of 4 to 7: no size outside was tried" in result.verdict.notes
    module = program.load(path)
    with torch.no_grad():
        for size in (3, 8):
            with pytest.raises(RuntimeRefused, match="4 to 7"):
                module(rows=noise(2, size, 64))
        module(rows=noise(2, 4, 64))


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"ids": (2, 5, torch.int64)}, "the program's input mask is missing"),
        ({"ids": (2, 5, torch.int64), "mask": (2, 5, torch.int64), "more": (2, 5, torch.int64)}, "has no input more"),
        ({"ids": (2, 5, torch.int32), "mask": (2, 5, torch.int64)}, "ids is int32, and the program takes int64"),
        ({"ids": (2, 5, torch.float32), "mask": (2, 5, torch.int64)}, "ids is float32"),
        ({"ids": (2, 5, torch.int64), "mask": (2, 4, torch.int64)}, "another axis that must have the same size is 5"),
        ({"ids": (2, 5, 1, torch.int64), "mask": (2, 5, torch.int64)}, "ids has 3 axes"),
    ],
)
def test_inputs_that_a_program_was_not_made_for_are_refused(
    made: Callable[[str, str], Path], inputs: dict[str, Any], problem: str
) -> None:
    module = program.load(made("words", "base"))
    given = {name: torch.zeros(shape, dtype=dtype) for name, (*shape, dtype) in inputs.items()}
    with pytest.raises(RuntimeRefused, match=problem):
        module(**given)


def test_an_operator_that_fails_is_named(made: Callable[[str, str], Path]) -> None:
    module = program.load(made("words", "base"))
    with pytest.raises(RuntimeRefused, match=r"node embedding \(aten\.embedding\.default\): index out of range"):
        module(ids=torch.full((2, 5), 10), mask=torch.ones(2, 5).long())


# --- in half precision -----------------------------------------------------------------------------


def in_half(subject: Subject, module: nn.Module, dtype: torch.dtype, path: Path) -> Path:
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in subject.inputs.items()}
    return export(copy.deepcopy(module).to(dtype), inputs, path, dynamic=subject.dynamic)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mlp", torch.bfloat16), pytest.param("cnn", torch.float16, marks=pytest.mark.slow)]
)
def test_in_half_precision_pytorch_is_run_in_it_too(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    subject, spelled = SUBJECTS[name], str(dtype).removeprefix("torch.")
    merged = in_half(subject, subject.merged(), dtype, tmp_path / "merged.pt2")
    base = load_model(str(in_half(subject, subject.base, dtype, tmp_path / "base.pt2")))
    assert {parameter.dtype for parameter in base.module.parameters()} == {torch.float32}
    result = verdict(merged, base, [adapter(name)])
    assert (result.verdict.outcome, result.verdict.dtype) == (Outcome.SAME, spelled), str(result.verdict)
    assert f"the model's .pt2 stores its weights in {spelled}" in result.verdict.notes
    assert all(case.deployed["output_0"].dtype.name == spelled for case in result.cases)
    eager = factory.from_module(subject.base, dict(subject.inputs))
    assert verdict(merged, eager, [adapter(name)]).verdict.outcome is Outcome.SAME
    wrong = in_half(subject, subject.merged(left_out), dtype, tmp_path / "wrong.pt2")
    assert verdict(wrong, base, [adapter(name)]).verdict.outcome is Outcome.DIFFERENT
    with pytest.raises(InputRefused, match=f"candidate computes in {spelled} and .* was exported in float32"):
        verdict(merged, load_model(str(made(name, "base"))), [adapter(name)])


class Upcast(nn.Module):
    """Computes its norm in fp32, as Llama does, and hands out the dtype that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.up(rows)
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.down(normed.to(x.dtype))


def test_casts_in_the_graph_follow_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Upcast().to(torch.bfloat16)
    path = export(eager, {"rows": noise(2, 5, 64).bfloat16()}, tmp_path / "half.pt2", dynamic=2)
    module = program.load(path)
    rows = noise(3, 4, 64)
    with torch.no_grad():
        assert torch.equal(module(rows=rows.bfloat16()), eager(rows.bfloat16()))
        assert torch.equal(module.float()(rows=rows), copy.deepcopy(eager).float()(rows))
    reference, theirs = Fp64Runner(copy.deepcopy(module).double()), Fp64Runner(copy.deepcopy(eager).double())
    own, wanted = (each.run({"rows": rows.numpy()})["output_0"] for each in (reference, theirs))
    np.testing.assert_allclose(own, wanted, rtol=1e-12)
    assert own.dtype == np.float64 and reference.narrow_operators == set()


# --- models ----------------------------------------------------------------------------------------


def test_the_axes_of_a_model_are_those_that_vary(made: Callable[[str, str], Path]) -> None:
    llama = load_model(str(made("llama", "base")))
    assert llama.axes == {name: {0: "batch", 1: "sequence"} for name in SUBJECTS["llama"].inputs}
    assert [sizes["batch"] for sizes in llama.checked_sizes({})] == [1, 3, 5]
    assert [sizes["sequence"] for sizes in llama.checked_sizes({})] == [7, 16, 29]
    cnn = load_model(str(made("cnn", "base")))
    assert cnn.axes == {"picture": {0: "batch"}}
    assert cnn.inputs({"batch": 3}, seed=0)["picture"].shape == (3, 3, 8, 8)


def test_inputs_are_drawn_as_the_model_takes_them(made: Callable[[str, str], Path]) -> None:
    drawn = load_model(str(made("words", "base"))).inputs({"batch": 5, "sequence": 29}, seed=1)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in drawn.items()} == dict.fromkeys(
        SUBJECTS["words"].inputs, (torch.int64, (5, 29))
    )
    assert set(drawn["ids"].unique().tolist()) == set(range(10))
    mask = drawn["mask"]
    assert set(mask.unique().tolist()) == {0, 1}
    assert (mask[:, 0] == 0).any() and (mask[1:] == 0).any(1).all()
    again = load_model(str(made("words", "base"))).inputs({"batch": 5, "sequence": 29}, seed=1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_sizes_stay_within_what_the_model_takes(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=3, max=8)
    path = export(Wide(), {"rows": noise(2, 5, 64)}, tmp_path / "w.pt2", shapes={"rows": {0: VARIES, 1: length}})
    sizes = [there["rows_axis1"] for there in load_model(str(path)).checked_sizes({})]
    assert sizes == [6, 8, 8]


def test_a_model_of_one_size_says_that_no_other_was_tried(adapter: Callable[[str], Adapter], tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]
    base = export(subject.base, subject.inputs, tmp_path / "base.pt2", dynamic=0)
    merged = export(subject.merged(), subject.inputs, tmp_path / "merged.pt2", dynamic=0)
    result = verdict(merged, load_model(str(base)), [adapter("mlp")])
    assert result.verdict.outcome is Outcome.SAME
    assert any(note.startswith("the model was exported for one size of every axis") for note in result.verdict.notes)


class Numbers(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return x * n[:, None]


def test_whole_numbers_of_which_nothing_tells_the_range_are_refused(tmp_path: Path) -> None:
    path = export(Numbers(), {"x": noise(2, 4), "n": torch.tensor([1, 2])}, tmp_path / "numbers.pt2")
    program.load(path)
    with pytest.raises(InputRefused, match="the integer input n indexes no embedding table"):
        load_model(str(path))


def test_an_adapter_for_another_model_lists_its_misfits(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter]
) -> None:
    base = load_model(str(made("cnn", "base")))
    with pytest.raises(InputRefused, match="targets do not fit the base"):
        verdict(made("cnn", "base"), base, [adapter("mlp")])


def test_packed_attention_takes_its_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Spotter().eval()
    fresh = layers.create_adapter(eager, targets="all-linear", rank=2, alpha=4, seed=0)
    assert "encoder.layers.0.self_attn" in fresh.pairs
    rng = np.random.default_rng(0)
    pairs = {
        name: LoraPair(a=pair.a, b=rng.standard_normal(pair.b.shape) * 0.3, scale=pair.scale)
        for name, pair in fresh.pairs.items()
    }
    adapter = Adapter(name="a", format="test", pairs=pairs)
    base = load_model(str(export(eager, {"signal": noise(2, 4, 9)}, tmp_path / "base.pt2")))
    own = Fp64Runner(pytorch.adapted(base, [adapter]).double()).run({"signal": noise(3, 4, 9).numpy()})
    of_eager = factory.from_module(eager, noise(2, 4, 9))
    theirs = Fp64Runner(pytorch.adapted(of_eager, [adapter]).double()).run({"signal": noise(3, 4, 9).numpy()})
    np.testing.assert_allclose(own["output_0"], theirs["output_0"], rtol=1e-10, atol=1e-12)
    without = Fp64Runner(copy.deepcopy(eager).double()).run({"signal": noise(3, 4, 9).numpy()})
    assert np.abs(without["output_0"] - own["output_0"]).max() > 1e-2


def test_merged_files_of_other_kinds_are_judged_by_a_program_too(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    base, merged = load_model(str(made("words", "base"))), SUBJECTS["words"].merged()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    with torch.no_grad():
        torch.jit.trace(merged, tuple(SUBJECTS["words"].inputs.values())).save(str(tmp_path / "merged.pt"))
    for name in ("merged.safetensors", "merged.pt"):
        assert verdict(tmp_path / name, base, [adapter("words")]).verdict.outcome is Outcome.SAME
    save_file(SUBJECTS["words"].base.state_dict(), tmp_path / "base.safetensors")
    result = verdict(tmp_path / "base.safetensors", base, [adapter("words")])
    assert result.verdict.outcome is Outcome.DIFFERENT


def test_what_the_reference_said_of_a_program_is_kept_for_that_program_alone(
    made: Callable[[str, str], Path], adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for what in ("base", "base"):
        base = load_model(str(made("mlp", what)))
        assert verdict(made("mlp", "merged"), base, [adapter("mlp")], cache=cache).verdict.same
        assert len(list(cache.iterdir())) == 1
    other = copy.deepcopy(base.module)
    assert repr(other) == repr(base.module) and base.module.description.graph_sha256 in repr(other)


# --- the commands ----------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, json.loads(told.out) if told.out.startswith("{") else told.out, told.err


FACTORY = f"{FACTORIES}:wide"


def test_verify_takes_a_pt2_on_either_side(
    made: Callable[[str, str], Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SUBJECTS["mlp"].adapter(place / "mlp-adapter")
    base, merged, adapter = made("mlp", "base"), made("mlp", "merged"), place / "mlp-adapter"
    report = tmp_path / "verdict.json"
    code, told, _ = call(capsys, "verify", merged, "--model", base, "-a", adapter, "--report", report, "--json")
    assert (code, told["outcome"]) == (0, "same")
    assert list(told["about"]["candidate"]["sha256"]) == [merged.name]
    assert json.loads(report.read_text())["outcome"] == "same"
    code, told, _ = call(capsys, "verify", base, "--model", base, "-a", adapter, "--json")
    assert (code, told["outcome"]) == (4, "different")
    assert call(capsys, "verify", merged, "--model", base, "-a", adapter, "--provider", "cuda")[0] == 2


def test_a_graph_that_onnx_made_is_proven_against_the_program(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = export(Wide(), SUBJECTS["mlp"].inputs, tmp_path / "base.pt2", dynamic=2)
    SUBJECTS["mlp"].adapter(place / "mlp-adapter")
    out = tmp_path / "out.onnx"
    assert call(capsys, "onnx", FACTORY, "-a", place / "mlp-adapter", "-o", out)[0] == 0
    code, told, _ = call(capsys, "verify", out, "--model", base, "-a", place / "mlp-adapter", "--json")
    assert (code, told["outcome"], told["placement"]["off_provider"]) == (0, "same", [])
    code, told, _ = call(capsys, "verify", out, "--model", base, "--json")
    assert (code, told["outcome"]) == (4, "different")


def test_a_program_is_not_exported_again_and_not_trained(
    made: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made("mlp", "base")
    np.savez(tmp_path / "data.npz", rows=np.ones((4, 5, 64), np.float32), labels=np.ones((4, 5, 64), np.float32))
    for command in (
        ("onnx", base, "-o", tmp_path / "out.onnx"),
        ("torchscript", base, "-o", tmp_path / "out.pt"),
        ("train", base, "--data", tmp_path / "data.npz", "-o", tmp_path / "adapter"),
    ):
        code, said, told = call(capsys, *command)
        assert (code, said) == (3, "")
        assert "was exported already" in told and "`lora-export verify` takes it" in told
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


# --- what keeps something ---------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize(
    ("decomposed", "problem"),
    [(False, "programs that keep state from run to run"), (True, "no pure function of its inputs")],
)
def test_a_program_that_changes_its_buffers_is_refused(tmp_path: Path, decomposed: bool, problem: str) -> None:
    path = export(Counting(), {"x": noise(2, 4)}, tmp_path / "counting.pt2", decomposed=decomposed)
    with pytest.raises(InputRefused, match=problem):
        program.load(path)


def test_a_weight_that_is_changed_through_a_view_is_noticed(made: Callable[[str, str], Path], tmp_path: Path) -> None:
    name, graph = graph_of(made("mlp", "base"))
    nodes = graph["graph_module"]["graph"]["nodes"]
    weight = graph["graph_module"]["signature"]["input_specs"][0]["parameter"]["arg"]["name"]
    detach = {"target": "torch.ops.aten.detach.default", "metadata": {}, "name": "d"}
    detach |= {"inputs": [tensor("self", weight)], "outputs": [{"as_tensor": {"name": "view_of_it"}}]}
    write = {"target": "torch.ops.aten.zero_.default", "metadata": {}, "name": "z"}
    write |= {"inputs": [tensor("self", "view_of_it")], "outputs": [{"as_tensor": {"name": "zeroed"}}]}
    nodes += [detach, write]
    path = rewritten(made("mlp", "base"), tmp_path / "sly.pt2", {name: json.dumps(graph).encode()})
    module = program.load(path)
    with torch.no_grad(), pytest.raises(RuntimeRefused, match="changes its own weights"):
        module(rows=noise(2, 5, 64))


def tensor(argument: str, value: str) -> dict[str, Any]:
    return {"name": argument, "arg": {"as_tensor": {"name": value}}, "kind": 1}
