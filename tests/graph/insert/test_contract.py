"""The contract of a graph with inputs for adapters, checked against the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import checked_contract, contract_dora_factors, insert_inputs
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.values import new_initializer
from lora_export.lora import LoraPair
from lora_export.provenance import CONTRACT_KEY, ROW_ADAPTERS_KEY
from support.graphs import a_graph, an_adapter, quantised, run
from support.insertion import RNG, adapter_inputs, packed_graph, with_inputs
from support.small_graphs import GEMM, SQUARE


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with a graph of two layers, the first of which takes adapters."""
    model = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}, float[2,2] n.weight = {1,0,0,1}>
        { [m] h = MatMul(x, m.weight)
          [n] y = MatMul(h, n.weight) }""")
    with_inputs(model, "m.weight")
    save_graph(model, tmp_path, "saved.onnx")
    return tmp_path / "saved.onnx"


def test_contract_is_read_from_file(saved: Path) -> None:
    model = load_graph(saved)
    assert checked_contract(model, saved) == read_contract(model.metadata_props, saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.weight", "m.weight: differs from the weight for which"), ("n.weight", "weights without an adapter differ")],
)
def test_base_changed_after_insertion_is_refused(saved: Path, name: str, message: str) -> None:
    model = load_graph(saved)
    weight = model.graph.initializers[name]
    weight.const_value = ir.Tensor(weight.const_value.numpy() + np.float32(1), name=name)
    with pytest.raises(InputRefused, match=message):
        checked_contract(model, saved)


def test_changed_inputs_are_all_listed(saved: Path) -> None:
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


def test_missing_and_damaged_contracts_are_refused(saved: Path) -> None:
    model = load_graph(saved)
    good = model.metadata_props.pop(CONTRACT_KEY)
    with pytest.raises(InputRefused, match="does not record where it takes adapters"):
        checked_contract(model, saved)
    with pytest.raises(InputRefused, match="its rows choose among the adapters in it"):
        read_contract({ROW_ADAPTERS_KEY: "[]"}, "rows.onnx")
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
        model.metadata_props[CONTRACT_KEY] = bad
        with pytest.raises(InputRefused):
            checked_contract(model, saved)


def test_adapter_that_does_not_fit_lists_every_misfit(saved: Path) -> None:
    contract = checked_contract(load_graph(saved), saved)
    adapter = an_adapter({"n": SQUARE, "m": LoraPair(a=[[1, 2, 3, 4]], b=[[1], [1]], scale=1.0)})
    with pytest.raises(MatchError) as refusal:
        adapter_inputs(contract, adapter)
    assert len(refusal.value.misfits) == 2


@pytest.mark.parametrize("bits", [0, 4])
def test_block_named_by_checkpoint_is_found_by_contract(tmp_path: Path, bits: int) -> None:
    model, found = packed_graph(tmp_path, bits=bits)
    with_inputs = insert_inputs(model, found, ["k.weight", "o.weight"], dora=["k.weight"])
    save_graph(model, tmp_path, "packed.onnx")
    model = load_graph(tmp_path / "packed.onnx")
    assert not {"k.weight", "o.weight"} & set(find_sites(model).by_name)
    contract = checked_contract(model, tmp_path / "packed.onnx")
    assert contract == with_inputs
    assert [(place.weight, place.block) for place in contract.places] == [("k.weight", (8, 12)), ("o.weight", None)]
    pair = LoraPair(a=RNG.normal(size=(2, 32)), b=RNG.normal(size=(4, 2)), scale=1.0, magnitude=[1, 2, 3, -4])
    adapter = an_adapter({"k": pair})
    steps = plan.make([adapter], [place.spec for place in contract.places])
    fed = onnx_adapter.input_values(
        contract, steps, adapter.name, contract_dora_factors(model, contract, steps, adapter.name)
    )
    x = RNG.normal(size=(5, 32)).astype(np.float32)
    off, on = run(model, x=x), run(model, x=x, **fed)
    stored = next(site for site in found.by_name["k.weight"]).matrix.astype(np.float64)
    factor = pair.magnitude / np.linalg.norm(stored + pair.delta(), axis=1)
    np.testing.assert_allclose(on["y"][:, 8:], (off["y"][:, 8:] + x @ pair.delta().T) * factor, rtol=1e-4, atol=1e-4)
    assert on["y"][:, :8].tobytes() == off["y"][:, :8].tobytes() and on["z"].tobytes() == off["z"].tobytes()


@pytest.mark.parametrize(("bits", "name"), [(0, "W"), (4, "W_Q4"), (4, "W_scales")])
def test_block_changed_after_insertion_is_refused(tmp_path: Path, bits: int, name: str) -> None:
    model, found = packed_graph(tmp_path, bits=bits)
    insert_inputs(model, found, ["k.weight"])
    value = model.graph.initializers[name]
    changed = value.const_value.numpy().copy()
    changed[-1] += 1  # a row of k
    value.const_value = ir.Tensor(changed, name=name)
    with pytest.raises(InputRefused, match=r"k\.weight: differs from the weight for which"):
        checked_contract(model, Path("x.onnx"))


def test_graph_quantised_after_insertion_is_accepted() -> None:
    model = quantised_later(
        a_graph("""
        g (float[N,32] x) => (float[N,4] y) <float[32,4] m.weight = {0}>
        { [m] y = MatMul(x, m.weight) }""")
    )
    contract = checked_contract(model, Path("x.onnx"))
    assert [place.quantised for place in contract.places] == [""]
    assert [site.quantised is not None for site in find_sites(model).by_name["m.weight"]] == [True]


def quantised_later(model: ir.Model) -> ir.Model:
    """The graph with inputs for adapters, quantised afterwards by a tool that keeps these inputs."""
    weight = RNG.normal(size=(32, 4)).astype(np.float32)
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


# --- Fingerprints of a graph's base weights. ---


def test_fingerprint_depends_on_base_only() -> None:
    row = a_graph(GEMM)  # stored (out, in)
    column = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}>
        { [n] y = MatMul(x, m.weight) }""")
    other = a_graph(GEMM.replace("{1,2,", "{1,3,"))
    renamed = a_graph(GEMM.replace("m.weight", "k.weight"))
    fingerprints = [with_inputs(model, *places).base for model, places in [
        (row, ["m.weight"]), (column, ["m.weight"]), (a_graph(GEMM), []), (other, ["m.weight"]), (renamed, []),
    ]]  # fmt: skip
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize("as_pairs", [False, True])
def test_fingerprint_of_quantised_base_is_of_stored_tensors(tmp_path: Path, as_pairs: bool) -> None:
    def fingerprint(**options: Any) -> str:
        model, found = packed_graph(tmp_path, **options)
        return insert_inputs(model, found, ["q.weight"]).base

    fingerprints = [
        fingerprint(bits=4, as_pairs=as_pairs),
        fingerprint(bits=4, block=16, as_pairs=as_pairs),
        fingerprint(bits=4, as_pairs=as_pairs, seed=1),
        fingerprint(),
    ]
    assert fingerprint(bits=4, as_pairs=as_pairs) == fingerprints[0]
    assert len(set(fingerprints)) == 4
