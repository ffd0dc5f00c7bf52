"""What the HTML report of a checkpoint's audit shows, computed from its JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lora_export.report import plots
from lora_export.report.html_facts import Document, bar_width, times
from lora_export.verification.parity import percent

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
        "tiles": list(_tiles(weights, changed)),
        "wrong": wrong,
        "changed": [_with_bar(weight) for weight in sorted(changed, key=lambda weight: weight["outcome"] == "same")],
        "plots": plots.layers([_plotted(weight) for weight in changed], first, PLOTTED),
        "controls": _controls(changed),
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


def _tiles(weights: Sequence[Document], changed: Sequence[Document]) -> Iterator[tuple[str, str]]:
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


def _controls(changed: Sequence[Document]) -> list[dict[str, Any]]:
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
