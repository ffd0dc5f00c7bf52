"""What a spelling finds: layers that are missing, and tensors that are made of several of the adapter's."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import MatchError
from support.plans import holding
from support.spellings import (
    MIXTRAL,
    NEW,
    OLD,
    VIT,
    base,
    experts,
    numbered,
)


@pytest.mark.parametrize(("own", "stored"), [(NEW, OLD), (OLD, NEW)])
def test_a_targeted_layer_without_tensors_is_missing(own, stored):
    short = holding(pairs=numbered(own[:-1]), targets=(own[0].rpartition(".")[2], own[1].rpartition(".")[2]))
    with pytest.raises(MatchError) as refused:
        plan.make([short], base(stored), rules=VIT)
    assert [misfit.problem for misfit in refused.value.misfits] == [
        "targeted by the adapter's config, but its file has no tensors for it"
    ]


def test_pairs_of_single_experts_are_parts_of_the_stacked_tensor():
    pairs, stacked = experts()
    made = plan.make([holding(pairs=pairs)], stacked, rules=MIXTRAL)
    for spec in stacked:
        expected = np.zeros(spec.shape, np.float32)
        rows = expected.reshape(-1, spec.shape[-1])
        for step in made.by_part[spec.name]:
            rows[step.spec.region.rows] += sums.delta(step)
        for number in range(3):
            own = {
                name: pairs[f"model.layers.0.block_sparse_moe.experts.{number}.{name}"].delta()
                for name in ("w1", "w2", "w3")
            }
            wanted = own["w2"] if "down" in spec.name else np.concatenate([own["w1"], own["w3"]])
            np.testing.assert_array_equal(expected[number], wanted)
    assert "model.layers.0.mlp.experts.gate_up_proj[1, 2:4]" in made.by_weight


def test_pairs_of_some_experts_only_are_refused():
    pairs, stacked = experts()
    some = {name: each for name, each in pairs.items() if ".1." not in name}
    with pytest.raises(MatchError, match="of tensors that the adapter lacks in part"):
        plan.make([holding(pairs=some)], stacked, rules=MIXTRAL)
