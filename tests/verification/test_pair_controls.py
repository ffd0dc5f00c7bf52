"""Single pairs that are switched off: which are, what is found, and in what sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lora_export.errors import first_of
from lora_export.runtime.runner import Arrays
from lora_export.verification import pair_controls
from lora_export.verification.pair_controls import (
    SHOWN_PAIRS,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)
from lora_export.verification.parity import Case, EffectShare, Findings, MissingPart, Outputs


def test_each_pair_that_the_candidate_lacks_has_a_fault_of_its_own() -> None:
    found = PairControls(("q", "k", "v"), shares={"q": 1.02, "k": -0.9})
    faults = (
        "q: the candidate lacks 102 % of what this pair changes",
        "k: the candidate has 1.9 times what this pair changes",
    )
    assert found.findings == Findings(faults=faults)


def test_layers_are_named_where_their_pairs_were_off_together() -> None:
    found = PairControls(("h.0", "h.1"), without_effect=("h.0",), missed=("h.1",), by_layer=True)
    assert found.findings.doubts[0].startswith("no output depends on the pairs of 1 of the 2 layers: h.0. ")
    assert found.findings.not_judged[0].endswith("h.1. A candidate without those of one layer would pass")
    assert found.findings.notes == ("the pairs of one layer were switched off together: the model is large",)


def test_long_lists_of_names_are_cut() -> None:
    assert first_of(list("abcde"), SHOWN_PAIRS) == "a, b, c, d, e"
    assert first_of(list("abcdefg"), SHOWN_PAIRS) == "a, b, c, d, e and 2 more"


def a_case(name: str) -> Case:
    return Case(name, "", reference={"y": np.zeros(1)}, deployed={"y": np.zeros(1)}, candidate={"y": np.zeros(1)})


def test_a_later_case_has_the_pairs_that_were_not_detected() -> None:
    runs: list[tuple[str, str]] = []

    def run_without(groups: Mapping[str, Sequence[str]], case: Case) -> Iterator[tuple[str, Arrays]]:
        for name, off in groups.items():
            runs.append((case.name, *off))
            yield name, {"y": np.array([{"large": 2.0, "small": 1.0, "none": 0.0}[off[0]]])}

    def judge(case: Case, outputs: Outputs) -> MissingPart:
        return MissingPart(bool(outputs["y"]), bool(outputs["y"] > 1), EffectShare())

    groups = {name: [name] for name in ("large", "small", "none", "known")}
    found = switch_off(groups, [a_case("one"), a_case("two")], run_without, judge, detected=["known"])
    assert runs == [("one", "large"), ("one", "small"), ("one", "none"), ("two", "small"), ("two", "none")]
    assert found.detected == {"large", "known"} and found.missed == ("small",) and found.without_effect == ("none",)


def test_names_have_their_adapter_where_there_are_several() -> None:
    assert grouped([("q", "a", 1), ("k", "a", 2)], by_layer=False) == {"q": [1], "k": [2]}
    assert grouped([("q", "a", 1), ("q", "b", 2)], by_layer=False) == {"q of a": [1], "q of b": [2]}


def test_pairs_of_a_layer_are_together_up_to_its_first_number() -> None:
    pairs = [("h.0.q", "a", 1), ("h.0.mlp.1.up", "a", 2), ("h.1.q", "a", 3), ("head", "a", 4)]
    assert grouped(pairs, by_layer=True) == {"h.0": [1, 2], "h.1": [3], "head": [4]}


def test_pairs_times_parameters_decide_about_the_groups() -> None:
    assert not too_many(20, int(pair_controls.LARGEST_EFFORT) // 20)
    assert too_many(21, int(pair_controls.LARGEST_EFFORT) // 20)


def test_what_pairs_change_is_added_to_the_reference() -> None:
    case = Case("one", "", reference={"y": np.array([1.0, -np.inf, 5.0])}, deployed={}, candidate={})
    on, off = {"y": np.array([2.0, -np.inf, 7.0])}, {"y": np.array([2.5, -np.inf, np.inf])}
    assert with_difference(case, off, on)["y"].tolist() == [1.5, -np.inf, np.inf]
