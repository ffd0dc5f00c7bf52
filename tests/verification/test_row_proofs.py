"""Graphs whose rows choose their adapters: what a proof of single adapters would not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import lora_export as le
from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.formats.contract import ABSENT_LABEL
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof
from lora_export.verification.row_proofs import mixed_rows, several_on_row
from support.graphs import an_adapter
from support.insertion import with_other_ids, with_reversed_rows
from support.proofs import judge_mixed
from support.small_graphs import PAIR

INPUTS = {"input": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))


def adapters() -> list[Adapter]:
    return [an_adapter({"0": PAIR}, name="one"), an_adapter({"0": replace(PAIR, b=-2 * PAIR.b)}, name="two")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.onnx"
    result = le.export_onnx((net(), INPUTS), path, adapters=adapters(), lora="rows", per_row=2)
    assert result.proofs is not None and result.proofs.mixed is not None
    assert any("1+2" in case.name for case in result.proofs.mixed.cases)
    return path


FIRST, SECOND = (
    f"at_{name} = Constant <value = int64[1] {{{place}}}> () {name} = Gather <axis = 1> (adapter_ids, at_{name})"
    for name, place in (("first", 0), ("second", 1))
)
OTHER_IDS = {
    "nothing where the first place is empty": f"{FIRST} is_used = Sign (first) other = Mul (adapter_ids, is_used)",
    "nothing at the second place": f"{FIRST} zero = Sub (first, first) other = Concat <axis = 1> (first, zero)",
    "ids in ascending order": f"""{FIRST} {SECOND} low = Min (first, second) high = Max (first, second)
        other = Concat <axis = 1> (low, high)""",
}


def test_each_adapter_is_on_a_row_once_and_then_again() -> None:
    assert several_on_row(3, 2) == ((1, 2), (0.75, -0.5))
    assert several_on_row(2, 5) == ((1, 2, 1, 2, 1), (0.75, -0.5, 0.375, 0.75, -0.5))


@pytest.mark.parametrize("name", ["adapter_ids", "adapter_scales"])
def test_exchanged_rows_are_different(exported: Path, name: str, tmp_path: Path) -> None:
    model = load_graph(exported)
    value = next(given for given in model.graph.inputs if given.name == name)
    with_reversed_rows(model, value, list(value.uses()))
    ir.save(model, wrong := tmp_path / "wrong.onnx")
    result = le.verify(wrong, (net(), INPUTS), adapters=adapters())
    assert result.proof is not None and result.proof.verdict.outcome is Outcome.DIFFERENT
    assert {reason.case.split(",")[0] for reason in result.proof.verdict.reasons} == {"mixed batches"}


@pytest.mark.parametrize("wrong", OTHER_IDS)
def test_graph_that_is_wrong_for_some_places_of_adapters_is_different(
    exported: Path, wrong: str, tmp_path: Path
) -> None:
    path = with_other_ids(exported, OTHER_IDS[wrong], tmp_path / "wrong.onnx")
    result = le.verify(path, (net(), INPUTS), adapters=adapters())
    assert result.proof is not None and result.proof.verdict.outcome is Outcome.DIFFERENT


@pytest.mark.parametrize(
    ("adapters", "per_row", "rows"),
    [
        (2, 1, ["1", "2", "0"]),
        (2, 2, ["1+2", "2+1", "0+1", "2", "0"]),
        (1, 3, ["1+1+1", "1+1+1", "0+1", "0+0+1", "1", "0"]),
        (3, 2, ["1+2", "2+1", "0+1", "2", "0+3", "0"]),
    ],
)
def test_mixed_batches_have_every_adapter_and_every_place(adapters: int, per_row: int, rows: list[str]) -> None:
    made = mixed_rows(adapters, per_row)
    assert list(map(str, made)) == rows
    assert [row.proof for row in made[-3:]][-1] == 0 and {len(row.ids) for row in made} == {per_row}


def test_batches_of_a_right_graph_reach_every_kind_of_row(exported: Path) -> None:
    result = le.verify(exported, (net(), INPUTS), adapters=adapters())
    assert result and result.proof is not None
    names = " ".join(each.case for each in result.proof.verdict.comparisons if "mixed" in each.case)
    assert all(f" {row}" in names for row in ("1+2", "2+1", "0+1", "2", "0"))


def test_a_tolerance_is_demanded_of_mixed_batches_too(exported: Path) -> None:
    result = le.verify(exported, (net(), INPUTS), adapters=adapters(), atol=1e-3, rtol=0.0)
    assert result and result.proof is not None
    judged = [figures.gate("tolerance") for _, figures in result.proof.verdict.measured]
    assert judged and all(judged)


def test_unjudged_positions_are_those_of_each_rows_adapter() -> None:
    truth = np.ones((3, 2, 2))
    masks = [np.array([[True, False]] * 3), np.array([[False, True]] * 3)]
    cases = [
        parity.Case("a", "", {"y": truth}, {"y": truth}, {"y": truth}, unjudged_by_output={"y": own}) for own in masks
    ]

    class Same(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            return {"y": truth}

    inputs = {"a": {"ids": np.zeros((3, 2))}}
    proofs = [Proof(parity.judge([case]), inputs=inputs, cases=(case,)) for case in cases]
    (mixed,) = judge_mixed(Same(nn.Identity()), proofs, [1, 0]).cases
    assert mixed.unjudged_by_output["y"].tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ({"y": np.ones((3, 2))}, "z: the candidate lacks this output"),
        ({"y": np.ones((3, 2)), "z": np.float64(1)}, "z: the candidate's shape is [], the reference's is [3]"),
        ({"z": np.ones(3), "y": np.ones((1, 2))}, "y: the candidate's shape is [1, 2], the reference's is [3, 2]"),
    ],
)
def test_mixed_batch_whose_outputs_lack_rows_is_different(outputs: Arrays, found: str) -> None:
    """Rows of an output that is missing, or is one for the whole batch, ended a proof with a traceback."""
    truth = {"y": np.ones((3, 2)), "z": np.ones(3)}
    case = parity.Case("a", "", truth, truth, truth)
    proof = Proof(parity.judge([case]), inputs={"a": {"ids": np.zeros((3, 2))}}, cases=(case,))

    class Given(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            return outputs

    verdict = judge_mixed(Given(nn.Identity()), [proof, proof], [1, 0]).verdict
    reasons = [reason for reason in verdict.reasons if reason.outcome is Outcome.DIFFERENT]
    assert [f"{reason.output}: {reason.text}".startswith(found) for reason in reasons] == [True]


def test_cases_that_one_adapter_has_alone_are_in_no_mixed_batch() -> None:
    """Those of an expert that no other input reaches come before the user's own."""
    truths = {"user's": np.ones((3, 2)), "seed 9": np.full((2, 4), 7.0)}
    inputs = {name: {"ids": np.zeros(truth.shape)} for name, truth in truths.items()}
    cases = {name: parity.Case(name, "", *[{"y": truth}] * 3) for name, truth in truths.items()}
    base, adapter = (
        Proof(
            parity.judge([cases[name] for name in names]),
            inputs={name: inputs[name] for name in names},
            cases=tuple(cases[name] for name in names),
        )
        for names in (["user's"], ["seed 9", "user's"])
    )

    class Given(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            return {"y": truths["user's"]}

    (mixed,) = judge_mixed(Given(nn.Identity()), [base, adapter], [1, 0]).cases
    assert mixed.name == "user's, adapters 1, 0, 1"


@pytest.mark.parametrize(("position", "outcome"), [(0, parity.Outcome.SAME), (1, parity.Outcome.DIFFERENT)])
@pytest.mark.parametrize("labels", [(4, 4, 4), (4, 3, 6)], ids=["equal heads", "heads of their own"])
def test_mixed_batch_is_judged_from_each_rows_first_token(
    labels: tuple[int, ...], position: int, outcome: parity.Outcome
) -> None:
    rng = np.random.default_rng(0)
    arrays = {"attention_mask": np.array([[0, 0, 1, 1, 1]] * 200)}
    truths = [rng.standard_normal((200, 5, count)) for count in labels]
    alone = []
    for truth in truths:
        deployed = {"logits": (truth + 1e-6 * rng.standard_normal(truth.shape)).astype(np.float32)}
        base = truths[0] if truth.shape == truths[0].shape else rng.standard_normal(truth.shape)
        scaled = {"logits": base + 1.1 * (truth - base)}
        runs = {"reference": {"logits": truth}, "deployed": deployed, "candidate": deployed, "scaled": scaled}
        unjudged = np.cumsum(arrays["attention_mask"], 1) == 0
        case = parity.Case("padded", "", base={"logits": base}, unjudged=unjudged, **runs)
        alone.append(Proof(parity.judge([case]), None, {}, {"padded": arrays}, (case,)))
    rows = np.resize([1, 2, 0], 200)

    def padded(case: parity.Case, row: int) -> NDArray[np.float32]:
        own: NDArray[np.float32] = case.deployed["logits"][row]
        return np.pad(own, ((0, 0), (0, max(labels) - own.shape[-1])), constant_values=absent)

    class Mixing(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            logits = np.stack([padded(alone[chosen].cases[0], row) for row, chosen in enumerate(rows)])
            logits[np.cumsum(inputs["attention_mask"], 1) == position, :3] += 1.0
            return {"logits": logits}

    absent = ABSENT_LABEL
    verdict = judge_mixed(Mixing(nn.Identity()), alone, [1, 2, 0]).verdict
    assert verdict.outcome is outcome, str(verdict)
    absent = 0.0  # such a label is no longer absent
    verdict = judge_mixed(Mixing(nn.Identity()), alone, [1, 2, 0]).verdict
    assert verdict.outcome is (parity.Outcome.DIFFERENT if len(set(labels)) > 1 else outcome)


# The rows of a batch of three have the adapters 1, 0 and 1. A wrong number, as [row, row], and what is to be found.
@pytest.mark.parametrize(
    ("batches", "wrong", "tokens", "outcome"),
    [
        ((2, 3), (0, 1), 4, parity.Outcome.SAME),  # between rows of different adapters
        ((2, 3), (0, 2), 4, parity.Outcome.DIFFERENT),
        ((2, 3), (1, 1), 4, parity.Outcome.DIFFERENT),
        ((3, 3), (0, 1), 4, parity.Outcome.DIFFERENT),  # three numbers of each row, for all that is known
        ((2, 3), (0, 1), 0, parity.Outcome.DIFFERENT),  # as many tokens as rows, which the numbers may be of
    ],
)
def test_numbers_between_rows_of_other_adapters_are_not_judged(
    batches: tuple[int, int], wrong: tuple[int, int], tokens: int, outcome: parity.Outcome
) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        f"{place}: {batch}": {"x": rng.standard_normal((batch, tokens or batch))} for place, batch in enumerate(batches)
    }
    alone = []
    for adapter in range(2):
        cases = []
        for name, arrays in inputs.items():
            y = arrays["x"] @ arrays["x"].T
            base, truth, scaled = ({"y": y + adapter * factor} for factor in (0, 1, 1.1))
            deployed = {"y": truth["y"].astype(np.float32)}
            cases.append(parity.Case(name, "", truth, deployed, deployed, base=base, scaled=scaled))
        alone.append(Proof(parity.judge(cases), None, {}, inputs, tuple(cases)))

    class Mixing(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            ids = np.resize([1, 0, 1], len(inputs["x"]))
            y = inputs["x"] @ inputs["x"].T + np.sqrt(np.outer(ids, ids))
            if len(y) == 3:
                y[wrong] += 1
            return {"y": y.astype(np.float32)}

    verdict = judge_mixed(Mixing(nn.Identity()), alone, [1, 0, 1]).verdict
    assert verdict.outcome is outcome, str(verdict)
    is_noted = any("between rows with different adapters" in note for note in verdict.notes)
    assert is_noted == (batches == (2, 3) and tokens > 0)
    if outcome is parity.Outcome.DIFFERENT and batches == (2, 3):
        assert f"the element at {list(wrong)}" in str(verdict)


# --- strengths that a run chooses ---


def with_strength_of(graph: Path, place: int | None, target: Path) -> Path:
    """The graph whose adapters all have the strength at this place, or the default one."""
    model = load_graph(graph)
    value = ir.tensor(np.ones(2, np.float32)) if place is None else ir.tensor([place], ir.DataType.INT64)
    constant = ir.node("Constant", [], {"value": value})
    for node in model.graph:
        if node.op_type == "Gather" and any(one is not None and one.name == "adapter_strengths" for one in node.inputs):
            node.replace_input_with(0 if place is None else 1, constant.outputs[0])
    model.graph.insert_before(model.graph[0], constant)
    ir.save(model, target)
    return target


@pytest.fixture(scope="module")
def with_strengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("strengths") / "nodes.onnx"
    result = le.export_onnx((net(), INPUTS), path, adapters=adapters(), lora="nodes", strength_input=True)
    assert result.proofs is not None and list(result.proofs.strengths) == ["all"]
    assert json.loads(load_graph(path).metadata_props[provenance.KEY])["settings"]["strength_input"] is True
    return path


def test_other_strengths_are_proven_too(with_strengths: Path) -> None:
    result = le.verify(with_strengths, (net(), INPUTS), adapters=adapters()[::-1])
    assert result.verdict.outcome == "same"
    assert {comparison.case.split(",")[0] for comparison in result.verdict.comparisons} == {
        "default strengths",
        "other strengths",
    }


@pytest.mark.parametrize("place", [0, 1, None])
def test_a_graph_of_wrong_strengths_is_different(with_strengths: Path, place: int | None, tmp_path: Path) -> None:
    wrong = with_strength_of(with_strengths, place, tmp_path / "wrong.onnx")
    result = le.verify(wrong, (net(), INPUTS), adapters=adapters())
    assert result.verdict.outcome == "different"
    assert all(reason.case is None or "other strengths" in reason.case for reason in result.verdict.reasons)


def test_other_adapters_than_those_with_strengths_are_refused(with_strengths: Path) -> None:
    with pytest.raises(InputRefused, match=r"has the strengths of one, two\. Give these adapters by these names"):
        le.verify(with_strengths, (net(), INPUTS), adapters=adapters()[:1])


@pytest.mark.parametrize("mode", ["nodes", "inputs", "all nodes"])
def test_an_adapter_that_was_merged_beside_those_with_strengths_has_none(mode: str, tmp_path: Path) -> None:
    model = nn.Sequential(net(), nn.Linear(2, 2)), INPUTS
    one, two = (replace(adapter, pairs={"0.0": adapter.pairs["0"]}) for adapter in adapters())
    merged = an_adapter({"1": LoraPair(a=[[1, 2]], b=[[3], [1]], scale=1.0)}, name="merged")
    own, lora = [one, two] if mode == "all nodes" else [one], "inputs" if mode == "inputs" else "nodes"
    le.export_onnx(model, tmp_path / "base.onnx", adapters=[merged], verify=False)
    graph, file = tmp_path / "g.onnx", {} if lora == "nodes" else {"onnx_adapter": tmp_path / "one.onnx_adapter"}
    le.export_onnx(tmp_path / "base.onnx", graph, adapters=own, lora=lora, strength_input=True, verify=False)
    result = le.verify(graph, model, adapters=[merged, *own], **file)
    assert result.verdict.outcome == "same" and any("other" in each.case for each in result.verdict.comparisons)


def test_exchanged_strengths_of_many_adapters_are_different(tmp_path: Path) -> None:
    four = [an_adapter({"0": replace(PAIR, b=factor * PAIR.b)}, name=f"a{factor}") for factor in (1, 2, 3, 4)]
    graph = tmp_path / "g.onnx"
    le.export_onnx((net(), INPUTS), graph, adapters=four, lora="nodes", strength_input=True, verify=False)
    model = load_graph(graph)
    places = [one for name, one in model.graph.initializers.items() if name.startswith("adapter_strengths.place")]
    assert len(places) == 4
    for place, other in ((places[0], [3]), (places[3], [0])):
        place.const_value = ir.tensor(other, ir.DataType.INT64)
    ir.save(model, tmp_path / "exchanged.onnx")
    assert le.verify(graph, (net(), INPUTS), adapters=four).verdict.outcome == "same"
    assert le.verify(tmp_path / "exchanged.onnx", (net(), INPUTS), adapters=four).verdict.outcome == "different"


@pytest.mark.parametrize("required", [False, True])
def test_the_strength_of_an_adapter_that_is_given_is_proven(tmp_path: Path, required: bool) -> None:
    result = le.export_onnx(
        (net(), INPUTS),
        tmp_path / "g.onnx",
        adapters=adapters(),
        lora="inputs",
        strength_input=True,
        required_inputs=required,
    )
    assert result.proofs is not None and list(result.proofs.strengths) == ["one", "two"]
    proven = le.verify(
        tmp_path / "g.onnx", (net(), INPUTS), adapters=adapters()[:1], onnx_adapter=tmp_path / "one.onnx_adapter"
    )
    assert proven.verdict.outcome == "same" and len(proven.verdict.comparisons) > len(result.proofs.whole.cases)
    without = le.verify(tmp_path / "g.onnx", (net(), INPUTS))
    assert without.verdict.outcome == "same"


@pytest.mark.parametrize(
    ("number", "reference"), [(0, "the base without adapters"), (1, "one alone"), (2, "two alone")]
)
def test_of_all_adapters_that_of_the_id_is_the_reference(exported: Path, number: int, reference: str) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"adapter_id": number, "weights": [1.0, 1.0], "on_message": said.append}
    assert le.verify(exported, (net(), INPUTS), adapters=adapters(), **options)
    assert said == [f"note: adapter_id={number}: the reference is {reference}"]
    in_other_order = le.verify(exported, (net(), INPUTS), adapters=adapters()[::-1], adapter_id=number)
    assert bool(in_other_order) is (number == 0)


def test_id_0_is_the_base_also_beside_one_adapter(exported: Path) -> None:
    assert le.verify(exported, (net(), INPUTS), adapters=adapters()[:1], adapter_id=0)


@pytest.mark.parametrize(
    ("number", "why"), [(3, "is none of the adapters that are given: 1"), (1, "2 adapters .*, not 3")]
)
def test_an_id_that_no_adapter_has_is_refused(exported: Path, number: int, why: str) -> None:
    more = [an_adapter({"0": PAIR}, name="three")] * (number == 1)
    said: list[str] = []
    with pytest.raises(InputRefused, match=why):
        le.verify(exported, (net(), INPUTS), adapters=[*adapters(), *more], adapter_id=number, on_message=said.append)
    assert said == []
