"""Converted tensors, entry by entry, against what transformers makes of the values."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import core_model_loading as loading

from lora_export.names.architecture import RenameRule
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible, converted

CONFIG = {"num_attention_heads": 2}
CASES = {
    "chunk": (["qkv"], ["q", "k", "v"], [loading.Chunk(dim=0)], {"qkv": [(12, 3)]}),
    "chunk of columns": (["ab"], ["a", "b"], [loading.Chunk(dim=1)], {"ab": [(2, 6)]}),
    "concatenate": (["q", "k"], ["qk"], [loading.Concatenate(dim=0)], {"k": [(2, 3)], "q": [(4, 3)]}),
    "concatenate columns": (["q", "k"], ["qk"], [loading.Concatenate(dim=1)], {"q": [(2, 3)], "k": [(2, 5)]}),
    "experts": (
        ["w1", "w3"],
        ["gate_up"],
        [loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)],
        {"w1": [(4, 3)] * 3, "w3": [(4, 3)] * 3},
    ),
    "experts of one kind": (["w2"], ["down"], [loading.MergeModulelist(dim=0)], {"w2": [(4, 3)] * 3}),
    "transpose": (["a"], ["b"], [loading.Transpose(0, 1)], {"a": [(4, 3)]}),
    "transpose of experts": (["a"], ["b"], [loading.Transpose(1, 2)], {"a": [(2, 4, 3)]}),
    "interleave": (["a"], ["b"], [loading.Interleave(dim=0)], {"a": [(6, 2)]}),
    "interleave back": (["a"], ["b"], [loading.Interleave(dim=1, inverse=True)], {"a": [(2, 6)]}),
    "interleave and chunk": (["a"], ["gate", "up"], [loading.Interleave(dim=0), loading.Chunk(dim=0)], {"a": [(6, 2)]}),
    "rope": (["a"], ["b"], [loading.PermuteForRope()], {"a": [(8, 3)]}),
    "rope of a bias": (["a"], ["b"], [loading.PermuteForRope(inverse=True)], {"a": [(8,)]}),
    "chunk and rope": (
        ["qkv"],
        ["q", "k", "v"],
        [loading.Chunk(dim=0), loading.PermuteForRope(permute_layer_names=["q", "k"])],
        {"qkv": [(24, 3)]},
    ),
}


def as_rule(sources, targets, operations) -> RenameRule:
    fields = [{"name": type(one).__name__, **json.loads(json.dumps(vars(one)))} for one in operations]
    return RenameRule(sources, targets, fields)


def evaluated(tensor: AssembledTensor, values: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor with values: every entry is written once."""
    result = np.full(tensor.shape, np.nan)
    for piece in tensor.pieces:
        order = [axis for axis in piece.axes if axis is not None]
        chosen = [piece.indices[piece.axes.index(axis)] for axis in range(len(order))]
        part = values[piece.source][np.ix_(*chosen)].transpose(order)
        assert np.isnan(result[np.ix_(*piece.positions)]).all()
        result[np.ix_(*piece.positions)] = part.reshape([len(each) for each in piece.positions])
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_converted_tensor_has_the_entries_of_transformers(case):
    sources, targets, operations, shapes = CASES[case]
    rng = np.random.default_rng(0)
    values = {f"{key}{n}": rng.normal(size=shape) for key, each in shapes.items() for n, shape in enumerate(each)}
    collected = {
        key: [AssembledTensor.stored(f"{key}{n}", shape) for n, shape in enumerate(each)]
        for key, each in shapes.items()
    }
    found = converted(as_rule(sources, targets, operations), collected, CONFIG)

    tensors = {key: [torch.tensor(values[f"{key}{n}"]) for n in range(len(each))] for key, each in shapes.items()}
    for operation in operations:
        tensors = operation.convert(
            tensors, source_patterns=sources, target_patterns=targets, config=SimpleNamespace(**CONFIG)
        )
    assert set(found) == set(targets) == set(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(evaluated(found[name], values), np.asarray(expected))


def test_an_operation_that_computes_is_not_expressible():
    rule = RenameRule(["a"], ["b"], [{"name": "Inkling2UnpadVocab"}])
    with pytest.raises(NotExpressible, match="the operation Inkling2UnpadVocab"):
        converted(rule, {"a": [AssembledTensor.stored("a", (4, 2))]}, {})


@pytest.mark.parametrize(
    ("operation", "shape", "why"),
    [
        ({"name": "Chunk", "dim": 0}, (5, 2), "5 rows into 2 parts"),
        ({"name": "Chunk", "num_shards_attribute": "n"}, (4, 2), "as many tensors as n"),
        ({"name": "Transpose", "check_dims": True}, (4, 2), "only where its shape"),
        ({"name": "MergeModulelist", "dim": 1}, (4, 2), "other than the first"),
        ({"name": "PermuteForRope"}, (6, 2), "4 heads"),
        ({"name": "PermuteForRope", "subconfig_key": "vision"}, (6, 2), "does not state"),
    ],
)
def test_what_the_stored_tensors_do_not_determine_is_refused(operation, shape, why):
    config = {"num_attention_heads": 4, "vision": {}}
    rule = RenameRule(["a"], ["b", "c"], [operation])
    with pytest.raises(NotExpressible, match=why):
        converted(rule, {"a": [AssembledTensor.stored("a", shape)]}, config)


SPLIT = RenameRule(["a"], ["q", "k", "v"], [{"name": "Split", "dim": 0}])


@pytest.mark.parametrize("known", [{"q": 3, "k": 1, "v": 2}, {"q": 3, "v": 2}, {"k": 1, "v": 2}])
def test_a_split_needs_all_sizes_but_one(known):
    found = converted(SPLIT, {"a": [AssembledTensor.stored("a", (6, 2))]}, {}, lambda name, _: known.get(name))
    values = {"a": np.arange(12).reshape(6, 2)}
    parts = [evaluated(found[name], values) for name in ("q", "k", "v")]
    for part, expected in zip(parts, np.split(values["a"], [3, 4]), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({"q": 3}, "the sizes of k, v are not known"),
        ({"q": 3, "k": 3}, "6 rows, and the adapter was trained on 6"),
        ({"q": 3, "k": 3, "v": 3}, "6 rows, and the adapter was trained on 9"),
    ],
)
def test_a_split_of_unknown_or_other_sizes_is_refused(known, why):
    with pytest.raises(NotExpressible, match=why):
        converted(SPLIT, {"a": [AssembledTensor.stored("a", (6, 2))]}, {}, lambda name, _: known.get(name))


def test_several_tensors_are_not_split():
    stored = [AssembledTensor.stored(f"a{n}", (6, 2)) for n in range(2)]
    with pytest.raises(NotExpressible, match="works on one tensor, and 2 were found"):
        converted(SPLIT, {"a": stored}, {}, {"q": 3, "k": 1}.get)


def test_tensors_of_different_widths_are_not_joined():
    rule = RenameRule(["a", "b"], ["c"], [{"name": "Concatenate", "dim": 0}])
    collected = {"a": [AssembledTensor.stored("a", (2, 3))], "b": [AssembledTensor.stored("b", (2, 4))]}
    with pytest.raises(NotExpressible, match="different shapes"):
        converted(rule, collected, {})
