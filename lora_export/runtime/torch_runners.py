"""Run a PyTorch module, as deployed or in fp64."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_export.errors import RuntimeRefused
from lora_export.layers.torch_internals import TorchDispatchMode, grouped_products, tree_map
from lora_export.models.outputs import have_names, named_outputs
from lora_export.models.refusals import named_failures
from lora_export.models.stored_parameter import NARROW_DTYPES, StoredParameter, is_streamed
from lora_export.models.tracing import attribute_writes, same_state, state_reader
from lora_export.runtime import onnx_runner
from lora_export.runtime.runner import Arrays, PlainRunner, TooSlow, within_memory
from lora_export.runtime.runs_in_step import MOST_IN_STEP, Meet, by_itself, run_in_step

NamedTensors = dict[str, torch.Tensor]
Called = tuple[Any, tuple[Any, ...], Mapping[str, Any]]  # the first argument, those behind the second, and named ones
UseRow = Callable[[torch.Tensor], contextlib.AbstractContextManager[None]]


@dataclass
class ModuleRunner(PlainRunner):
    """A module as deployed: in its own dtype, without gradients and TF32."""

    module: nn.Module
    device: str = "cpu"
    axes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    names_known: bool = True
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)  # tensor -> dtype in its file, where known
    limits: Mapping[str, tuple[tuple[int, int | None], ...]] = field(default_factory=dict)  # least and greatest sizes
    has_fp32_outputs: bool = False  # whether float outputs are cast to fp32, whatever the module computes in
    path: Path = Path()  # of the file that the module is from, for the message of TooSlow
    timeout: float = math.inf  # seconds after which a run ends with TooSlow, once its operator has ended
    memory: int | None = None  # bytes that a run may take; None: without a bound
    # Bytes of the outputs for each number of the inputs, once runs together were what the first is by itself
    _growth: float | None = field(default=None, init=False, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first float parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, with floats in the module's own dtype."""
        with within_memory(self.memory, self.path), _tf32_off(), same_state(self.module):
            return self._run(inputs, by_itself, self.timeout)

    def run_together(self, cases: Sequence[Arrays], kept: Callable[[Arrays], Arrays]) -> list[Arrays] | None:
        """What `kept` returns for the outputs of each case. Weights that are read from a file are read once for all.

        None where outputs are large, a run together fails, or the first case is not what it is by itself, which is
        looked at once. Raises RuntimeRefused where that fails by itself.
        """
        growth = self._growth
        if len(cases) < (3 if growth is None else 2) or not is_streamed(self.module):
            return None
        sizes = [sum(array.size for array in arrays.values()) for arrays in cases]
        first = self.run(cases[0]) if growth is None else {}
        if growth is None:
            growth = sum(array.nbytes for array in first.values()) / max(1, sizes[0])
        if growth * sum(sizes) > MOST_IN_STEP:
            return None

        def call(arrays: Arrays, meet: Meet) -> Arrays:
            return kept(self._run(arrays, meet, self.timeout * len(cases)))

        with within_memory(self.memory, self.path), _tf32_off(), same_state(self.module):
            outputs = _in_step([self.module], [functools.partial(call, arrays) for arrays in cases])
        is_same = outputs is not None and all(
            outputs[0][name].tobytes() == own.tobytes() for name, own in first.items()
        )
        if not is_same:
            return None
        self._growth = growth
        return outputs

    def _run(self, inputs: Arrays, meet: Meet, timeout: float) -> Arrays:
        dtype = self.dtype
        tensors = {name: to_tensor(value).to(self.device) for name, value in inputs.items()}
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        sized = [f"{name} {list(value.shape)}" for name, value in tensors.items()]  # which no user may have chosen
        limit = contextlib.nullcontext() if math.isinf(timeout) else _TimeLimit(self.path, timeout)
        shared = contextlib.nullcontext() if meet is by_itself else _SharedWeights(meet)
        with torch.no_grad(), named_failures(self.module, sized), limit, shared:
            outputs = named_outputs(self.module(**tensors))
        self.names_known = have_names(outputs)
        if self.has_fp32_outputs:
            outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        return _as_arrays(outputs)


class _SharedWeights(TorchFunctionMode):
    """Layers and tables whose weight is read from a file get it together with other runs."""

    def __init__(self, meet: Meet):
        super().__init__()
        self._meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.embedding) and len(args) > 1 and isinstance(args[1], StoredParameter):
            return self._meet(
                _products_of if func is F.linear else _rows_of, args[1], (args[0], args[2:], kwargs or {})
            )
        return func(*args, **(kwargs or {}))


def _products_of(weight: StoredParameter, inputs: Sequence[Called]) -> list[torch.Tensor]:
    values = weight.stored().to(weight.dtype)
    return [F.linear(x, values, *bias, **named) for x, bias, named in inputs]


def _rows_of(table: StoredParameter, lookups: Sequence[Called]) -> list[torch.Tensor]:
    """Rows of a table in its own dtype, for some ids and the other arguments of `F.embedding`."""
    values = table.stored()
    return [F.embedding(ids, values, *others, **named).to(table.dtype) for ids, others, named in lookups]


class _TimeLimit(TorchFunctionMode):
    """Raises TooSlow at the first operator after so many seconds. One that runs is not interrupted."""

    def __init__(self, path: Path, seconds: float):
        super().__init__()
        self.path, self.seconds, self._end = path, seconds, time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TooSlow(self.path, self.seconds)
        return func(*args, **(kwargs or {}))


@dataclass
class Fp64Runner:
    """A module computed in fp64; its own casts to fp32 or a half are replaced by casts to fp64.

    Weights that the module has in a narrower dtype are widened where they are used (see `Fp64Operators`).
    `narrow_operators` collects the operators that produced less than fp64 all the same, for the report.
    """

    module: nn.Module
    narrow_operators: set[str] = field(default_factory=set)
    largest_result: int = 0  # bytes of the largest result of an operator in all runs

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass with every float in fp64."""
        return _as_arrays(self._outputs(inputs, lambda forward: forward()))

    def run_each(self, inputs: Arrays, rows: torch.Tensor, use: UseRow) -> list[Arrays]:
        """One forward pass for each of the rows, in the context that `use` makes of it: all of them in one batch.

        The numbers are those of single runs, but for the order of sums in fp64. Raises RuntimeRefused where the module
        computes what a batch cannot have: a number of its rows that Python reads.
        """

        def each(forward: Callable[[], NamedTensors]) -> NamedTensors:
            def with_row(row: torch.Tensor) -> NamedTensors:
                with use(row):
                    return forward()

            return torch.func.vmap(with_row)(rows)

        with warnings.catch_warnings(action="ignore"):  # of operators that a batch computes one by one
            outputs = self._outputs(inputs, each)
        return [_as_arrays({name: value[row] for name, value in outputs.items()}) for row in range(len(rows))]

    def _outputs(
        self, inputs: Arrays, call: Callable[[Callable[[], NamedTensors]], NamedTensors], meet: Meet | None = None
    ) -> NamedTensors:
        """What `call` returns for the module's forward pass. With `meet`, other runs have its state in common."""
        wide = {name: to_tensor(value) for name, value in inputs.items()}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
        module = self.module  # before the modes are active: a lazy reference makes it now, from one in fp32
        narrow = NarrowOperators(self.narrow_operators)
        state = _in_fp64(module) if meet is None else contextlib.nullcontext()
        operators = Fp64Operators(module, narrow, meet or by_itself)
        try:
            with state, torch.no_grad(), narrow, operators, named_failures(module, wide):
                return call(lambda: named_outputs(module(**wide)))
        finally:
            self.largest_result = max(self.largest_result, narrow.largest_result)


@contextlib.contextmanager
def _in_fp64(*modules: nn.Module) -> Iterator[None]:
    """PyTorch makes new floats in fp64. The modules have their own state again afterwards."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.ExitStack() as states:
            for module in modules:
                states.enter_context(same_state(module))
            yield
    finally:
        torch.set_default_dtype(default)


def run_all_in_step(runs: Sequence[tuple[Fp64Runner, Arrays]], kept: Callable[[Arrays], Arrays]) -> list[Arrays] | None:
    """What `kept` returns for the outputs of each run, which have the bits of `run`. A weight is read once for all.

    None where a run changed an attribute of a module, which another one may have read, and where one failed.
    """

    def call(runner: Fp64Runner, inputs: Arrays, meet: Meet) -> Arrays:
        return kept(_as_arrays(runner._outputs(inputs, lambda forward: forward(), meet)))

    modules = {id(runner.module): runner.module for runner, _ in runs}.values()
    with _in_fp64(*modules):
        return _in_step(modules, [functools.partial(call, *run) for run in runs])


def _in_step(modules: Iterable[nn.Module], calls: Sequence[Callable[[Meet], Arrays]]) -> list[Arrays] | None:
    """What the calls return; None where one fails, or changes what another may have read.

    That is an attribute of a module, also for a while, and the state of the random generator.
    """
    modules = list(modules)
    are_as_before, generator = [state_reader(module) for module in modules], torch.get_rng_state()
    with torch.no_grad(), attribute_writes(modules) as written:
        try:
            outputs = run_in_step(calls)
        except (RuntimeRefused, RuntimeError, MemoryError):
            return None
    is_same = not written and torch.equal(generator, torch.get_rng_state())
    return outputs if is_same and all(is_as_before() for is_as_before in are_as_before) else None


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def to_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor of its own dtype."""
    array = np.asarray(array, order="C")  # `ascontiguousarray` would give a scalar an axis
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as an array of its own dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _as_arrays(outputs: NamedTensors) -> Arrays:
    return {name: to_numpy(value) for name, value in outputs.items()}


def describe_environment() -> dict[str, Any]:
    """Versions and settings that a result depends on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **onnx_runner.describe_ort_environment(),
    }
    if transformers := sys.modules.get("transformers"):
        facts["transformers"] = transformers.__version__
    return facts


# --- Operators in fp64, whatever a model casts to, and whatever its weights are stored in ---
#
# A model in fp64 takes two to four times the memory of its file. Here a weight in a narrower dtype is widened for the
# operator that computes with it, and dropped afterwards. fp64 represents every number of the narrower floats, so the
# results are those of a model in fp64. Views and rows of a weight stay in its own dtype until something is computed.

NARROWING_METHODS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
GROUPED_MM = grouped_products()
READ_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
# Names of what moves numbers and computes nothing, as a function or a method; `__get__` is any other attribute.
# fmt: off
MOVES_NUMBERS = frozenset({
    "__get__", "__set__", "__getitem__", "__len__", "__iter__", "chunk", "contiguous", "detach", "dim", "expand",
    "expand_as", "flatten", "index_select", "is_contiguous", "is_floating_point", "movedim", "narrow",
    "ndimension", "numel", "permute", "reshape", "select", "size", "split", "squeeze", "stride", "t", "transpose",
    "unbind", "unflatten", "unsqueeze", "untyped_storage", "view", "view_as",
})
# fmt: on
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
# Bytes in fp64 of a linear layer's weight that are there at once. A core's cache holds most of them, and the memory is
# used again: with new memory for each weight, the kernel takes longer to provide it than the layer to compute.
MOST_WIDENED = 16 << 20


class Fp64Operators(TorchFunctionMode):
    """Widens the narrow weights of a module where they are used, and replaces casts to a narrower float by fp64.

    PyTorch has no fp64 kernel for products of experts, so these are computed one expert after the other.
    """

    def __init__(self, module: nn.Module, narrow: NarrowOperators, meet: Meet = by_itself):
        super().__init__()
        self._meet = meet
        tensors = itertools.chain(module.parameters(), module.buffers())
        self._stored = {_memory(tensor) for tensor in tensors if tensor.dtype in NARROW_DTYPES and tensor.numel()}
        # What an nn.ParameterDict holds: A and B of adapters, which other runs may be without.
        dictionaries = (part for part in module.modules() if isinstance(part, nn.ParameterDict))
        self._apart = {_memory(parameter) for part in dictionaries for parameter in part.parameters()}
        self._narrow = narrow
        self._scratch = torch.empty(0, dtype=torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in NARROWING_METHODS:
            return args[0].double()
        if func is GROUPED_MM and (args[0].ndim, args[1].ndim) == (2, 3):
            with self._narrow.paused():
                experts = list(args[1])
            return _grouped_products(args[0], experts, *args[2:], **kwargs)
        args = tuple(torch.float64 if _is_narrow(arg) else arg for arg in args)
        kwargs = {name: torch.float64 if _is_narrow(value) else value for name, value in kwargs.items()}
        if self._stored and _has_narrow((args, tuple(kwargs.values()))):
            return self._with_widened_weights(func, args, kwargs)
        return func(*args, **kwargs)

    def _with_widened_weights(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if func is READ_DTYPE:
            return torch.float64 if self._is_stored(args[0]) else func(*args)
        if func is F.embedding and isinstance(args[1], StoredParameter):
            return self._meet(self._rows, args[1], (args[0], args[2:], kwargs))
        if name in MOVES_NUMBERS or func is F.embedding:
            with self._narrow.paused():
                return tree_map(self._widened_copy, func(*args, **kwargs))
        if func is F.linear and not kwargs and self._is_stored(args[1]):
            meet = by_itself if _memory(args[1]) in self._apart else self._meet
            return meet(self._products, args[1], (args[0], *args[2:]))
        changed = 1 if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) else 0
        rest, kwargs = tree_map(self._widened, (args[changed:], kwargs))
        return func(*args[:changed], *rest, **kwargs)

    def _rows(self, table: StoredParameter, lookups: Sequence[Called]) -> list[torch.Tensor]:
        """Rows of a table in fp64, for some ids and the other arguments of `F.embedding`."""
        with self._narrow.paused():
            return [rows.double() for rows in _rows_of(table, lookups)]

    def _products(self, weight: torch.Tensor, inputs: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        """Linear layers in fp64, for some x and bias, so many outputs at a time that few of W are there in fp64."""
        weight = self._as_stored(weight)
        rows = max(1, MOST_WIDENED // (8 * weight.shape[1]))
        with self._narrow.paused():
            parts = weight.split(rows)
        layers = [(x, bias[0].double() if bias and bias[0] is not None else None) for x, *bias in inputs]
        if len(parts) == 1:
            wide = self._in_scratch(weight)
            return [F.linear(x, wide, bias) for x, bias in layers]
        products = [x.new_empty(*x.shape[:-1], len(weight)) for x, _ in layers]
        for number, part in enumerate(parts):
            own, wide = slice(number * rows, number * rows + len(part)), self._in_scratch(part)
            for made, (x, bias) in zip(products, layers, strict=True):
                made[..., own] = F.linear(x, wide, None if bias is None else bias[own])
        return products

    def _in_scratch(self, values: torch.Tensor) -> torch.Tensor:
        """The values in fp64, until the next call."""
        with self._narrow.paused():
            if self._scratch.numel() < values.numel() or self._scratch.device != values.device:
                self._scratch = torch.empty(values.numel(), dtype=torch.float64, device=values.device)
            return self._scratch[: values.numel()].view(values.shape).copy_(values)

    def _is_stored(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES and _memory(value) in self._stored

    def _as_stored(self, value: torch.Tensor) -> torch.Tensor:
        """The values of a weight in the dtype in which it is stored."""
        if not isinstance(value, StoredParameter):
            return value
        with self._narrow.paused():
            return value.stored()

    def _widened(self, value: Any) -> Any:
        if not self._is_stored(value):
            return value
        with self._narrow.paused():
            return self._as_stored(value).double()

    def _widened_copy(self, value: Any) -> Any:
        """A copy of some numbers of a weight, in fp64; a view of a weight itself."""
        is_copy = isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES and not self._is_stored(value)
        return value.double() if is_copy else value


class NarrowOperators(TorchDispatchMode):
    """Records which operators produce a narrower float although everything should be fp64."""

    def __init__(self, seen: set[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen
        self.largest_result = 0  # bytes
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: numbers of a weight are moved."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if not self._is_paused and isinstance(value, torch.Tensor):
                self.largest_result = max(self.largest_result, 0 if func.is_view else value.nbytes)
                if value.dtype in NARROW_DTYPES:
                    self.seen.add(str(func))
        return result


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW_DTYPES


def _has_narrow(values: Any) -> bool:
    """Whether a tensor among arguments, or in a list of them, is of a dtype that weights are stored in."""
    return any(
        value.dtype in NARROW_DTYPES if isinstance(value, torch.Tensor) else _has_narrow(value)
        for value in values
        if isinstance(value, torch.Tensor | list | tuple)
    )


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _grouped_products(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], offs: torch.Tensor, **_: None
) -> torch.Tensor:
    """Products of rows (rows, in) with weights (in, out), one an expert; the rows of expert i end before `offs[i]`."""
    products, begin = rows.new_zeros(len(rows), weights[0].shape[-1]), 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        products[begin:end] = rows[begin:end] @ weight.double()
        begin = end
    return products
