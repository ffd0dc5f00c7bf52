"""onnxruntime's adapter files (`.onnx_adapter`), and the record of a graph's adapter inputs.

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
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, brief, count, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import command, named
from lora_export.plan import Layout, Plan, TensorSpec
from lora_export.plan.own_heads import head_into_base
from lora_export.storage import hashes, input_files, json_files

CONTRACT_KEY = "lora_export.inputs"  # of the contract, in a graph's metadata
ROW_ADAPTERS_KEY = "lora_export.rows"  # of the adapters' names, in the metadata of a graph made with `lora="rows"`
ADAPTER_IDS = "adapter_ids"  # the input of such a graph: one adapter per row of the batch
ADAPTER_SCALES = "adapter_scales"  # its input where a row has several adapters: a factor for each
ROW_INPUTS = (ADAPTER_IDS, ADAPTER_SCALES)
SUFFIX = ".onnx_adapter"
LIMIT = (1 << 31) - (1 << 20)  # bytes; a FlatBuffer ends at 2 GiB, names and padding included
# ONNX's numbers of the types that a weight may have
ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}

AdapterArrays = Mapping[str, NDArray[Any]]
NO_ARRAYS: AdapterArrays = MappingProxyType({})


@dataclass(frozen=True)
class AdapterSlot:
    """The optional inputs of a graph that take an adapter for one weight.

    A linear layer takes A (in, rank) and B (rank, out). An embedding takes the same; `in` is its number of rows.
    A convolution takes A (rank, in, kernel) and B (out, rank, 1...). B contains the scale.
    """

    weight: str  # the base's name of the weight
    a: str  # name of the graph's input for A
    b: str  # name of the graph's input for B
    shape: tuple[int, ...]  # (out, in, kernel) of the weight
    dtype: str
    digest: str  # of the weight's contents
    factor: str = ""  # name of the graph's input (out, 1...) for DoRA's m / ‖W + sBA‖; empty without such an input
    scale: str = ""  # name of the graph's input (in, 1...) for factors of the layer's inputs; empty without
    embedding: bool = False
    value: str = ""  # the graph's initializer that holds the weight
    block: tuple[int, int] | None = None  # the weight's output features, where the initializer holds others too
    quantised: str = ""  # how the weight is quantised, in words; empty where it is not
    max_rank: int = 0  # the rank of A and B, to which smaller ones are padded; 0: any rank

    @property
    def spec(self) -> TensorSpec:
        shape = self.shape[::-1] if self.embedding else self.shape
        return TensorSpec(self.weight, shape, self.dtype, Layout.EMBEDDING if self.embedding else Layout.OUT_IN)

    @property
    def input_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of each input, by its name. The size of the rank is None, unless it is fixed."""
        out, inner, *kernel = self.shape
        ones, rank = (1,) * len(kernel), self.max_rank or None
        a = (rank, inner, *kernel) if kernel else (inner, rank)
        b = (out, rank, *ones) if kernel else (rank, out)
        factors = {self.factor: (out, *ones), self.scale: (inner, *ones)}
        return {self.a: a, self.b: b} | {name: shape for name, shape in factors.items() if name}

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return each input's value when there is no adapter: A and B of rank zero, and a factor of ones.

        A fixed rank is that of zeros. A convolution's A and B have one rank of zeros: onnxruntime's convolution over no
        channels does not set its output.
        """
        return self.zeros(1 if len(self.shape) > 2 else 0)

    def zeros(self, rank: int = 1) -> dict[str, NDArray[Any]]:
        """Return the values of an adapter of this rank that changes nothing: A and B of zeros, and a factor of ones."""
        sizes = {name: [rank if size is None else size for size in shape] for name, shape in self.input_shapes.items()}
        ones = {self.factor, self.scale}
        return {name: (np.ones if name in ones else np.zeros)(size, self.dtype) for name, size in sizes.items()}

    def rank_axis(self, name: str) -> int:
        """The axis of an input that is the rank."""
        is_a, is_linear = name == self.a, len(self.shape) == 2
        return int(is_a == is_linear)

    def padded(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return A or B with zeros up to the fixed rank; unchanged where any rank fits."""
        sizes, axis = [(0, 0)] * array.ndim, self.rank_axis(name)
        sizes[axis] = (0, max(0, self.max_rank - array.shape[axis]))
        return np.pad(array, sizes) if self.max_rank else array


@dataclass(frozen=True)
class Contract:
    """The adapter inputs of a graph, and the base that the graph holds."""

    base: str  # fingerprint of all the base's weights, as hex
    names: str  # a hash of their names alone
    slots: tuple[AdapterSlot, ...]
    required: bool = False  # whether the inputs have no default, so that every run has to feed them

    @property
    def version(self) -> int:
        """What an adapter's file holds of the fingerprint."""
        return version_of(self.base)

    @property
    def inputs(self) -> dict[str, AdapterSlot]:
        """The slot of each input, by the input's name."""
        return {name: slot for slot in self.slots for name in slot.input_shapes}

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return the values of all inputs when there is no adapter."""
        return {name: value for slot in self.slots for name, value in slot.without_adapter().items()}

    def __str__(self) -> str:
        """The JSON that a graph's metadata holds."""
        defaults = {one.name: one.default for one in fields(AdapterSlot)}
        records = [{key: value for key, value in asdict(slot).items() if value != defaults[key]} for slot in self.slots]
        required = {"required": True} if self.required else {}
        return json.dumps({"base": self.base, "names": self.names, **required, "places": records})


def read_contract(metadata: Mapping[str, str], source: Path | str) -> Contract:
    """Read the contract in a graph's metadata. Raises InputRefused where there is none, or where it is damaged."""
    if CONTRACT_KEY not in metadata:
        raise InputRefused(
            f"{source} does not record where it takes adapters: it was not made by `{command('onnx', lora='inputs')}`, "
            f"or it has lost its metadata ({CONTRACT_KEY})"
        )
    record = json_files.parse_json(metadata[CONTRACT_KEY].encode(), f"{source}, {CONTRACT_KEY}")
    try:
        slots = tuple(_slot(entry) for entry in record["places"])
        contract = Contract(str(record["base"]), str(record["names"]), slots, bool(record.get("required")))
        version_of(contract.base)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{source}: its record of adapter inputs ({CONTRACT_KEY}) is damaged: {error!r}") from error
    return contract


def _slot(entry: Mapping[str, Any]) -> AdapterSlot:
    shape = tuple(map(operator.index, entry["shape"]))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a weight of shape {shape}")
    texts = {key: str(entry[key]) for key in ("weight", "a", "b", "dtype", "digest")}
    texts |= {key: str(entry[key]) for key in ("factor", "scale", "value", "quantised") if key in entry}
    start, stop = map(operator.index, entry.get("block", (0, 0)))
    max_rank = operator.index(entry.get("max_rank", 0))
    if max_rank < 0:
        raise ValueError(f"a rank of {max_rank}")
    block = (start, stop) if "block" in entry else None
    return AdapterSlot(shape=shape, embedding=bool(entry.get("embedding")), block=block, max_rank=max_rank, **texts)


def version_of(fingerprint: str) -> int:
    """The first 31 bits of a hash: an adapter's file holds no more."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


# --- the values of a graph's adapter inputs -----------------------------------------------------


def _transforms(adapter: Adapter) -> dict[str, list[str]]:
    """The layers whose change follows from their weight and is no scale, by its kind."""
    found: dict[str, list[str]] = {}
    for module in adapter.beyond_pairs["transforms"]:
        if adapter.pairs[module].scaling() is None:
            found.setdefault(f"a change by {adapter.pairs[module].kind}", []).append(module)
    return found


def refuse_beyond_low_rank(adapters: Sequence[Adapter]) -> None:
    """Raise InputRefused for adapters that hold more than low-rank pairs. The message lists what they hold.

    A table that PEFT saves beside its pair is no reason: `refuse_new_tables` compares it with the base's.
    """
    problems = []
    for adapter in adapters:
        whole = [name for name in adapter.replaced if name.removesuffix(".weight") not in adapter.pairs]
        kinds = {"a whole tensor": whole, "a change of a bias": adapter.biases, "a change of a vector": adapter.added}
        kinds |= {"rows of tokens": adapter.token_rows, **_transforms(adapter)}
        problems += [f"{adapter.name}, {name}: {kind}" for kind, names in kinds.items() for name in names]
    remedies = [
        f"A graph of {named('lora', 'rows')} takes adapters with heads of their own.",
        f"If all adapters share one head, merge it into the model once ({head_into_base()}), and export with-head with "
        f"{named('ignore_head', True)}.",
    ]
    if problems:
        raise InputRefused(
            "only low-rank pairs can be swapped while a graph runs; these cannot:",
            listed(problems),
            f"Merge such an adapter into a graph of its own ({named('lora', 'merged')}).",
            *(remedies if any(adapter.replaced for adapter in adapters) else []),
            "Nothing was written.",
        )


def refuse_new_tables(plan: Plan) -> None:
    """Raise InputRefused for whole tensors beside pairs, once those that the base has too are removed; for biases."""
    tables = [
        f"{step.terms[0].adapter}, {step.weight}"
        for step in plan.low_rank
        if step.replace is not None or step.is_vector
    ]
    if tables:
        raise InputRefused(
            "only low-rank pairs can be swapped while a graph runs; these tensors would differ from the base's:",
            listed(tables),
            f"Merge such an adapter into a graph of its own ({named('lora', 'merged')}). Nothing was written.",
        )


def refuse_dora_without_factor(contract: Contract, plan: Plan) -> None:
    """Raise InputRefused where an adapter has DoRA and the graph has no input for its factor. Lists every weight."""
    slots = {slot.weight: slot for slot in contract.slots}
    lacking = [
        f"{term.adapter}, {step.weight}"
        for step in plan.low_rank
        for term in step.terms
        if (needed := _input_of_factors(term.pair)) and not getattr(slots.get(step.weight), needed, "")
    ]
    if lacking:
        raise InputRefused(
            "the graph has no input for the factors of DoRA or IA3 at these weights:",
            listed(lacking),
            "Make the graph with an adapter that has them, or, for factors of outputs, with "
            f"`{command('onnx', lora='inputs', dora=True)}`. Nothing was written.",
        )


def _input_of_factors(pair: LoraPair) -> str:
    """The field of a slot that a pair needs beside A and B; empty for none."""
    if (scaling := pair.scaling()) is not None and scaling.of_inputs:
        return "scale"
    return "factor" if scaling is not None or pair.magnitude is not None else ""


def refuse_larger_ranks(plan: Plan, max_ranks: Mapping[str, int]) -> None:
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
            f"the graph has a fixed rank ({named('max_rank')}), and these adapters have a larger one:",
            listed(larger),
            f"Export with a larger {named('max_rank')}, or make the adapter smaller ({command('resize')}). "
            "Nothing was written.",
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
    slots = {slot.weight: slot for slot in contract.slots}
    refuse_larger_ranks(plan, {weight: slot.max_rank for weight, slot in slots.items()})
    values: dict[str, NDArray[Any]] = {}
    for step in plan.low_rank:
        own = step.for_adapter(adapter)
        if own is None:
            continue
        slot = slots[step.weight]
        arrays: dict[str, NDArray[Any]] = slot.zeros()
        if own.scaling is not None:
            name = getattr(slot, _input_of_factors(own.terms[0].pair))
            arrays[name] = own.scaling.factors.reshape(arrays[name].shape)
        else:
            arrays |= {
                name: slot.padded(name, np.concatenate(parts, axis=slot.rank_axis(name)))
                for name, *parts in zip((slot.a, slot.b), *(term.factors for term in own.terms), strict=True)
            }
        if own.magnitude is not None:
            arrays[slot.factor] = factors[step.weight]
        for name, array in arrays.items():
            values[name] = cast_factor(f"{adapter}, {step.weight}", name, array, slot.dtype)
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
        raise OutputFailed(f"{path} could not be written: {str(error).splitlines()[0]}") from error
    hashes.append_hash(path)


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
    for slot in contract.slots:
        values = {name: adapter.values[name] for name in slot.input_shapes if name in adapter.values}
        for name in slot.input_shapes:
            if values and name not in values:
                yield f"{name}: missing, though {next(iter(values))} is present"
        for name, value in values.items():
            if value.element_type() != ONNX_TYPES[slot.dtype]:
                yield f"{name}: {value.data_type()}, the graph takes {slot.dtype}"
        if len(values) == len(slot.input_shapes):
            yield from _shape_misfits(slot, {name: list(value.shape()) for name, value in values.items()})


def _shape_misfits(slot: AdapterSlot, shapes: Mapping[str, list[int]]) -> Iterator[str]:
    for name, shape in shapes.items():
        wanted = slot.input_shapes[name]
        if len(shape) != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, shape, strict=True)):
            sizes = ["rank" if size is None else str(size) for size in wanted]
            yield f"{name}: {shape}, the graph takes [{', '.join(sizes)}]"
            return
    a, b = (shapes[name][slot.rank_axis(name)] for name in (slot.a, slot.b))
    if a != b:
        yield f"{slot.a} {shapes[slot.a]} and {slot.b} {shapes[slot.b]}: the ranks disagree"


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
    """An OrtValue with the contents of an array, bfloat16 included."""
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
