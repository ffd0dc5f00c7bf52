"""One case: its runs, its outputs, and the positions that are not judged."""

from __future__ import annotations

import dataclasses

import numpy as np

from lora_export.verification.parity import Case

HIDDEN = np.arange(12.0).reshape(2, 3, 2)  # (batch, sequence, features)
POOLED = np.ones((2, 4))
PADDING = np.array([[True, False, False], [False, False, False]])  # the first row's first position


def a_case(**fields: object) -> Case:
    outputs = {"hidden": HIDDEN, "pooled": POOLED}
    runs = dict.fromkeys(("reference", "deployed", "candidate", "base", "scaled"), outputs)
    return Case("first", "ids [2, 3]", **(runs | {"unjudged": PADDING} | fields))  # type: ignore[arg-type]


def test_runs_are_those_that_exist() -> None:
    assert list(a_case(base=None, scaled=None).runs) == ["the candidate", "the reference", "the deployed model"]
    assert list(a_case(attached={}).runs)[3:] == [
        "the base", "the reference with scale × 1.1", "the attached reference",
    ]  # fmt: skip


def test_an_output_of_any_run_is_compared() -> None:
    case = a_case(candidate={"hidden": HIDDEN, "extra": POOLED}, base=None, scaled=None)
    assert case.outputs == ["hidden", "extra", "pooled"]


def test_positions_that_are_not_judged_are_left_out_of_every_run() -> None:
    judged = a_case().judged()
    for outputs in judged.runs.values():
        assert outputs["hidden"].tolist() == HIDDEN.reshape(6, 2)[1:].tolist()
        assert outputs["pooled"] is POOLED
    assert judged.unjudged is None and judged.judged() is judged


def test_positions_of_one_output_are_left_out_of_it_alone() -> None:
    other = np.array([[False, False, True], [False, False, False]])
    runs = {"hidden": HIDDEN, "logits": HIDDEN}
    every = dict.fromkeys(("reference", "deployed", "candidate", "base", "scaled"), runs)
    judged = a_case(**every, unjudged_by_output={"hidden": other}).judged()
    assert judged.candidate["hidden"].shape == (4, 2) and judged.candidate["logits"].shape == (5, 2)
    assert judged.index("hidden", (1, 0)) == (1, 0, 0) and judged.judged() is judged
    alone = a_case(**every, unjudged=None, unjudged_by_output={"hidden": other}).judged()
    assert alone.reference["hidden"].shape == (5, 2) and alone.reference["logits"] is HIDDEN


def test_an_index_is_that_of_the_output_as_it_was_computed() -> None:
    judged = a_case().judged()
    assert judged.index("hidden", (0, 1)) == (0, 1, 1) and judged.index("hidden", (2, 0)) == (1, 0, 0)
    assert judged.index("pooled", (1, 3)) == (1, 3)


def test_a_value_that_is_not_finite_is_judged_everywhere() -> None:
    broken = HIDDEN.copy()
    broken[0, 0, 1] = np.nan
    assert a_case(candidate={"hidden": broken, "pooled": POOLED}).judged().candidate["hidden"].shape == (6, 2)


def test_outputs_of_other_shapes_are_judged_whole() -> None:
    short = a_case(candidate={"hidden": HIDDEN[:, :2], "pooled": POOLED}).judged()
    assert short.reference["hidden"] is HIDDEN
    matrix = a_case(**{run: {"y": np.ones((2, 3))} for run in ("reference", "deployed", "candidate", "base", "scaled")})
    assert matrix.judged().reference["y"].shape == (2, 3), "an output of two axes has no features"
    assert dataclasses.replace(a_case(), unjudged=None).judged().positions == {}
