"""What HTML reports show, computed from the JSON document: of every run, of a verdict, and of a checkpoint's audit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lora_export.report import plots
from lora_export.report.verdict_screen import diagnosis_lines
from lora_export.verification.parity import CONTROLS, percent

Document = Mapping[str, Any]

SHOWN_ELSEWHERE = ("candidate", "model", "adapters", "command", "inputs", "created")


def inline(value: Any) -> str:
    """A fact in one line, of whatever type it is."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inline(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        is_shape = all(isinstance(item, int) for item in value)
        return (" x " if is_shape else ", ").join(map(inline, value))
    return str(value)


def times(factor: float) -> str:
    """`× 1.34`, `× 8,490`."""
    return f"× {factor:.3g}" if factor < 1000 else f"× {float(f'{factor:.3g}'):,.0f}"


def bar_width(used: float) -> float:
    """The width in percent of a bar that is full at the limit, and never invisible."""
    return round(100.0 * min(1.0, max(0.02, used)), 1)


def adapters_of(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adapters of the run; empty where `about` does not hold them."""
    listed = about.get("adapters", [])
    return [adapter for adapter in listed if isinstance(adapter, Mapping)] if isinstance(listed, list) else []


def with_adapters(adapters: Sequence[Mapping[str, Any]]) -> str:
    """`its adapter “english”`, `its 3 adapters`; empty without adapters.

    An adapter that is called `adapter`, as its folder often is, is not called by its name.
    """
    names = [str(adapter.get("name", "")) for adapter in adapters]
    named = [f"“{name}”" for name in names if name not in ("", "adapter")]
    if not names:
        return ""
    if len(names) == 1:
        return " ".join(["its adapter", *named])
    if len(named) < len(names):
        return f"its {len(names)} adapters"
    return f"its adapters {', '.join(named[:-1])} and {named[-1]}"


def candidate_name(about: Mapping[str, Any]) -> str:
    """The candidate's file name; empty where `about` does not hold it."""
    candidate = about.get("candidate", "")
    path = candidate.get("path", "") if isinstance(candidate, Mapping) else candidate
    return PurePath(str(path)).name


def files(about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what it is, name, SHA-256) of everything that was read."""
    rows = []
    if isinstance(candidate := about.get("candidate"), Mapping):
        rows += [("candidate", name, digest) for name, digest in candidate.get("sha256", {}).items()]
    if isinstance(model := about.get("model"), Mapping):
        rows.append(("model's weights", str(model.get("source", "")), str(model.get("sha256", ""))))
    for adapter in adapters_of(about):
        weight = adapter.get("weight", 1)
        what = "adapter" if weight == 1 else f"adapter, × {weight:g}"
        rows.append((what, str(adapter.get("name", "")), str(adapter.get("sha256", ""))))
    return rows


def facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every other fact about the run."""
    return [(name, inline(value)) for name, value in about.items() if name not in SHOWN_ELSEWHERE]


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
        "controls": named_controls(document),
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
        yield (f"{on_provider} of {placement['compute_nodes']}", f"compute nodes on {placement['requested_provider']}")


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


def named_controls(document: Document) -> list[dict[str, Any]]:
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


FATES = {
    "kept": "as in the base",
    "changed": "changed by adapters",
    "replaced": "replaced by adapters, whole or in rows",
    "none": "in neither the base nor the adapters",
}
PLOTTED = (
    ("effect", "effect", "‖ΔW‖ / ‖W‖, the adapters' change"),
    ("error", "error", "the distance of the weight from W + s·BA"),
)
MAX_WEIGHTS = 400  # weights that the table lists
TENSORS = 5000  # that are listed by name


def checkpoint_context(document: Document) -> dict[str, Any]:
    """The variables of `checkpoint.html.j2`, besides those of every page."""
    weights = document["weights"]
    wrong = sorted((weight for weight in weights if weight["outcome"] != "same"), key=lambda weight: weight["outcome"])
    changed = [weight for weight in weights if weight["fate"] == "changed" and weight["relative_change"] is not None]
    first = next((weight["name"] for weight in changed if weight["outcome"] != "same"), None)
    return {
        "tiles": list(_checkpoint_tiles(weights, changed)),
        "wrong": wrong,
        "changed": [_with_bar(weight) for weight in sorted(changed, key=lambda weight: weight["outcome"] == "same")],
        "plots": plots.layers([_plotted(weight) for weight in changed], first, PLOTTED),
        "controls": _checkpoint_controls(changed),
        "fates": list(_fates(weights)),
        "most_rows": MAX_WEIGHTS,
        "most_tensors": TENSORS,
    }


def _plotted(weight: Document) -> dict[str, Any]:
    change, noise = weight["relative_change"], weight["noise"]
    error = None if change is None or noise is None else change * noise
    return {"name": weight["name"], "effect": change, "error": error}


def _with_bar(weight: Document) -> dict[str, Any]:
    used = math.inf if weight["error"] is None else weight["error"]  # JSON has no infinity
    return {**weight, "used": used, "width": bar_width(used)}


def _checkpoint_tiles(weights: Sequence[Document], changed: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """The few numbers that a reader looks for first: (number, meaning)."""
    right = sum(weight["outcome"] == "same" for weight in weights)
    yield f"{right:,} of {len(weights):,}", "tensors are as they should be"
    if changed:
        used = max(_with_bar(weight)["used"] for weight in changed)
        yield percent(used) if used < 10 else times(used), "of the limit was used, at most"
        yield percent(min(weight["retention"] or 0.0 for weight in changed)), "of a change was retained, at least"
        yield percent(max(weight["relative_change"] for weight in changed)), "of a weight was changed, at most"
    results = [detected for weight in changed for detected in weight["controls"].values()]
    if results:
        yield f"{sum(results)} of {len(results)}", "wrong sums were detected"


def _checkpoint_controls(changed: Sequence[Document]) -> list[dict[str, Any]]:
    """For each wrong sum the number of weights in which it was detected, and those in which it was not."""
    by_control: dict[str, list[tuple[Document, bool]]] = {}
    for weight in changed:
        for control, detected in weight["controls"].items():
            by_control.setdefault(control, []).append((weight, detected))
    return [
        {
            "control": control,
            "detected": sum(detected for _, detected in results),
            "compared": len(results),
            "matches": [w["name"] for w, detected in results if not detected and w["outcome"] == "different"],
            "missed": [w["name"] for w, detected in results if not detected and w["outcome"] != "different"],
        }
        for control, results in by_control.items()
    ]


def _fates(weights: Sequence[Document]) -> Iterator[dict[str, Any]]:
    for fate in dict.fromkeys(weight["fate"] for weight in weights):
        listed = [weight for weight in weights if weight["fate"] == fate]
        outcomes = [weight["outcome"] for weight in listed]
        yield {
            "name": FATES.get(fate, fate),
            "all": len(listed),
            "right": outcomes.count("same"),
            "elements": sum(weight["elements"] for weight in listed),
            "outcome": "different" if "different" in outcomes else "undecided",
        }
