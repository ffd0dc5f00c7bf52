"""onnxruntime's adapter files (`.onnx_adapter`), and the values of a graph's adapter inputs.

A graph made with `lora="inputs"` takes A (in, rank) and B (rank, out) of each layer as optional inputs. A graph made
for DoRA also takes a factor for each output. An `.onnx_adapter` is a FlatBuffer of tensors under the names of those
inputs (onnxruntime/lora/adapter_format/adapter_schema.fbs). It also holds two integers that onnxruntime does not
read: here, `model_version` is the base's fingerprint, and `adapter_version` the adapter's. After the FlatBuffer, where
onnxruntime does not read, a file of this package ends with a hash of all bytes before it.

This is an output format: it is written for one graph, so it is not in the table of formats that can be loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, brief, count, first_line, listed
from lora_export.formats.contract import NO_ARRAYS, AdapterArrays, AdapterPlace, Contract, HeadPlace, version_of
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import command, named
from lora_export.plan import Plan
from lora_export.plan.own_heads import head_into_base
from lora_export.storage import hashes, input_files

SUFFIX = ".onnx_adapter"
LIMIT = (1 << 31) - (1 << 20)  # bytes; a FlatBuffer ends at 2 GiB, names and padding included
# ONNX's numbers of the types that a weight may have
ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


# --- the values of a graph's adapter inputs -----------------------------------------------------


def _transforms(adapter: Adapter, of: str) -> dict[str, list[str]]:
    """The layers whose change follows from their weight, by its kind; of a graph, which takes scales, without these."""
    found: dict[str, list[str]] = {}
    for module in adapter.beyond_pairs["transforms"]:
        if of != "graph" or adapter.pairs[module].scaling() is None:
            found.setdefault(f"a change by {adapter.pairs[module].kind}", []).append(module)
    return found


def refuse_beyond_low_rank(adapters: Sequence[Adapter], of: str = "graph") -> None:
    """Raise InputRefused for adapters that hold more than low-rank pairs. The message lists what they hold.

    `of` names what takes them: a "graph" or a "program".

    A table that PEFT saves beside its pair is no reason: `refuse_new_tables` compares it with the base's.
    """
    problems = []
    for adapter in adapters:
        whole = [name for name in adapter.replaced if name.removesuffix(".weight") not in adapter.pairs]
        kinds = {"a whole tensor": whole, "a change of a bias": adapter.biases, "a change of a vector": adapter.added}
        kinds |= {"rows of tokens": adapter.token_rows, **_transforms(adapter, of)}
        problems += [f"{adapter.name}, {name}: {kind}" for kind, names in kinds.items() for name in names]
    remedies = [
        f"A graph of {named('lora', 'rows')} takes adapters with heads of their own.",
        f"If all adapters share one head, merge it into the model once ({head_into_base()}), and export with-head with "
        f"{named('ignore_head', True)}.",
    ]
    if problems:
        raise InputRefused(
            f"only low-rank pairs can be swapped while a {of} runs; these cannot:",
            listed(problems),
            f"Merge such an adapter into a {of} of its own ({named('lora', 'merged')}).",
            *(remedies if of == "graph" and any(adapter.replaced for adapter in adapters) else []),
        )


def refuse_new_tables(plan: Plan, of: str = "graph") -> None:
    """Raise InputRefused for whole tensors beside pairs, once those that the base has too are removed; for biases."""
    tables = [
        f"{step.terms[0].adapter}, {step.weight}"
        for step in plan.low_rank
        if step.replace is not None or step.is_vector
    ]
    if tables:
        raise InputRefused(
            f"only low-rank pairs can be swapped while a {of} runs; these tensors would differ from the base's:",
            listed(tables),
            f"Merge such an adapter into a {of} of its own ({named('lora', 'merged')})",
        )


def refuse_dora_without_factor(contract: Contract, plan: Plan) -> None:
    """Raise InputRefused where an adapter has DoRA and the graph has no input for its factor. Lists every weight."""
    places = {place.weight: place for place in contract.places}
    lacking = [
        f"{term.adapter}, {step.weight}"
        for step in plan.low_rank
        for term in step.terms
        if (needed := _input_of_factors(term.pair)) and not getattr(places.get(step.weight), needed, "")
    ]
    if lacking:
        raise InputRefused(
            "the graph has no input for the factors of DoRA or IA3 at these weights:",
            listed(lacking),
            "Make the graph with an adapter that has them, or, for factors of outputs, with "
            f"`{command('onnx', lora='inputs', dora=True)}`",
        )


def _input_of_factors(pair: LoraPair) -> str:
    """The field of a place that a pair needs beside A and B; empty for none."""
    if (scaling := pair.scaling()) is not None and scaling.of_inputs:
        return "scale"
    return "factor" if scaling is not None or pair.magnitude is not None else ""


def refuse_larger_ranks(plan: Plan, max_ranks: Mapping[str, int], of: str = "graph") -> None:
    """Raise InputRefused for ranks larger than that of a weight (0 or no such weight: any fits). Lists all."""
    larger = []
    for step in plan.low_rank:
        ranks: dict[str, int] = {}
        for term in (term for term in step.terms if term.pair.scaling() is None):
            ranks[term.adapter] = ranks.get(term.adapter, 0) + term.pair.rank
        limit = max_ranks.get(step.weight, 0)
        larger += [f"{name}, {step.weight}: rank {rank} > {limit}" for name, rank in ranks.items() if 0 < limit < rank]
    if larger:
        raise InputRefused(
            f"the {of} has a fixed rank ({named('max_rank')}), and these adapters have a larger one:",
            listed(larger),
            f"Export with a larger {named('max_rank')}, or make the adapter smaller ({command('resize')})",
        )


def input_values(
    contract: Contract, plan: Plan, adapter: str, factors: AdapterArrays = NO_ARRAYS
) -> dict[str, NDArray[Any]]:
    """Return the values of the graph's inputs for one adapter of a plan: A, B times its scale, and DoRA's factors.

    Two pairs of one adapter that change one weight are concatenated along the rank, and padded with zeros to a fixed
    rank. `factors` holds, by weight, what `dora_factors_by_weight` computed of the magnitudes; a pair without one gets
    ones. Raises InputRefused where the graph's dtype cannot hold a value, for a rank larger than the
    fixed one, and for DoRA where the graph does not take it.
    """
    refuse_dora_without_factor(contract, plan)
    places = {place.weight: place for place in contract.places}
    refuse_larger_ranks(plan, {weight: place.max_rank for weight, place in places.items()})
    values: dict[str, NDArray[Any]] = {}
    for step in plan.low_rank:
        own = step.for_adapter(adapter)
        if own is None:
            continue
        place = places[step.weight]
        arrays: dict[str, NDArray[Any]] = place.zeros()
        if own.scaling is not None:
            name = getattr(place, _input_of_factors(own.terms[0].pair))
            arrays[name] = own.scaling.factors.reshape(arrays[name].shape)
        else:
            arrays |= {
                name: place.padded(name, np.concatenate([*map(place.oriented, parts)], axis=place.rank_axis(name)))
                for name, *parts in zip((place.a, place.b), *(term.factors for term in own.terms), strict=True)
            }
        if own.magnitude is not None:
            arrays[place.factor] = factors[step.weight]
        for name, array in arrays.items():
            values[name] = cast_factor(f"{adapter}, {step.weight}", name, array, place.dtype)
    return values


def cast_factor(what: str, name: str, array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Cast a factor to the graph's dtype. Raises InputRefused where the dtype cannot hold a value."""
    target = np.dtype(dtype)
    with np.errstate(over="ignore"):  # infinities are counted below
        cast = np.ascontiguousarray(array.astype(target))
    bad = cast.size - np.count_nonzero(np.isfinite(cast))
    if bad:
        raise InputRefused(
            f"{what}: {count(bad, 'value')} of {name} would not be finite: the largest {dtype} is "
            f"{float(ml_dtypes.finfo(target).max):g}. Check the adapter's scale"
        )
    return cast


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class OnnxAdapter:
    """An adapter file in memory."""

    values: Mapping[str, Any]  # OrtValue by input; its memory is the file's
    model_version: int
    adapter_version: int
    has_hash: bool  # of its contents, which then agrees with them. Other tools write none: damage is not detected
    file: Any  # onnxruntime's AdapterFormat, which owns that memory

    def __repr__(self) -> str:
        return brief(self, count(len(self.values), "parameter"), f"for the base {self.model_version}")


def write(path: Path, values: AdapterArrays, contract: Contract, *, sha256: str) -> None:
    """Write one adapter's file into a folder that the caller publishes.

    `values` is what `input_values` returned; `sha256` is the adapter's. Raises OutputFailed where the file cannot be
    written, and InputRefused for 2 GiB and more.
    """
    size = sum(array.nbytes for array in values.values())
    if size > LIMIT:
        raise InputRefused(f"the adapter has {size:,} bytes, and onnxruntime's format ends at {LIMIT:,}")
    ort = import_onnxruntime()
    file = ort.AdapterFormat()
    ort_values = {name: ort_value_of_array(ort, array) for name, array in values.items()}
    file.set_adapter_version(version_of(sha256 or "0"))
    file.set_model_version(contract.version)
    file.set_parameters(ort_values)
    try:
        file.export_adapter(str(path))
    except (RuntimeError, UnicodeError) as error:
        raise OutputFailed(f"{path} could not be written: {_reason(path, size) or first_line(error)}") from error
    hashes.append_hash(path)


def _reason(path: Path, size: int) -> str:
    """Why the system writes no such file, which onnxruntime does not pass on; empty where it does write."""
    try:
        with path.open("ab") as file:
            file.write(bytes(size))
    except OSError as error:
        return error.strerror or ""
    return ""


def read(path: Path) -> OnnxAdapter:
    """Read a whole file. Raises InputRefused for another or a damaged one, and for values that are not finite."""
    input_files.must_be_regular(path)
    if path.stat().st_size > LIMIT + hashes.ENDING:
        raise InputRefused(f"{path} has {path.stat().st_size:,} bytes, and onnxruntime's format ends at {LIMIT:,}")
    has_hash = hashes.agrees_with_hash(path)
    try:
        file = import_onnxruntime().AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        versions = file.get_model_version(), file.get_adapter_version()
    except (RuntimeError, UnicodeError) as error:
        raise InputRefused(f"{path} is not an adapter in onnxruntime's format, or it is damaged") from error
    problems = []
    for name, value in values.items():
        array = array_of_ort_value(value)
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            problems.append(f"{name}: {bad} of {array.size} values are not finite (NaN or infinity)")
    if problems:
        raise InputRefused(f"{path} is refused:", listed(problems))
    return OnnxAdapter(values, *versions, has_hash=has_hash, file=file)


def arrays_of(path: Path) -> AdapterArrays:
    """The values of an adapter's file by the names of the inputs. Raises InputRefused as `read`."""
    # Copies: the memory of these values is the file's, which ends here.
    return {name: array_of_ort_value(value).copy() for name, value in read(path).values.items()}


def refuse_misfits(adapter: OnnxAdapter, contract: Contract, *, source: Path | str, graph: Path | str) -> None:
    """Raise InputRefused where an adapter's file does not fit this graph. The message lists every misfit."""
    misfits = list(_misfits(adapter, contract))
    if misfits:
        raise InputRefused(
            f"{source} does not fit {graph}:",
            listed(misfits),
            f"Make one that does from the trained adapter: `{command('convert', graph='MODEL.onnx')}`",
        )


def _misfits(adapter: OnnxAdapter, contract: Contract) -> Iterator[str]:
    if adapter.model_version != contract.version:
        yield f"it was made for another base (fingerprint {adapter.model_version}, the graph has {contract.version})"
    if not adapter.values:
        yield "it is empty"
    for name in adapter.values:
        if name not in contract.inputs:
            yield f"{name}: the graph has no such input for an adapter"
    for place in contract.every_place:
        values = {name: adapter.values[name] for name in place.input_shapes if name in adapter.values}
        for name in place.input_shapes:
            if values and name not in values:
                yield f"{name}: missing, though {next(iter(values))} is present"
        for name, value in values.items():
            if value.element_type() != ONNX_TYPES[place.dtype]:
                yield f"{name}: {value.data_type()}, the graph takes {place.dtype}"
        if len(values) == len(place.input_shapes):
            yield from _shape_misfits(place, {name: list(value.shape()) for name, value in values.items()})


def _shape_misfits(place: AdapterPlace | HeadPlace, shapes: Mapping[str, list[int]]) -> Iterator[str]:
    for name, shape in shapes.items():
        wanted = place.input_shapes[name]
        if len(shape) != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, shape, strict=True)):
            sizes = ["rank" if size is None else str(size) for size in wanted]
            yield f"{name}: {shape}, the graph takes [{', '.join(sizes)}]"
            return
    if isinstance(place, HeadPlace):
        return
    a, b = (shapes[name][place.rank_axis(name)] for name in (place.a, place.b))
    if a != b:
        yield f"{place.a} {shapes[place.a]} and {place.b} {shapes[place.b]}: the ranks disagree"


def array_of_ort_value(value: Any) -> NDArray[Any]:
    """Return the contents of an OrtValue on the CPU, bfloat16 included, which onnxruntime's `numpy()` refuses."""
    if value.element_type() != ONNX_TYPES["bfloat16"]:
        array: NDArray[Any] = value.numpy()
        return array
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    halves: NDArray[Any] = np.array(words, np.uint16).view(ml_dtypes.bfloat16)
    return halves.reshape(shape)


def ort_value_of_array(ort: Any, array: NDArray[Any]) -> Any:
    """An OrtValue with the contents of an array, bfloat16 and the other order of bytes included."""
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")  # onnxruntime reads no other, and refuses none
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_TYPES["bfloat16"])
    return ort.OrtValue.ortvalue_from_numpy(array)


def import_onnxruntime() -> Any:
    """Import onnxruntime when it is first needed. Raises EnvironmentLacking where it cannot be imported."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise EnvironmentLacking(
            f"onnxruntime cannot be imported ({error}): pip install onnxruntime, or onnxruntime-gpu"
        ) from error


def import_quantiser() -> Any:
    """The class of onnxruntime that quantises weights to MatMulNBits. Raises EnvironmentLacking without it."""
    import_onnxruntime()
    try:
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer").MatMulNBitsQuantizer
    except ImportError as error:
        raise EnvironmentLacking(f"onnxruntime's quantiser cannot be imported ({error})") from error
