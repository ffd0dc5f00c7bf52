"""What the HTML report of a verdict shows, computed from its JSON document."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lora_export.report import plots
from lora_export.report.html_facts import Document, bar_width, times
from lora_export.report.sentences import diagnosis_lines
from lora_export.verification.parity import CONTROLS, percent

GATES = {
    "error": "rmse",
    "tail": "worst element",
    "bulk": "median error",
    "loss": "cost of rounding",
    "effect": "relative to effect",
    "exact": "values that differ",
    "tolerance": "tolerance",
}
REASONS = 12  # that are listed
OFF_PROVIDER = 20  # nodes on another provider that are listed
MAX_LAYERS = 400  # that the table lists


def verdict_context(document: Document) -> dict[str, Any]:
    """The variables of `verdict.html.j2`, besides those of every page."""
    diagnosis = document["diagnosis"]
    return {
        "explanation": [
            *document["recorded"],
            *(diagnosis_lines(diagnosis["first"], diagnosis["why"]) if diagnosis else ()),
        ],
        "reasons": _reasons(document["reasons"]),
        "most_reasons": REASONS,
        "tiles": list(_tiles(document)),
        "outputs": [_output(document, name) for name in _outputs(document)],
        "controls": _controls(document),
        "placement": document["placement"],
        "most_off_provider": OFF_PROVIDER,
        "diagnosis": diagnosis,
        "layers": plots.layers(diagnosis["layers"], diagnosis["first"]) if diagnosis else [],
        "most_layers": MAX_LAYERS,
    }


def _reasons(reasons: Sequence[Document]) -> list[dict[str, Any]]:
    """One reason for each gate of each output, with its number of cases. Equal remedies are shown once."""
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for reason in reasons:
        key = reason["outcome"], reason["gate"], reason["output"] or reason["text"]
        grouped.setdefault(key, {**reason, "cases": 0})["cases"] += 1
    result = list(grouped.values())
    for reason, following in itertools.pairwise(result):
        if reason["output"] == following["output"] and reason["remedy"] == following["remedy"]:
            reason["remedy"] = ""
    return result


def _measured(document: Document) -> list[Document]:
    return [comparison for comparison in document["comparisons"] if comparison["figures"]]


def _outputs(document: Document) -> list[str]:
    return list(dict.fromkeys(comparison["output"] for comparison in document["comparisons"]))


def _tiles(document: Document) -> Iterator[tuple[str, str]]:
    """The few numbers that a reader looks for first: (number, meaning)."""
    measured = [comparison["figures"] for comparison in _measured(document)]
    cases = {comparison["case"] for comparison in document["comparisons"]}
    yield f"{len(_outputs(document))} × {len(cases)}", "outputs × cases compared"
    if errors := [f["relative_to_effect"] for f in measured if f["relative_to_effect"] is not None]:
        yield percent(max(errors)), "largest error, relative to the adapter's effect"
    if ratios := [f["ratio"] for f in measured if f["ratio"] is not None]:
        yield times(max(ratios)), f"{document['peer']}'s own error, at most"
    if agreements := [f["top1"] for f in measured if f["top1"] is not None]:
        yield percent(min(agreements)), "top-1 agreement, at least"
    if placement := document["placement"]:
        on_provider = placement["compute_nodes"] - len(placement["off_provider"])
        yield (
            f"{on_provider} of {placement['compute_nodes']}",
            f"compute nodes on {placement['requested_provider']}",
        )


def _output(document: Document, name: str) -> dict[str, Any]:
    """An output with its cases and its plot."""
    cases = [comparison for comparison in document["comparisons"] if comparison["output"] == name]
    figures = [comparison["figures"] for comparison in cases if comparison["figures"]]
    limits = [gate["allowed"] for f in figures for gate in f["gates"] if gate["name"] == "error"]
    series = [
        ("effect", "the adapter's effect", [f["effects"] for f in figures if f["effects"]]),
        ("error", "the candidate's error", [f["errors"] for f in figures]),
        ("own", f"{document['peer']}'s own error", [f["deployed_errors"] for f in figures]),
    ]
    return {
        "name": name,
        "dtype": figures[0]["dtype"] if figures else None,
        "cases": [{**comparison, "gates": _gates(comparison["figures"])} for comparison in cases],
        "has_effect": any(f["effect"] is not None for f in figures),
        "has_classes": any(f["kl"] is not None for f in figures),
        "has_loss": any(f["merge_loss"] is not None for f in figures),
        "exact": sum(f["errors"]["zeros"] for f in figures),
        "elements": sum(f["errors"]["zeros"] + sum(f["errors"]["counts"]) for f in figures),
        "plots": plots.magnitudes(series, min(limits, default=None)),
    }


def _gates(figures: Document | None) -> list[dict[str, Any]]:
    """The used part of each gate's limit, as a bar that is full at the limit."""
    bars = []
    for gate in figures["gates"] if figures else []:
        used = gate["value"] / gate["allowed"] if gate["allowed"] else None
        width = bar_width(used) if used is not None else 0.0 if gate["passed"] else 100.0
        bars.append({**gate, "title": GATES.get(gate["name"], gate["name"]), "used": used, "width": width})
    return bars


def _controls(document: Document) -> list[dict[str, Any]]:
    """For each control the number of comparisons in which it was detected, and those in which it was missed."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for comparison in _measured(document):
        for control in comparison["figures"]["controls"]:
            where = {"output": comparison["output"], "case": comparison["case"]}
            by_name.setdefault(control["name"], []).append({**control, **where})
    return [
        {
            "title": CONTROLS[name].title if name in CONTROLS else name,
            "model": CONTROLS[name].model if name in CONTROLS else "",
            "detected": sum(control["detected"] for control in controls),
            "compared": len(controls),
            "missed": [control for control in controls if control["required"] and not control["detected"]],
        }
        for name, controls in by_name.items()
    ]
