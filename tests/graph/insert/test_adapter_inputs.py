"""Adapters as optional inputs: names, shapes and defaults, and what the graph computes."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import AdapterPlace, Contract, read_contract
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.provenance import CONTRACT_KEY
from support.graphs import a_graph, an_adapter, run
from support.insertion import CONVOLUTION, CONVOLUTION_PAIR, X, adapter_inputs, with_inputs
from support.small_graphs import GEMM, LINEAR, PAIR, SHARED, SQUARE, TIED_TABLE


def test_a_and_b_are_inputs_with_defaults_of_rank_zero() -> None:
    model = a_graph(LINEAR)
    contract = with_inputs(model, "m.weight")
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


def test_adapter_is_added_when_passed() -> None:
    model = a_graph(LINEAR)
    before = run(model, x=X)["y"]
    contract = with_inputs(model, "m.weight")
    fed = adapter_inputs(contract, an_adapter({"m": PAIR}), 0.5)
    assert np.array_equal(fed["m.lora_A.weight"], [[1], [0], [-1]])
    assert np.array_equal(fed["m.lora_B.weight"], [[1 * 2 * 0.5, 2 * 2 * 0.5]])
    assert run(model, x=X)["y"].tobytes() == before.tobytes()
    # x A^T = [-1, -1], times 0.5 s B^T = [1, 2], times `other.bias` of the last node
    assert np.array_equal(run(model, x=X, **fed)["y"], before + np.float32([[-1 * 7, -2 * 8]] * 2))


def test_gemm_and_module_called_twice_take_one_pair() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    contract = with_inputs(model, "a.fc.weight")
    fed = adapter_inputs(contract, an_adapter({"a.fc": SQUARE}))
    w = np.float32([[1, 2], [3, 4]]) + np.float32([[1, 2], [0, 0]])  # (in, out)
    assert np.array_equal(run(model, x=np.float32([[1, 2]]), **fed)["y"], np.float32([[1, 2]]) @ w @ w)
    gemm = a_graph(GEMM)
    fed = adapter_inputs(with_inputs(gemm, "m.weight"), an_adapter({"m": PAIR}))
    assert np.array_equal(run(gemm, x=X, **fed)["y"], [[7, 17], [7, 17]])


def test_two_pairs_on_one_weight_are_concatenated() -> None:
    model = a_graph(GEMM)
    contract = with_inputs(model, "m.weight")
    fed = adapter_inputs(
        contract, an_adapter({"m": PAIR, "m.weight": LoraPair(a=[[0, 1, 0], [1, 0, 0]], b=[[1, 0], [0, 1]], scale=3.0)})
    )
    assert fed["m.lora_A.weight"].shape == (3, 3)
    # [[7, 17], [7, 17]] by PAIR, plus 3 [x1, x0] by the other pair
    assert np.array_equal(run(model, x=X, **fed)["y"], [[7 + 3, 17 + 3], [7 + 9, 17 + 0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_and_their_values_have_dtype_of_weight(dtype: str) -> None:
    model = a_graph(GEMM)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
    weight = model.graph.initializers["m.weight"]
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(dtype), name="m.weight")
    weight.dtype = weight.const_value.dtype
    contract = with_inputs(model, "m.weight")
    assert {str(value.dtype.numpy()) for value in model.graph.inputs} == {dtype}
    fed = adapter_inputs(contract, an_adapter({"m": PAIR}))
    assert {str(array.dtype) for array in fed.values()} == {dtype}
    if dtype == "float16":  # onnxruntime's CPU provider has no MatMul in bfloat16
        assert np.array_equal(run(model, x=X.astype(dtype), **fed)["y"], [[7, 17], [7, 17]])


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 7e4), ("bfloat16", 3.4e38), ("float32", 3.4e38)])
def test_factor_that_overflows_dtype_of_weight_is_refused(dtype: str, largest: float) -> None:
    place = AdapterPlace("m.weight", "a", "b", (2, 3), dtype, "")
    pair = LoraPair(a=PAIR.a, b=[[1], [largest]], scale=1.0 if dtype == "float16" else 2.0)
    with pytest.raises(InputRefused, match=rf"default, m.weight: 1 value of b .* largest {dtype} is"):
        adapter_inputs(Contract("0", "0", (place,)), an_adapter({"m": pair}))


def test_second_insertion_of_inputs_is_refused() -> None:
    model = a_graph(GEMM)
    with_inputs(model, "m.weight")
    with pytest.raises(InputRefused, match="has inputs for adapters already"):
        with_inputs(model, "m.weight")
    del model.metadata_props[CONTRACT_KEY]
    with pytest.raises(InputRefused, match=r"the graph holds m.lora_A.weight already"):
        with_inputs(model, "m.weight")


def test_weight_that_is_also_embedding_is_refused() -> None:
    model = a_graph(TIED_TABLE, modules={"e": "", "n": ""})
    with pytest.raises(InputRefused, match=r"tied.weight is read by Gather"):
        with_inputs(model, "tied.weight")


def test_old_ir_version_is_refused() -> None:
    model = a_graph(GEMM)
    model.ir_version = 3
    with pytest.raises(InputRefused, match="IR version 3"):
        with_inputs(model, "m.weight")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            an_adapter({"m": PAIR}, token_rows={"e.weight": TokenRows(np.arange(2), X)}),
            "default, e.weight: rows of tokens",
        ),
        (an_adapter({"m": PAIR}, replaced={"head.weight": X}), "default, head.weight: a whole tensor"),
        (an_adapter({"m": PAIR}, biases={"m": np.ones(2, np.float32)}), "default, m: a change of a bias"),
        (an_adapter({"m": PAIR}, added={"n.weight": np.ones(2, np.float32)}), "n.weight: a change of a vector"),
    ],
)
def test_adapter_beyond_low_rank_is_refused_by_name(adapter: Adapter, message: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(message)):
        onnx_adapter.refuse_beyond_low_rank([an_adapter({"m": PAIR}, name="good"), adapter])
    onnx_adapter.refuse_beyond_low_rank([an_adapter({"m": PAIR}, name="good")])


def test_dora_without_input_for_factor_is_refused() -> None:
    model = a_graph(GEMM)
    contract = with_inputs(model, "m.weight")
    dora = LoraPair(a=PAIR.a, b=PAIR.b, scale=1.0, magnitude=[1, 1])
    with pytest.raises(InputRefused, match=r"no input for the factors .* at these weights:\n  default, m\.weight\n"):
        adapter_inputs(contract, an_adapter({"m": dora}))


def test_default_of_convolution_has_one_rank_of_zeros() -> None:
    # onnxruntime's convolution over no channels does not set its output.
    model = a_graph("""
        g (float[N,2,L] x) => (float[N,3,M] y) <float[3,2,2] c.weight = {1,2,3,4,5,6,7,8,9,1,2,3}>
        { [n] y = Conv(x, c.weight) }""")
    (place,) = with_inputs(model, "c.weight", dora=["c.weight"]).places
    defaults = {name: model.graph.initializers[name].const_value.numpy() for name in place.input_shapes}
    assert {name: array.shape for name, array in defaults.items()} == {
        "c.lora_A.weight": (1, 2, 2), "c.lora_B.weight": (3, 1, 1), "c.lora_magnitude_vector.weight": (3, 1),
    }  # fmt: skip
    assert [array.any() for array in defaults.values()] == [False, False, True]
    assert [str(value.shape) for value in model.graph.inputs[1:]] == ["[c.lora_r,2,2]", "[3,c.lora_r,1]", "[3,1]"]


def test_factors_of_adapter_without_dora_are_ones() -> None:
    model = a_graph(GEMM)
    fed = adapter_inputs(with_inputs(model, "m.weight", dora=["m.weight"]), an_adapter({"m": PAIR}))
    assert fed["m.lora_magnitude_vector.weight"].tolist() == [1, 1]
    assert np.array_equal(run(model, x=X, **fed)["y"], [[7, 17], [7, 17]])


def test_fixed_rank_makes_every_shape_static_and_computes_the_same() -> None:
    model = a_graph(LINEAR)
    before = run(model, x=X)["y"]
    contract = with_inputs(model, "m.weight", max_rank=3)
    assert [str(value.shape) for value in model.graph.inputs[-2:]] == ["[3,3]", "[3,2]"]
    assert run(model, x=X)["y"].tobytes() == before.tobytes()
    fed = adapter_inputs(contract, an_adapter({"m": PAIR}))
    assert np.array_equal(fed["m.lora_A.weight"], [[1, 0, 0], [0, 0, 0], [-1, 0, 0]])
    assert np.array_equal(fed["m.lora_B.weight"], [[2, 4], [0, 0], [0, 0]])
    assert np.array_equal(run(model, x=X, **fed)["y"], before + np.float32([[-2 * 7, -4 * 8]] * 2))
    assert read_contract(model.metadata_props, "") == contract


def test_larger_rank_than_the_fixed_one_is_refused_with_both_numbers() -> None:
    contract = with_inputs(a_graph(LINEAR), "m.weight", max_rank=1)
    both = {"m": PAIR, "m.weight": PAIR}
    with pytest.raises(InputRefused, match=r"default, m.weight: rank 2 > 1\n.*larger max_rank="):
        adapter_inputs(contract, an_adapter(both))
    assert adapter_inputs(contract, an_adapter({"m": PAIR}))["m.lora_A.weight"].shape == (3, 1)


def test_fixed_rank_of_convolution_is_its_first_axis() -> None:
    model = a_graph(CONVOLUTION.replace("ATTRIBUTES", "strides = [1]"))
    contract = with_inputs(model, "c.weight", max_rank=2)
    assert [str(value.shape) for value in model.graph.inputs[-2:]] == ["[2,2,2]", "[3,2,1]"]
    pair = LoraPair(a=CONVOLUTION_PAIR.a, b=CONVOLUTION_PAIR.b, scale=0.5)
    fed = adapter_inputs(contract, an_adapter({"c": pair}))
    assert (
        fed["c.lora_A.weight"][1:].tolist() == [[[0, 0], [0, 0]]] and fed["c.lora_B.weight"][:, 1].tolist() == [[0]] * 3
    )
    x, weight = np.float32([[[1, 2, 3], [0, 1, -1]]]), model.graph.initializers["c.weight"].const_value.numpy()
    changed = weight + 0.5 * np.einsum("or,rik->oik", pair.b[:, :, 0], pair.a)
    windows = np.stack([x[0, :, :2], x[0, :, 1:]])  # (position, in, kernel)
    expected = np.einsum("oik,pik->op", changed, windows) + np.float32([[10], [20], [30]])
    assert np.array_equal(run(model, x=x, **fed)["y"][0], expected)


def test_required_inputs_have_no_default() -> None:
    model, plain = a_graph(LINEAR), a_graph(LINEAR)
    contract = with_inputs(model, "m.weight", required=True)
    assert contract.required and not {"m.lora_A.weight", "m.lora_B.weight"} & model.graph.initializers.keys()
    with pytest.raises(Exception, match="Required inputs"):
        run(model, x=X)
    assert run(model, x=X, **contract.without_adapter())["y"].tobytes() == run(plain, x=X)["y"].tobytes()
    fed = adapter_inputs(contract, an_adapter({"m": PAIR}))
    with_default = with_inputs(plain, "m.weight")
    assert not with_default.required
    assert np.array_equal(run(model, x=X, **fed)["y"], run(plain, x=X, **fed)["y"])
    assert read_contract(model.metadata_props, "") == contract
