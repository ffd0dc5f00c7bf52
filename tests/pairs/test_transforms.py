"""Changes that follow from the weight, by numbers that a person can check."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.stages import Blocks, EntryWise, LowRank, RowBlocks, Stage
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.tensor_blocks import OutputTensor, Patch

WEIGHT = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
SWAP = np.float32([[[-1, 1], [1, -1]]])  # less the identity: two rows change places


def of_stages(*stages: Stage, whole: tuple[int, ...] = (4, 2), **more: object) -> WeightTransform:
    return WeightTransform("test", {"x": np.ones(1)}, lambda *_: stages, whole, **more)


def one(value: float) -> LoraPair:
    return LoraPair(a=np.ones((1, 2), np.float32), b=np.full((4, 1), value, np.float32), scale=1.0)


STAGES = {
    "entries": (EntryWise(factor=one(2), addend=one(10)), 3 * WEIGHT + 10),
    "swapped outputs": (Blocks(less_identity=SWAP), WEIGHT[[1, 0, 3, 2]]),
    "in another order": (Blocks(less_identity=SWAP, order=np.array([0, 3, 1, 2])), WEIGHT[[3, 2, 1, 0]]),
    "swapped inputs": (Blocks(less_identity=SWAP, turned=True), WEIGHT[:, ::-1]),
    "one direction": (
        LowRank(u=np.float32([[1], [0], [0], [0]]), v=np.float32([[0, 1, 0, 0]])),
        [[4, 6], [3, 4], [5, 6], [7, 8]],
    ),
    "square blocks": (
        RowBlocks(matrices=np.float32([[[1, 0], [0, 0]], [[0, 0], [0, 1]]])),
        [[3, 2], [6, 4], [5, 12], [7, 17]],
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_changes_a_weight_and_its_transpose(name):
    stage, expected = STAGES[name]
    pair = of_stages(stage)
    for dtype in (np.float32, np.float64):
        weight = WEIGHT.astype(dtype)
        assert (weight + pair.change(weight)).tolist() == np.asarray(expected).tolist()
        assert (weight.T + pair.transposed.change(weight.T)).T.tolist() == np.asarray(expected).tolist()
    half = WEIGHT + pair.times(2).change(WEIGHT, strength=0.25)
    assert half.tolist() == ((WEIGHT + np.float32(expected)) / 2).tolist()


def test_stages_follow_one_another():
    pair = of_stages(STAGES["entries"][0], STAGES["swapped outputs"][0])
    assert (WEIGHT + pair.change(WEIGHT)).tolist() == (3 * WEIGHT + 10)[[1, 0, 3, 2]].tolist()
    assert pair.rows_together == 2
    assert of_stages(STAGES["one direction"][0]).rows_together == 0


def test_what_only_a_pair_has_is_refused_by_name():
    pair = of_stages(STAGES["entries"][0])
    for read in (lambda: pair.a, lambda: pair.b, pair.delta):
        with pytest.raises(InputRefused, match="test has no A and B"):
            read()
    with pytest.raises(InputRefused, match="mixes all of them"):
        of_stages(STAGES["in another order"][0]).part(np.arange(2), None)
    with pytest.raises(InputRefused, match="mixes all of them"):
        of_stages(STAGES["swapped outputs"][0]).part(np.arange(1, 3), None)
    for value in (np.nan, np.inf):
        with pytest.raises(InputRefused, match="not finite"):
            WeightTransform("test", {"x": np.array([value])}, lambda *_: (), (4, 2))
        with pytest.raises(InputRefused, match="must be finite"):
            of_stages(scale=value)


def test_a_shape_is_completed_by_the_weight():
    pair = of_stages(whole=(0, 12))
    assert pair.for_weight((3, 12)).shape == (3, 12)
    assert pair.for_weight((3, 2, 3, 2)).shape == (3, 2, 3, 2)
    assert pair.for_weight((3, 11)).shape == (0, 12)
    assert of_stages(whole=(3, 0, 0)).for_weight((3, 5, 7)).shape == (3, 5, 7)
    assert not of_stages(STAGES["entries"][0]).is_identity
    assert of_stages(Blocks(less_identity=0 * SWAP), LowRank(u=np.zeros((4, 1)), v=np.ones((1, 4)))).is_identity


@pytest.mark.parametrize(("start", "count"), [(0, 4), (4, 4), (2, 16)])
def test_rows_that_are_changed_together_are_in_one_block(start, count):
    matrix = np.zeros((1, 4, 4), np.float32)
    matrix[0, 0, 1] = 1
    spec = TensorSpec("w", (8, 2), "float32", Layout.OUT_IN)
    step = Step(spec, (Term("a", "w", of_stages(Blocks(less_identity=matrix), whole=(8, 2))),))
    source = Entry("w", np.dtype(ml_dtypes.bfloat16), (16, 2), 0, 64)
    patches = (Patch(step, slice(start, start + 8), slice(None)),)
    assert OutputTensor(source, None, "w", source.dtype, patches).rows_at_once == count
    whole = replace(step, spec=replace(spec, layout=Layout.IN_OUT))
    assert OutputTensor(replace(source, shape=(2, 8)), whole, "w", source.dtype).rows_at_once == 1
