"""What quantisation changed: dequantised weights against the float checkpoint that they were made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lora_export import sums
from lora_export.errors import InputRefused, first_of, listed
from lora_export.lora import EVERY_ROW
from lora_export.names.loaded_names import LoadedNames
from lora_export.plan import FLOATS, Plan
from lora_export.plan.stored_region import StoredRegion
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge_report import QuantisationLoss, StepResult
from lora_export.weights.quantised.stored_parts import QuantisedTensor

UNRELATED = 1.0  # ‖Q - W‖ / ‖W‖ of a weight of zeros; that of two unrelated weights is about 1.4
SHOWN_NAMES = 3


def refuse_other_shapes(base: Checkpoint, floats: Checkpoint) -> None:
    """Raise InputRefused where `floats` lacks a quantised weight of the base, by its name, shape and dtype.

    The two may have names of different generations: see `plan.spelling`.
    """
    entries = _float_entries(base, floats)
    problems = []
    for name, tensor in base.quantised.items():
        found = entries.get(name)
        if found is None:
            problems.append(f"{name}: no such weight")
        elif found[1].shape != tensor.shape or str(found[1].dtype) not in FLOATS:
            problems.append(
                f"{name}: is {list(found[1].shape)} {found[1].dtype}, and the base's is {list(tensor.shape)}"
            )
    if problems:
        raise InputRefused(f"{floats.path} is not the float checkpoint of {base.path}:", listed(problems))


def bytes_to_measure(base: Checkpoint) -> int:
    """How many bytes of the base `measure_quantisation` reports to `progress`."""
    packed = {tensor.packed for tensor in base.quantised.values()}
    return sum(shard.entries[name].nbytes for shard in base.shards.values() for name in packed & shard.entries.keys())


def measure_quantisation(
    base: Checkpoint,
    floats: Checkpoint,
    plan: Plan,
    results: Sequence[StepResult],
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[QuantisationLoss, ...]:
    """The error of each quantised weight, beside the change that the plan adds to it, in the order of the base.

    `floats` has passed `refuse_other_shapes`. `results` are those of the merge. Reads each quantised weight of both
    checkpoints once, in pieces. `progress` receives the bytes of the base that were measured since the last call.
    Raises InputRefused for values that are not finite.
    """
    packed, entries = _entries(base), _float_entries(base, floats)
    relative = {result.weight: result.relative_change for result in results}

    def measure(tensor: QuantisedTensor) -> QuantisationLoss:
        source, numbers = packed[tensor.packed]
        steps = [step for step in plan.steps_on(tensor.name) if step.terms]
        regions = [step.spec.region for step in steps]
        error, norm, *of_regions = _squares(tensor, source, *entries[tensor.name], regions)
        changes = (
            relative[step.weight if step.spec.region else plan.output_name(tensor.name)] ** 2 * square
            if step.depends_on_weight  # as with DoRA: what the merge measured
            else float(sums.squared_row_norms(step).astype(np.float64).sum())
            for step, square in zip(steps, of_regions, strict=True)
        )
        if not math.isfinite(error):
            raise InputRefused(f"{tensor.name}: {floats.path} or {base.path} has values that are not finite")
        progress(numbers.nbytes)
        return QuantisationLoss(
            weight=tensor.name,
            scheme=tensor.scheme,
            norm=math.sqrt(norm),
            error=math.sqrt(error),
            relative_error=math.sqrt(error / norm) if norm else math.inf if error else 0.0,
            change=math.sqrt(sum(changes)) if steps else None,
        )

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        return tuple(pool.map(measure, base.quantised.values()))


def notes_on_quantisation(base: Checkpoint, floats: Checkpoint, losses: Sequence[QuantisationLoss]) -> Iterator[str]:
    """What makes the figures doubtful: another checkpoint, or scales that were moved between layers."""
    unrelated = [loss for loss in losses if loss.relative_error > UNRELATED]
    if unrelated:
        worst = max(unrelated, key=lambda loss: loss.relative_error)
        yield (
            f"{len(unrelated)} of {len(losses)} quantised weights differ from those of {floats.path} by more than "
            f"their norm ({worst.weight}: {worst.relative_error:.0%}). Is this the checkpoint that the base was made "
            "from?"
        )
    if moved := _other_vectors(base, floats):
        yield (
            f"norms or biases, which are not quantised, differ too: {first_of(moved, SHOWN_NAMES)}. AWQ and "
            "SmoothQuant scale layers so, and the errors contain it"
        )


def _entries(checkpoint: Checkpoint) -> dict[str, tuple[TensorFile, Entry]]:
    return {name: (shard, entry) for shard in checkpoint.shards.values() for name, entry in shard.entries.items()}


def _float_entries(base: Checkpoint, floats: Checkpoint) -> dict[str, tuple[TensorFile, Entry]]:
    """The tensors of the float checkpoint, also under the names that they have in the base."""
    entries, rules = _entries(floats), base.rules or floats.rules
    if rules is None or not rules.own:
        return entries
    float_names = LoadedNames(rules, list(entries))
    for tensor in LoadedNames(rules, [spec.name for spec in base.specs]).values():
        other = float_names.get(tensor.name)
        if tensor.conversion is None and other is not None and other.conversion is None:
            entries.setdefault(tensor.stored, entries[other.stored])
    return entries


def _squares(
    tensor: QuantisedTensor,
    source: TensorFile,
    shard: TensorFile,
    entry: Entry,
    regions: Sequence[StoredRegion | None],
) -> list[float]:
    """‖Q - W‖², ‖W‖² and ‖Q‖² of each region, in fp64; Q is the dequantised weight, W the float one."""
    rows, columns = tensor.row_shape
    packed, row_bytes = source.entries[tensor.packed], columns * entry.dtype.itemsize
    at_once = max(tensor.rows_at_once, block_copy.BLOCK // max(1, row_bytes))
    totals = np.zeros(2 + len(regions))
    places = [(tensor.rows_in(r.shape, r.rows), r.columns) if r else (slice(0, rows), EVERY_ROW) for r in regions]
    with source.path.open("rb") as quantised, shard.path.open("rb") as floats, np.errstate(all="ignore"):
        for first in range(0, rows, at_once):
            own = slice(first, min(first + at_once, rows))
            values = tensor.read(source.path, quantised.fileno(), packed.start, packed.nbytes, own).astype(np.float64)
            buffer = np.empty((own.stop - own.start) * row_bytes, np.uint8)
            block_copy.read(shard.path, floats.fileno(), buffer, entry.start + own.start * row_bytes)
            weight = buffer.view(entry.dtype).astype(np.float64)
            for number, (part, own_columns) in enumerate(places, 2):
                here = slice(max(part.start - first, 0), max(part.stop - first, 0))
                totals[number] += np.square(values[here, own_columns]).sum()
            flat = values.reshape(-1)
            flat -= weight
            totals[:2] += flat @ flat, weight @ weight
    return [float(total) for total in totals]


def _other_vectors(base: Checkpoint, floats: Checkpoint) -> list[str]:
    """The vectors (norms, biases) of the base that the float checkpoint has with other numbers."""
    entries = _float_entries(base, floats)
    differing = []
    for file in base.shards:
        for name, entry in base.entries(file).items():
            other = entries.get(name)
            if len(entry.shape) != 1 or name in base.quantised or other is None or other[1].shape != entry.shape:
                continue
            own, theirs = base.shards[file].read(name), other[0].read(name)
            narrow = min(own.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
            if str(narrow) in FLOATS and not np.array_equal(own.astype(narrow), theirs.astype(narrow), equal_nan=True):
                differing.append(name)
    return differing
