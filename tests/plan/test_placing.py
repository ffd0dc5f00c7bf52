"""Where the entries of an adapter's tensor are in the base: the change is the same entry by entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.lora import LoraPair
from lora_export.names.architecture import RenameRule
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible, converted
from lora_export.plan import Layout
from lora_export.plan.placing import places_in_result, places_in_sources
from support.plans import matrix

CONVERTERS = {
    "chunk": (["a"], ["q", "k"], [("Chunk", {"dim": 0})], (8, 4)),
    "chunk of columns": (["a"], ["q", "k"], [("Chunk", {"dim": 1})], (4, 8)),
    "transpose": (["a"], ["b"], [("Transpose", {"dim0": 0, "dim1": 1})], (4, 6)),
    "interleave and chunk": (["a"], ["g", "u"], [("Interleave", {"dim": 0}), ("Chunk", {"dim": 0})], (8, 4)),
    "interleaved columns": (["a"], ["g", "u"], [("Interleave", {"dim": 1}), ("Chunk", {"dim": 1})], (4, 8)),
    "rope": (["a"], ["b"], [("PermuteForRope", {})], (8, 4)),
    "chunk and rope": (["a"], ["q", "k"], [("Chunk", {"dim": 0}), ("PermuteForRope", {})], (16, 4)),
}


def a_pair(out: int, in_: int) -> LoraPair:
    rng = np.random.default_rng(out * in_)
    a, b = rng.integers(-4, 5, (2, in_)), rng.integers(-4, 5, (out, 2))
    return LoraPair(a=a.astype(np.float32), b=b.astype(np.float32), scale=1.0)


def results_of(case: str) -> tuple[tuple[int, ...], dict[str, AssembledTensor]]:
    sources, targets, operations, shape = CONVERTERS[case]
    rule = RenameRule(sources, targets, [{"name": name, **fields} for name, fields in operations])
    return shape, converted(rule, {"a": [AssembledTensor.stored("a", shape)]}, {"num_attention_heads": 2})


def entries(tensor: AssembledTensor, values: np.ndarray) -> np.ndarray:
    """The converted tensor with values."""
    result = np.zeros(tensor.shape)
    for piece in tensor.pieces:
        chosen = [piece.indices[piece.axes.index(axis)] for axis in range(len(piece.axes))]
        result[np.ix_(*piece.positions)] = values[np.ix_(*chosen)].transpose(piece.axes)
    return result


@pytest.mark.parametrize("case", CONVERTERS)
def test_a_change_of_the_loaded_weight_is_that_of_its_sources(case):
    shape, results = results_of(case)
    change = np.zeros(shape, np.float32)  # of the stored tensor
    pairs = {name: a_pair(*tensor.shape) for name, tensor in results.items()}
    for name, tensor in results.items():
        for place in places_in_sources(tensor, lambda _: shape):
            delta = place.of_pair(pairs[name]).delta()
            np.testing.assert_array_equal(place.of_array(pairs[name].delta()), delta.T if place.transposed else delta)
            if place.region is None:
                change += delta
                continue
            view = place.view(matrix("a", *shape))
            assert view.layout is (Layout.IN_OUT if place.transposed else Layout.OUT_IN)
            assert view.shape == place.region.cut_shape
            cut = change.reshape(place.region.shape)[place.region.rows][:, place.region.columns]
            cut += delta.T if place.transposed else delta
    for name, tensor in results.items():
        np.testing.assert_array_equal(entries(tensor, change), pairs[name].delta())


@pytest.mark.parametrize("case", CONVERTERS)
def test_a_change_of_a_source_is_that_of_the_loaded_weights(case):
    shape, results = results_of(case)
    own = a_pair(*shape)
    for name, tensor in results.items():
        change = np.zeros(tensor.shape, np.float32)
        for piece in tensor.pieces:
            place = places_in_result(tensor, name, piece, lambda _: shape)
            delta = place.of_pair(own).delta()
            if place.region is None:
                change += delta
            else:
                cut = change.reshape(place.region.shape)[place.region.rows][:, place.region.columns]
                cut += delta.T if place.transposed else delta
        np.testing.assert_array_equal(change, entries(tensor, own.delta()))


def test_dora_over_a_part_of_the_inputs_is_not_expressible():
    shape, results = results_of("chunk of columns")
    own = LoraPair(a=np.ones((1, 8)), b=np.ones((4, 1)), scale=1.0, magnitude=np.ones(4))
    place = places_in_result(results["q"], "q", results["q"].pieces[0], lambda _: shape)
    with pytest.raises(NotExpressible, match="DoRA"):
        place.of_pair(own)


def test_a_stack_is_not_expressible_as_one_pair():
    rule = RenameRule(["e"], ["s"], [{"name": "MergeModulelist", "dim": 0}])
    stack = converted(rule, {"e": [AssembledTensor.stored(f"e{n}", (2, 3)) for n in range(2)]}, {})["s"]
    with pytest.raises(NotExpressible, match="stacks tensors"):
        places_in_sources(stack, lambda _: (2, 3))


@pytest.mark.parametrize(("case", "is_whole"), [("rope", True), ("chunk", False)])
def test_only_a_reordered_whole_stays_the_pair_of_a_bare_parameter(case, is_whole):
    shape, results = results_of(case)
    tensor = next(iter(results.values()))
    (place,) = places_in_sources(tensor, lambda _: shape)
    assert (place.region is None) is is_whole
    assert place.of_pair(replace(a_pair(*tensor.shape), as_stored=True)).as_stored is is_whole


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_of_a_stack_is_in_its_own_tensors(transposed):
    """Two tensors for each expert, g and u, are stacked and joined, and transposed in one of the cases."""
    operations = [{"name": "MergeModulelist", "dim": 0}, {"name": "Concatenate", "dim": 1}]
    rule = RenameRule(["g", "u"], ["s"], operations)
    collected = {
        part: [AssembledTensor.stored(f"{part}{expert}", (2, 3)) for expert in range(3)] for part in ("g", "u")
    }
    stack = converted(rule, collected, {})["s"]
    stack = stack.transposed(1, 2) if transposed else stack
    own = a_pair(3, 4) if transposed else a_pair(4, 3)
    for expert, part in enumerate(stack.along_first_axis()):
        gate, up = places_in_sources(part, lambda _: (2, 3))
        assert (gate.tensor, up.tensor) == (f"g{expert}", f"u{expert}")
        change = own.delta().T if transposed else own.delta()
        for place, expected in ((gate, change[:2]), (up, change[2:])):
            delta = place.of_pair(own).delta()
            np.testing.assert_array_equal(delta.T if place.transposed else delta, expected)


def test_an_expert_of_a_stored_stack_is_a_region_of_it():
    whole = AssembledTensor.stored("s", (3, 4, 2))
    for expert, part in enumerate(whole.along_first_axis()):
        (place,) = places_in_sources(part, lambda _: (3, 4, 2))
        view = place.view(replace(matrix("s", 12, 2), nbytes=12 * 2 * 4))
        assert (place.name, view.shape, view.nbytes) == (f"s[{expert}]", (4, 2), 4 * 4 * 2)
