"""What the figures of an output mean, in words: what is wrong with it, or what could not be told, and the remedy."""

from __future__ import annotations

import math

from lora_export.verification.parity.gates import CONTROLS, LARGEST_SHARE, WRONG_BY
from lora_export.verification.parity.verdict import Figures, Outcome, Reason, count, percent


def complaints(case: str, output: str, f: Figures) -> list[Reason]:
    """What the gates say against the candidate or, only where that is nothing, against the check itself."""
    differences = _differences(f)
    outcome = Outcome.DIFFERENT if differences else Outcome.UNDECIDED
    remedies = {} if differences else _remedies(f)
    return [
        Reason(outcome, gate, text, case, output, remedies.get(gate, ""))
        for gate, text in (differences or _doubts(f)).items()
    ]


def _differences(f: Figures) -> dict[str, str]:
    failed = {gate.name: gate for gate in f.gates if not gate.passed}
    fits = [CONTROLS[control.name] for control in f.controls if not control.detected and control.required]
    suspicion = f". It fits {fits[0]}" if fits else ""
    texts = {}
    if gate := failed.get("error"):
        times = f", which is x {f.ratio:.3g}" if f.ratio is not None else ""
        texts["error"] = (
            f"the error is {f.error:.3g}, allowed is {gate.allowed:.3g}; {f.peer}'s own is {f.deployed_error:.3g}"
            f"{times}{suspicion}"
        )
    if gate := failed.get("tail"):
        texts["tail"] = f"{_at(f)}, allowed is {gate.allowed:.3g}{suspicion}"
    if gate := failed.get("bulk"):
        texts["bulk"] = (
            f"half of it is off by {gate.value:.3g} and more, allowed is {gate.allowed:.3g}: {f.peer}'s own error is "
            f"in a few elements{suspicion}"
        )
    if gate := failed.get("exact"):
        wrong = f"{gate.value:.0f} of {count(math.prod(f.shape), 'value')}"
        texts["exact"] = f"{wrong} are neither the reference's nor {f.peer}'s; {_at(f)}"
    if gate := failed.get("tolerance"):
        texts["tolerance"] = (
            f"outside the tolerance: max(|O-R| - rtol * |R|) is {gate.value:.3g}, atol {gate.allowed:.3g}"
        )
    return texts


def _doubts(f: Figures) -> dict[str, str]:
    texts = {}
    if f.relative_to_effect is not None and any(gate.name == "effect" and not gate.passed for gate in f.gates):
        texts["effect"] = (
            f"the error {f.error:.3g} is {percent(f.relative_to_effect)} of what the adapter does ({f.effect:.3g}); "
            f"over {percent(LARGEST_SHARE)} a merged model cannot be told from an unmerged one"
        )
    if any(gate.name == "loss" and not gate.passed for gate in f.gates):
        cost = "all" if f.merge_loss is None else percent(f.merge_loss)
        texts["loss"] = (
            f"rounding the merged weights costs {cost} of what the adapter does: the file is what such a merge should "
            "be, and whether the adapter is still in it cannot be told"
        )
    for control in f.controls:
        if control.detected or not control.required:
            continue
        gates = "the gates: they are too wide to judge this output, or the adapter does too little to it"
        if control.name == "tolerance":
            gates = f"the tolerance: it is wider than the adapter's effect ({f.effect:.3g})"
        texts[control.name] = (
            f"control `{control.name}`: {CONTROLS[control.name]} (off by {control.error:.3g}; {f.peer}'s own error is "
            f"{f.deployed_error:.3g}) passes {gates}"
        )
    return texts


def _remedies(f: Figures) -> dict[str, str]:
    """For each doubt, by its gate, what would take it away: in numbers, so that nobody has to try them out.

    The adapter that does enough for the most demanding of them does enough for all.
    """
    allowed = next((gate.allowed for gate in f.gates if gate.name == "error"), 0.0)
    remedies = {
        "loss": "weights that are stored finer (a merge with --dtype float32, a graph of more bits), or the adapter "
        "beside them (onnx --lora nodes)"
    }
    times = [f.relative_to_effect / LARGEST_SHARE] if f.relative_to_effect else []
    for control in f.controls:
        if control.name == "tolerance":
            # The worst element lies at least as far off as all do in the mean.
            remedies[control.name] = f"an --atol below {control.error:.2g} with --rtol 0, or the gates alone"
        elif control.name == "values_1.01":
            remedies[control.name] = f"inputs on which {f.peer}'s own error is smaller beside the values (--inputs)"
        elif f.effect and control.required and not control.detected:
            # O's own error and the wrong reference's distance add up as squares do.
            distance = math.sqrt(max(0.0, allowed**2 - f.error**2))
            times.append(distance / (f.effect * WRONG_BY.get(control.name, 1.0)))
    if times:
        enough = 1.05 * max(1.0, *times, 0.0)
        told = f"{enough:.2g}" if enough < 10 else f"{enough:,.0f}"
        more = f"an adapter that does {told} times as much to this output, or inputs on which this one does (--inputs)"
        remedies |= dict.fromkeys(("effect", *WRONG_BY), more)
    return remedies


def _at(f: Figures) -> str:
    worst = f.worst
    return (
        f"at {list(worst.index)} it is {worst.candidate:.9g}, the reference has {worst.reference:.9g}: off by "
        f"{f.max_error:.3g}, {f.peer} by {f.deployed_max_error:.3g} at most"
    )
