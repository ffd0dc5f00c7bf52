"""Reports: what was measured is in them, whole, and readable by the programs they are for."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from lora_export import plan, report
from lora_export.errors import InputRefused, OutputFailed
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.verification.parity import Case, Outcome, Sensitivity, Verdict, judge
from support import junit_schema
from support.verdicts import DIFFERENT, NOTHING, SAME, STRAYED, TRIED, UNDECIDED, Placed, case


@dataclass(frozen=True)
class Result:
    weight: str
    retention: float = 1.0
    relative_change: float = 0.0123
    noise: float = 0.02
    changed: int = 9
    elements: int = 10


@dataclass(frozen=True)
class MergeReport:
    results: tuple[Result, ...]
    copied: int = 80_200_000
    bytes: int = 88_100_000
    seconds: float = 0.25


def printed(*arguments: Any, with_: Any = report.print_verdict, terminal: bool = False, width: int = 40) -> str:
    file = io.StringIO()
    to = Console(file=file, force_terminal=terminal, width=width, color_system="standard" if terminal else "auto")
    with_(to, *arguments)
    return file.getvalue()


# Terminal


def test_the_screen_shows_outcome_figures_and_placement() -> None:
    text = printed(SAME, Placed())
    assert text.startswith("same: 1 output in 2 cases, float32\n")
    assert "error 0.25, allowed 0.25; PyTorch's own 0.125 (x 2)" in text
    assert "the error is 0.39 % of what the adapter does (64)" in text
    assert "  worst place [0, 0]: off by 0.25, PyTorch by 0.125 at most\n    it is -0.25, the reference has 0\n" in text
    assert text.endswith("142 of 142 compute nodes on CPUExecutionProvider\n")


def test_a_narrow_pipe_cuts_no_line_and_has_no_colour() -> None:
    text = printed(SAME, Placed(), width=10)
    assert "\x1b" not in text and "…" not in text
    assert text.splitlines() == [*str(SAME).splitlines(), report.placed(Placed())]


@pytest.mark.parametrize(("verdict", "colour"), [(SAME, "32"), (DIFFERENT, "31"), (UNDECIDED, "33")])
def test_a_terminal_shows_the_outcome_in_colour(verdict: Verdict, colour: str) -> None:
    text = printed(verdict, terminal=True)
    assert text.startswith(f"\x1b[1;{colour}m{verdict.outcome}\x1b[0m: ")
    assert text.count(f"\x1b[{colour}m  - ") == len(verdict.reasons)


def test_the_screen_shows_why_not() -> None:
    text = printed(DIFFERENT)
    assert "  - logits in case bad: the error is 1, allowed is 0.25; PyTorch's own is 0.125, which is x 8\n" in text
    assert "  - perturbing the input mask changes PyTorch and not the candidate: it was folded away\n" in text
    assert "nothing was compared" in printed(NOTHING)


def test_compute_that_ran_elsewhere_is_named() -> None:
    text = printed(SAME, STRAYED)
    assert "141 of 142 compute nodes on CUDAExecutionProvider\n" in text
    assert text.endswith("  - /layer.3/MatMul (MatMul) on CPUExecutionProvider\n")
    many = Placed(off_provider=STRAYED.off_provider * 9)
    assert report.placed(many).splitlines()[-1] == "  - and 4 more"
    assert len(report.placed(many).splitlines()) == 7


def test_names_are_neither_markup_nor_commands_to_the_terminal() -> None:
    text = printed(judge([case(output="[red]\x1b[2J[/red]")]), terminal=True)
    assert "[red]\\x1b[2J[/red] in case" in text
    assert "\x1b[2J" not in text


ADAPTER = Adapter(
    name="english",
    format="peft",
    pairs={
        "q": LoraPair(a=np.array([[3.0, 0.0, 4.0]]), b=np.array([[1.0], [2.0]]), scale=2.0),
        "v": LoraPair(a=np.eye(2), b=np.eye(2), scale=0.5, magnitude=np.ones(2)),
    },
    replaced={"score.weight": np.ones((10, 384), np.float32)},
    biases={"k": np.ones(2, np.float32)},
    notes=("rsLoRA: the scale is alpha/√r",),
)


def test_an_adapter_is_shown_as_a_table() -> None:
    lines = [line.split() for line in printed(ADAPTER, with_=report.print_adapter).splitlines()]
    assert " ".join(lines[0]) == "english: peft, 2 low-rank pairs, 1 whole tensor, 1 bias, 3,857 parameters"
    assert lines[1] == ["module", "rank", "scale", "shape", "‖ΔW‖"]
    # ΔW = 2 * [[3, 0, 4], [6, 0, 8]], whose norm is 2 * 5 * √5
    assert lines[2] == ["q", "1", "2", "2", "x", "3", f"{10 * math.sqrt(5):.4g}"]
    assert lines[3] == ["v", "2", "0.5", "2", "x", "2", f"{math.sqrt(0.5):.4g}", "DoRA"]
    assert " ".join(lines[4]) == "DoRA rescales W + ΔW: how much changes in all, only the base's weights would tell"
    assert lines[5] == ["replaced", "as", "a", "whole:", "score.weight", "10", "x", "384", "float32"]
    assert lines[6] == ["added", "to", "a", "bias:", "k", "2"]
    assert lines[7] == ["note:", "rsLoRA:", "the", "scale", "is", "alpha/√r"]


def test_embeddings_and_convolutions_are_called_so() -> None:
    table = LoraPair(a=np.ones((1, 9)), b=np.ones((2, 1)), scale=1.0, magnitude=np.ones(2), embedding=True)
    kernel = LoraPair(a=np.ones((1, 2, 3)), b=np.ones((4, 1, 1)), scale=1.0)
    lines = printed(Adapter("mixed", "peft", {"e": table, "c": kernel}), with_=report.print_adapter).splitlines()
    assert lines[2].split()[-2:] == ["DoRA", "embedding"]
    assert lines[3].split()[3:] == ["4", "x", "2", "x", "3", f"{math.sqrt(24):.4g}", "convolution"]


def test_rows_are_told_with_their_number_and_width() -> None:
    there = {"e.weight": TokenRows(np.array([1, 7]), np.ones((2, 3), np.float32))}
    lines = printed(Adapter("tokens", "peft", {}, token_rows=there), with_=report.print_adapter).splitlines()
    assert lines == ["tokens: peft, 2 rows, 6 parameters", "rows replaced: e.weight  2 x 3 float32"]


def test_the_norm_is_that_of_the_delta() -> None:
    rng = np.random.default_rng(3)
    pair = LoraPair(a=rng.normal(size=(4, 6, 3, 3)), b=rng.normal(size=(5, 4, 1, 1)), scale=-0.7)
    adapter = Adapter("conv", "peft", {"c": pair})
    norm = np.linalg.norm(pair.delta().ravel())
    assert f"  {norm:.4g}  convolution\n" in printed(adapter, with_=report.print_adapter)


def test_a_fresh_adapter_is_called_so() -> None:
    pair = LoraPair(a=np.ones((1, 2)), b=np.zeros((2, 1)), scale=1.0)
    assert "it changes nothing" in printed(Adapter("fresh", "peft", {"q": pair}), with_=report.print_adapter)
    assert "it changes nothing" not in printed(ADAPTER, with_=report.print_adapter)


def a_plan() -> plan.Plan:
    pair = LoraPair(a=np.ones((1, 3)), b=np.ones((2, 1)), scale=2.0)
    spec = plan.TensorSpec("q.weight", (2, 3), "float32", plan.Layout.OUT_IN)
    return plan.make([Adapter("english", "peft", {"q": pair})], [spec])


def test_a_plan_is_printed_as_it_stands() -> None:
    assert printed(a_plan(), with_=report.print_plan) == f"{a_plan()}\n"


def test_a_ledger_is_a_line_and_the_weights_that_kept_least() -> None:
    kept = [0.999, 0.42, 1.0, 0.95, math.nan, 0.97, 0.98]
    ledger = MergeReport(tuple(Result(f"layer.{number}", retention) for number, retention in enumerate(kept)))
    lines = printed(ledger, Path("merged"), with_=report.print_merge_report).splitlines()
    assert lines[0] == (
        "7 weights merged; 88.1 MB written to merged in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    )
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["layer.4", "layer.1", "layer.3", "layer.5", "layer.6"]
    assert rows[1] == ["layer.1", "0.0123", "0.4200", "0.02", "90.0%"]
    assert lines[-1] == "2 more, each keeps at least as much"


def test_on_a_terminal_weights_that_lost_much_are_marked() -> None:
    ledger = MergeReport((Result("lost", 0.4), Result("kept", 1.0), Result("unknown", math.nan)))
    lines = printed(ledger, with_=report.print_merge_report, terminal=True).splitlines()
    assert [("lost" in line or "unknown" in line) for line in lines] == ["\x1b[33m" in line for line in lines]


def test_a_merge_without_low_rank_weights_is_a_line() -> None:
    assert printed(MergeReport(()), with_=report.print_merge_report).splitlines() == [
        "0 weights merged; 88.1 MB written in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    ]


def test_our_own_console_cuts_nothing_and_reads_no_markup() -> None:
    file = io.StringIO()
    to = report.console(file)
    to.print("[bold]W[/bold] :smile: " + "1234567890 " * 30)
    assert file.getvalue() == "[bold]W[/bold] :smile: " + "1234567890 " * 30 + "\n"


# JSON


def test_a_verdict_comes_back_from_its_json(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    report.write(path, DIFFERENT, placement=STRAYED, about={"candidate": "model.onnx", "seed": 7})
    back = json.loads(path.read_text())
    assert back["schema"] == "lora-export/verdict/2"
    assert (back["outcome"], back["exit_code"], back["dtype"]) == ("different", 4, "float32")
    assert back["about"] == {"candidate": "model.onnx", "seed": 7}
    bad = back["comparisons"][1]
    assert (bad["case"], bad["output"], bad["figures"]["error"], bad["figures"]["shape"]) == (
        "bad", "logits", 1.0, [2, 300],
    )  # fmt: skip
    assert bad["figures"]["worst"] == {"index": [0, 0], "candidate": -1.0, "reference": 0.0}
    assert bad["figures"]["gates"][0] == {"name": "error", "value": 1.0, "allowed": 0.25, "passed": False}
    assert back["reasons"][0]["outcome"] == "different"
    assert back["sensitivity"][1] == {"input": "mask", "peer_changed": True, "candidate_changed": False}
    assert back["placement"] == {
        "requested_provider": "CUDAExecutionProvider",
        "compute_nodes": 142,
        "off_provider": [["CPUExecutionProvider", "/layer.3/MatMul", "MatMul"]],
        "nodes": {"CPUExecutionProvider": 2},
        "options": {},
        "version": "1.31.1",
    }


def test_what_is_not_a_number_is_null_and_said_in_words() -> None:
    ledger = MergeReport((Result("w", math.nan, relative_change=np.float32("inf")),))
    there = report.as_dict(ledger)["results"][0]
    assert there["retention"] is None and there["retention_text"] == "nan"
    assert there["relative_change"] is None and there["relative_change_text"] == "inf"
    assert "noise_text" not in there
    about = report.document(SAME, about={"loss": [1.0, -math.inf]})["about"]
    assert about == {"loss": [1.0, None], "loss_text": "[1.0, -inf]"}
    json.dumps([report.as_dict(ledger), about], allow_nan=False)


def test_every_noun_is_a_document_with_its_schema() -> None:
    adapter = json.loads(json.dumps(report.as_dict(ADAPTER), allow_nan=False))
    assert adapter["schema"] == "lora-export/adapter/1"
    assert adapter["pairs"]["q"]["a"] == {"shape": [1, 3], "dtype": "float32"}, "an array is told, not dumped"
    assert adapter["pairs"]["q"]["scale"] == 2.0
    made = json.loads(json.dumps(report.as_dict(a_plan()), allow_nan=False))
    assert made["schema"] == "lora-export/plan/1"
    assert made["steps"][0]["spec"]["layout"] == "out_in"
    assert "by_weight" not in made, "an index over the steps"
    assert report.as_dict(MergeReport(()))["schema"] == "lora-export/merge-report/1"


def test_values_of_other_kinds_are_told_or_refused() -> None:
    about = {"path": Path("a/b"), "dtype": np.dtype("int8"), "count": np.int64(3), "names": {"b", "a"}, "on": np.True_}
    assert report.document(SAME, about=about)["about"] == {
        "path": "a/b", "dtype": "int8", "count": 3, "names": ["a", "b"], "on": True,
    }  # fmt: skip
    with pytest.raises(TypeError, match="a report cannot hold a function"):
        report.document(SAME, about={"what": printed})


# JUnit


def parsed(verdict: Verdict, placement: Any = None, **more: Any) -> ElementTree.Element:
    root = ElementTree.fromstring(report.junit(verdict, placement, **more))
    assert root.tag == "testsuites" and junit_schema.faults(root) == []
    return root


def test_the_schema_of_junit_finds_what_is_wrong() -> None:
    text = report.junit(DIFFERENT, STRAYED, {"torch": "2.13"}, seconds=1.5)
    assert junit_schema.faults(ElementTree.fromstring(text)) == []
    for there, instead in {
        ' tests="': ' count="',
        'failures="': 'failures="1',
        "<system-out>": "<system-out><b/>",
        "<property ": "<property kind='' ",
        'time="1.500"': 'time="1.5 s"',
        "<properties>": "<properties>words",
        "</testsuites>": "<testcase name=''/></testsuites>",
    }.items():
        assert there in text
        assert junit_schema.faults(ElementTree.fromstring(text.replace(there, instead, 1))), instead


def outcomes(root: ElementTree.Element) -> dict[tuple[str, str], str]:
    found = {}
    for test in root.iter("testcase"):
        marks = [child.tag for child in test if child.tag != "system-out"]
        found[test.attrib["classname"].removeprefix("lora-export."), test.attrib["name"]] = " ".join(marks) or "passed"
    return found


def test_junit_has_a_test_for_everything_that_was_asked() -> None:
    root = parsed(SAME, Placed(), about={"torch": "2.13"}, seconds=1.5)
    assert outcomes(root) == {
        ("cases", "2 x 300"): "passed",
        ("cases", "1 x 600"): "passed",
        ("outputs.2 x 300", "logits"): "passed",
        ("outputs.1 x 600", "logits"): "passed",
        ("controls", "adapter_off: the model without its adapters"): "passed",
        ("controls", "scale_1.1: the model with every scale x 1.1"): "passed",
        ("inputs", "ids"): "passed",
        ("placement", "CPUExecutionProvider"): "passed",
        ("verdict", "same"): "passed",
    }
    for element in (root, root[0]):
        counts = [element.attrib[name] for name in ("tests", "failures", "errors", "time")]
        assert counts == ["9", "0", "0", "1.500"]
    assert (root[0].attrib["skipped"], "skipped" in root.attrib) == ("0", False)
    assert root.find("testsuite/properties/property").attrib == {"name": "torch", "value": "2.13"}  # type: ignore[union-attr]
    told = {test.attrib["classname"]: test.findtext("system-out") for test in root.iter("testcase")}
    assert "error 0.25, allowed 0.25; PyTorch's own 0.125 (x 2)" in str(told["lora-export.outputs.2 x 300"])
    assert told["lora-export.cases"] == "compared: logits [2, 300]"
    assert str(told["lora-export.controls"]).splitlines() == [
        "told from the candidate in 2 of 2 outputs",
        "logits in case 2 x 300: told, off by 6.15",
        "logits in case 1 x 600: told, off by 6.15",
    ]


def test_what_is_different_is_a_failure() -> None:
    root = parsed(DIFFERENT, STRAYED)
    assert outcomes(root) == {
        ("cases", "2 x 300"): "passed",
        ("cases", "bad"): "passed",
        ("outputs.2 x 300", "logits"): "passed",
        ("outputs.bad", "logits"): "failure",
        ("controls", "adapter_off: the model without its adapters"): "passed",
        ("controls", "scale_1.1: the model with every scale x 1.1"): "passed",
        ("inputs", "ids"): "passed",
        ("inputs", "mask"): "failure",
        ("placement", "CUDAExecutionProvider"): "failure",
        ("verdict", "same"): "failure",
    }
    assert (root.attrib["failures"], root.attrib["errors"]) == ("4", "0")
    failure = next(root.iter("failure"))
    assert failure.attrib["type"] == "different"
    assert failure.attrib["message"].startswith("logits in case bad: the error is 1, allowed is 0.25")
    assert "at [0, 0] it is -1, the reference has 0" in str(failure.text)


def test_what_is_undecided_is_an_error_never_a_pass() -> None:
    found = outcomes(parsed(UNDECIDED))
    assert found["outputs.2 x 300", "logits"] == "passed"
    assert found["controls", "tolerance: the model without its adapters"] == "error"
    assert found["verdict", "same"] == "error"
    assert outcomes(parsed(NOTHING)) == {("verdict", "same"): "error"}


def test_a_difference_outweighs_a_doubt_in_the_xml_too() -> None:
    verdict = judge([case(name="wide"), case(1.0, name="bad")], atol=65.0)
    assert verdict.reasons[0].outcome is Outcome.UNDECIDED
    assert outcomes(parsed(verdict))["verdict", "same"] == "failure"


def test_an_input_that_nobody_heeds_is_a_skipped_test() -> None:
    verdict = judge([case()], sensitivity=[*TRIED, Sensitivity("mask", False, False)])
    root = parsed(verdict)
    assert outcomes(root)["inputs", "mask"] == "skipped"
    assert root[0].attrib["skipped"] == "1"


def test_a_missing_output_and_a_value_that_is_no_number_are_in_the_xml() -> None:
    nan = case()
    nan.candidate["logits"][0, 3] = math.nan  # type: ignore[index]
    lost = Case(**{**vars(case(name="lost")), "candidate": {}})
    verdict = judge([nan, lost])
    assert verdict.outcome is Outcome.DIFFERENT
    messages = [failure.attrib["message"] for failure in parsed(verdict).iter("failure")]
    assert "the candidate has 1 value not finite, the first at [0, 3]: nan" in messages[0]
    assert messages[1] == "logits in case lost: the candidate lacks this output"
    assert '"figures": null' in json.dumps(report.document(verdict), allow_nan=False)


def test_names_that_xml_cannot_hold_do_not_break_it() -> None:
    root = parsed(judge([case(output="a\x00\x1b<&\ud800b")]))
    assert ("outputs.2 x 300", "a��<&�b") in outcomes(root)


# Files


def test_the_suffix_chooses_and_an_older_report_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    report.write(path, DIFFERENT)
    report.write(path, SAME, placement=Placed(), seconds=2)
    root = ElementTree.parse(path).getroot()
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["time"]) == ("9", "0", "2.000")
    assert [there.name for there in tmp_path.iterdir()] == ["junit.xml"]


@pytest.mark.parametrize("name", ["report.txt", "report", "report.htm"])
def test_another_suffix_is_refused_before_and_after_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputRefused, match=r"a report is \.json .*, \.xml .* or \.html"):
        report.check_path(tmp_path / name)
    with pytest.raises(InputRefused, match=r"a report is \.json .*, \.xml .* or \.html"):
        report.write(tmp_path / name, SAME)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_an_output_failure(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="does not exist"):
        report.write(tmp_path / "nowhere" / "report.json", SAME)
