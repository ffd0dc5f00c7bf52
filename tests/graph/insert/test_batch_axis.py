"""The dimension of a layer's input that is the batch."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.batch_axis import unclear_inputs
from lora_export.graph.site import find_readers
from lora_export.lora import LoraPair
from support.exported_models import exported
from support.graphs import a_graph, an_adapter, run
from support.insertion import OTHER_PAIR, TWO_LAYERS, W, row_ids, with_rows
from support.small_graphs import GEMM, PAIR, SQUARE, filled


@pytest.mark.parametrize("sizes", ["N,S,3", "S,N,3", "N,S,4,3", "S,N,4,3", "S,4,N,3"])
def test_batch_is_found_on_any_axis(sizes: str) -> None:
    model = a_graph(f"""
        g (float[{sizes}] x, float[N] other_input) => (float[{sizes[:-1]}2] y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}>
        {{ [n] y = MatMul(x, m.weight) }}""")
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    axis = sizes.split(",").index("N")
    x = whole_numbers(sizes)
    output = run(model, x=x, other_input=np.zeros(3, np.float32), adapter_ids=row_ids(2, 0, 1))["y"]
    rows, outputs = np.moveaxis(x, axis, 0), np.moveaxis(output, axis, 0)
    for row, change in enumerate([OTHER_PAIR.delta(), 0, PAIR.delta()]):
        assert np.array_equal(outputs[row], rows[row] @ (W + change).T)


def whole_numbers(sizes: str) -> NDArray[np.float32]:
    """An array of small whole numbers with these dimensions: a batch N of 3, S of 5, T of 2."""
    shape = [{"N": 3, "S": 5, "T": 2}.get(size) or int(size) for size in sizes.split(",")]
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("before", ["N,S,3", "S,N,3", "2,N,S,3", "S,N,2,3", "N,S,T,3", "S,N,T,3", "N,S,1,3", "S,N,3,1"])
def test_batch_of_flattened_rows_is_found(before: str) -> None:
    model = a_graph(f"""
        g (float[{before}] t, float[N] other_input) => (float[M,2] y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}, int64[2] flat = {{-1,3}}>
        {{ r = Reshape(t, flat)
           [n] y = MatMul(r, m.weight) }}""")
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    x = whole_numbers(before)
    numbers = np.arange(3).reshape([-1 if size == "N" else 1 for size in before.split(",")])
    origin = np.broadcast_to(numbers, x.shape).reshape(-1, 3)[:, 0]  # the batch row of each flattened row
    change = [OTHER_PAIR.delta(), 0, PAIR.delta()]
    expected = [row @ (W + change[of]).T for row, of in zip(x.reshape(-1, 3), origin, strict=True)]
    output = run(model, t=x, other_input=np.zeros(3, np.float32), adapter_ids=row_ids(2, 0, 1))["y"]
    assert np.array_equal(output, np.float32(expected))


@pytest.mark.parametrize(
    ("sizes", "body", "message"),
    [
        (
            "K,3",
            "y = MatMul(t, m.weight)",
            r"m.weight \(MatMul `n`\): its input has the shape \[K,3\], in which no single dimension",
        ),
        ("N,N,3", "y = MatMul(t, m.weight)", r"its input has the shape \[N,N,3\]"),
        ("3,N", "y = Gemm <transA = 1> (t, m.weight)", "transposes its input"),
        ("S,K,3", "y = MatMul(r, m.weight)", "its input has the shape"),  # r is t with flattened rows
        ("N,S,N,3", "y = MatMul(r, m.weight)", "its input has the shape"),
    ],
)
def test_layer_with_uncertain_batch_is_refused_by_name(sizes: str, body: str, message: str) -> None:
    model = a_graph(f"""
        g (float[{sizes}] t, float[N] other_input) => (y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}, int64[2] flat = {{-1,3}}>
        {{ r = Reshape(t, flat)
           [n] {body} }}""")
    with pytest.raises(InputRefused, match=message):
        with_rows(model, an_adapter({"m": PAIR}))


def test_batch_symbol_is_the_one_that_enters_every_layer() -> None:
    two = an_adapter({"a": SQUARE, "b": SQUARE})
    with_rows(model := a_graph(TWO_LAYERS.replace("[N,2] x", "[N,2] x, float[M,2] z")), two, batch="batch")
    x = np.float32([[1, 2], [3, 4]])
    expected = x @ np.float32([[2, 4], [3, 4]]) @ np.float32([[2, 2], [1, 1]])
    assert np.array_equal(run(model, x=x, z=x[:1], adapter_ids=row_ids(1, 1))["y"], expected)
    apart = TWO_LAYERS.replace("[N,2] x", "[N,2] x, float[M,2] z").replace("MatMul(h, b", "MatMul(z, b")
    with pytest.raises(InputRefused, match=r"the batch, `batch`, .*: x \[N,2\], z \[M,2\]"):
        with_rows(a_graph(apart), two, batch="batch")


def test_graph_without_batch_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"no input of the graph has the batch, `N`, .*: x \[2,3\]"):
        with_rows(a_graph(GEMM.replace("float[N,3]", "float[2,3]")), an_adapter({"m": PAIR}))


def test_all_uncertain_layers_are_listed() -> None:
    model = a_graph(TWO_LAYERS.replace("[N,2] x", "[K,2] x, float[N] other_input").replace("[N,2] y", "[K,2] y"))
    with pytest.raises(InputRefused) as refusal:
        with_rows(model, an_adapter({"a": SQUARE, "b": SQUARE}))
    assert str(refusal.value).startswith("2 layers cannot have an adapter for each row of the batch, `N`:\n  a.weight")
    assert "\n  b.weight (MatMul `b`): its input has the shape [K,2]" in str(refusal.value)


def test_unclear_inputs_are_those_whose_shapes_would_tell_the_batch() -> None:
    two = """
        g (float[N,S,2] x, float[M,2] z) => (y)
        <float[2,2] a.weight = {1,2,3,4}, float[2,2] b.weight = {1,0,1,1}, int64[2] flat = {-1,2}>
        { h = MatMul(x, a.weight)
          t = Relu(h)
          r = Reshape(t, flat)
          y = MatMul(r, b.weight) }"""
    for domain, unclear in {"": [], "other": ["r", "t"]}.items():
        model = a_graph(two)
        model.graph[1].domain = domain
        layers = find_sites(model).linear
        assert len(layers) == 2 and [value.name for value in unclear_inputs(model, layers)] == unclear


RNG = np.random.default_rng(0)


def random_array(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def test_position_embedding_without_batch_is_refused() -> None:
    made = exported("bert")
    found = find_sites(made.graph)
    name = "bert.embeddings.position_embeddings"
    (spec,) = (spec for spec in found.specs if spec.name == f"{name}.weight")
    pair = LoraPair(a=random_array(1, spec.shape[0]), b=random_array(spec.shape[1], 1), scale=1.0, embedding=True)
    steps = plan.make([an_adapter({name: pair})], found.specs)
    with pytest.raises(InputRefused, match=rf"{name}\.weight \(Gather .* no single dimension is the batch for certain"):
        insert_rows(made.graph, found, steps)


def test_convolution_with_uncertain_batch_is_refused_by_name() -> None:
    graph = filled(
        "g (float[L,2,N] x, float[N] lead) => (float[L,4,M] y) <float[1] W = {0}> { [n] y = Conv(x, W) }",
        W=random_array(4, 2, 1),
    )
    found = find_sites(graph)
    assert list(found.by_name) == []
    by_hand = Sites({"c.weight": (next(find_readers(graph.graph.initializers["W"])),)}, (), ())
    pair = LoraPair(a=random_array(1, 2, 1), b=random_array(4, 1, 1), scale=1.0)
    with pytest.raises(
        InputRefused, match=r"c\.weight \(Conv `n`\): its input has the shape \[L,2,N\], whose first dimension"
    ):
        insert_rows(graph, by_hand, plan.make([an_adapter({"c": pair})], by_hand.specs), batch="N")
