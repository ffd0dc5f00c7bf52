"""The flow that every proof follows: the same seeded inputs through referee, PyTorch and candidate.

The referee attaches the adapters as branches and never merges them, so that it shares no
arithmetic with what it judges.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import kept, layers, parity, plan, runtime, standin
from lora_export.decoding import CacheRunner, with_cache
from lora_export.diagnosis import Diagnosis
from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused
from lora_export.evidence import Proof as Proof
from lora_export.evidence import before_first_token, bits, differ, distances, from_first_token
from lora_export.evidence import bits_that_differ as bits_that_differ
from lora_export.evidence import prove_mixed as prove_mixed
from lora_export.examples import read_arrays
from lora_export.exported.program import Program
from lora_export.exported.specimens import Limits
from lora_export.lora import Adapter
from lora_export.model import Model, Sizes
from lora_export.plan import Plan
from lora_export.provenance import described
from lora_export.runtime import Arrays, ModuleRunner, OnnxRunner, Placement, Referee, Runner
from lora_export.trace import Suspect, diagnose

MIXED = "mixed batches"
LOUDER = 1.1  # the control's factor on every scale
# What ends a diagnosis without one: ours, and what PyTorch and NumPy raise where somebody's model is not as others.
CANNOT_FOLLOW = (LoraExportError, RuntimeError, ValueError, MemoryError)
PERTURBATIONS = 5  # draws before an input counts as one that cannot be varied

Note = Callable[[str], None]


def adapted(model: Model, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> nn.Module:
    """A copy of the model's module with the adapters attached; raises MatchError where they do not fit it."""
    return _with_adapters(copy.deepcopy(model.module), adapters, strengths)


def _with_adapters(module: nn.Module, adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> nn.Module:
    if strengths and not adapters:
        raise InputRefused("there are strengths and no adapters that they could belong to")
    if adapters:
        layers.attach(module, plan.make(adapters, layers.specs(module), strengths=strengths))
    return module.eval()


def _copied(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of which each parameter and buffer is what `change` makes of the original's: no more memory than that."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        made = change(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(module, memo)


def _shared(module: nn.Module) -> nn.Module:
    """A copy that holds the very same parameters and buffers: they go where those of the original go."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


@contextlib.contextmanager
def _widened(module: nn.Module) -> Iterator[None]:
    """Have the module's fp32 tensors in fp64, where they lie, while active: never do both take memory.

    All who share them see it. Each fp32 number is an fp64 number too, so that nothing is lost on the way back.
    """
    narrow = [tensor for tensor in _tensors(module) if tensor.dtype is torch.float32]

    def turn(dtype: torch.dtype) -> None:
        made: dict[Any, torch.Tensor] = {}  # one that has several names keeps them
        for tensor in narrow:
            place = tensor.data_ptr(), tensor.shape, tensor.stride()
            if place not in made or not tensor.numel():
                made[place] = tensor.detach().to(dtype)
            tensor.data = made[place]

    try:
        turn(torch.float64)
        yield
    finally:
        turn(torch.float32)


class _LateReferee(Referee):
    """A referee whose module is made when it is first asked: what it said may have been kept."""

    def __init__(self, make: Callable[[], nn.Module], stayed: set[str]):
        self.make, self.stayed = make, stayed

    @functools.cached_property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self.make()


def prove(
    candidate: Runner,
    model: Model,
    adapters: Sequence[Adapter],
    *,
    strengths: Sequence[float] | None = None,
    seed: int = 0,
    user_inputs: Path | None = None,
    device: str = "cpu",
    atol: float | None = None,
    rtol: float | None = None,
    cache: Path | None = None,
    trace: bool = False,
    origin: Path | None = None,
    step: Note = lambda _: None,
    say: Note = lambda _: None,
) -> Proof:
    """Judge a candidate against the model with its adapters attached (numerics: the verdict).

    Runs referee, deployed model, base, louder referee and candidate on three sets of seeded inputs
    of different shapes, and on `user_inputs` (.npz) too. `device` is where PyTorch runs as deployed.
    `cache` is a folder that keeps what the referee said; `say` hears where that could not be used.
    `origin` is the quantised graph into whose weights the adapters were merged to make an ONNX candidate.
    A candidate that is different is followed module by module to where that begins; with `trace`, any is.
    Raises EnvironmentLacking when the asked provider did not do the work, and RuntimeRefused when
    the candidate cannot be run at all.
    """
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is not None:
        placement.insist()
    changes = plan.make(adapters, layers.specs(model.module), strengths=strengths) if adapters else None
    inputs = case_inputs(model, candidate, seed=seed, user_inputs=user_inputs, adapters=adapters)
    held = _held(candidate, model, changes, origin, inputs)
    judged = standin.standing_in(model, held)
    module = _with_adapters(_shared(judged.module), adapters, strengths)
    rounded, chosen = _rounded_weights(candidate, module, held) if adapters else ({}, {})
    has_pairs = any(adapter.pairs for adapter in adapters)
    asked = _asked(candidate, model, inputs, seed, step)
    if len(asked.refusals) == len(inputs):
        raise RuntimeRefused(asked.refusals[0])
    stayed: set[str] = set()
    with contextlib.ExitStack() as stack:
        # fp32 and fp64 by turns: the model, in the wider of them, is all that is held beside the candidate.
        sides = _Sides(module, rounded, chosen, stack, stayed, has_pairs=has_pairs)
        deployed = ModuleRunner(_narrowed(_deployed(sides, held, device), candidate, model), device)
        step("PyTorch")
        looked_up = _RowsLookedUp(deployed.module, model, adapters)
        own = {name: deployed.run(arrays) for name, arrays in inputs.items()}
        doubts, notes = looked_up.doubts, looked_up.notes  # before other inputs are tried
        sensitivity = list(_sensitivity(asked, deployed))
        dtypes = {name: kind for name, kind in rounded.items() if isinstance(kind, str)}
        question = None
        if cache is not None and len(dtypes) == len(rounded):
            question = kept.question(judged, adapters, strengths, inputs, dtypes, deployed.module)
        answers = kept.Answers(cache, question, stayed, say)
        said: dict[str, dict[str, Arrays]] = {}
        for role in sides.roles if adapters else ("referee",):
            step(f"the {role}")
            side = sides.of(role)
            said[role] = {name: answers.of(name, role, side, arrays) for name, arrays in inputs.items()}
        answers.keep()
    cases = []
    for name, arrays in inputs.items():
        answer, reference = asked.answers.get(name, {}), said["referee"][name]
        wrong: dict[str, Any] = {role: said[role][name] for role in said if role != "referee"}
        case = parity.Case(
            name=name,
            inputs_summary=", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in arrays.items()),
            referee=reference,
            deployed=own[name],
            candidate=_aligned(answer, reference, candidate, deployed),
            **wrong,
        )
        cases.append(from_first_token(case, arrays))
    again = [] if asked.again is None else list(_asked_again(asked.again, cases[0], inputs[cases[0].name]))
    padded = any(before_first_token(arrays).any() for arrays in inputs.values())
    verdict = parity.judge(
        [*cases, *again],
        dtype=_name(_computes_in(candidate)),
        perturbed=sensitivity,
        atol=atol,
        rtol=rtol,
        notes=[
            *asked.refusals,
            *_about_referee(stayed),
            *model.notes,
            *_fixed(candidate, model),
            *_about_cache(candidate),
            *_never_varied(model, sensitivity, asked.refusals),
            *(f"asked again, the candidate gives other bits: {case.name}" for case in again),
            *notes,
            *(["what stands before a row's first token was not judged: it attends to nothing"] if padded else []),
            *standin.told(held),
        ],
        doubts=doubts,
        faults=standin.faults(held),
    )
    if all(there.figures for there in verdict.comparisons):
        step("as shipped")
        verdict = replace(verdict, notes=(*verdict.notes, *_as_shipped(candidate, deployed, cases, inputs)))
    about = {
        **runtime.environment(),
        "model": {"source": model.source, "sha256": model.fingerprint()},
        "adapters": described(adapters, strengths or (1.0,) * len(adapters)),
        "seed": seed,
        "tolerance": None if atol is None and rtol is None else {"atol": atol or 0.0, "rtol": rtol or 0.0},
        "inputs": {name: {key: value.shape for key, value in arrays.items()} for name, arrays in inputs.items()},
    }
    diagnosis = None
    answered = any(case.candidate for case in cases)  # with some output, whether it is the model's or not
    if answered and (trace or verdict.outcome is parity.Outcome.DIFFERENT):
        step("looking for where it differs")
        case = _most_telling(cases, verdict, inputs)
        attached = Referee(_copied(module, _double), stayed)
        referee = Referee(_settled(attached.module, rounded, chosen), stayed) if rounded else attached
        everybody = candidate, referee, attached, deployed
        suspect = Suspect(*everybody, judged.module, changes, inputs[case.name], case, keep_whole=has_pairs)
        diagnosis, note = _diagnosed(suspect, every=trace)
        verdict = replace(verdict, notes=(*verdict.notes, *note))
    return Proof(verdict, placement, about, inputs, tuple(cases), diagnosis=diagnosis)


def prove_rows(
    candidate: OnnxRunner,
    model: Model,
    adapters: Sequence[Adapter],
    *,
    strengths: Sequence[float] | None = None,
    step: Note = lambda _: None,
    **how: Any,
) -> Proof:
    """Judge a graph whose rows choose their adapter: the base, each adapter alone, and all of them in one batch.

    `adapters` are those of the graph, in the order of their ids; `how` is as in `prove`. Raises InputRefused
    where the graph says that it holds others, or another number of them.
    """
    names = candidate.adapters_by_row
    if names is not None and len(names) != len(adapters):
        raise InputRefused(
            f"{candidate.path} holds {len(names)} adapters ({', '.join(names)}) and {len(adapters)} were given: give "
            "them in that order, or prove one by --adapter-id"
        )
    roles = ["the base", *(adapter.name for adapter in adapters)]
    alone = []
    for number, role in enumerate(roles):
        runner = with_cache(candidate.with_rows([number]))
        mine: Sequence[Adapter] = adapters[number - 1 : number] if number else ()
        own = strengths[number - 1 : number] if strengths and number else None
        alone.append(prove(runner, model, mine, strengths=own, step=functools.partial(_told_of, role, step), **how))
    ids = [*range(1, len(roles)), 0]
    step("mixed batches")
    mixed = prove_mixed(with_cache(candidate.with_rows(ids)), alone, ids)
    verdicts = dict(zip(roles, (proof.verdict for proof in alone), strict=True))
    verdict = parity.together(verdicts | {MIXED: mixed.verdict})
    about = {**alone[0].about, "adapters": [told for proof in alone for told in proof.about["adapters"]]}
    diagnosis = next((proof.diagnosis for proof in alone if proof.diagnosis), None)
    return Proof(verdict, alone[0].placement, about, alone[0].inputs, alone[0].cases, diagnosis=diagnosis)


def _told_of(role: str, step: Note, what: str) -> None:
    step(f"{role}, {what}")


def _most_telling(cases: Sequence[parity.Case], verdict: parity.Verdict, inputs: Mapping[str, Arrays]) -> parity.Case:
    """The smallest of the cases that the candidate answered and that are different; of all, where none of them is."""
    answered = [case for case in cases if case.candidate]
    wrong = {reason.case for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    telling = [case for case in answered if case.name in wrong]
    return min(telling or answered, key=lambda case: sum(value.size for value in inputs[case.name].values()))


def _diagnosed(suspect: Suspect, *, every: bool) -> tuple[Diagnosis | None, list[str]]:
    """What was found, and what a reader must know of it. A verdict stands, whatever becomes of this."""
    watched = [suspect.base, *([suspect.candidate.module] if isinstance(suspect.candidate, ModuleRunner) else [])]
    unseen = [name for module in watched if isinstance(module, Program) for name in module.unseen]
    if unseen:
        return None, [
            f"where it differs was not looked for: {unseen[0]} and {len(unseen) - 1} more weights of a .pt2 are "
            "multiplied by operators that are no layer's"
        ]
    try:
        return diagnose(suspect, every=every), []
    except CANNOT_FOLLOW as error:
        return None, [f"where it differs was looked for in vain: {(str(error) or repr(error)).splitlines()[0]}"]


def _held(
    candidate: Runner, model: Model, changes: Plan | None, origin: Path | None, inputs: Mapping[str, Arrays]
) -> dict[str, standin.StandIn]:
    """The quantised weights of an ONNX candidate."""
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    held = {}
    if isinstance(runner, OnnxRunner):
        executed = functools.partial(_executed, candidate, runner, next(iter(inputs.values())))
        held = standin.stand_ins(runner.path, model, changes, origin, executed)
    if origin is not None and not held:
        raise InputRefused(f"{origin} is given as what was merged into, and the candidate has no quantised weights")
    return held


def _executed(candidate: Runner, graph: OnnxRunner, arrays: Arrays) -> frozenset[tuple[str, str]]:
    """(node, operator) of what onnxruntime makes of a graph."""

    def run(other: OnnxRunner) -> None:
        (replace(candidate, inner=other) if isinstance(candidate, CacheRunner) else other).run(arrays)

    return graph.executed(run)


def _rounded_weights(
    candidate: Runner, module: nn.Module, held: Mapping[str, standin.StandIn]
) -> tuple[dict[str, layers.Stored], Mapping[str, torch.Tensor]]:
    """Which of the module's tensors the candidate stores in less than fp32, how, and what it made of them."""
    if not isinstance(candidate, ModuleRunner):
        sums = {name: there for name, there in held.items() if there.merged is not None}
        return {name: there.nearest for name, there in sums.items()}, {
            name: torch.from_numpy(there.weight) for name, there in sums.items()
        }
    stored = candidate.stored
    low = {name: dtype for name, dtype in stored.items() if dtype in ("bfloat16", "float16")}
    # A checkpoint may lack the model's prefix, or have one that the module lacks.
    rounded: dict[str, layers.Stored] = {
        spec.name: dtype
        for spec in layers.specs(module)
        for name, dtype in low.items()
        if spec.name == name or spec.name.endswith(f".{name}") or name.endswith(f".{spec.name}")
    }
    return rounded, candidate.module.state_dict()


class _Sides:
    """The referee and those that are wrong on purpose, one after the other: none is made before it is asked.

    Where weights are rounded, each has a copy of those that are: beside a base in full precision, rounding alone
    would look like an adapter.
    """

    def __init__(
        self,
        module: nn.Module,
        rounded: Mapping[str, layers.Stored],
        chosen: Mapping[str, torch.Tensor],
        stack: contextlib.ExitStack,
        stayed: set[str],
        *,
        has_pairs: bool,
    ):
        self.source, self.rounded, self.chosen = module, rounded, chosen
        self.stack, self.stayed, self.has_pairs = stack, stayed, has_pairs
        self.roles = ("referee", "base", "louder", *(["attached"] if rounded else []))

    @functools.cached_property
    def wide(self) -> nn.Module:
        """The adapters attached, in fp64."""
        self.stack.enter_context(_widened(self.source))
        return self.source

    def of(self, role: str) -> Callable[[Arrays], Arrays]:
        """Who answers in a role."""
        factor = {"base": 0.0, "louder": LOUDER}.get(role)
        if self.rounded and role != "attached":
            return _LateReferee(functools.partial(self.settled, factor), self.stayed).run
        attached = _LateReferee(lambda: self.wide, self.stayed)
        if factor is None:
            return attached.run
        return functools.partial(_with_strength, attached, factor, self.has_pairs)

    def settled(self, factor: float | None = None) -> nn.Module:
        """With the weights as they should be stored, in fp64."""
        if factor is None:
            return _settled(self.wide, self.rounded, self.chosen)
        return _settled(self.wide, self.rounded, {}, factor=factor, turn_whole=not self.has_pairs)


def _settled(
    module: nn.Module, rounded: Mapping[str, layers.Stored], chosen: Mapping[str, torch.Tensor], **how: Any
) -> nn.Module:
    made = _shared(module)
    layers.settle(made, rounded, chosen, **how)
    return made


def _deployed(sides: _Sides, held: Mapping[str, standin.StandIn], device: str) -> nn.Module:
    """PyTorch as it would be deployed: where weights are rounded, of those that the referee rounded itself.

    The loss that a merge into a low precision means is so told apart from faults of the merge.
    """
    if sides.rounded:
        module = _copied(sides.settled(), _single).to(device)
    else:
        module = _shared(sides.source) if device == "cpu" else copy.deepcopy(sides.source).to(device)
    standin.round_activations(module, held)
    return module


def _computes_in(candidate: Runner) -> torch.dtype:
    """The dtype in which a candidate was made to compute, where PyTorch runs it; float32 for everybody else."""
    halves = (torch.float16, torch.bfloat16)
    return candidate.dtype if isinstance(candidate, ModuleRunner) and candidate.dtype in halves else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _narrowed(module: nn.Module, candidate: Runner, model: Model) -> nn.Module:
    """The module, or beside a candidate that computes in a half a copy that does too.

    Each of the copy's tensors is in the dtype in which the candidate's file keeps it.

    Raises InputRefused for a program of another dtype: its graph names the one that it was exported in, and would
    compute neither in that nor in this.
    """
    dtype = _computes_in(candidate)
    if dtype is torch.float32:
        return module
    if isinstance(module, Program) and module.file_dtype is not dtype:
        own = "no float" if module.file_dtype is None else _name(module.file_dtype)
        raise InputRefused(
            f"the candidate computes in {_name(dtype)} and {model.source} was exported in {own}, from which PyTorch's "
            f"own error in {_name(dtype)} cannot be told. Give --model as a Hugging Face folder, a factory, or a .pt2 "
            f"that was exported in {_name(dtype)}"
        )
    made = _copied(module, torch.clone)
    told = candidate.stored if isinstance(candidate, ModuleRunner) else {}
    stored = {name: kind for name, kind in told.items() if kind in parity.DEPLOYED}
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in (*parameters.items(), *made.named_buffers(remove_duplicate=False)):
        if tensor.is_floating_point():
            usual = dtype if name in parameters else torch.float32  # a buffer that no file keeps stays as it is
            tensor.data = tensor.data.to(getattr(torch, stored.get(name, _name(usual))))
    return made


def _with_strength(referee: Referee, factor: float, has_pairs: bool, arrays: Arrays) -> Arrays:
    # A head that came whole stays where pairs can be switched off: the effect to be seen is theirs.
    with layers.strength(referee.module, factor, keep_whole=has_pairs, turn_whole=not has_pairs):
        return referee.run(arrays)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the candidate answered, before anybody else is asked."""

    answers: Mapping[str, Arrays]  # by case
    refusals: Sequence[str]
    varied: Sequence[_Varied] = ()  # nothing of these where a case was refused
    again: Arrays | None = None  # the first case once more, after all others


class _Varied(NamedTuple):
    """One input drawn anew, the others held."""

    input: str
    before: Arrays
    after: Arrays
    changed: bool  # the candidate's answer


def _asked(candidate: Runner, model: Model, inputs: Mapping[str, Arrays], seed: int, step: Note) -> _Asked:
    answers, refusals = {}, []
    for name, arrays in inputs.items():
        step(f"case {name}")
        try:
            answers[name] = candidate.run(arrays)
        except RuntimeRefused as refusal:
            refusals.append(f"the candidate refused case {name}: {refusal}")
    if refusals:
        return _Asked(answers, refusals)
    step("inputs, one by one")
    varied = list(_varied(model, candidate, inputs, seed))
    return _Asked(answers, (), varied, candidate.run(next(iter(inputs.values()))))


def _asked_again(answer: Arrays, case: parity.Case, arrays: Arrays) -> Iterator[parity.Case]:
    """The first case once more, with what came after all others, where that is not the same bit for bit.

    Dropout, an adapter that was let go, or a cache that outlives a call show themselves here.
    """
    if answer.keys() != case.candidate.keys() and len(answer) == len(case.candidate):
        answer = dict(zip(case.candidate, answer.values(), strict=True))  # names that mean nothing
    if answer.keys() != case.candidate.keys() or any(bits(case.candidate[key]) != bits(answer[key]) for key in answer):
        yield from_first_token(replace(case, name=f"{case.name}, asked again", candidate=answer), arrays)


def _as_shipped(
    candidate: Runner, deployed: ModuleRunner, cases: Sequence[parity.Case], inputs: Mapping[str, Arrays]
) -> list[str]:
    """How far off the candidate is where its provider has its own settings; nothing where a proof leaves it those."""
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is None or not placement.options:
        return []
    settings = ", ".join(f"{name}={value}" for name, value in placement.options.items())
    told = f"not judged: with {placement.asked}'s own settings, in place of {settings}, "
    try:
        shipped: Runner = candidate.as_shipped()  # type: ignore[attr-defined]
        answers = [_aligned(shipped.run(inputs[case.name]), dict(case.referee), shipped, deployed) for case in cases]
    except LoraExportError as error:
        return [f"{told}it did not run: {str(error).splitlines()[0]}"]
    itself = [
        from_first_token(replace(case, candidate=answer), inputs[case.name])
        for case, answer in zip(cases, answers, strict=True)
    ]
    judged, found = distances(cases), []
    for output, (off, share) in distances(itself).items():
        of_effect = "" if share is None else f", {parity.percent(share)} of what the adapter does"
        found.append(f"{output} is off by {off:.3g} (as judged by {judged[output][0]:.3g}){of_effect}")
    return [told + "; ".join(found)]


class _RowsLookedUp:
    """Which of the rows that adapters bring to tables of embeddings were looked up while PyTorch ran."""

    def __init__(self, module: nn.Module, model: Model, adapters: Sequence[Adapter]):
        self.wanted: dict[str, set[int]] = {}
        self.seen: dict[str, set[int]] = {}
        if not any(adapter.rows for adapter in adapters):
            return
        for step in plan.make(adapters, layers.specs(model.module)).steps:
            owner = module.get_submodule(step.weight.rpartition(".")[0])
            if step.rows is not None and isinstance(owner, nn.Embedding):
                self.wanted[step.weight] = set(step.rows.indices.tolist())
                self.seen[step.weight] = set()
                owner.register_forward_pre_hook(functools.partial(self._note, step.weight))

    def _note(self, table: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen[table] |= set(inputs[0].flatten().tolist())

    @property
    def doubts(self) -> list[str]:
        """Tables of whose rows none was looked up: they may hold anything."""
        return [
            f"{table}: none of the {len(rows)} rows that the adapter brings was looked up. Give inputs in which they "
            "are (--inputs)"
            for table, rows in self.wanted.items()
            if not rows & self.seen[table]
        ]

    @property
    def notes(self) -> list[str]:
        return [
            f"{table}: {len(rows & self.seen[table])} of the {len(rows)} rows that the adapter brings were looked up"
            for table, rows in self.wanted.items()
            if 0 < len(rows & self.seen[table]) < len(rows)
        ]


def case_inputs(
    model: Model,
    candidate: Runner,
    *,
    seed: int = 0,
    user_inputs: Path | None = None,
    adapters: Sequence[Adapter] = (),
) -> dict[str, Arrays]:
    """What a proof gives to everybody, by case: three sets of seeded inputs, and the user's own.

    Tokens whose rows the adapters bring stand among a Hugging Face model's seeded ones.
    """
    rows = [index for adapter in adapters for rows in adapter.rows.values() for index in rows.indices.tolist()]
    tokens = np.array(sorted(set(rows)) if model.is_huggingface else [], np.int64)
    return dict(_inputs(model, candidate, seed, user_inputs, tokens))


def _inputs(
    model: Model, candidate: Runner, seed: int, user_inputs: Path | None, tokens: NDArray[np.int64]
) -> Iterator[tuple[str, Arrays]]:
    for number, sizes in enumerate(model.checked_sizes(_fixed_sizes(candidate, model), _limits(candidate, model))):
        label = " x ".join(f"{symbol} {size}" for symbol, size in sizes.items()) or f"draw {number + 1}"
        arrays = _draw(model, candidate, sizes, seed + number + 1)
        yield label, _with_tokens(arrays, tokens) if tokens.size else arrays
    if user_inputs is not None:
        yield user_inputs.name, _read_inputs(user_inputs, model)


def _draw(model: Model, candidate: Runner, sizes: Sizes, seed: int) -> Arrays:
    """Seeded inputs as the model takes them, and the candidate can."""
    arrays = {name: value.numpy() for name, value in model.inputs(sizes, seed=seed).items()}
    if isinstance(candidate, CacheRunner) and not candidate.takes_padding:
        return candidate.without_padding(arrays)
    return arrays


def _with_tokens(arrays: Arrays, tokens: NDArray[np.int64]) -> Arrays:
    """These tokens, from the last on, at every second place: a random one of 50,000 would never be among 200."""
    made = {}
    for name, array in arrays.items():
        made[name] = array.copy()
        if name.endswith("input_ids"):
            places = made[name].reshape(-1)[::2]
            places[:] = np.resize(np.roll(tokens, len(places)), len(places))
    return made


def _read_inputs(path: Path, model: Model) -> Arrays:
    arrays = read_arrays(path)
    if set(arrays) != set(model.input_names):
        raise InputRefused(
            f"{path} holds {', '.join(arrays) or 'nothing'}; the model takes {', '.join(model.input_names)}"
        )
    return {name: arrays[name] for name in model.input_names}


def _fixed_sizes(candidate: Runner, model: Model) -> Sizes:
    """Sizes that the candidate declares constant. The batch is never excused."""
    fixed: Sizes = {}
    for name, axes in model.axes.items():
        declared = candidate.axes.get(name, ())
        for axis, symbol in axes.items():
            size = declared[axis] if axis < len(declared) else None
            if size is not None and symbol != "batch":
                fixed[symbol] = size
    return fixed


def _limits(candidate: Runner, model: Model) -> Limits:
    """Between which sizes a candidate says that it can be run, where it says so. The batch is never excused."""
    limits: Limits = {}
    told = candidate.limits if isinstance(candidate, ModuleRunner) else {}
    for name, axes in model.axes.items():
        for axis, symbol in axes.items():
            if symbol != "batch" and axis < len(told.get(name, ())):
                limits[symbol] = told[name][axis]
    return limits


def _fixed(candidate: Runner, model: Model) -> list[str]:
    fixed = _fixed_sizes(candidate, model)
    notes = [
        f"the candidate was made for one size of {symbol}, {size}: no other was tried" for symbol, size in fixed.items()
    ]
    for symbol, (low, high) in _limits(candidate, model).items():
        if symbol not in fixed and (low or high is not None):
            bounds = f"{low} and more" if high is None else f"{low} to {high}" if low else f"up to {high}"
            notes.append(f"the candidate takes a {symbol} of {bounds}: what lies beyond was not tried")
    return notes


def _about_cache(candidate: Runner) -> list[str]:
    return candidate.notes if isinstance(candidate, CacheRunner) else []


def _about_referee(stayed: Collection[str]) -> list[str]:
    if not stayed:
        return ["the referee ran in fp64 throughout"]
    return [f"the referee ran in fp64, but for: {', '.join(sorted(stayed))}"]


def _aligned(answer: Arrays, reference: Arrays, candidate: Runner, deployed: ModuleRunner) -> Arrays:
    """The candidate's outputs under the reference's names: by order where either side's names mean nothing."""
    if (candidate.names_known and deployed.names_known) or len(answer) != len(reference):
        return answer
    return dict(zip(reference, answer.values(), strict=True))


def _varied(model: Model, candidate: Runner, inputs: Mapping[str, Arrays], seed: int) -> Iterator[_Varied]:
    """For each input: does another draw of it, the others held, change the candidate's answer?"""
    before = list(inputs.values())[min(2, len(inputs) - 1)]
    sizes = {symbol: before[name].shape[axis] for name, axes in model.axes.items() for axis, symbol in axes.items()}
    draws = [_draw(model, candidate, sizes, seed + 1000 + number) for number in range(PERTURBATIONS)]
    answered = candidate.run(before)
    for name in model.input_names:
        fresh = next((draw[name] for draw in draws if not np.array_equal(draw[name], before[name])), None)
        if fresh is None:
            continue  # `_never_varied` tells of it
        after = {**before, name: fresh}
        yield _Varied(name, before, after, differ(answered, candidate.run(after)))


def _sensitivity(asked: _Asked, deployed: ModuleRunner) -> Iterator[parity.Sensitivity]:
    """The same of PyTorch's answer."""
    if not asked.varied:
        return
    expected = deployed.run(asked.varied[0].before)
    for there in asked.varied:
        yield parity.Sensitivity(there.input, differ(expected, deployed.run(there.after)), there.changed)


def _never_varied(model: Model, tried: Sequence[parity.Sensitivity], refusals: Sequence[str]) -> list[str]:
    """Inputs that are the same in every draw, such as a mask of ones in a factory's example."""
    constant = [] if refusals else [name for name in model.input_names if name not in {there.input for there in tried}]
    return [
        f"the input {name} is the same in every draw: whether it matters was not tried. --inputs can"
        for name in constant
    ]
