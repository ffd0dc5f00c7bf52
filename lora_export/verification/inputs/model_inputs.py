"""The inputs of a proof against a PyTorch model: several shapes, within what the candidate takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS, MASK, POSITION_IDS
from lora_export.lora import Adapter
from lora_export.models.cached_decoder import takes_positions
from lora_export.models.model import CHECKED_SIZES, Limits, Model, Sizes, in_dtype_of
from lora_export.models.refusals import failure_on
from lora_export.options.spelling import named
from lora_export.runtime.endpoint.tensors import TensorRunner
from lora_export.runtime.kv_cache import CacheRunner, graph_of
from lora_export.runtime.onnx_runner import token_positions
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.three_graphs import EncoderDecoderRunner, ImageTextRunner
from lora_export.runtime.torch_runners import ModuleRunner, to_numpy
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage.npz import read_arrays
from lora_export.verification.compare_outputs import before_first_token
from lora_export.verification.inputs import NOT_VARIED, REDRAWS, Inputs
from lora_export.verification.inputs.invocations import with_invocations
from lora_export.verification.parity import Findings

HALVES = frozenset({"float16", "bfloat16"})


def inputs_of_proof(
    model: Model, candidate: Runner, made: Mapping[str, Arrays], seed: int, user_inputs: Path | None
) -> Inputs:
    """The cases that `case_inputs` made, and one of them with each input drawn again."""
    cases = {name: as_declared(candidate, arrays) for name, arrays in made.items()}
    seeded = list(cases.values())[min(2, len(cases) - 1)]
    # Every value that a Hugging Face model takes can be drawn, and one text of the user's may have no padding.
    varied = cases[user_inputs.name] if user_inputs and not model.is_huggingface else seeded
    varied = varied if varied.keys() == seeded.keys() else seeded  # the user's are texts without images
    perturbed = _perturbed(model, candidate, varied, seed)
    constant = [name for name in model.input_names if name not in perturbed]
    # One that never varies has a single value there.
    single, unknown = (constant, []) if model.is_huggingface else ([], constant)
    first_tokens = {name: before_first_token(arrays) for name, arrays in cases.items() if model.is_huggingface}
    return Inputs(
        cases,
        varied,
        perturbed,
        unjudged={name: positions for name, positions in first_tokens.items() if positions is not None},
        findings=Findings(
            notes=tuple(map(NOT_VARIED.format, single)),
            doubts=tuple(
                f"the input {name} is the same in every draw, so that it is not known whether the candidate reads it. "
                f"Give it other values with {named('inputs', 'FILE.npz')}, or in the example inputs of the factory"
                for name in unknown
            ),
        ),
    )


def _perturbed(model: Model, candidate: Runner, before: Arrays, seed: int) -> dict[str, Arrays]:
    """Input -> the arrays with another draw of it; none for an input that is the same in every draw."""
    sizes = {symbol: before[name].shape[axis] for name, own in model.axes.items() for axis, symbol in own.items()}
    draws = [as_declared(candidate, draw(model, candidate, sizes, seed + 1000 + number)) for number in range(REDRAWS)]
    perturbed = {}
    for name in before:
        fresh = next((drawn[name] for drawn in draws if not np.array_equal(drawn[name], before[name])), None)
        if fresh is not None:
            perturbed[name] = {**before, name: fresh}
    return perturbed


def case_inputs(
    model: Model,
    candidate: Runner,
    *,
    seed: int = 0,
    user_inputs: Path | None = None,
    adapters: Sequence[Adapter] = (),
    further_seeds: Sequence[int] = (),
) -> dict[str, Arrays]:
    """The inputs of every run of a proof, by case: seeded sets, one more for each further seed, and the user's own.

    The seeded token ids of a Hugging Face model include those whose rows the adapters bring. Raises InputRefused
    where the arrays of `user_inputs` are not the model's inputs.
    """
    rows = [index for adapter in adapters for rows in adapter.token_rows.values() for index in rows.indices.tolist()]
    tokens = np.array(sorted(set(rows)) if model.is_huggingface else [], np.int64)
    invocations = list(dict.fromkeys(adapter.invocation_tokens for adapter in adapters if adapter.invocation_tokens))
    room = [{"sequence": 2 * max(map(len, invocations)) + 8}] if invocations else []
    sized = dataclasses.replace(model, further=(*model.further, *room))
    cases: dict[str, Arrays] = {}
    fixed = _fixed_sizes(candidate, model)
    for number, sizes in enumerate(sized.checked_sizes(fixed, _limits(candidate, model))):
        label = " x ".join(f"{symbol} {size}" for symbol, size in sizes.items()) or f"draw {number + 1}"
        if label in cases:  # every size is fixed
            label += f", draw {number + 1}"
        if sizes.get("sequence") == 1 and not _takes_one_token(model, sizes):
            continue
        arrays = draw(model, candidate, sizes, seed + number + 1)
        cases[label] = _with_tokens(arrays, tokens, model.placeholders) if tokens.size else arrays
    cases |= {f"seed {further}": further_draw(model, candidate, further) for further in further_seeds}
    cases = {name: with_invocations(arrays, invocations) for name, arrays in cases.items()}
    if user_inputs is not None:
        cases[user_inputs.name] = _with_positions(_read_inputs(user_inputs, model), model, candidate)
    return cases


def _takes_one_token(model: Model, sizes: Sizes) -> bool:
    """Whether the model runs on such texts. Canine joins four tokens to one."""
    return not failure_on(model.module, in_dtype_of(model.module, model.inputs(sizes, seed=0)))


def further_draw(model: Model, candidate: Runner, seed: int) -> Arrays:
    """Seeded inputs of the largest usual sizes."""
    usual = model.checked_sizes(_fixed_sizes(candidate, model), _limits(candidate, model))[: len(CHECKED_SIZES)]
    return draw(model, candidate, usual[-1], seed)


def draw(model: Model, candidate: Runner, sizes: Sizes, seed: int) -> Arrays:
    """Seeded inputs of the model; without padding where the candidate takes none, and as a server's types hold them."""
    arrays = {name: to_numpy(value) for name, value in model.inputs(sizes, seed=seed).items()}
    if isinstance(candidate, TensorRunner):
        arrays = candidate.rounded(arrays)
    if isinstance(candidate, CacheRunner) and not candidate.takes_padding:
        arrays = candidate.without_padding(arrays)
    if isinstance(candidate, EncoderDecoderRunner):
        module: Any = model.module
        return candidate.without_padding(arrays, getattr(module.config, "pad_token_id", None))
    return _with_positions(arrays, model, candidate)


def _with_positions(arrays: Arrays, model: Model, candidate: Runner) -> Arrays:
    """The inputs with the positions of the tokens, where the candidate is a graph that takes them, and the model does.

    PyTorch would count padding, too. Programs that generate count the ones of the mask: only these positions show
    whether a graph reads them.
    """
    graph = candidate.decoder if isinstance(candidate, ImageTextRunner) else graph_of(candidate)
    is_taken = graph is not None and len(graph.axes.get(POSITION_IDS, ())) == 2 and model.is_huggingface
    if not is_taken or IDS not in arrays or POSITION_IDS in arrays or not takes_positions(model.module):
        return arrays
    return {**arrays, POSITION_IDS: token_positions(arrays.get(MASK, np.ones_like(arrays[IDS])))}


def _with_tokens(arrays: Arrays, tokens: NDArray[np.int64], placeholders: Sequence[int] = ()) -> Arrays:
    """The arrays with these tokens, the last one first, at every second position of `input_ids`.

    At random, one token of 50,000 would never be among 200. The placeholders of images stay where they are.
    """
    changed = {}
    for name, array in arrays.items():
        changed[name] = array.copy()
        if name.endswith("input_ids"):
            every_second = changed[name].reshape(-1)[::2]
            wanted = np.resize(np.roll(tokens, len(every_second)), len(every_second))
            is_fixed = np.isin(every_second, placeholders) | np.isin(wanted, placeholders)
            every_second[:] = np.where(is_fixed, every_second, wanted)
    return changed


def _read_inputs(path: Path, model: Model) -> Arrays:
    arrays = read_arrays(path)
    model = model.taking(arrays)
    if set(arrays) != set(model.input_names):
        raise InputRefused(
            f"{path} contains {', '.join(arrays) or 'nothing'}; the model takes {', '.join(model.input_names)}"
        )
    by_row = (name for name, axes in model.axes.items() if axes.get(0) == "batch")
    if empty := [name for name in by_row if arrays[name].shape[:1] == (0,)]:
        # onnxruntime 1.29 and 1.30 end the whole process where a TopK gets no rows (SIGFPE).
        raise InputRefused(f"{path}: {', '.join(empty)} has no rows, so that nothing would be compared")
    dtypes = {name: to_numpy(value).dtype for name, value in model.example_inputs().items()}
    halves = {name for name, dtype in dtypes.items() if dtype.name in HALVES}
    halves = {name for name in halves if arrays[name].dtype.kind == "f"}
    return {name: arrays[name].astype(dtypes[name]) if name in halves else arrays[name] for name in model.input_names}


def in_stated_batch(model: Model, stated: Mapping[str, int]) -> Model:
    """The model whose generated inputs have the size of the batch that the user stated, where there is one."""
    size = stated.get("batch")
    return model if size is None else dataclasses.replace(model, limits={**model.limits, "batch": (size, size)})


def _declared_sizes(candidate: Runner, model: Model) -> Sizes:
    """Sizes that the candidate declares constant."""
    found: Sizes = {}
    for name, axes in model.axes.items():
        declared = dict(enumerate(candidate.axes.get(name, ())))
        found |= {symbol: size for axis, symbol in axes.items() if (size := declared.get(axis)) is not None}
    return found


def _fixed_sizes(candidate: Runner, model: Model) -> Sizes:
    """Sizes that the candidate declares constant. The batch is excused only where it was stated (`in_stated_batch`)."""
    declared = _declared_sizes(candidate, model).items()
    return {symbol: size for symbol, size in declared if symbol != "batch" or model.limits.get(symbol) == (size, size)}


def _limits(candidate: Runner, model: Model) -> Limits:
    """The smallest and largest sizes that the candidate declares.

    The batch is excused where the memory of the largest inputs is planned.
    """
    limits: Limits = {}
    declared = candidate.limits if isinstance(candidate, ModuleRunner | RegisteredRunner) else {}
    excuses_batch = isinstance(candidate, RegisteredRunner) and candidate.plans_memory
    for name, axes in model.axes.items():
        for axis, symbol in axes.items():
            if (symbol != "batch" or excuses_batch) and axis < len(declared.get(name, ())):
                limits[symbol] = declared[name][axis]
    traced = candidate if isinstance(candidate, ScriptRunner | SeveralGraphs) else graph_of(candidate)
    limits |= {symbol: (0, size) for symbol, size in (traced.longest if traced else {}).items()}
    return limits


def notes_on_sizes(candidate: Runner, model: Model) -> list[str]:
    """What a verdict notes about sizes that the candidate does not take."""
    fixed = _fixed_sizes(candidate, model)
    notes = [
        f"the candidate was made for one size of {symbol}, {size}: no other was tried" for symbol, size in fixed.items()
    ]
    for symbol, (low, high) in _limits(candidate, model).items():
        if symbol not in fixed and (low or high is not None):
            bounds = f"{low} and more" if high is None else f"{low} to {high}" if low else f"up to {high}"
            notes.append(f"the candidate takes {symbol} sizes of {bounds}: no other was tried")
    return notes


def doubts_on_sizes(candidate: Runner, model: Model, stated: Mapping[str, int] | None) -> list[str]:
    """Why a candidate that takes one size of an axis cannot be judged, unless this size was stated.

    At one size, parts of a model may have no effect: at a sequence of 1, queries and keys have none. None for `stated`:
    whatever size the candidate has was chosen by the user.
    Raises InputRefused for a stated axis that the model does not have, or of which the candidate takes any size.
    """
    fixed = _declared_sizes(candidate, model)
    symbols = {symbol for axes in model.axes.values() for symbol in axes.values()}
    for symbol in stated or {}:
        if symbol not in symbols:
            raise InputRefused(
                f"{named('fixed', symbol)}: the model has no axis of this name. It has "
                f"{', '.join(sorted(symbols)) or 'none'}"
            )
        if symbol not in fixed and any(candidate.axes.values()):
            raise InputRefused(f"{named('fixed', symbol)}: the candidate takes any size of it. Leave the option out")
    return [
        f"the candidate takes one size of {symbol}, {size}, and the model takes any. What it computes at others is not "
        f"known. State this size where it is intended: {named('fixed', f'{symbol}={size}')}"
        for symbol, size in fixed.items()
        if stated is not None and stated.get(symbol) != size and (symbol != "batch" or symbol in stated)
    ]


# --- a graph in half precision ---


def as_declared(candidate: Runner, inputs: Arrays) -> Arrays:
    """The inputs; those in half precision in fp32 where the graph declares that. No number changes."""
    graph = graph_of(candidate)
    if graph is None:
        return inputs
    wide = {value.name for value in graph.session.get_inputs() if value.type == "tensor(float)"}
    is_narrow = {name for name, array in inputs.items() if name in wide and array.dtype.name in HALVES}
    return {name: array.astype(np.float32) if name in is_narrow else array for name, array in inputs.items()}
