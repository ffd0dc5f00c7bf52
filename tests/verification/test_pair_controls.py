"""The sentences on single pairs that were switched off."""

from __future__ import annotations

from lora_export.verification.pair_controls import PairControls, first_names


def test_each_pair_that_the_candidate_lacks_has_a_fault_of_its_own() -> None:
    found = PairControls(("q", "k", "v"), shares={"q": 1.02, "k": -0.9})
    assert found.faults == [
        "q: the candidate lacks 102 % of what this pair changes",
        "k: the candidate has 1.9 times what this pair changes",
    ]
    assert not [*found.doubts, *found.not_judged, *found.notes]


def test_layers_are_named_where_their_pairs_were_off_together() -> None:
    found = PairControls(("h.0", "h.1"), without_effect=("h.0",), missed=("h.1",), by_layer=True)
    assert found.doubts[0].startswith("no output depends on the pairs of 1 of the 2 layers: h.0. ")
    assert found.not_judged[0].endswith("h.1. A candidate without those of one layer would pass")
    assert found.notes == ["the pairs of one layer were switched off together: the model is large"]


def test_long_lists_of_names_are_cut() -> None:
    assert first_names(list("abcde")) == "a, b, c, d, e"
    assert first_names(list("abcdefg")) == "a, b, c, d, e and 2 more"
