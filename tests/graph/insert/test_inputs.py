"""Places for adapters in a graph: optional inputs, what they are called, and what the graph is without them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import AdapterSlot, Contract
from lora_export.graph.find_readers import find_readers
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.check_contract import checked_contract, contract_dora_factors
from lora_export.graph.insert.dora import dora_factors_by_weight
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.values import new_initializer
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.weights.checkpoint import open_checkpoint
from support.exported_models import EVERY_MODEL, eager, exported, inputs, with_changes
from support.graphs import a_graph, an_adapter, contents, linear_specs, quantised, run
from support.handmade import base_file
from support.small_graphs import GEMM, LINEAR, PAIR, SHARED, SQUARE

X = np.float32([[1, 1, 2], [0, 3, 1]])


def opened(model: ir.Model, *weights: str, **options: Any) -> Contract:
    contract = insert_inputs(model, find_sites(model), weights, **options)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return contract


def given(contract: Contract, adapter: Adapter, strength: float = 1.0) -> dict[str, NDArray[Any]]:
    steps = plan.make([adapter], [place.spec for place in contract.slots], strengths=[strength])
    return onnx_adapter.input_values(contract, steps, adapter.name)


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
    assert [(place.weight, place.a, place.b, place.shape) for place in contract.slots] == [
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
    place = AdapterSlot("m.weight", "a", "b", (2, 3), dtype, "")
    pair = LoraPair(a=PAIR.a, b=[[1], [largest]], scale=1.0 if dtype == "float16" else 2.0)
    with pytest.raises(InputRefused, match=rf"default, m.weight: 1 values of b .* largest {dtype} is"):
        given(Contract("0", "0", (place,)), an_adapter({"m": pair}))


# --- refusals ---


def test_a_second_opening_and_a_name_that_is_taken_are_refused() -> None:
    model = a_graph(GEMM)
    opened(model, "m.weight")
    with pytest.raises(InputRefused, match="has inputs for adapters already"):
        opened(model, "m.weight")
    del model.metadata_props[onnx_adapter.CONTRACT_KEY]
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
        (
            an_adapter({"m": PAIR}, token_rows={"e.weight": TokenRows(np.arange(2), X)}),
            "default, e.weight: rows of tokens",
        ),
        (an_adapter({"m": PAIR}, replaced={"head.weight": X}), "default, head.weight: a whole tensor"),
        (an_adapter({"m": PAIR}, biases={"m": np.ones(2, np.float32)}), "default, m: a change of a bias"),
    ],
)
def test_what_no_input_carries_is_refused_by_name(adapter: Adapter, told: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(told)):
        onnx_adapter.refuse_beyond_low_rank([an_adapter({"m": PAIR}, name="good"), adapter])
    onnx_adapter.refuse_beyond_low_rank([an_adapter({"m": PAIR}, name="good")])


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
    save_graph(model, tmp_path, "saved.onnx")
    return tmp_path / "saved.onnx"


def test_the_contract_survives_the_file(saved: Path) -> None:
    model = load_graph(saved)
    assert checked_contract(model, saved) == onnx_adapter.read_contract(model.metadata_props, saved)


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
    ("name", "told"),
    [("m.weight", "m.weight: differs from the weight for which"), ("n.weight", "weights without an adapter differ")],
)
def test_a_base_that_was_changed_afterwards_is_refused(saved: Path, name: str, told: str) -> None:
    model = load_graph(saved)
    weight = model.graph.initializers[name]
    weight.const_value = ir.Tensor(weight.const_value.numpy() + np.float32(1), name=name)
    with pytest.raises(InputRefused, match=told):
        checked_contract(model, saved)


def test_a_graph_whose_inputs_were_changed_is_refused_with_all_of_it(saved: Path) -> None:
    model = load_graph(saved)
    model.graph.inputs[1].shape = ir.Shape([3, 4])
    del model.graph.inputs[2]
    with pytest.raises(InputRefused) as refusal:
        checked_contract(model, saved)
    assert "m.lora_B.weight: no optional input" in str(refusal.value)
    model = load_graph(saved)
    model.graph.inputs[1].shape = ir.Shape([3, 4])
    model.graph.inputs[2].shape = ir.Shape(["r", 5])
    with pytest.raises(InputRefused) as refusal:
        checked_contract(model, saved)
    assert "m.lora_A.weight: its rank is fixed" in str(refusal.value)
    assert "m.lora_B.weight: has the shape [r,5], its weight is 2 x 3" in str(refusal.value)


def test_a_graph_without_a_contract_and_a_damaged_one_are_refused(saved: Path) -> None:
    model = load_graph(saved)
    good = model.metadata_props.pop(onnx_adapter.CONTRACT_KEY)
    with pytest.raises(InputRefused, match="does not record where it takes adapters"):
        checked_contract(model, saved)
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
        model.metadata_props[onnx_adapter.CONTRACT_KEY] = bad
        with pytest.raises(InputRefused):
            checked_contract(model, saved)


def test_an_adapter_that_does_not_fit_the_places_is_told_with_every_misfit(saved: Path) -> None:
    contract = checked_contract(load_graph(saved), saved)
    adapter = an_adapter({"n": SQUARE, "m": LoraPair(a=[[1, 2, 3, 4]], b=[[1], [1]], scale=1.0)})
    with pytest.raises(MatchError) as refusal:
        given(contract, adapter)
    assert len(refusal.value.misfits) == 2


# --- real exports, against PyTorch ---


def everywhere(contract: Contract, *, seed: int = 1) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """A pair of its own rank at each place, and the change of each weight in the model's own layout."""
    rng = np.random.default_rng(seed)
    pairs, changes = {}, {}
    for number, place in enumerate(contract.slots):
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


# --- quantised bases and blocks ---

NUMBERS = np.random.default_rng(3)
WEIGHTS = {name: NUMBERS.normal(size=(size, 32)).astype(np.float32) for name, size in {"q": 8, "k": 4, "o": 6}.items()}


def two_layers(
    folder: Path, *, bits: int = 0, block: int = 32, as_pairs: bool = False, seed: int = 0
) -> tuple[ir.Model, Sites]:
    """q and k in one matrix, o in its own, with names that only the base's checkpoint knows."""
    noise = np.random.default_rng(seed).normal(size=(12, 32)).astype(np.float32) * (1e-2 if seed else 0)
    packed = np.concatenate([WEIGHTS["q"], WEIGHTS["k"]]) + noise
    model = a_graph("""
        g (float[N,32] x) => (float[N,12] y, float[N,6] z)
        <float[32,12] W = {0}, float[32,6] V = {0}>
        { [qk] y = MatMul(x, W)
          [o] z = MatMul(x, V) }""")
    for name, array in {"W": packed.T, "V": WEIGHTS["o"].T}.items():
        model.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    if bits:
        model = quantised(model, bits=bits, block=block, as_pairs=as_pairs)
    tensors = {"q.weight": packed[:8], "k.weight": packed[8:], "o.weight": WEIGHTS["o"]}
    return model, find_sites(model, open_checkpoint(base_file(folder / f"{seed}.safetensors", tensors)))


@pytest.mark.parametrize("as_pairs", [False, True])
def test_a_quantised_bases_fingerprint_is_of_what_is_stored(tmp_path: Path, as_pairs: bool) -> None:
    def fingerprint(**options: Any) -> str:
        model, found = two_layers(tmp_path, **options)
        return insert_inputs(model, found, ["q.weight"]).base

    prints = [
        fingerprint(bits=4, as_pairs=as_pairs),
        fingerprint(bits=4, block=16, as_pairs=as_pairs),
        fingerprint(bits=4, as_pairs=as_pairs, seed=1),
        fingerprint(),
    ]
    assert fingerprint(bits=4, as_pairs=as_pairs) == prints[0]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("bits", [0, 4])
def test_a_block_whose_name_only_the_checkpoint_knew_is_still_known(tmp_path: Path, bits: int) -> None:
    model, found = two_layers(tmp_path, bits=bits)
    opened = insert_inputs(model, found, ["k.weight", "o.weight"], dora=["k.weight"])
    save_graph(model, tmp_path, "packed.onnx")
    model = load_graph(tmp_path / "packed.onnx")
    assert not {"k.weight", "o.weight"} & set(find_sites(model).by_name)
    contract = checked_contract(model, tmp_path / "packed.onnx")
    assert contract == opened
    assert [(place.weight, place.block) for place in contract.slots] == [("k.weight", (8, 12)), ("o.weight", None)]
    pair = LoraPair(a=NUMBERS.normal(size=(2, 32)), b=NUMBERS.normal(size=(4, 2)), scale=1.0, magnitude=[1, 2, 3, -4])
    adapter = an_adapter({"k": pair})
    steps = plan.make([adapter], [place.spec for place in contract.slots])
    fed = onnx_adapter.input_values(
        contract, steps, adapter.name, contract_dora_factors(model, contract, steps, adapter.name)
    )
    x = NUMBERS.normal(size=(5, 32)).astype(np.float32)
    off, on = run(model, x=x), run(model, x=x, **fed)
    stored = next(site for site in found.by_name["k.weight"]).matrix.astype(np.float64)
    factor = pair.magnitude / np.linalg.norm(stored + pair.delta(), axis=1)
    np.testing.assert_allclose(on["y"][:, 8:], (off["y"][:, 8:] + x @ pair.delta().T) * factor, rtol=1e-4, atol=1e-4)
    assert on["y"][:, :8].tobytes() == off["y"][:, :8].tobytes() and on["z"].tobytes() == off["z"].tobytes()


@pytest.mark.parametrize(("bits", "name"), [(0, "W"), (4, "W_Q4"), (4, "W_scales")])
def test_a_block_that_was_changed_afterwards_is_refused(tmp_path: Path, bits: int, name: str) -> None:
    model, found = two_layers(tmp_path, bits=bits)
    insert_inputs(model, found, ["k.weight"])
    value = model.graph.initializers[name]
    changed = value.const_value.numpy().copy()
    changed[-1] += 1  # k's
    value.const_value = ir.Tensor(changed, name=name)
    with pytest.raises(InputRefused, match=r"k\.weight: differs from the weight for which"):
        checked_contract(model, Path("x.onnx"))


def test_a_graph_that_was_quantised_after_it_got_its_inputs_is_believed() -> None:
    model = quantised_later(
        a_graph("""
        g (float[N,32] x) => (float[N,4] y) <float[32,4] m.weight = {0}>
        { [m] y = MatMul(x, m.weight) }""")
    )
    contract = checked_contract(model, Path("x.onnx"))
    assert [place.quantised for place in contract.slots] == [""]
    assert [site.quantised is not None for site in find_sites(model).by_name["m.weight"]] == [True]


def quantised_later(model: ir.Model) -> ir.Model:
    """As a quantiser would do it that leaves the inputs for adapters alone."""
    weight = NUMBERS.normal(size=(32, 4)).astype(np.float32)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(weight, name="m.weight")
    four = quantised(model.clone())
    insert_inputs(model, find_sites(model), ["m.weight"])
    (old,), (new,) = (
        [node for node in graph.graph if node.name == name] for graph, name in ((model, "m"), (four, "m_Q4"))
    )
    values = [new_initializer(model, value.name, value.const_value) for value in new.inputs[1:3]]
    product = ir.Value(name="product", type=old.outputs[0].type, shape=old.outputs[0].shape)
    node = ir.node(new.op_type, [old.inputs[0], *values], new.attributes, domain=new.domain, outputs=[product])
    model.graph.insert_before(old, node)
    for user, index in old.outputs[0].uses():
        user.replace_input_with(index, product)
    model.graph.remove(old)
    del model.graph.initializers["m.weight"]
    model.opset_imports["com.microsoft"] = 1
    return model


# --- DoRA's factors, embeddings, dtypes ---


def test_dora_where_the_graph_takes_none_is_refused_by_name() -> None:
    model = a_graph(GEMM)
    contract = opened(model, "m.weight")
    dora = LoraPair(a=PAIR.a, b=PAIR.b, scale=1.0, magnitude=[1, 1])
    with pytest.raises(InputRefused, match=r"no input for DoRA's factor at these weights:\n  default, m\.weight\n"):
        given(contract, an_adapter({"m": dora}))


def test_a_convolutions_default_has_one_rank_of_zeros() -> None:
    # Over no channels at all, onnxruntime's convolution returns whatever was in its memory before.
    model = a_graph("""
        g (float[N,2,L] x) => (float[N,3,M] y) <float[3,2,2] c.weight = {1,2,3,4,5,6,7,8,9,1,2,3}>
        { [n] y = Conv(x, c.weight) }""")
    (place,) = opened(model, "c.weight", dora=["c.weight"]).slots
    defaults = {name: model.graph.initializers[name].const_value.numpy() for name in place.input_shapes}
    assert {name: array.shape for name, array in defaults.items()} == {
        "c.lora_A.weight": (1, 2, 2), "c.lora_B.weight": (3, 1, 1), "c.lora_magnitude_vector.weight": (3, 1),
    }  # fmt: skip
    assert [array.any() for array in defaults.values()] == [False, False, True]
    assert [str(value.shape) for value in model.graph.inputs[1:]] == ["[c.lora_r,2,2]", "[3,c.lora_r,1]", "[3,1]"]


def test_a_plain_adapter_gives_ones_where_the_graph_takes_factors() -> None:
    model = a_graph(GEMM)
    fed = given(opened(model, "m.weight", dora=["m.weight"]), an_adapter({"m": PAIR}))
    assert fed["m.lora_magnitude_vector.weight"].tolist() == [1, 1]
    assert np.array_equal(run(model, x=X, **fed)["y"], [[7, 17], [7, 17]])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("olive", ["h.self_attn.e.lora_A.weight", "h.self_attn.e.lora_B.weight", "h.self_attn.e.{}.weight"]),
        ("genai", ["h.attn.e.lora_A.MatMul.weight", "h.attn.e.lora_B.MatMul.weight", "h.attn.e.{}.weight"]),
        ("peft", ["base_model.model.h.self_attn.e.lora_embedding_A", "base_model.model.h.self_attn.e.lora_embedding_B",
                  "base_model.model.h.self_attn.e.{}"]),
    ],
)  # fmt: skip
def test_an_embeddings_inputs_and_its_factor_follow_the_conventions_too(names: str, expected: list[str]) -> None:
    model = a_graph("""
        g (int64[N] ids) => (float[N,2] y) <float[3,2] h.self_attn.e.weight = {1,2,3,4,5,6}>
        { [n] y = Gather(h.self_attn.e.weight, ids) }""")
    opened(model, "h.self_attn.e.weight", names=names, dora=["h.self_attn.e.weight"])
    assert [value.name for value in model.graph.inputs[1:]] == [
        name.format("lora_magnitude_vector") for name in expected
    ]


TWO_DTYPES = """
g (float[N,3] x, float16[N,3] h) => (float[N,2] y, float16[N,2] z)
<float[3,2] m.weight = {1,4,2,5,3,6}>
{ half = Cast <to = 10> (m.weight)
  [first] z = MatMul(h, half)
  [second] y = MatMul(x, m.weight) }
"""


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
def test_readers_that_compute_in_two_dtypes_have_each_their_own(mode: str) -> None:
    model = a_graph(TWO_DTYPES, modules={"first": "m", "second": "m"})
    found, pair = find_sites(model), LoraPair(a=PAIR.a, b=PAIR.b, scale=2.0, magnitude=[2, -3])
    assert {site.dtype for site in found.by_name["m.weight"]} == {"float16", "float32"}
    steps, fed = plan.make([an_adapter({"m": pair})], found.specs), dict[str, Any]()
    if mode == "nodes":
        insert_nodes(model, found, steps)
    elif mode == "rows":
        insert_rows(model, found, steps, batch="N")
        fed = {"adapter_ids": np.array([1, 1])}
    else:
        contract = insert_inputs(model, found, ["m.weight"], dora=["m.weight"])
        fed = onnx_adapter.input_values(
            contract, steps, "default", contract_dora_factors(model, contract, steps, "default")
        )
        assert {array.dtype for array in fed.values()} == {np.dtype(np.float32)}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    total = np.float64([[1, 2, 3], [4, 5, 6]]) + pair.delta()
    expected = X @ (total * (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]).T
    answer = run(model, x=X, h=X.astype(np.float16), **fed)
    assert answer["z"].dtype == np.float16
    np.testing.assert_allclose(answer["y"], expected, rtol=1e-6)
    np.testing.assert_allclose(answer["z"], expected, rtol=2e-3)


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
def test_a_block_in_bfloat16_is_filled_up_in_a_dtype_that_can_be(mode: str) -> None:
    # onnxruntime's CPU computes nothing in bfloat16, and its Pad has no kernel for it anywhere: ONNX's own definition.
    model = a_graph("""
        g (float[N,3] x) => (float[N,4] y) <float[3,4] W = {1,4,2,5,3,6,1,2,3,4,5,6}>
        { [n] y = MatMul(x, W) }""")
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.dtype = ir.DataType.BFLOAT16
    value = model.graph.initializers["W"]
    value.const_value = ir.Tensor(value.const_value.numpy().astype(ml_dtypes.bfloat16), name="W")
    (site,) = find_readers(value)
    blocks = {
        name: (dataclasses.replace(site, name=name, block=block),)
        for name, block in {"q.weight": range(1), "k.weight": range(1, 4)}.items()
    }
    found = Sites(blocks, (), ())
    pair = LoraPair(a=PAIR.a, b=[[1], [2], [-1]], scale=2.0)
    steps, fed = plan.make([an_adapter({"k": pair})], found.specs), dict[str, Any]()
    if mode == "nodes":
        insert_nodes(model, found, steps)
    elif mode == "rows":
        insert_rows(model, found, steps, batch="N")
        fed = {"adapter_ids": np.array([1, 1])}
    else:
        fed = onnx_adapter.input_values(insert_inputs(model, found, ["k.weight"]), steps, "default")
    assert {node.op_type: str(node.inputs[0].dtype) for node in model.graph}["Pad"] == "FLOAT"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (answer,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(
        None, {"x": X.astype(ml_dtypes.bfloat16), **fed}
    )
    weight = np.float32([[1, 3, 3], [4, 6, 4], [2, 1, 5], [5, 2, 6]])
    weight[1:] += pair.delta()
    assert np.array_equal(answer.astype(np.float32), X @ weight.T)


@pytest.mark.parametrize("last", [6, 7])
def test_dora_has_one_factor_for_a_weight_that_is_stored_more_than_once(last: int) -> None:
    model = a_graph(f"""
        g (float[N,3] x) => (float[N,2] y, float[N,2] z)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2,3] o.weight = {{1,2,3,4,5,{last}}}>
        {{ y = Gemm <transB = 1> (x, m.weight)
           z = Gemm <transB = 1> (x, o.weight) }}""")
    there = tuple(site for found in find_sites(model).by_name.values() for site in found)
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=2.0, magnitude=[1, 2])
    both = Sites({"m.weight": there}, (), ())
    steps = plan.make([an_adapter({"m": pair})], both.specs)
    if last == 6:
        assert dora_factors_by_weight(steps.steps, "default", both.by_name.__getitem__)["m.weight"].shape == (2,)
        return
    with pytest.raises(InputRefused, match=r"m\.weight is stored more than once in the graph, with different"):
        insert_rows(model, both, steps, batch="N")
