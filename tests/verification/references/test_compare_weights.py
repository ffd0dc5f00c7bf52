"""The weights of both sides, compared: every number of every tensor, whatever the exporter made of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import NameSource
from lora_export.lora import Adapter, LoraPair, TokenRows, expert_name
from lora_export.models.export import to_onnx
from lora_export.models.load import from_module
from lora_export.models.model import Model
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.plan.stored_region import StoredRegion
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from lora_export.verification.references import expected_weight
from lora_export.verification.references.candidate_tensors import compare_tensors
from lora_export.verification.references.compare_tensors import CandidateTensor, compare_expected
from lora_export.verification.references.expected_weight import ExpectedWeight, WrongNumbers

Tensors = dict[str, NDArray[Any]]
Change = Callable[[Tensors], None]
CLASS, OWN = None, NameSource.INITIALIZER  # the names of a module of the same class, and of a graph


class Layers(nn.Module):
    """A tied head, three layers of one input, a transposed one, a convolution, experts in a stack, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 16)
        self.q, self.k, self.v = (nn.Linear(16, size) for size in (16, 8, 24))
        self.turned = Conv1D(16, 16)
        nn.init.normal_(self.turned.weight)
        self.conv = nn.Conv1d(8, 16, 3)
        self.experts = nn.Parameter(torch.randn(6, 16, 12))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.embed.weight


MODULE = Layers()
LAYERS = ("q", "v", "turned", "conv")


def a_pair(name: str, *, dora: bool = False) -> LoraPair:
    rng = np.random.default_rng(len(name))
    spec = next(spec for spec in layers.specs(MODULE) if spec.name == f"{name}.weight")
    out, *inner = spec.matrix
    b = rng.normal(size=(out, 4, *[1] * (len(inner) - 1)))
    magnitude = rng.uniform(1, 2, size=out) if dora else None
    return LoraPair(a=rng.normal(size=(4, *inner)), b=b, scale=0.5, magnitude=magnitude)


def an_expert() -> LoraPair:
    rng = np.random.default_rng(3)
    return LoraPair(a=rng.normal(size=(2, 12)), b=rng.normal(size=(16, 2)), scale=0.5, as_stored=True)


ADAPTERS = {
    "none": None,
    "lora": Adapter(name="a", format="test", pairs={name: a_pair(name) for name in LAYERS}, sha256="0"),
    "dora": Adapter(name="a", format="test", pairs={name: a_pair(name, dora=True) for name in LAYERS}, sha256="0"),
    "experts": Adapter(
        name="a", format="test", pairs={expert_name("experts", at): an_expert() for at in (1, 4)}, sha256="0"
    ),
    "rows": Adapter(
        name="a", format="test", pairs={}, sha256="0",
        token_rows={"embed.weight": TokenRows(np.array([3, 200]), np.ones((2, 16), np.float32), tied=("head",))},
    ),
}  # fmt: skip


@functools.cache
def planned(kind: str) -> plan.Plan | None:
    adapter = ADAPTERS[kind]
    return None if adapter is None else plan.make([adapter], layers.specs(MODULE))


@functools.cache
def folded(kind: str) -> nn.Module:
    """The module with an adapter folded in by PyTorch."""
    module, steps = copy.deepcopy(MODULE), planned(kind)
    if steps is not None:
        layers.fold(module, steps)
    return module


def merged(kind: str, dtype: Any = np.float32) -> Tensors:
    """A copy of its tensors, in a dtype."""
    return {name: value.detach().numpy().astype(dtype) for name, value in folded(kind).state_dict().items()}


def compared(
    tensors: Mapping[str, NDArray[Any]], kind: str = "none", source: NameSource | None = OWN
) -> parity.Findings:
    """`tensors` whose names begin with `?` have lost them."""
    given = [
        CandidateTensor("" if name.startswith("?") else name, source, array.shape, lambda array=array: array)
        for name, array in tensors.items()
    ]
    return compare_tensors(given, MODULE, planned(kind))


def share(found: parity.Findings) -> str:
    """How many of the model's tensors were compared."""
    (note,) = found.notes
    return note.partition(" tensors")[0]


def as_they_are(tensors: Tensors) -> None:
    pass


def transposed(tensors: Tensors) -> None:
    for name in ("q.weight", "k.weight", "v.weight", "turned.weight", "experts"):
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(-1, -2))


def without_names(tensors: Tensors) -> None:
    for name in [name for name, array in tensors.items() if array.ndim > 1]:
        tensors[f"?{name}"] = tensors.pop(name)


def fused(tensors: Tensors) -> None:
    tensors["?qkv"] = np.concatenate([tensors.pop(f"{name}.weight") for name in "qkv"]).T


def with_a_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


RIGHT = [as_they_are, transposed, without_names, fused, with_a_prefix]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("change", "dtype"),
    [*((change, np.float32) for change in RIGHT), (as_they_are, np.float16), (fused, ml_dtypes.bfloat16)],
    ids=lambda each: each.__name__,
)
def test_right_tensors_are_found_and_equal(change: Change, kind: str, dtype: Any) -> None:
    for tensors in (merged(kind, dtype), merged("none", dtype)):  # the adapter in the weights, or beside them
        change(tensors)
        found = compared(tensors, kind)
        assert not [*found.faults, *found.doubts]
        assert share(found) == "14 of the model's 14"


def test_what_cannot_be_matched_is_only_noted() -> None:
    tensors = merged("lora")
    tensors["?folded"] = tensors.pop("q.weight") * 3 + 1
    tensors["norm.weight"] = tensors["norm.weight"] + 1  # Gemma's norms, as the genai builder stores them
    tensors["conv.weight"] = tensors["conv.weight"] * np.arange(-8, 8).reshape(16, 1, 1) * 1.01  # a batch norm
    tensors["?table"] = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    tensors["?mask"] = np.triu(np.ones((16, 24), np.float32))
    tensors["lora_A.weight"] = np.ones((8, 16), np.float32)
    found = compared(tensors, "lora")
    assert not [*found.faults, *found.doubts]
    assert share(found) == "11 of the model's 14"
    (note,) = found.notes
    assert note.endswith("no tensor like the others: outputs alone judge q.weight, conv.weight, norm.weight")


def every_50th_row(tensors: Tensors) -> None:
    for name in ("embed.weight", "head.weight"):
        tensors[name][::50] = tensors[name][1]


def a_negated_layer(tensors: Tensors) -> None:
    tensors["k.weight"] *= -1


def a_blank_layer(tensors: Tensors) -> None:
    tensors["v.weight"] *= 0


def a_negated_expert(tensors: Tensors) -> None:
    tensors["experts"][2] *= -1


def exchanged_experts(tensors: Tensors) -> None:
    tensors["experts"][[1, 2]] = tensors["experts"][[2, 1]]


def one_number(tensors: Tensors) -> None:
    tensors["q.weight"][3, 5] = np.nan


def one_bias(tensors: Tensors) -> None:
    tensors["q.bias"][3] += tensors["q.bias"][4]


DEFECTS = {
    every_50th_row: "embed.weight: 96 of 4,800 numbers are not the model's, in 6 rows, the first of them 0",
    a_negated_layer: "k.weight: its numbers have the other sign",
    a_blank_layer: "v.weight: all of its numbers are 0",
    a_negated_expert: "experts: 192 of 1,152 numbers are not the model's, in 16 rows, the first of them 32",
    exchanged_experts: "experts: 384 of 1,152 numbers",
    one_number: "q.weight: 1 of 256 numbers are not the model's, the first in row 3",
    one_bias: "q.bias: 1 of 16 numbers",
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("source", [CLASS, OWN], ids=["module", "graph"])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_wrong_numbers_are_found(defect: Change, source: NameSource | None, kind: str) -> None:
    tensors = merged(kind)
    defect(tensors)
    found = compared(tensors, kind, source)
    name = DEFECTS[defect].partition(":")[0]
    assert found.faults and all(fault.startswith((f"{name}:", "head.weight:", "experts[")) for fault in found.faults)
    if kind == "none" and source is OWN:
        assert found.faults[0].startswith(DEFECTS[defect])


def test_a_modules_own_tensor_may_not_be_transposed() -> None:
    tensors = merged("none") | {"q.weight": MODULE.q.weight.detach().numpy().T}
    assert not compared(tensors).faults, "a graph may store it so"
    assert compared(tensors, source=CLASS).faults[0].startswith("q.weight: 2")


@pytest.mark.parametrize("row", [3, 12, 18], ids=["in a part", "between two parts", "in another part"])
def test_the_first_wrong_row_is_that_of_the_tensor(row: int) -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=(24, 8)).astype(np.float32)  # q, k and v
    found, steps = base.copy(), []
    for name, rows in (("q", slice(0, 8)), ("v", slice(16, 24))):
        pair = LoraPair(a=random.normal(size=(2, 8)), b=random.normal(size=(8, 2)), scale=1.0)
        spec = TensorSpec(f"{name}.weight", (8, 8), "float32", Layout.OUT_IN, region=StoredRegion("qkv", (24, 8), rows))
        steps.append(Step(spec, (Term("one", name, pair, 1.0),)))
        found[rows] += pair.b @ pair.a
    expected = ExpectedWeight(TensorSpec("qkv", (24, 8), "float32"), lambda: base, tuple(steps))
    assert expected.wrong_in(found) == WrongNumbers()
    found[row, 5] += 1
    assert expected.wrong_in(found) == WrongNumbers(1, 1, row)


def test_many_wrong_tensors_are_counted() -> None:
    tensors = {name: array + 1 for name, array in merged("none").items()}
    faults = compared(tensors, source=CLASS).faults
    assert len(faults) == 6 and faults[-1] == "numbers of 10 more tensors are wrong"


@pytest.mark.parametrize("change", [transposed, without_names, fused], ids=lambda change: change.__name__)
@pytest.mark.parametrize("defect", [every_50th_row, a_negated_expert, one_number], ids=lambda each: each.__name__)
def test_wrong_numbers_are_found_in_other_places(change: Change, defect: Change) -> None:
    tensors = merged("lora")
    defect(tensors)
    change(tensors)
    assert compared(tensors, "lora").faults


def test_other_numbers_under_a_graphs_name_are_a_doubt() -> None:
    tensors = merged("none")
    tensors["k.weight"] = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    found = compared(tensors)
    assert not found.faults and found.doubts[0].startswith("k.weight: the candidate has other numbers in the tensor")
    assert compared(tensors, source=CLASS).faults[0].startswith("k.weight: 128 of 128 numbers are not the model's")


# --- batch norms that an exporter folded ---


class Normed(nn.Module):
    """A convolution and a transposed one, each before a batch norm."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, eps=3e-6)
        self.turned, self.other = nn.ConvTranspose2d(12, 8, 3), nn.BatchNorm2d(8, eps=3e-6)
        for norm in (self.norm, self.other) if trained else ():
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.data.uniform_(0.5, 2)
        self.eval()

    def adapted(self) -> plan.Plan:
        rng = np.random.default_rng(0)
        pair = LoraPair(a=rng.normal(size=(2, 6, 3, 3)), b=rng.normal(size=(12, 2, 1, 1)), scale=0.5)
        return plan.make([Adapter(name="a", format="test", pairs={"conv": pair}, sha256="0")], layers.specs(self))

    def folded(self) -> Tensors:
        """The tensors of both convolutions with the adapter and the norms in them, folded by PyTorch."""
        merged = copy.deepcopy(self)
        layers.fold(merged, self.adapted())
        conv = fuse_conv_bn_eval(merged.conv, merged.norm)
        turned = fuse_conv_bn_eval(merged.turned, merged.other, transpose=True)
        parts = {"conv": conv, "turned": turned}
        return {
            f"{part}.{name}": value.detach().numpy()
            for part, owner in parts.items()
            for name, value in owner.named_parameters()
        }

    def compared(self, tensors: Tensors) -> parity.Findings:
        given = [CandidateTensor(name, OWN, array.shape, lambda array=array: array) for name, array in tensors.items()]
        return compare_tensors(given, self, self.adapted())


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_folded_batch_norms_are_undone_before_weights_are_compared(trained: bool) -> None:
    module = Normed(trained=trained)
    right = module.compared(module.folded())
    assert not [*right.faults, *right.doubts]
    assert share(right) == "2 of the model's 12"
    for name in ("conv.weight", "turned.weight"):
        tensors = module.folded()
        tensors[name] = tensors[name].copy()
        tensors[name][3, 2, 1, 1] *= 1.001
        (fault,) = module.compared(tensors).faults
        assert fault.startswith(f"{name}: 1 of ")


def test_a_norm_that_the_graph_has_is_not_undone() -> None:
    module = Normed(trained=False)
    found = module.compared(module.folded() | {"norm.running_var": np.ones(12, np.float32)})
    (fault,) = found.faults
    assert fault.startswith("conv.weight: ")
    assert share(found) == "3 of the model's 12"


# --- the verdict ---------------------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts, of which inputs hardly ever reach the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.often, self.rare = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.mean(-1, keepdim=True) > 5, self.rare(x), self.often(x))


@pytest.fixture
def routed() -> Model:
    return from_module(Routed(), {"x": torch.randn(2, 5, 16)})


def verdict_of(module: nn.Module, model: Model, folder: Path, form: str) -> parity.Verdict:
    adapter = Adapter(
        name="a", format="test", sha256="0",
        pairs={"often": LoraPair(a=np.ones((2, 16)) / 4, b=np.eye(16)[:, :2] + 0.5, scale=1.0)},
    )  # fmt: skip
    if form == "folder":
        layers.fold(module, plan.make([adapter], layers.specs(module)))
        return prove(ModuleRunner(module), PyTorchReferences(model, [adapter])).verdict
    graph: ir.Model = to_onnx(module, model.example_inputs(), axes=model.axes)
    save_graph(graph, folder, "m.onnx")
    return prove(OnnxRunner(folder / "m.onnx"), PyTorchReferences(model)).verdict


@pytest.mark.parametrize("form", ["folder", "graph"])
def test_a_negated_rare_expert_is_different(form: str, routed: Model, tmp_path: Path) -> None:
    right = verdict_of(copy.deepcopy(routed.module), routed, tmp_path, form)
    assert right.same and any("4 of the model's 4 tensors, 100 %" in note for note in right.notes), str(right)
    module = copy.deepcopy(routed.module)
    module.rare.weight.data *= -1
    wrong = verdict_of(module, routed, tmp_path, form)
    assert wrong.outcome is parity.Outcome.DIFFERENT
    assert {reason.gate for reason in wrong.reasons} == {"weights"}


def test_a_comparison_computes_with_one_thread_of_a_blas():
    (name, array), *_ = merged("lora").items()
    threads: list[int] = []

    def load() -> NDArray[Any]:
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return array

    with threadpool_limits(2, user_api="blas"):
        compare_tensors([CandidateTensor(name, OWN, array.shape, load)], MODULE, planned("lora"))
    assert threads and set(threads) == {1}


def test_nameless_tensors_are_compared_with_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with each would take hours for the experts of a model."""
    calls, are_near = [], expected_weight._Terms.are_near
    monkeypatch.setattr(expected_weight._Terms, "are_near", lambda *given: calls.append(given) or are_near(*given))
    rng = np.random.default_rng(0)
    arrays = list(rng.normal(size=(50, 16, 16)).astype(np.float32))
    specs = [TensorSpec(f"l{number}.weight", (16, 16), "float32", Layout.OUT_IN) for number in range(50)]
    pair = LoraPair(a=rng.normal(size=(2, 16)), b=rng.normal(size=(16, 2)), scale=1)
    steps = {7: (Step(specs[7], (Term("a", "l7", pair),)),)}
    weights = [
        (i, ExpectedWeight(specs[i], functools.partial(arrays.__getitem__, i), steps.get(i, ()))) for i in range(50)
    ]
    stored = [*arrays[:7], arrays[7] + pair.delta(), *arrays[8:], rng.normal(size=(16, 16)).astype(np.float32)]
    tensors = [CandidateTensor("", None, (16, 16), stored[i].T.copy) for i in rng.permutation(51)]
    found = compare_expected(tensors, weights)
    assert found.notes[0].startswith("50 of the model's 50 tensors, 100 % of its numbers") and not found.faults
    assert len(calls) < 20 * len(tensors)
