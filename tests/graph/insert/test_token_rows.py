"""Layers whose rows are tokens in an order of their own, as those of experts: each has its row's adapter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_slots import insert_slots
from lora_export.graph.insert.batch_axis import unclear_inputs
from lora_export.lora import Adapter, LoraPair
from support.graphs import a_graph, an_adapter, run
from support.insertion import row_ids, with_rows

# Tokens of [N, S, 3] are flattened, sorted, and go through two experts: each multiplies its own part, twice.
EXPERTS = """
g (float[{sizes}] x, int64[K] order, int64[A] first, int64[B] second, float[N] other) => (float[K,2] y)
<float[3,3] up.weight = {{1,2,0,0,1,1,2,0,1}}, float[3,3] up2.weight = {{0,1,1,1,0,2,1,1,0}},
 float[3,2] down.weight = {{1,0,2,1,0,1}}, float[3,2] down2.weight = {{0,1,1,1,2,0}}, int64[2] flat = {{-1,3}}>
{{ rows = Reshape(x, flat)
  {taken}
  p = Gather <axis = 0> (sorted, first)      q = Gather <axis = 0> (sorted, second)
  [up] hp = MatMul(p, up.weight)             [up2] hq = MatMul(q, up2.weight)
  h = Concat <axis = 0> (hp, hq)
  {inner}
  p2 = Gather <axis = 0> (act, first)        q2 = Gather <axis = 0> (act, second)
  [down] yp = MatMul(p2, down.weight)        [down2] yq = MatMul(q2, down2.weight)
  y = Concat <axis = 0> (yp, yq) }}
"""
TAKEN = {
    "Gather": "sorted = Gather <axis = 0> (rows, order)",
    "GatherND": """last = Constant <value = int64[1] {1}> () index = Unsqueeze(order, last)
        sorted = GatherND <batch_dims = 0> (rows, index)""",
    "twice": "one = Gather <axis = -2> (rows, order) same = Identity(one) sorted = Reshape(same, flat)",
}
INNER = {
    "as it is": "act = Identity(h)",
    "gated": """wide = Concat <axis = 1> (h, h) left, right = Split <axis = -1, num_outputs = 2> (wide)
        act = Mul(left, right)""",
    "sliced": """table = Constant <value = float[2,3] {1,0,2,0,1,0}> () zero = Constant <value = int64 {0}> ()
        kind = Mul(order, zero) bias = Gather <axis = 0> (table, kind) more = Add(h, bias)
        features = Constant <value = int64[1] {1}> () back = Constant <value = int64[1] {-1}> ()
        last = Constant <value = int64[1] {-9}> () act = Slice(more, back, last, features, back)""",
    "scaled": "half = Constant <value = float[1,1] {0.5}> () s = Mul(h, half) again = Add(s, s) act = Relu(again)",
}
INNER_VALUES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "as it is": lambda h: h,
    "gated": lambda h: h * h,
    "sliced": lambda h: (h + np.array([1, 0, 2]))[..., ::-1],
    "scaled": lambda h: np.maximum(h, 0),
}
W = {
    "up": np.float64([[1, 2, 0], [0, 1, 1], [2, 0, 1]]),
    "up2": np.float64([[0, 1, 1], [1, 0, 2], [1, 1, 0]]),
    "down": np.float64([[1, 0], [2, 1], [0, 1]]),
    "down2": np.float64([[0, 1], [1, 1], [2, 0]]),
}
BATCH, LENGTH = 3, 4
ORDER = np.array([11, 0, 5, 3, 7, 8, 2, 6, 9])
FIRST, SECOND = np.array([0, 1, 2, 3, 4]), np.array([5, 6, 7, 8])


def adapters() -> list[Adapter]:
    rng = np.random.default_rng(0)

    def pair(out: int, rank: int) -> LoraPair:
        a, b = (rng.integers(-2, 3, size).astype(np.float32) for size in ((rank, 3), (out, rank)))
        return LoraPair(a=a, b=b, scale=2.0)

    one = {name: pair(weight.shape[1], 2) for name, weight in W.items()}
    two = {name: pair(W[name].shape[1], 1) for name in ("up", "down2")}  # not at every expert
    return [an_adapter(one, name="one"), an_adapter(two, name="two")]


def experts(sizes: str = "N,S,3", taken: str = "Gather", inner: str = "as it is") -> ir.Model:
    return a_graph(EXPERTS.format(sizes=sizes, taken=TAKEN[taken], inner=INNER[inner]))


def feeds(sizes: str = "N,S,3") -> dict[str, NDArray[np.generic]]:
    x = np.random.default_rng(1).integers(-3, 4, (BATCH, LENGTH, 3)).astype(np.float32)
    x = x if sizes == "N,S,3" else x.swapaxes(0, 1)
    return {"x": x, "order": ORDER, "first": FIRST, "second": SECOND, "other": np.zeros(BATCH, np.float32)}


def expected(factors: NDArray[np.float64], sizes: str = "N,S,3", inner: str = "as it is") -> NDArray[np.float64]:
    """What each token gets whose row has these factors of the adapters (batch, adapters)."""
    x = feeds(sizes)["x"].reshape(-1, 3).astype(np.float64)
    row_of = np.arange(BATCH * LENGTH) // LENGTH if sizes == "N,S,3" else np.arange(BATCH * LENGTH) % BATCH
    result = []
    for place, token in enumerate(ORDER):
        up, down = ("up", "down") if place in FIRST else ("up2", "down2")

        def changed(name: str, own: NDArray[np.float64] = factors[row_of[token]]) -> NDArray[np.float64]:
            given = zip(own, adapters(), strict=True)
            return W[name] + sum(by * one.pairs[name].delta().T for by, one in given if name in one.pairs)

        result.append(INNER_VALUES[inner](x[token] @ changed(up)) @ changed(down))
    return np.array(result)


def one_hot(*ids: int) -> NDArray[np.float64]:
    return np.eye(3)[list(ids)][:, 1:]


@pytest.mark.parametrize(
    ("sizes", "taken", "inner"),
    [
        ("N,S,3", "Gather", "as it is"),
        ("S,N,3", "Gather", "gated"),
        ("N,S,3", "GatherND", "gated"),
        ("N,S,3", "twice", "scaled"),
        ("S,N,3", "twice", "sliced"),
    ],
)
def test_each_token_has_the_adapter_of_its_row(sizes: str, taken: str, inner: str) -> None:
    model = experts(sizes, taken, inner)
    base = run(experts(sizes, taken, inner), **feeds(sizes))["y"]
    with_rows(model, *adapters(), one_at_a_time=True)
    for ids in ((1, 2, 0), (2, 2, 1), (0, 0, 0)):
        found = run(model, **feeds(sizes), adapter_ids=row_ids(*ids))["y"]
        np.testing.assert_array_equal(found, expected(one_hot(*ids), sizes, inner))
    assert found.tobytes() == base.tobytes()


def test_tokens_have_several_adapters_of_their_row() -> None:
    model = experts(taken="GatherND")
    with_rows(model, *adapters(), one_at_a_time=True, per_row=2)
    scales = np.float32([[1, 0.5], [-2, 0], [0, 0]])
    found = run(model, **feeds(), adapter_ids=np.array([[1, 2], [2, 0], [1, 2]]), adapter_scales=scales)["y"]
    np.testing.assert_array_equal(found, expected(np.float64([[1, 0.5], [0, -2], [0, 0]])))


@pytest.mark.parametrize("many", [0, 40])
def test_many_adapters_and_no_tokens_of_an_expert(many: int) -> None:
    """With many adapters, the matrices of each token are copied; with few, all are multiplied."""
    model = experts()
    more = [an_adapter(adapters()[1].pairs, name=f"more {number}") for number in range(many)]
    with_rows(model, *adapters(), *more, one_at_a_time=True)
    given = {**feeds(), "order": ORDER[:5], "second": SECOND[:0]}
    found = run(model, **given, adapter_ids=row_ids(1, 2, 0))["y"]
    np.testing.assert_array_equal(found, expected(one_hot(1, 2, 0))[:5])


def test_slots_serve_the_tokens_of_experts() -> None:
    model = experts()
    contract = insert_slots(model, find_sites(model), [f"{name}.weight" for name in W], slots=3, max_rank=2, batch="N")
    stacks = contract.stacks()
    for slot, one in ((3, adapters()[0]), (1, adapters()[1])):
        steps = plan.make([one], [place.spec for place in contract.places])
        contract.fill(stacks, slot, onnx_adapter.input_values(contract, steps, one.name))
    found = run(model, **feeds(), **stacks, adapter_ids=row_ids(3, 0, 1))["y"]
    np.testing.assert_array_equal(found, expected(one_hot(1, 0, 2)))


def test_what_is_flattened_without_a_known_batch_is_to_be_measured() -> None:
    body = EXPERTS.replace("rows = Reshape(x, flat)", "hidden = Relu(x) rows = Reshape(hidden, flat)")
    text = body.format(sizes="N,S,3", taken=TAKEN["Gather"], inner=INNER["as it is"])
    for symbol, size in (("K", 9), ("A", 5), ("B", 4)):  # else these could be the batch
        text = text.replace(f"[{symbol}", f"[{size}")
    model = a_graph(text)
    sites = [site for own in find_sites(model).by_name.values() for site in own]
    assert unclear_inputs(model, sites) == []
    hidden = next(value for node in model.graph for value in node.outputs if value.name == "hidden")
    hidden.shape = ir.Shape([None, None, 3])
    assert hidden in unclear_inputs(model, sites)


REFUSED = {
    "features that move": "t = Transpose(rows) u = Reshape(t, flat) sorted = Gather <axis = 0> (u, order)",
    "rows of two orders": """one = Gather <axis = 0> (rows, order) two = Gather <axis = 0> (rows, order)
        sorted = Add(one, two)""",
    "rows that are summed": """zero = Constant <value = int64 {0}> () total = CumSum(rows, zero)
        sorted = Gather <axis = 0> (total, order)""",
    "tokens in the place of features": """turned = Transpose <perm = [0, 2, 1]> (x) flipped = Reshape(turned, flat)
        sorted = Gather <axis = 0> (flipped, order)""",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_rows_that_are_not_certain_are_refused(name: str) -> None:
    model = a_graph(EXPERTS.format(sizes="N,S,3", taken=REFUSED[name], inner=INNER["as it is"]))
    with pytest.raises(InputRefused, match=r"up\.weight .* no single dimension is the batch for certain"):
        with_rows(model, *adapters(), one_at_a_time=True)
