"""Plan, ledger and verdict -> terminal, JSON, JUnit.

Nothing is decided here: what a verdict means stands in it. On a terminal a verdict is one screen;
its files hold every figure. Lines are never wrapped or cut, so that numbers survive a pipe.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Protocol, TextIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from lora_export import files
from lora_export.errors import InputRefused, one_line, printable
from lora_export.lora import Adapter, LoraPair
from lora_export.parity import CONTROLS, Comparison, Control, Outcome, Reason, Sensitivity, Verdict
from lora_export.plan import Plan

VERSION = 1  # of the JSON documents; grows when a field changes its meaning or goes
COLOURS = {Outcome.SAME: "green", Outcome.DIFFERENT: "red", Outcome.UNDECIDED: "yellow"}
SHOWN = 5  # rows of a ledger
LOW_RETENTION = 0.9  # below this a row is coloured
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 has no escape for these


class Placement(Protocol):
    """What ran where, as a runtime tells it."""

    @property
    def asked(self) -> str: ...
    @property
    def by_provider(self) -> Mapping[str, Sequence[tuple[str, str]]]: ...  # provider -> (node, operator) ...
    @property
    def compute(self) -> int: ...
    @property
    def off_provider(self) -> Sequence[tuple[str, str, str]]: ...  # (provider, node, operator)
    @property
    def options(self) -> Mapping[str, str]: ...
    @property
    def version(self) -> str: ...


class StepResult(Protocol):
    """What became of one weight."""

    @property
    def weight(self) -> str: ...
    @property
    def relative_change(self) -> float: ...
    @property
    def retention(self) -> float: ...
    @property
    def noise(self) -> float: ...
    @property
    def changed(self) -> int: ...
    @property
    def elements(self) -> int: ...


class Ledger(Protocol):
    """What a merge did."""

    @property
    def results(self) -> Sequence[StepResult]: ...
    @property
    def copied(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


# Terminal


def console(file: TextIO | None = None) -> Console:
    """Where answers go: stdout, plain where it is no terminal. Names from files are never taken for markup."""
    return Console(file=file, soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_verdict(to: Console, verdict: Verdict, placement: Placement | None = None) -> None:
    """One screen: the outcome, why, the most strained outputs with their figures, and what ran where."""
    colour = COLOURS[verdict.outcome]
    title, *lines = str(verdict).splitlines()
    rest = _text(title.removeprefix(verdict.outcome))
    to.print(Text.assemble((verdict.outcome, f"bold {colour}"), rest), soft_wrap=True)
    for line in lines:
        _say(to, line, style=colour if line.startswith("  - ") else "")
    if placement is not None:
        _say(to, placed(placement), style="red" if placement.off_provider else "")


def placed(placement: Placement) -> str:
    """`142 of 142 compute nodes on CPUExecutionProvider`, and those that were not."""
    off = placement.off_provider
    line = f"{placement.compute - len(off)} of {placement.compute} compute nodes on {placement.asked}"
    strays = [f"  - {node} ({operator}) on {provider}" for provider, node, operator in off[:SHOWN]]
    strays += [f"  - and {len(off) - SHOWN} more"] if len(off) > SHOWN else []
    return "\n".join([line, *strays])


def print_adapter(to: Console, adapter: Adapter) -> None:
    """What an adapter file holds, a row for each module. ‖ΔW‖ is the Frobenius norm of s·BA at strength 1."""
    counts = {"low-rank pair": len(adapter.pairs), "whole tensor": len(adapter.replaced), "bias": len(adapter.biases)}
    counts["row"] = sum(rows.indices.size for rows in adapter.rows.values())
    held = ", ".join(f"{count} {what}{_s(count)}" for what, count in counts.items() if count)
    _say(to, f"{adapter.name}: {adapter.format}, {held or 'empty'}, {adapter.parameters:,} parameters", style="bold")
    rows = [["module", "rank", "scale", "shape", "‖ΔW‖", ""]]
    for module, pair in adapter.pairs.items():
        rows.append([module, f"{pair.rank}", f"{pair.scale:g}", _shape(pair.shape), f"{_norm(pair):.4g}", _kind(pair)])
    _table(to, rows)
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        _say(to, "DoRA rescales W + ΔW: how much changes in all, only the base's weights would tell")
    for name, tensor in adapter.replaced.items():
        _say(to, f"replaced as a whole: {name}  {_shape(tensor.shape)} {tensor.dtype}")
    for name, own in adapter.rows.items():
        _say(to, f"rows replaced: {name}  {_shape(own.values.shape)} {own.values.dtype}")
    for name, change in adapter.biases.items():
        _say(to, f"added to a bias: {name}  {_shape(change.shape)}")
    if adapter.is_identity:
        _say(to, "it changes nothing: every B, A or scale is zero, as in a fresh adapter", style="yellow")
    for note in adapter.notes:
        _say(to, f"note: {note}")


def _kind(pair: LoraPair) -> str:
    layer = "embedding" if pair.embedding else "convolution" if pair.a.ndim > 2 else ""
    return " ".join(filter(None, ["" if pair.magnitude is None else "DoRA", layer]))


def _norm(pair: LoraPair) -> float:
    """‖scale · B A‖ without making it: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), both (rank, rank)."""
    a = pair.a.astype(np.float64).reshape(pair.rank, -1)
    b = pair.b.astype(np.float64).reshape(-1, pair.rank)
    return abs(pair.scale) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


def print_plan(to: Console, plan: Plan) -> None:
    """What `--dry-run` shows."""
    _say(to, str(plan))


def print_ledger(to: Console, ledger: Ledger, output: Path | None = None) -> None:
    """What a merge did, in a line, and the weights that lost most of their change to rounding."""
    speed = f" ({decimal(int(ledger.bytes / ledger.seconds))}/s)" if ledger.seconds > 0 else ""
    where = f" to {files.shown(output)}" if output else ""
    _say(
        to,
        f"{len(ledger.results)} weight{_s(len(ledger.results))} merged; {decimal(ledger.bytes)} written{where} in "
        f"{ledger.seconds:.2f} s{speed}, {decimal(ledger.copied)} of them copied unchanged",
        style="bold",
    )
    # One whose retention is no number comes first: it is the one to look at.
    results = sorted(ledger.results, key=lambda result: -math.inf if math.isnan(result.retention) else result.retention)
    rows = [["least kept of their change", "‖ΔW‖/‖W‖", "retention", "noise", "entries changed"]]
    for result in results[:SHOWN]:
        share = result.changed / result.elements if result.elements else math.nan
        figures = [f"{result.relative_change:.3g}", f"{result.retention:.4f}", f"{result.noise:.3g}", f"{share:.1%}"]
        rows.append([result.weight, *figures])
    marked = {number for number, there in enumerate(results[:SHOWN], 1) if not there.retention >= LOW_RETENTION}
    _table(to, rows, marked)
    if len(results) > SHOWN:
        _say(to, f"{len(results) - SHOWN} more, each keeps at least as much")


def _table(to: Console, rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> None:
    # Not rich's Table: on a narrow terminal or in a pipe it cuts cells, and a cut number is a wrong number.
    if len(rows) < 2:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, (first, *others) in enumerate(rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        style = "dim" if number == 0 else "yellow" if number in marked else ""
        _say(to, "  ".join(cells).rstrip(), style=style)


def _say(to: Console, line: str, *, style: str = "") -> None:
    to.print(_text(line, style), soft_wrap=True)


def _text(line: str, style: str = "") -> Text:
    return Text(printable(line), style=style)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _s(count: int) -> str:
    return "" if count == 1 else "s"


# JSON


def as_dict(noun: Any) -> dict[str, Any]:
    """A dataclass as a JSON document: its fields, and the schema's name and version.

    Arrays are told by shape and dtype. JSON has no NaN and no infinity: they become null, and
    `<field>_text` says which.
    """
    return {"schema": _schema(noun), **_members(noun)}


def document(
    verdict: Verdict, placement: Placement | None = None, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A verdict with what it takes to trust it: what ran where, and facts `about` the run (versions, files, seed)."""
    result = as_dict(verdict) | {"exit_code": verdict.exit_code, "placement": None, "about": _plain(about or {})}
    if placement is not None:
        result["placement"] = {
            "asked": placement.asked,
            "compute_nodes": placement.compute,
            "off_provider": _plain(placement.off_provider),
            "nodes": {provider: len(nodes) for provider, nodes in placement.by_provider.items()},
            "options": _plain(placement.options),
            "version": placement.version,
        }
    return result


def _schema(noun: Any) -> str:
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(noun).__name__).lower()
    return f"lora-export/{name}/{VERSION}"


def _members(noun: Any) -> dict[str, Any]:
    # A field that is left out of the repr is an index over the others.
    return _object({member.name: getattr(noun, member.name) for member in fields(noun) if member.repr})


def _object(members: Mapping[Any, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in members.items():
        result[str(name)] = _plain(value)
        if _unspeakable(value):
            result[f"{name}_text"] = str(value)
    return result


def _unspeakable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_unspeakable(item) for item in value)
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if _unspeakable(value) and isinstance(value, float):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | PurePath | np.dtype):
        return str(value)
    if isinstance(value, np.ndarray):
        return _outline(value)
    if is_dataclass(value):
        return _members(value)
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _outline(array: NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


# Files


def check_path(path: Path) -> None:
    """Raise InputRefused for a report that `write` could not write; to be asked before the work is done."""
    if path.suffix not in (".json", ".xml"):
        raise InputRefused(f"{path}: a report is .json (every figure) or .xml (JUnit, for CI); name it so")


def write(
    path: Path,
    verdict: Verdict,
    *,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
) -> None:
    """Write a report, JSON or JUnit XML by the path's suffix, whole or not at all; an older one is replaced.

    Raises InputRefused for another suffix and OutputFailed where it cannot be written.
    """
    check_path(path)
    if path.suffix == ".json":
        content = json.dumps(document(verdict, placement, about), indent=2, allow_nan=False) + "\n"
    else:
        content = junit(verdict, placement, about, seconds=seconds)
    with files.stage_file(path, inputs=[], overwrite=True) as stage:
        (stage / path.name).write_text(content, encoding="utf-8")


def junit(
    verdict: Verdict,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    *,
    seconds: float = 0.0,
) -> str:
    """The verdict as JUnit XML, as GitHub's and GitLab's test reports read it.

    A test for each output in each case, each control, each input, the placement, and the verdict
    as a whole. `different` is a failure; `undecided` is an error: the test could not be made.
    """
    suite = ElementTree.Element("testsuite", name="lora-export", time=f"{seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (about or {}).items():
        ElementTree.SubElement(properties, "property", name=_xml(name), value=_xml(str(value)))
    for there in verdict.comparisons:
        reasons = [reason for reason in there.reasons if not _of_control(reason)]
        _test(suite, f"outputs.{there.case}", there.output, reasons, told=str(there))
    for name in dict.fromkeys(control.name for there in verdict.comparisons for control in _controls(there)):
        reasons = [reason for reason in verdict.reasons if _of_control(reason) and reason.gate == name]
        _test(suite, "controls", f"{name}: {CONTROLS[name]}", reasons, told=_told(verdict, name))
    for sensitivity in verdict.perturbed:
        _input_test(suite, sensitivity, verdict.peer)
    if placement is not None:
        strays = [Reason(Outcome.DIFFERENT, "placement", placed(placement))] if placement.off_provider else []
        _test(suite, "placement", placement.asked, strays, told=placed(placement))
    _test(suite, "verdict", "same", verdict.reasons, told=str(verdict))
    suites = ElementTree.Element("testsuites", name="lora-export verify", time=f"{seconds:.3f}")
    suites.append(suite)
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for what, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(what, str(len(suite.findall(f"testcase/{tag}"))))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _of_control(reason: Reason) -> bool:
    return reason.outcome is Outcome.UNDECIDED and reason.gate in CONTROLS


def _controls(there: Comparison) -> Sequence[Control]:
    return there.figures.controls if there.figures else ()


def _told(verdict: Verdict, name: str) -> str:
    put = [control for there in verdict.comparisons for control in _controls(there) if control.name == name]
    return f"told from the candidate in {sum(control.told for control in put)} of {len(put)} outputs"


def _test(
    suite: ElementTree.Element, group: str, name: str, reasons: Sequence[Reason], *, told: str
) -> ElementTree.Element:
    test = ElementTree.SubElement(suite, "testcase", classname=_xml(f"lora-export.{group}"), name=_xml(name), time="0")
    if reasons:
        # A difference weighs more than a doubt, and a test has room for one of them.
        worst = next((reason for reason in reasons if reason.outcome is Outcome.DIFFERENT), reasons[0])
        tag = "failure" if worst.outcome is Outcome.DIFFERENT else "error"
        fault = ElementTree.SubElement(test, tag, message=_xml(str(worst)), type=worst.outcome)
        fault.text = _xml("\n".join(map(str, reasons)))
    ElementTree.SubElement(test, "system-out").text = _xml(told)
    return test


def _input_test(suite: ElementTree.Element, there: Sensitivity, peer: str) -> None:
    folded = there.reference_changed and not there.candidate_changed
    text = f"perturbing {there.input} changes {peer} and not the candidate: it was folded away"
    reasons = [Reason(Outcome.DIFFERENT, "inputs", text)] if folded else []
    changed = f"{peer} changed: {there.reference_changed}; the candidate changed: {there.candidate_changed}"
    test = _test(suite, "inputs", there.input, reasons, told=changed)
    if not there.reference_changed:
        test.insert(0, ElementTree.Element("skipped", message=f"{peer} does not heed it either"))


def _xml(text: str) -> str:
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
