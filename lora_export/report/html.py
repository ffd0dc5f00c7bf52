"""HTML: one page that explains itself, to be opened from a disk or an artefact. No script, no network.

It is drawn from the JSON document and from nothing else. Names in it come from files that nobody vouches for:
everything is escaped, and the page forbids itself to load or to run anything.
"""

from __future__ import annotations

import importlib
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.errors import EnvironmentLacking, one_line
from lora_export.report import drawing
from lora_export.verification.parity import CONTROLS

Document = Mapping[str, Any]

MARKS = {"same": "✓", "different": "✕", "undecided": "?"}
GATES = {
    "error": "error in the mean",
    "tail": "worst element",
    "bulk": "most elements",
    "loss": "cost of rounding",
    "effect": "beside the effect",
    "exact": "values that differ",
    "tolerance": "tolerance",
}
STRAYS = 20  # nodes off the asked provider that are listed
ROWS = 400  # layers that the table lists
MOST = 5000  # tensors that are listed by name
FATES = {
    "kept": "kept as the base has them",
    "changed": "changed by adapters",
    "replaced": "brought by adapters, whole or in rows",
    "none": "known to nobody",
}
OF_WEIGHTS = (
    ("effect", "effect", "‖ΔW‖ / ‖W‖, the adapters' change"),
    ("error", "error", "how far the weight lies from W + s·BA"),
)


def require_jinja2() -> Any:
    """The package. Raises EnvironmentLacking where it is missing."""
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise EnvironmentLacking(f"an HTML report needs jinja2 ({error}): pip install 'lora-export[report]'") from error


def page(told: Document) -> str:
    """A verdict's document (`document`), or an audit's, as a page of HTML that needs nothing beside itself."""
    jinja2 = require_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_export", "report"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "times": _times,
        "percent": _percent,
        "inline": _inline,
        "command_line": shlex.join,
    }
    name, figures = ("weights.html.j2", _of_weights(told)) if "weights" in told else ("page.html.j2", _of_outputs(told))
    rendered: str = environment.get_template(name).render(
        told=told,
        about=told["about"],
        mark=MARKS[told["outcome"]],
        rows=ROWS,
        adapters=_adapters(told["about"]),
        files=_files(told["about"]),
        facts=_facts(told["about"]),
        **figures,
    )
    return rendered


def _of_outputs(told: Document) -> dict[str, Any]:
    """What a page on a verdict shows beside what every page does."""
    diagnosis = told.get("diagnosis")
    return {
        "reasons": _reasons(told["reasons"]),
        "tiles": _tiles(told),
        "outputs": _outputs(told),
        "controls": _controls(told),
        "placement": told["placement"],
        "strays": STRAYS,
        "diagnosis": diagnosis,
        "layers": drawing.layers(diagnosis["layers"], diagnosis["first"]) if diagnosis else [],
    }


def _of_weights(told: Document) -> dict[str, Any]:
    """What a page on a checkpoint's weights shows beside what every page does."""
    weights = told["weights"]
    wrong = sorted((there for there in weights if there["outcome"] != "same"), key=lambda there: there["outcome"])
    changed = [there for there in weights if there["fate"] == "changed" and there["relative_change"] is not None]
    first = next((there["name"] for there in changed if there["outcome"] != "same"), None)
    measured = [
        {
            "name": there["name"],
            "effect": there["relative_change"],
            "error": _product(there, "relative_change", "noise"),
        }
        for there in changed
    ]
    return {
        "tiles": _tiles_of_weights(weights, changed),
        "wrong": wrong,
        "changed": [_with_bar(there) for there in sorted(changed, key=lambda there: there["outcome"] == "same")],
        "drawings": drawing.layers(measured, first, OF_WEIGHTS),
        "controls": _controls_of_weights(changed),
        "fates": _fates(weights),
        "most": MOST,
    }


def _product(there: Document, one: str, other: str) -> float | None:
    return None if there[one] is None or there[other] is None else there[one] * there[other]


def _with_bar(weight: Document) -> dict[str, Any]:
    used = math.inf if weight["error"] is None else weight["error"]  # JSON has no infinity
    return {**weight, "used": used, "width": round(100.0 * min(1.0, max(0.02, used)), 1)}


def _tiles_of_weights(weights: Sequence[Document], changed: Sequence[Document]) -> list[tuple[str, str]]:
    right = sum(there["outcome"] == "same" for there in weights)
    tiles = [(f"{right:,} of {len(weights):,}", "tensors are what they should be")]
    if changed:
        used = max(_with_bar(there)["used"] for there in changed)
        tiles.append((_percent(used) if used < 10 else _times(used), "of what is allowed was used, at most"))
        tiles.append((_percent(min(there["retention"] or 0.0 for there in changed)), "of a change arrived, at least"))
        tiles.append((_percent(max(there["relative_change"] for there in changed)), "of a weight was changed, at most"))
    put = [told for there in changed for told in there["controls"].values()]
    if put:
        tiles.append((f"{sum(put)} of {len(put)}", "wrong sums were told from the candidate"))
    return tiles


def _controls_of_weights(changed: Sequence[Document]) -> list[dict[str, Any]]:
    """For each wrong sum from how many weights it was told, and from which it was not."""
    put: dict[str, list[tuple[Document, bool]]] = {}
    for there in changed:
        for what, told in there["controls"].items():
            put.setdefault(what, []).append((there, told))

    def missed(weights: Sequence[tuple[Document, bool]], *, is_that_sum: bool) -> list[str]:
        return [
            there["name"] for there, told in weights if not told and (there["outcome"] == "different") == is_that_sum
        ]

    return [
        {
            "what": what,
            "detected": sum(told for _, told in weights),
            "put": len(weights),
            "fits": missed(weights, is_that_sum=True),
            "powerless": missed(weights, is_that_sum=False),
        }
        for what, weights in put.items()
    ]


def _fates(weights: Sequence[Document]) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys(there["fate"] for there in weights):
        mine = [there for there in weights if there["fate"] == name]
        outcomes = [there["outcome"] for there in mine]
        found.append(
            {
                "name": FATES[name],
                "all": len(mine),
                "right": outcomes.count("same"),
                "elements": sum(there["elements"] for there in mine),
                "outcome": "different" if "different" in outcomes else "undecided",
            }
        )
    return found


def _shown(value: Any) -> Any:
    """What the page shows of a value: control characters, and half characters that UTF-8 cannot hold, as escapes."""
    return one_line(value) if type(value) is str else value


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _times(factor: float) -> str:
    return f"× {factor:.3g}" if factor < 1000 else f"× {float(f'{factor:.3g}'):,.0f}"


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:.2g} %" if share < 0.99 else f"{100 * share:.0f} %"


def _inline(value: Any) -> str:
    """A fact in one line, whatever it is made of."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_inline(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return (
            " x ".join(map(_inline, value))
            if all(isinstance(item, int) for item in value)
            else ", ".join(map(_inline, value))
        )
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _reasons(reasons: Sequence[Document]) -> list[dict[str, Any]]:
    """One for each gate of each output, however many cases failed it; a remedy once for all that have the same."""
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for reason in reasons:
        key = reason["outcome"], reason["gate"], reason["output"], "" if reason["output"] else reason["text"]
        grouped.setdefault(key, {**reason, "cases": 0})["cases"] += 1
    result = list(grouped.values())
    for reason, after in itertools.pairwise(result):
        if reason["output"] == after["output"] and reason["remedy"] == after["remedy"]:
            reason["remedy"] = ""
    return result


def _measured(told: Document) -> list[Document]:
    return [there for there in told["comparisons"] if there["figures"]]


def _tiles(told: Document) -> list[tuple[str, str]]:
    """The handful of numbers that one looks for first."""
    measured = [there["figures"] for there in _measured(told)]
    outputs = {there["output"] for there in told["comparisons"]}
    cases = {there["case"] for there in told["comparisons"]}
    tiles = [(f"{len(outputs)} × {len(cases)}", "outputs × cases compared")]
    if shares := [f["relative_to_effect"] for f in measured if f["relative_to_effect"] is not None]:
        tiles.append((_percent(max(shares)), "of what the adapter does is error, at most"))
    if ratios := [f["ratio"] for f in measured if f["ratio"] is not None]:
        tiles.append((_times(max(ratios)), "PyTorch's own error, at most"))
    if agreements := [f["top1"] for f in measured if f["top1"] is not None]:
        tiles.append((_percent(min(agreements)), "top-1 agreement, at least"))
    if placement := told["placement"]:
        on = placement["compute_nodes"] - len(placement["off_provider"])
        tiles.append((f"{on} of {placement['compute_nodes']}", f"compute nodes on {placement['requested_provider']}"))
    return tiles


def _outputs(told: Document) -> list[dict[str, Any]]:
    """For each output its cases and its plot, in the model's order."""
    result = []
    for name in dict.fromkeys(there["output"] for there in told["comparisons"]):
        cases = [there for there in told["comparisons"] if there["output"] == name]
        figures = [there["figures"] for there in cases if there["figures"]]
        limits = [gate["allowed"] for f in figures for gate in f["gates"] if gate["name"] == "error"]
        series = [
            ("effect", "what the adapter does", [f["effects"] for f in figures if f["effects"]]),
            ("error", "the candidate's error", [f["errors"] for f in figures]),
            ("own", "PyTorch's own error", [f["deployed_errors"] for f in figures]),
        ]
        result.append(
            {
                "name": name,
                "dtype": figures[0]["dtype"] if figures else None,
                "cases": [{**there, "gates": _gates(there["figures"])} for there in cases],
                "logits": any(f["top1"] is not None for f in figures),
                "loss": any(f["merge_loss"] is not None for f in figures),
                "exact": sum(f["errors"]["zeros"] for f in figures),
                "elements": sum(f["errors"]["zeros"] + sum(f["errors"]["counts"]) for f in figures),
                "drawings": drawing.histogram(series, min(limits, default=None)),
            }
        )
    return result


def _gates(figures: Document | None) -> list[dict[str, Any]]:
    """How much of what each gate allows was used, as a bar that is full at the limit."""
    gates = figures["gates"] if figures else []
    bars = []
    for gate in gates:
        used = gate["value"] / gate["allowed"] if gate["allowed"] else None
        width = 100.0 * min(1.0, max(0.02, used)) if used is not None else 0.0 if gate["passed"] else 100.0
        bars.append({**gate, "title": GATES.get(gate["name"], gate["name"]), "used": used, "width": round(width, 1)})
    return bars


def _controls(told: Document) -> list[dict[str, Any]]:
    """For each control where it had to tell the candidate from a model that is wrong on purpose, and whether it did."""
    put: dict[str, list[dict[str, Any]]] = {}
    for there in _measured(told):
        for control in there["figures"]["controls"]:
            put.setdefault(control["name"], []).append({**control, "output": there["output"], "case": there["case"]})
    return [
        {
            "name": name,
            "what": CONTROLS.get(name, name),
            "detected": sum(control["detected"] for control in controls),
            "put": len(controls),
            "powerless": [control for control in controls if control["required"] and not control["detected"]],
        }
        for name, controls in put.items()
    ]


def _files(about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what it is, where, SHA-256) of everything that was read."""
    rows = []
    if isinstance(candidate := about.get("candidate"), Mapping):
        rows += [("candidate", name, digest) for name, digest in candidate.get("sha256", {}).items()]
    if isinstance(model := about.get("model"), Mapping):
        rows.append(("model's weights", str(model.get("source", "")), str(model.get("sha256", ""))))
    for adapter in _adapters(about):
        weight = adapter.get("weight", 1)
        what = "adapter" if weight == 1 else f"adapter, × {weight:g}"
        rows.append((what, str(adapter.get("name", "")), str(adapter.get("sha256", ""))))
    return rows


def _adapters(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    there = about.get("adapters", [])
    return [adapter for adapter in there if isinstance(adapter, Mapping)] if isinstance(there, list) else []


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything else that is known about the run."""
    elsewhere = ("candidate", "model", "adapters", "command", "inputs", "created")
    return [(name, _inline(value)) for name, value in about.items() if name not in elsewhere]
