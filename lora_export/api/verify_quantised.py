"""What a candidate computes that stayed quantised, as its base is: a merged folder, or a GGUF file.

Its weights decide, and the runs show what quantisation costs:

    exact      The base with its weights as floats, and the adapters attached, in fp32. Nothing is merged.
    off        The same without adapters.
    own        The candidate with its weights as floats, in fp32.
    loaded     The candidate as transformers loads and runs it, with the library of its scheme; or as `runner` does.

‖exact - off‖ is the adapter's effect. ‖own - exact‖ is what the rounding of the merge costs: each number is proven to
be what its record states, so that nothing else is in it. ‖loaded - own‖ is the library's own arithmetic. How much of
own - off is in loaded - off shows whether the library runs the merged weights.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.api.load import load_adapters
from lora_export.api.load_model import resolve_model
from lora_export.api.memory_needs import PROGRAM
from lora_export.api.verify_record import VerifyRequest
from lora_export.api.verify_weights import judge_weights
from lora_export.artifacts.artifact import Artifact
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused, first_line
from lora_export.graph.cache_names import MASK
from lora_export.lora import Adapter
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Plan
from lora_export.runtime.memory import require_memory
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.atomic_output import refuse_lack_of_space
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import Findings, Outcome
from lora_export.weights.gguf.floats import bytes_as_floats, write_as_floats
from lora_export.weights.merge import merge_checkpoint, output_size

if TYPE_CHECKING:
    from lora_export.models.model import Model
    from lora_export.runtime.registered.runner import RegisteredRunner
    from lora_export.runtime.runner import Arrays

MOST_COST = 1.0  # of the rounding, and of the library's arithmetic, relative to the adapter's effect
MOST_OFF = 0.1  # of the adapter's strength, as the library runs it
Runs = Mapping[str, "Arrays"]  # by case


class RunOutputs(NamedTuple):
    """The outputs of each run, by case; `refusal` is why the library did not load the candidate."""

    exact: Runs
    off: Runs
    own: Runs
    loaded: Runs | None
    refusal: str
    padding: Mapping[str, NDArray[np.bool_]]  # case -> positions that are no tokens, [batch, sequence]: not compared
    findings: Findings = Findings()

    @property
    def figures(self) -> dict[str, float]:
        """What costs how much, relative to the adapter's effect, and the strength that the library runs it at."""
        effect = self._distance(self.exact, self.off)
        found = {"of_rounding": self._distance(self.own, self.exact)}
        if self.loaded is not None:
            found["of_library"] = self._distance(self.loaded, self.own)
        found = {what: one / effect if effect else math.inf if one else 0.0 for what, one in found.items()}
        if self.loaded is not None:
            found["strength"] = self._strength(self.loaded)
        return found

    def _strength(self, loaded: Runs) -> float:
        """The factor at which own - off is in loaded - off, by least squares; 1.0 where nothing changes."""
        along = whole = 0.0
        for case, outputs in self.own.items():
            for name in self._compared(outputs, loaded[case], self.off[case]):
                change, seen = (
                    self._tokens(case, each[name]) - self._tokens(case, self.off[case][name])
                    for each in (outputs, loaded[case])
                )
                along, whole = along + float((change * seen).sum()), whole + float(np.square(change).sum())
        return along / whole if whole else 1.0

    def _distance(self, one: Runs, other: Runs) -> float:
        """‖one - other‖ over all outputs that both have."""
        squares = (
            np.square(self._tokens(case, one[case][name]) - self._tokens(case, other[case][name])).sum()
            for case in one
            for name in self._compared(one[case], other[case])
        )
        return math.sqrt(sum(map(float, squares)))

    def _compared(self, first: Arrays, *others: Arrays) -> list[str]:
        """The names of the floats that all have."""
        names = [name for name, value in first.items() if str(value.dtype) in FLOATS]
        return [name for name in names if all(name in other for other in others)]

    def _tokens(self, case: str, values: NDArray[Any]) -> NDArray[np.float64]:
        wide, skipped = values.astype(np.float64), self.padding.get(case)
        return wide[~skipped] if skipped is not None and wide.shape[:2] == skipped.shape else wide


def judge_quantised(candidate: Artifact, request: VerifyRequest) -> Audit:
    """The verdict on the weights; and where they are right, what quantisation costs, as notes and in `about`.

    It is undecided where the rounding costs more than the adapters change, or where the library runs the adapters at
    another strength. Raises as `judge_weights`.
    """
    audit = judge_weights(candidate, request)
    if audit.outcome is not Outcome.SAME:
        return audit
    loaded = load_adapters(request.adapters)
    with tempfile.TemporaryDirectory() as folder:
        outputs = _run(candidate, request, loaded, Path(folder))
    figures = outputs.figures
    sentences = [
        f"as stored, the outputs are {figures['of_rounding']:.3g} of the adapter's effect away from those of the exact "
        "merge"
    ]
    audit = audit.with_files(outputs.findings)
    if outputs.loaded is not None:
        sentences.append(
            f"as {request.runner or 'transformers'} runs it, they are {figures['of_library']:.3g} of it away from "
            f"those of its own weights as floats, and have {figures['strength']:.3g} of the merged change"
        )
    elif candidate.kind is ArtifactKind.GGUF:  # it is made for llama.cpp: another reader of it is no part of the proof
        sentences.append(f"what transformers makes of the file is not compared: {outputs.refusal}")
    else:
        audit = audit.with_files(Findings(not_judged=(f"what transformers computes: {outputs.refusal}",)))
    doubts = _doubts(figures)
    return replace(
        audit,
        outcome=Outcome.UNDECIDED if doubts else audit.outcome,
        figures=(*sentences, *doubts),
        about={**audit.about, "model": str(request.checkpoint.path), "quantisation_error": figures},
    )


def _doubts(figures: Mapping[str, float]) -> list[str]:
    """Why the outputs do not show that the adapters are merged."""
    if not all(map(math.isfinite, figures.values())):
        return ["not all of the outputs are finite"]
    doubts = []
    if max(figures["of_rounding"], figures.get("of_library", 0.0)) > MOST_COST:
        doubts.append("that is more than the adapters change: no output shows that they are merged")
    if abs(figures.get("strength", 1.0) - 1) > MOST_OFF:
        doubts.append("so the adapters are run at another strength, or not at all")
    return doubts


def _run(candidate: Artifact, request: VerifyRequest, adapters: Sequence[Adapter], folder: Path) -> RunOutputs:
    """Run one model after the other on the same seeded inputs."""
    from lora_export.api.adapted_model import adapted_model
    from lora_export.runtime.registered.runner import RegisteredRunner
    from lora_export.runtime.torch_runners import ModuleRunner
    from lora_export.verification.inputs.model_inputs import case_inputs
    from lora_export.verification.references.attached_module import attach_adapters

    base, own_inputs = request.checkpoint, request.inputs
    source = _float_model(base, base, folder / "base", adapters, inputs=own_inputs)
    adapted = adapted_model(source, adapters, request.weights, request, request.on_message)
    runner = ModuleRunner(adapted.model.module)
    with contextlib.ExitStack() as until_the_end:
        theirs = None
        if request.runner is not None:
            theirs = RegisteredRunner(request.runner, candidate, timeout=request.seconds)
            until_the_end.enter_context(contextlib.closing(theirs))
        model = adapted.model.taking(theirs.axes) if theirs is not None and theirs.axes else adapted.model
        seed = request.input_seed or 0
        cases = case_inputs(model, theirs or runner, seed=seed, user_inputs=own_inputs, adapters=adapted.adapters)
        off = {name: runner.run(arrays) for name, arrays in cases.items()}
        attach_adapters(adapted.model.module, adapted.adapters, adapted.strengths)
        exact = {name: runner.run(arrays) for name, arrays in cases.items()}
        own_runner = ModuleRunner(_float_model(candidate, base, folder / "candidate", inputs=own_inputs).module)
        own = {name: own_runner.run(arrays) for name, arrays in cases.items()}
        padding = {name: arrays[MASK] == 0 for name, arrays in cases.items() if MASK in arrays}
        outputs = RunOutputs(exact, off, own, None, "", padding)
        if theirs is not None:
            return _with_runner(outputs, theirs, cases)
        return _with_transformers(outputs, candidate, type(own_runner.module).__name__, cases, folder)


def _with_transformers(
    outputs: RunOutputs, candidate: Artifact, class_name: str, cases: Runs, folder: Path
) -> RunOutputs:
    """With what transformers computes; or with why it does not."""
    import torch

    from lora_export.runtime.torch_runners import ModuleRunner

    try:
        library = ModuleRunner(_by_transformers(candidate, class_name, folder))
        with torch.no_grad():  # some libraries unpack their weights in the first run
            library.module(**{name: torch.from_numpy(value) for name, value in next(iter(cases.values())).items()})
        return outputs._replace(loaded={name: library.run(arrays) for name, arrays in cases.items()})
    except (ImportError, RuntimeError, ValueError, InputRefused, EnvironmentLacking) as error:
        why = first_line(error)
        return outputs._replace(refusal=why.removesuffix(" Nothing was started."))


def _with_runner(outputs: RunOutputs, runner: RegisteredRunner, cases: Runs) -> RunOutputs:
    """With what a runner computes, by the names of PyTorch's outputs. Raises RuntimeRefused for what is no output."""
    from lora_export.verification.compare_outputs import aligned

    loaded, lacking = {}, dict[str, None]()
    for case, arrays in cases.items():
        own = outputs.own[case]
        loaded[case] = found = aligned(runner.run(arrays), own, names_known=runner.names_known)
        lacking |= dict.fromkeys(name for name in own if name not in found)
        given = [name for name in own if name in found]
        if not given or any(_form(found[name]) != _form(own[name]) for name in given):
            returned, wanted = (", ".join(map(_described, each.items())) for each in (found, own))
            raise RuntimeRefused(f"the runner {runner.name} returns {returned or 'nothing'}, and the model {wanted}")
    not_given = [*(f"{name}, which the runner leaves out" for name in lacking)]
    not_given += [f"the candidate gives no {what}" for what in runner.cannot_give]
    return outputs._replace(loaded=loaded, findings=Findings(tuple(runner.notes), tuple(not_given)))


def _form(values: NDArray[Any]) -> tuple[tuple[int, ...], bool]:
    return values.shape, str(values.dtype) in FLOATS


def _described(output: tuple[str, NDArray[Any]]) -> str:
    name, values = output
    return f"{name} {list(values.shape)} {values.dtype}"


def _float_model(
    quantised: Artifact, base: Artifact, output: Path, adapters: Sequence[Adapter] = (), **options: Any
) -> Model:
    """The model with its weights as floats. Raises InputRefused where transformers cannot load it."""
    folder = _as_floats(quantised, base, output)
    try:
        return resolve_model(folder, adapters, streamed=True, **options)
    except InputRefused as error:
        if quantised.kind is not ArtifactKind.GGUF:
            raise
        raise InputRefused(
            f"{quantised.path}: transformers cannot load a model with these weights by the config in the file. Put the "
            f"config.json of the model beside it, or judge the weights alone: {named('base', 'BASE.gguf')}"
        ) from error


def _as_floats(quantised: Artifact, base: Artifact, output: Path) -> Path:
    """A quantised folder or file as the folder of a float model, bit for bit the weights that its library makes.

    A GGUF file has the config of its base.
    """
    output.mkdir()
    if quantised.kind is ArtifactKind.GGUF:
        from lora_export.models.gguf_files import save_config

        refuse_lack_of_space(output, bytes_as_floats(quantised.gguf))
        save_config(base.gguf, output, with_tokenizer=False)
        write_as_floats(quantised.gguf, output)
        return output
    checkpoint = quantised.dequantised
    copied = Plan((), (), (), tuple(spec.name for spec in checkpoint.specs))
    refuse_lack_of_space(output, output_size(copied, checkpoint))
    merge_checkpoint(copied, checkpoint, output)
    return output


def _by_transformers(candidate: Artifact, class_name: str, folder: Path) -> Any:
    """The model as transformers loads it. Raises what transformers raises, which names a package that is absent."""
    import transformers

    from lora_export.models.huggingface import quiet
    from lora_export.models.processors import refusing_failures

    load, path = getattr(transformers, class_name).from_pretrained, candidate.path
    if candidate.kind is not ArtifactKind.GGUF:
        return load(path, device_map="cpu", local_files_only=True).eval()
    require_memory(PROGRAM + 2 * bytes_as_floats(candidate.gguf), "reading it by transformers")
    with (
        quiet(transformers),
        contextlib.redirect_stderr(io.StringIO()),  # it has a progress bar of its own
        refusing_failures("transformers does not read this GGUF file"),
    ):
        return load(_alone(path, folder / "alone"), gguf_file=path.name, local_files_only=True).eval()


def _alone(path: Path, folder: Path) -> Path:
    """A folder with a link to the file: beside an adapter, transformers would read the adapter's base too."""
    folder.mkdir()
    try:
        (folder / path.name).symlink_to(path.absolute())
    except OSError:  # Windows allows links to few users
        return path.parent
    return folder
