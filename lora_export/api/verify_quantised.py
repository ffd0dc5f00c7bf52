"""A merged folder that stayed quantised, beside PyTorch: its weights decide, and the runs show what quantisation costs.

    exact      The base with its weights as floats, and the adapters attached, in fp32. Nothing is merged.
    off        The same without adapters.
    own        The candidate with its weights as floats, in fp32.
    loaded     The candidate as transformers loads and runs it, with the library of its scheme.

‖exact - off‖ is the adapter's effect. ‖own - exact‖ is what the rounding of the merge costs: each number is proven to
be the nearest, so that nothing else is in it. ‖loaded - own‖ is the library's own arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_export.api.load import load_adapters, resolve_model
from lora_export.api.verify_record import VerifyRequest
from lora_export.api.verify_weights import judge_weights
from lora_export.artifacts.artifact import Artifact
from lora_export.lora import Adapter
from lora_export.plan import FLOATS, Plan
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import Outcome
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.merge import merge_checkpoint

if TYPE_CHECKING:
    from lora_export.runtime.runner import Arrays

MOST_COST = 1.0  # of the rounding, relative to the adapter's effect
Runs = Mapping[str, "Arrays"]  # by case


class RunOutputs(NamedTuple):
    """The outputs of each run, by case; `refusal` is why the library did not load the candidate."""

    exact: Runs
    off: Runs
    own: Runs
    loaded: Runs | None
    refusal: str


def judge_quantised(candidate: Artifact, request: VerifyRequest) -> Audit:
    """The verdict on the weights; and where they are right, what quantisation costs, as notes and in `about`.

    It is undecided where the rounding costs more than the adapters change. Raises as `judge_weights`.
    """
    base = request.checkpoint.path
    audit = judge_weights(candidate, request)
    if audit.outcome is not Outcome.SAME:
        return audit
    loaded = load_adapters(request.adapters)
    with tempfile.TemporaryDirectory() as folder:
        outputs = _run(candidate.path, base, loaded, request, Path(folder))
    effect = _distance(outputs.exact, outputs.off)
    cost = _relative(_distance(outputs.own, outputs.exact), effect)
    sentences = [f"quantised, the outputs are {cost:.3g} of the adapter's effect away from those of the exact merge"]
    figures = {"of_rounding": cost}
    if outputs.loaded is None:
        audit = replace(audit, not_judged=(*audit.not_judged, f"what transformers computes: {outputs.refusal}"))
    else:
        figures["of_library"] = _relative(_distance(outputs.loaded, outputs.own), effect)
        sentences.append(
            f"as transformers runs it, they are {figures['of_library']:.3g} of it away from those of its own weights "
            "as floats"
        )
    too_much = [what for what, one in figures.items() if not one <= MOST_COST]
    if too_much:
        sentences.append("that is more than the adapters change: no output shows that they are merged")
    return replace(
        audit,
        outcome=Outcome.UNDECIDED if too_much else audit.outcome,
        figures=tuple(sentences),
        about={**audit.about, "model": str(base), "quantisation_error": figures},
    )


def _run(candidate: Path, base: Path, adapters: Sequence[Adapter], request: VerifyRequest, folder: Path) -> RunOutputs:
    """Run one model after the other on the same seeded inputs."""
    import torch

    from lora_export.api.adapted_model import adapted_model
    from lora_export.runtime.torch_runners import ModuleRunner
    from lora_export.verification.inputs.model_inputs import inputs_of_proof
    from lora_export.verification.references.attached_module import attach_adapters

    source = resolve_model(_as_floats(base, folder / "base"), adapters, inputs=request.inputs)
    adapted = adapted_model(source, adapters, request.weights, request, request.on_message)
    runner = ModuleRunner(adapted.model.module)
    seed, own_inputs = request.input_seed or 0, request.inputs
    cases = inputs_of_proof(adapted.model, runner, seed=seed, user_inputs=own_inputs, adapters=adapted.adapters).cases
    off = {name: runner.run(arrays) for name, arrays in cases.items()}
    attach_adapters(adapted.model.module, adapted.adapters, adapted.strengths)
    exact = {name: runner.run(arrays) for name, arrays in cases.items()}
    own_runner = ModuleRunner(resolve_model(_as_floats(candidate, folder / "candidate"), inputs=own_inputs).module)
    own = {name: own_runner.run(arrays) for name, arrays in cases.items()}
    try:
        library = ModuleRunner(_by_transformers(candidate, type(own_runner.module).__name__))
        with torch.no_grad():  # some libraries unpack their weights in the first run
            library.module(**{name: torch.from_numpy(value) for name, value in next(iter(cases.values())).items()})
        loaded = {name: library.run(arrays) for name, arrays in cases.items()}
    except (ImportError, RuntimeError, ValueError) as error:
        return RunOutputs(exact, off, own, None, str(error).strip().splitlines()[0])
    return RunOutputs(exact, off, own, loaded, "")


def _as_floats(folder: Path, output: Path) -> Path:
    """A quantised folder as that of a float model, bit for bit the weights that its library makes."""
    output.mkdir()
    checkpoint = open_checkpoint(folder, dequantise=True)
    merge_checkpoint(Plan((), (), (), tuple(spec.name for spec in checkpoint.specs)), checkpoint, output)
    return output


def _by_transformers(folder: Path, class_name: str) -> Any:
    """The model as transformers loads it. Raises what transformers raises, which names a package that is absent."""
    import transformers

    found = getattr(transformers, class_name).from_pretrained(folder, device_map="cpu", local_files_only=True)
    return found.eval()


def _pairs(one: Runs, other: Runs) -> Iterator[tuple[Any, Any]]:
    for case, outputs in one.items():
        for name, value in outputs.items():
            if name in other[case] and str(np.asarray(value).dtype) in FLOATS:
                yield np.asarray(value, np.float64), np.asarray(other[case][name], np.float64)


def _distance(one: Runs, other: Runs) -> float:
    """‖one - other‖ over all outputs that both have."""
    return float(np.sqrt(sum(float(np.square(first - second).sum()) for first, second in _pairs(one, other))))


def _relative(distance: float, effect: float) -> float:
    return distance / effect if effect else float("inf") if distance else 0.0
