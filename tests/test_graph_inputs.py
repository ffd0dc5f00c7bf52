"""Places for adapters in a graph: optional inputs, what they are called, and what the graph is without them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import EVERY_MODEL, a_graph, an_adapter, contents, eager, exported, inputs, linear_specs, run, with_changes
from numpy.typing import NDArray
from test_graph_fold import GEMM, LINEAR, PAIR, SHARED, SQUARE

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import Contract, Place
from lora_export.graph import files, sites
from lora_export.graph.inputs import contract_of, open_inputs
from lora_export.lora import Adapter, LoraPair, Rows

X = np.float32([[1, 1, 2], [0, 3, 1]])


def opened(model: ir.Model, *weights: str, **options: Any) -> Contract:
    contract = open_inputs(model, sites.find(model), weights, **options)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return contract


def given(contract: Contract, adapter: Adapter, strength: float = 1.0) -> dict[str, NDArray[Any]]:
    steps = plan.make([adapter], [place.spec for place in contract.places], strengths=[strength])
    return onnx_adapter.parameters(contract, steps, adapter.name)


# --- one layer, by hand ---


def test_a_and_b_are_optional_inputs_whose_default_has_rank_zero() -> None:
    model = a_graph(LINEAR)
    contract = opened(model, "m.weight")
    a, b = model.graph.inputs[-2:]
    assert [(a.name, str(a.shape)), (b.name, str(b.shape))] == [
        ("m.lora_A.weight", "[3,m.lora_r]"),
        ("m.lora_B.weight", "[m.lora_r,2]"),
    ]
    defaults = [
        model.graph.initializers[name].const_value.shape.numpy() for name in ("m.lora_A.weight", "m.lora_B.weight")
    ]
    assert defaults == [(3, 0), (0, 2)]
    assert [(place.weight, place.a, place.b, place.shape) for place in contract.places] == [
        ("m.weight", "m.lora_A.weight", "m.lora_B.weight", (2, 3))
    ]


def test_an_adapter_is_added_where_it_is_given_and_nothing_where_it_is_not() -> None:
    model = a_graph(LINEAR)
    before = run(model, x=X)["y"]
    contract = opened(model, "m.weight")
    fed = given(contract, an_adapter({"m": PAIR}), 0.5)
    assert np.array_equal(fed["m.lora_A.weight"], [[1], [0], [-1]])
    assert np.array_equal(fed["m.lora_B.weight"], [[1 * 2 * 0.5, 2 * 2 * 0.5]])
    assert run(model, x=X)["y"].tobytes() == before.tobytes()
    # x A^T = [-1, -1], times 0.5 s B^T = [1, 2], times what the last node multiplies by
    assert np.array_equal(run(model, x=X, **fed)["y"], before + np.float32([[-1 * 7, -2 * 8]] * 2))


def test_a_gemm_and_a_module_that_is_called_twice_take_one_pair() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    contract = opened(model, "a.fc.weight")
    fed = given(contract, an_adapter({"a.fc": SQUARE}))
    w = np.float32([[1, 2], [3, 4]]) + np.float32([[1, 2], [0, 0]])  # (in, out)
    assert np.array_equal(run(model, x=np.float32([[1, 2]]), **fed)["y"], np.float32([[1, 2]]) @ w @ w)
    gemm = a_graph(GEMM)
    fed = given(opened(gemm, "m.weight"), an_adapter({"m": PAIR}))
    assert np.array_equal(run(gemm, x=X, **fed)["y"], [[7, 17], [7, 17]])


def test_two_pairs_of_one_adapter_on_one_weight_stand_side_by_side() -> None:
    model = a_graph(GEMM)
    contract = opened(model, "m.weight")
    fed = given(
        contract, an_adapter({"m": PAIR, "m.weight": LoraPair(a=[[0, 1, 0], [1, 0, 0]], b=[[1, 0], [0, 1]], scale=3.0)})
    )
    assert fed["m.lora_A.weight"].shape == (3, 3)
    # beside [[7, 17], [7, 17]]: 3 [x1, x0]
    assert np.array_equal(run(model, x=X, **fed)["y"], [[7 + 3, 17 + 3], [7 + 9, 17 + 0]])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("olive", ["h.0.self_attn.q.lora_A.weight", "h.0.self_attn.q.lora_B.weight"]),
        ("genai", ["h.0.attn.q.lora_A.MatMul.weight", "h.0.attn.q.lora_B.MatMul.weight"]),
        ("peft", ["base_model.model.h.0.self_attn.q.lora_A.weight", "base_model.model.h.0.self_attn.q.lora_B.weight"]),
    ],
)
def test_inputs_follow_the_conventions_that_were_asked_for(names: str, expected: list[str]) -> None:
    model = a_graph(GEMM.replace("m.weight", "h.0.self_attn.q.weight"))
    contract = opened(model, "h.0.self_attn.q.weight", names=names)
    assert [value.name for value in model.graph.inputs[1:]] == expected
    fed = given(contract, an_adapter({"h.0.self_attn.q": PAIR}))
    assert sorted(fed) == expected and np.array_equal(run(model, x=X, **fed)["y"], [[7, 17], [7, 17]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_and_what_is_given_to_them_have_the_weights_dtype(dtype: str) -> None:
    model = a_graph(GEMM)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
    weight = model.graph.initializers["m.weight"]
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(dtype), name="m.weight")
    weight.dtype = weight.const_value.dtype
    contract = opened(model, "m.weight")
    assert {str(value.dtype.numpy()) for value in model.graph.inputs} == {dtype}
    fed = given(contract, an_adapter({"m": PAIR}))
    assert {str(array.dtype) for array in fed.values()} == {dtype}
    if dtype == "float16":  # onnxruntime's CPU has no MatMul for the other
        assert np.array_equal(run(model, x=X.astype(dtype), **fed)["y"], [[7, 17], [7, 17]])


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 7e4), ("bfloat16", 3.4e38), ("float32", 3.4e38)])
def test_a_factor_that_overflows_the_weights_dtype_is_refused(dtype: str, largest: float) -> None:
    place = Place("m.weight", "a", "b", (2, 3), dtype, "")
    pair = LoraPair(a=PAIR.a, b=[[1], [largest]], scale=1.0 if dtype == "float16" else 2.0)
    with pytest.raises(InputRefused, match=rf"default, m.weight: 1 values of b .* largest {dtype} is"):
        given(Contract("0", "0", (place,)), an_adapter({"m": pair}))


# --- refusals ---


def test_a_second_opening_and_a_name_that_is_taken_are_refused() -> None:
    model = a_graph(GEMM)
    opened(model, "m.weight")
    with pytest.raises(InputRefused, match="takes adapters already"):
        opened(model, "m.weight")
    del model.metadata_props[onnx_adapter.KEY]
    with pytest.raises(InputRefused, match=r"the graph holds m.lora_A.weight already"):
        opened(model, "m.weight")


def test_a_weight_that_is_also_looked_up_takes_no_adapter() -> None:
    model = a_graph(
        """
        g (int64[N] ids) => (float[N,3] y)
        <float[3,2] tied.weight = {1,2,3,4,5,6}>
        { [e] x = Gather(tied.weight, ids)
          [t] w = Transpose(tied.weight)
          [n] y = MatMul(x, w) }""",
        modules={"e": "", "n": ""},
    )
    with pytest.raises(InputRefused, match=r"tied.weight is read by Gather"):
        opened(model, "tied.weight")


def test_a_graph_of_an_old_ir_version_is_refused() -> None:
    model = a_graph(GEMM)
    model.ir_version = 3
    with pytest.raises(InputRefused, match="IR version 3"):
        opened(model, "m.weight")


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (an_adapter({"m": PAIR}, rows={"e.weight": Rows(np.arange(2), X)}), "default, e.weight: rows of tokens"),
        (an_adapter({"m": PAIR}, replaced={"head.weight": X}), "default, head.weight: a whole tensor"),
        (an_adapter({"m": PAIR}, biases={"m": np.ones(2, np.float32)}), "default, m: a change of a bias"),
    ],
)
def test_what_no_input_carries_is_refused_by_name(adapter: Adapter, told: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(told)):
        onnx_adapter.refuse_what_no_input_carries([an_adapter({"m": PAIR}, name="good"), adapter])
    onnx_adapter.refuse_what_no_input_carries([an_adapter({"m": PAIR}, name="good")])


# --- the contract ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A graph of two layers with a place at the first."""
    model = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}, float[2,2] n.weight = {1,0,0,1}>
        { [m] h = MatMul(x, m.weight)
          [n] y = MatMul(h, n.weight) }""")
    opened(model, "m.weight")
    files.save(model, tmp_path, "saved.onnx")
    return tmp_path / "saved.onnx"


def test_the_contract_survives_the_file(saved: Path) -> None:
    model = files.load(saved)
    assert contract_of(model, saved) == onnx_adapter.read_contract(model.metadata_props, saved)


def test_the_fingerprint_is_the_bases_whatever_the_places_and_however_the_weights_lie() -> None:
    row = a_graph(GEMM)  # stored (out, in)
    column = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}>
        { [n] y = MatMul(x, m.weight) }""")
    other = a_graph(GEMM.replace("{1,2,", "{1,3,"))
    renamed = a_graph(GEMM.replace("m.weight", "k.weight"))
    prints = [opened(model, *places).base for model, places in [
        (row, ["m.weight"]), (column, ["m.weight"]), (a_graph(GEMM), []), (other, ["m.weight"]), (renamed, []),
    ]]  # fmt: skip
    assert prints[0] == prints[1] == prints[2]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("name", "told"), [("m.weight", "m.weight: holds other numbers"), ("n.weight", "beside which no adapter stands")]
)
def test_a_base_that_was_changed_afterwards_is_refused(saved: Path, name: str, told: str) -> None:
    model = files.load(saved)
    weight = model.graph.initializers[name]
    weight.const_value = ir.Tensor(weight.const_value.numpy() + np.float32(1), name=name)
    with pytest.raises(InputRefused, match=told):
        contract_of(model, saved)


def test_a_graph_whose_inputs_were_changed_is_refused_with_all_of_it(saved: Path) -> None:
    model = files.load(saved)
    model.graph.inputs[1].shape = ir.Shape([3, 4])
    del model.graph.inputs[2]
    with pytest.raises(InputRefused) as refusal:
        contract_of(model, saved)
    assert "m.lora_B.weight: no optional input" in str(refusal.value)
    model = files.load(saved)
    model.graph.inputs[1].shape = ir.Shape([3, 4])
    model.graph.inputs[2].shape = ir.Shape(["r", 5])
    with pytest.raises(InputRefused) as refusal:
        contract_of(model, saved)
    assert "m.lora_A.weight: its rank is fixed" in str(refusal.value)
    assert "m.lora_B.weight: has the shape [r,5], its weight is 2 x 3" in str(refusal.value)


def test_a_graph_without_a_contract_and_a_damaged_one_are_refused(saved: Path) -> None:
    model = files.load(saved)
    good = model.metadata_props.pop(onnx_adapter.KEY)
    with pytest.raises(InputRefused, match="does not say where it takes adapters"):
        contract_of(model, saved)
    for bad in (
        "",
        "{",
        "[]",
        "{}",
        '{"base": 1, "names": "", "places": 3}',
        good.replace("[2, 3]", "[2]"),
        good.replace('"a"', '"c"'),
        good.replace('"base": "', '"base": "z'),
    ):
        model.metadata_props[onnx_adapter.KEY] = bad
        with pytest.raises(InputRefused):
            contract_of(model, saved)


def test_an_adapter_that_does_not_fit_the_places_is_told_with_every_misfit(saved: Path) -> None:
    contract = contract_of(files.load(saved), saved)
    adapter = an_adapter({"n": SQUARE, "m": LoraPair(a=[[1, 2, 3, 4]], b=[[1], [1]], scale=1.0)})
    with pytest.raises(MatchError) as refusal:
        given(contract, adapter)
    assert len(refusal.value.misfits) == 2


# --- real exports, against PyTorch ---


def everywhere(contract: Contract, *, seed: int = 1) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """A pair of its own rank at each place, and the change of each weight in the model's own layout."""
    rng = np.random.default_rng(seed)
    pairs, changes = {}, {}
    for number, place in enumerate(contract.places):
        rank, (out, into) = [1, 4, 2, 7, 3][number % 5], place.shape
        pair = LoraPair(a=rng.standard_normal((rank, into)), b=rng.standard_normal((out, rank)), scale=0.3)
        pairs[re.sub(r"\.(in_proj_)?weight$", "", place.weight)] = pair
        changes[place.weight] = 0.3 * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))
    return an_adapter(pairs), changes


@EVERY_MODEL
def test_an_export_with_mixed_ranks_computes_what_pytorch_computes_and_the_base_without(name: str) -> None:
    made = exported(name)
    base = made.graph.clone()
    contract = opened(made.graph, *(spec.name for spec in linear_specs(made.graph)))
    assert contents(base).items() < contents(made.graph).items()
    adapter, changes = everywhere(contract)
    fed = given(contract, adapter)
    reference = with_changes(made.module, changes)
    for batch, length in [(1, 5), (3, 12), (2, 1)]:
        feeds = inputs(name, batch, length, seed=2)
        arrays = {key: value.numpy() for key, value in feeds.items()}
        answer, off, before = run(made.graph, **arrays, **fed), run(made.graph, **arrays), run(base, **arrays)
        for key, value in eager(reference, feeds).items():
            np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)
            assert np.abs(value - before[key]).max() > 1e-2  # the adapter is seen
            assert off[key].tobytes() == before[key].tobytes()
