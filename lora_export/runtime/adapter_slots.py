"""Serve many adapters from one session: an adapter is loaded into a slot of the graph when a row asks for it.

Needs onnxruntime and NumPy, and neither PyTorch nor onnx.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import ADAPTER_IDS, ROW_INPUTS, AdapterArrays, Contract, read_contract, row_inputs
from lora_export.formats.onnx_adapter import ONNX_TYPES, array_of_ort_value, import_onnxruntime, ort_value_of_array
from lora_export.options.proof import Running
from lora_export.options.spelling import named
from lora_export.provenance import read_longest, refuse_larger
from lora_export.runtime.ort_session import open_session, raising_refusals
from lora_export.runtime.session import ADAPTER_DTYPES
from lora_export.storage.hashes import FAST, file_hash

AdaptersOfRow = str | None | Sequence[str | None]  # the adapter of a row, or several; None is the base


class _Version(NamedTuple):
    """One version of an adapter's file."""

    stamp: tuple[int, int, int]  # file, time and size: while they are the same, the file is not read again
    digest: str


class _File(NamedTuple):
    version: _Version
    arrays: AdapterArrays


class AdapterSlots:
    """A graph made by `export_onnx(lora="slots")`, and adapters that are loaded when they are used.

        slots = AdapterSlots("served.onnx", "adapters")  # a folder of files NAME.onnx_adapter, made by `convert`
        slots.run(feeds, ["acme", None, "birch"])  # the adapter of each row of the batch; None is the base

    `adapters` is a folder, or a function from a name to the path of its file. The adapter that was not used for the
    longest time makes place for another one. A file that changes is loaded again, where its contents have changed.
    Where a file is refused, what uses it raises InputRefused, and all else goes on. All methods may be called from
    several threads: no slot is written while a run reads it.

    `provider` is `cpu` or `cuda`; `session` is an open InferenceSession of the graph, for other options. Raises
    InputRefused for a graph without slots, and as `Session` does.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: str | Path | Callable[[str], Path],
        *,
        provider: str = Running.provider,
        session: Any = None,
    ):
        self.model, self.provider = Path(model), provider
        self._path_of = adapters if callable(adapters) else lambda name: Path(adapters) / f"{name}.onnx_adapter"
        if session is None:
            session = open_session(self.model, provider, import_onnxruntime().SessionOptions())
        self.session, metadata = session, session.get_modelmeta().custom_metadata_map
        self.contract, self.longest = read_contract(metadata, self.model), read_longest(metadata, self.model)
        if not self.contract.slots:
            raise InputRefused(f"{self.model} has no slots: it was made with {named('lora', 'inputs')}")
        inputs = {value.name: value for value in session.get_inputs()}
        self.contract.refuse_other_inputs({name: value.shape for name, value in inputs.items()}, self.model)
        for name, place in self.contract.inputs.items():
            if ADAPTER_DTYPES.get(inputs.pop(name).type) != place.dtype:
                raise InputRefused(f"{self.model} has no input {name} of {place.dtype}, as its metadata has it")
        self._batch = inputs[ADAPTER_IDS].shape[0]  # its symbol
        self._shapes = {name: value.shape for name, value in inputs.items() if name not in ROW_INPUTS}
        self._outputs = [value.name for value in session.get_outputs()]
        self._stacks = _Stacks(self.contract, provider)
        self._threads = threading.local()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="adapters")
        self._changed = threading.Condition()  # guards all that follows
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # of loaded adapters, the one used last at the end
        self._versions: dict[str, _Version] = {}
        self._users = [0] * (self.contract.slots + 1)  # runs that read each slot, and loads that write it
        self._loading: set[str] = set()
        self._pinned: set[str] = set()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the adapters in slots, the one that was used last at the end."""
        with self._changed:
            return tuple(self._slot_of)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        adapters: Sequence[AdaptersOfRow],
        *,
        scales: Sequence[Sequence[float]] | NDArray[np.floating[Any]] | None = None,
        outputs: Sequence[str] | None = None,
        options: Any = None,
    ) -> dict[str, NDArray[Any]]:
        """Outputs by name (all, unless `outputs` names them), each row computed with its adapter.

        `adapters` has a name for each row, or several where the graph takes several; `scales` has their factors then.
        Raises InputRefused for an adapter that is refused, for more of them than there are slots, for another number of
        rows, and for other inputs than the graph's; RuntimeRefused where onnxruntime refuses the run.
        """
        if feeds.keys() != self._shapes.keys():  # a binding would read what an earlier run gave
            raise InputRefused(f"{self.model} takes {', '.join(self._shapes)}, and the run has {', '.join(feeds)}")
        binding = self.io_binding()
        names = self._outputs if outputs is None else list(outputs)
        ort = import_onnxruntime()
        held = {name: ort_value_of_array(ort, np.asarray(array)) for name, array in feeds.items()}
        for name, value in held.items():
            sizes = {symbol: size for symbol, size in zip(self._shapes[name], value.shape(), strict=False) if symbol}
            refuse_larger(sizes, self.longest, self.model, "Give shorter inputs")
            if sizes.get(self._batch, len(adapters)) != len(adapters):
                raise InputRefused(f"{name} has {sizes[self._batch]} rows, and there are adapters for {len(adapters)}")
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        with self.use(adapters) as ids:
            chosen = row_inputs(ids, _factors(scales, ids), self.contract.per_row)
            with raising_refusals(self.model):
                for name, array in chosen.items():
                    binding.bind_cpu_input(name, array)
                self.session.run_with_iobinding(binding, options)
                results = [array_of_ort_value(value) for value in binding.get_outputs()]
        return dict(zip(names, results, strict=True))

    def io_binding(self) -> Any:
        """onnxruntime's IOBinding of this thread, with the stacks bound and no outputs. Run it inside `use`."""
        if not hasattr(self._threads, "binding"):
            self._threads.binding = self.session.io_binding()
            for name, value in self._stacks.values.items():
                self._threads.binding.bind_ortvalue_input(name, value)
        self._threads.binding.clear_binding_outputs()
        return self._threads.binding

    @contextlib.contextmanager
    def use(self, adapters: Sequence[AdaptersOfRow]) -> Iterator[NDArray[np.int64]]:
        """The value of `adapter_ids` for rows with these adapters, whose slots stay as they are until the end.

        It is [batch], or [batch, adapters of a row] where a row has several.
        """
        rows = [[row] if row is None or isinstance(row, str) else row for row in adapters]
        most = max(map(len, rows), default=1)
        if most > self.contract.per_row:
            raise InputRefused(f"{self.model} takes {count(self.contract.per_row, 'adapter')} on a row, not {most}")
        slot_of = self._acquire([name for row in rows for name in row if name is not None])
        try:
            width = 1 if all(isinstance(row, str | None) for row in adapters) else self.contract.per_row
            ids = np.zeros((len(rows), width), np.int64)
            for own, row in zip(ids, rows, strict=True):
                own[: len(row)] = [0 if name is None else slot_of[name] for name in row]
            yield ids[:, 0] if width == 1 else ids
        finally:
            self._release(slot_of.values())

    def prefetch(self, name: str) -> Future[None]:
        """Load an adapter in the background. The future raises what `run` would raise."""
        return self._pool.submit(lambda: self._release(self._acquire([name]).values()))

    def pin(self, name: str) -> None:
        """Load an adapter that stays loaded until `unpin`."""
        slots = self._acquire([name])
        with self._changed:
            self._pinned.add(name)
        self._release(slots.values())

    def unpin(self, name: str) -> None:
        """Let an adapter make place for others again."""
        with self._changed:
            self._pinned.discard(name)
            self._changed.notify_all()

    def unload(self, name: str) -> None:
        """Empty the slot of an adapter. Runs that use it end with it; the next run loads its file again."""
        with self._changed:
            self._pinned.discard(name)
            self._forget([name])
            self._changed.notify_all()

    # --- slots and their users ---

    def _acquire(self, names: Iterable[str]) -> dict[str, int]:
        """The slots of loaded adapters, which count as used. Loads those that are missing, once slots are free.

        All slots are taken together, so that no two runs wait for each other.
        """
        wanted = dict.fromkeys(names)
        if len(wanted) > self.contract.slots:
            raise InputRefused(f"{self.model} has {count(self.contract.slots, 'slot')}, for {len(wanted)} adapters")
        files: dict[str, _File] = {}
        while True:
            files = {name: file for name in wanted if (file := self._changed_file(name, files.get(name))) is not None}
            with self._changed:
                missing = [name for name in wanted if self._lacks(name, files)]
                if files.keys() < {*files, *missing}:
                    continue  # one made place for another meanwhile
                free = None if self._loading.intersection(missing) else self._free_slots(wanted, missing)
                if free is None:
                    self._changed.wait()
                    continue
                new = dict(zip(missing, free, strict=True))
                used = {name: new[name] if name in new else self._slot_of[name] for name in wanted}
                self._forget(name for name, slot in [*self._slot_of.items()] if name in new or slot in free)
                self._loading.update(new)
                self._count(used.values(), 1)
            try:
                for name, slot in new.items():
                    self._stacks.fill(self.contract, slot, files[name].arrays)
            except BaseException:
                with self._changed:
                    self._loading.difference_update(new)
                    self._count(used.values(), -1)
                raise
            with self._changed:
                self._loading.difference_update(new)
                self._slot_of |= new
                for name in wanted:
                    if self._slot_of.get(name) == used[name]:
                        self._slot_of.move_to_end(name)
                        self._versions[name] = files[name].version if name in files else self._versions[name]
                self._changed.notify_all()
            return used

    def _release(self, slots: Iterable[int]) -> None:
        with self._changed:
            self._count(slots, -1)

    def _count(self, slots: Iterable[int], users: int) -> None:
        for slot in slots:
            self._users[slot] += users
        self._changed.notify_all()

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._slot_of.pop(name, None)
            self._versions.pop(name, None)

    def _lacks(self, name: str, files: Mapping[str, _File]) -> bool:
        """Whether this version of an adapter is in no slot."""
        known = self._versions.get(name)
        return known is None or (name in files and files[name].version.digest != known.digest)

    def _free_slots(self, wanted: Iterable[str], missing: Sequence[str]) -> list[int] | None:
        """A slot for each missing adapter that no run uses, empty ones first; None where there are fewer now.

        Raises InputRefused where there are fewer for good, because of adapters that are pinned.
        """
        kept = {self._slot_of[name] for name in {*self._pinned, *wanted} - {*missing} if name in self._slot_of}
        if len(missing) > self.contract.slots - len(kept):
            raise InputRefused(f"{self.model}: no slot is left beside {count(len(self._pinned), 'pinned adapter')}")
        loaded = list(self._slot_of.values())
        empty = [slot for slot in range(1, self.contract.slots + 1) if slot not in loaded]
        free = [slot for slot in (*empty, *loaded) if not self._users[slot] and slot not in kept]
        return free[: len(missing)] if len(free) >= len(missing) else None

    # --- files ---

    def _changed_file(self, name: str, before: _File | None) -> _File | None:
        """The file of an adapter that is not loaded, or that has changed since; None for any other."""
        stamp = self._stamp(name)
        if before is not None and before.version.stamp == stamp:
            return before
        with self._changed:
            known = self._versions.get(name)
        return None if known is not None and known.stamp == stamp else self._read(name)

    def _stamp(self, name: str) -> tuple[int, int, int]:
        found = self._path(name).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _path(self, name: str) -> Path:
        if name and not {"/", "\\", "\0"}.intersection(name):
            with contextlib.suppress(OSError):  # as of a name that is too long
                path = self._path_of(name)
                if path.is_file():
                    return path
        raise InputRefused(f"there is no adapter {name!r}: no file {name}{onnx_adapter.SUFFIX}")

    def _read(self, name: str) -> _File:
        """The values of an adapter's file. Raises InputRefused where it does not fit the graph."""
        path, stamp = self._path(name), self._stamp(name)
        digest, file = file_hash(path, FAST), onnx_adapter.read(path)
        onnx_adapter.refuse_misfits(file, self.contract, source=path, graph=self.model)
        if self._stamp(name) != stamp:
            return self._read(name)  # it was replaced meanwhile
        # Copies: the memory of these values is the file's, which ends here.
        return _File(
            _Version(stamp, digest), {key: array_of_ort_value(value).copy() for key, value in file.values.items()}
        )


class _Stacks:
    """The inputs of a graph of slots, allocated once, on the device of the session."""

    def __init__(self, contract: Contract, provider: str):
        ort, self.values, self.host = import_onnxruntime(), dict[str, Any](), dict[str, NDArray[Any]]()
        self.copied: set[str] = set()  # the stacks on another device, which have a copy on the host
        for name, empty in contract.without_adapter().items():
            shape, kind = (contract.slots + 1, *empty.shape), str(empty.dtype)
            if provider != "cpu" and kind != "bfloat16":
                self.host[name] = np.broadcast_to(empty, shape).copy()
                self.values[name] = ort.OrtValue.ortvalue_from_numpy(self.host[name], provider, 0)
                self.copied.add(name)
                continue
            self.values[name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[kind], "cpu")
            memory = (ctypes.c_uint8 * (math.prod(shape) * empty.itemsize)).from_address(self.values[name].data_ptr())
            self.host[name] = np.frombuffer(memory, np.uint8).view(empty.dtype).reshape(shape)
            self.host[name][...] = empty
        self.lock = threading.Lock()  # of the copies

    def fill(self, contract: Contract, slot: int, arrays: AdapterArrays) -> None:
        """Write an adapter into a slot that no run reads."""
        contract.fill(self.host, slot, arrays)
        with self.lock:
            for name in self.copied:
                self.values[name].update_inplace(self.host[name])


def _factors(
    scales: Sequence[Sequence[float]] | NDArray[np.floating[Any]] | None, ids: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """The factors of the adapters of each row; None where each row has one, at full strength.

    Raises InputRefused for factors of single adapters, which no run would use, for more rows or factors than ids, and
    for factors that are not finite.
    """
    if ids.ndim == 1:
        if scales is not None:
            raise InputRefused(
                f"scales need a graph of several adapters a row ({named('per_row')}), and rows with lists of adapters"
            )
        return None
    factors = np.ones(ids.shape, np.float32)
    if scales is None:
        return factors
    with np.errstate(over="ignore"):  # it is refused
        rows = [np.asarray(row, np.float32) for row in scales]
    if len(rows) != len(ids) or any(row.ndim != 1 or len(row) > ids.shape[1] for row in rows):
        raise InputRefused(f"scales need a list for each of {len(ids)} rows, of at most {ids.shape[1]} factors")
    for own, row in zip(factors, rows, strict=True):
        own[: len(row)] = row
    if not np.isfinite(factors).all():
        raise InputRefused("scales must be finite numbers in float32")
    return factors
