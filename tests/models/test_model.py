"""The inputs, sizes and fingerprint of a model."""

from __future__ import annotations

import torch

from lora_export.models.load import load_model
from support import FACTORIES


def test_inputs_have_the_requested_sizes_and_repeat_by_seed() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    first, again, other = (loaded.inputs({"batch": 3, "rows_axis1": 7}, seed=seed) for seed in (1, 1, 2))
    assert first["rows"].shape == (3, 7, 8)
    assert first["weights"].shape == (3, 7)
    assert torch.equal(first["rows"], again["rows"])
    assert not torch.equal(first["rows"], other["rows"])


def test_checked_sizes_differ_from_the_traced_ones() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    sets = loaded.checked_sizes({})
    assert len(sets) == 3
    assert 1 in {sizes["batch"] for sizes in sets}
    for symbol, traced in loaded.traced_sizes.items():
        assert traced not in {sizes[symbol] for sizes in sets}


def test_fixed_sizes_are_kept() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    assert {sizes["rows_axis1"] for sizes in loaded.checked_sizes({"rows_axis1": 5})} == {5}


def test_the_fingerprint_changes_with_one_weight() -> None:
    one, other = (load_model(f"{FACTORIES}:scaled") for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        other.module.dense.bias[0] += 1
    assert one.fingerprint() != other.fingerprint()
