"""The adapter that turns one checkpoint into another: pairs for matrices and convolutions, whole tensors for the rest.

Every tensor that differs is in the adapter, or the pair of checkpoints is refused with a list of all that is not.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.adapters.low_rank import LayerShare
from lora_export.adapters.singular_values import BlockedMatrix, RowBlock, SingularValues, Truncation
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.names.loaded_names import LoadedNames
from lora_export.names.table import is_embedding
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Layout, TensorSpec, Tied
from lora_export.plan.layouts import LayoutEvidence, check_stated, stated_layout
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge import WORD_HEAD
from lora_export.weights.merge_report import OnBytesWritten
from lora_export.weights.tied_tensors import TIED, tied_head, ties_of, word_tables

BLOCK_ENTRIES = 1 << 22  # of a difference in memory at once: 16 MiB in fp32
CACHED_ENTRIES = 1 << 25  # of a difference that is kept: 128 MiB in fp32


class TensorInFile(NamedTuple):
    """One tensor in its file."""

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]


def have_equal_bits(base: TensorInFile, tuned: TensorInFile) -> bool:
    """Whether two tensors of one shape have the same dtype and the same bits."""
    if base.entry.dtype != tuned.entry.dtype:
        return False
    return all(np.array_equal(_bits(old), _bits(new)) for _, old, new in _stored_rows(base, tuned))


@dataclass(eq=False)
class Difference(BlockedMatrix):
    """`tuned - base` of one tensor, as a matrix (rows, columns) of its first dimension and all others.

    Raises InputRefused where a value of either is not finite.
    """

    base: TensorInFile
    tuned: TensorInFile
    energy: float = field(init=False)  # ‖·‖²

    def __post_init__(self) -> None:
        self._kept: list[RowBlock] = []
        self.energy = 0.0
        entry = self.base.entry
        self.shape = (entry.rows, math.prod(entry.shape[1:]))
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype == new.dtype and np.array_equal(_bits(old), _bits(new)):
                continue
            change = self._subtracted(old, new)
            self.energy += float(np.einsum("ij,ij->", change, change, dtype=np.float64))
            if math.prod(self.shape) <= CACHED_ENTRIES and change.any():
                self._kept.append((rows, change))

    def _subtracted(self, old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            change: NDArray[np.float32] = np.subtract(_wide(new), _wide(old)).astype(np.float32)
        if not np.isfinite(change).all():
            where = "BASE" if not np.isfinite(_wide(old)).all() else "TUNED"
            raise InputRefused(
                f"{self.tuned.name}: {where} holds values that are not finite, or too far apart for float32"
            )
        return change

    def blocks(self) -> Iterator[RowBlock]:
        """The blocks of rows that are not all zero."""
        if self._kept:
            yield from self._kept
            return
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype != new.dtype or not np.array_equal(_bits(old), _bits(new)):
                yield rows, self._subtracted(old, new)


_Rows = tuple[slice, NDArray[np.generic], NDArray[np.generic]]


def _stored_rows(base: TensorInFile, tuned: TensorInFile) -> Iterator[_Rows]:
    """Blocks of rows of a tensor in both files, (rows, columns)."""
    entry = base.entry
    step = max(1, BLOCK_ENTRIES // max(1, math.prod(entry.shape[1:])))
    with base.file.path.open("rb") as first, tuned.file.path.open("rb") as second:
        for start in range(0, entry.rows, step):
            rows = slice(start, min(start + step, entry.rows))
            yield rows, _rows(base, first.fileno(), rows), _rows(tuned, second.fileno(), rows)


def _rows(tensor: TensorInFile, fd: int, rows: slice) -> NDArray[np.generic]:
    """Some rows of a tensor, (rows, columns), from its file."""
    entry = tensor.entry
    stored = np.empty((rows.stop - rows.start) * entry.row_bytes, np.uint8)
    block_copy.read(tensor.file.path, fd, stored, entry.start + rows.start * entry.row_bytes)
    return stored.view(entry.dtype).reshape(rows.stop - rows.start, -1)


def _bits(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return array.view(np.uint8)


def _wide(array: NDArray[np.generic]) -> NDArray[np.floating]:
    """The values in fp32, or in fp64 where they are stored so."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Extracted:
    """An adapter, what its pairs hold of each change, and the names of the tensors that were left out."""

    adapter: Adapter
    layers: tuple[LayerShare, ...]
    whole: tuple[str, ...]  # tensors that are saved whole, as the adapter names them
    excluded: tuple[str, ...]  # tensors that differ, and were to be left out


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    truncation: Truncation,
    *,
    name: str,
    layout: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    progress: OnBytesWritten = lambda _: None,
) -> Extracted:
    """Read both checkpoints, tensor by tensor, and return the adapter of their differences.

    A matrix or convolution called `weight` gets a pair. Other tensors are saved whole, with the other tensors of their
    module: norms, biases, buffers, and a head that only `tuned` has. `layout` states how matrices are stored where the
    base does not. `exclude` are tensors, modules or globs: what differs there is left out. Names are those of the
    model as transformers loads it.

    Peak memory is the adapter and one block of a difference. Raises InputRefused, with all names, for tensors that only
    the base has, or with other shapes; for changes that no PEFT adapter holds; and where nothing differs.
    """
    if not base.specs:
        raise InputRefused(f"{base.path} contains no tensor")
    check_stated(layout or {}, {spec.name: spec for spec in base.specs})
    return _Extraction(base, tuned, truncation, layout or {}, exclude, progress).result(name)


def _is_named(tensor: str, glob: str) -> bool:
    """Whether a tensor has this name, or its module has it, or a glob matches it."""
    return fnmatch.fnmatchcase(tensor, glob) or tensor.rpartition(".")[0] == glob


@dataclass(eq=False)
class _Extraction:
    """Tensors have their names in the loaded model, those of TUNED: where it has a head, the others have a prefix."""

    base: Checkpoint
    tuned: Checkpoint
    truncation: Truncation
    layout: Mapping[str, str]
    exclude: Sequence[str]
    progress: OnBytesWritten

    def __post_init__(self) -> None:
        self.new, self.converted = _tensors(self.tuned)
        old, _ = _tensors(self.base)
        prefix = _prefix(old, self.new)
        self.old = {prefix + name: tensor for name, tensor in old.items()}
        self.specs = {spec.name: spec for spec in self.base.specs}
        ties = ties_of(self.base, Tied.ERROR)
        self.unstored = {name: of for name, of in ties.tensors.items() if name not in self.specs}  # tied tensors
        self.evidence = LayoutEvidence(self.specs, {})
        self.pairs: dict[str, LoraPair] = {}
        self.layouts: dict[str, str] = {}
        self.tied: dict[str, str] = {}  # output embeddings -> input embeddings
        self.layers: list[LayerShare] = []
        self.excluded: list[str] = []
        self.others: list[str] = []  # tensors that differ and get no pair
        self.problems: list[str] = []

    def result(self, name: str) -> Extracted:
        for glob in self.exclude:
            if not any(_is_named(tensor, glob) for tensor in (*self.old, *self.new)):
                raise InputRefused(f"{named('exclude', glob)}: no tensor has this name")
        for tensor in {**self.old, **self.new}:
            if any(_is_named(tensor, glob) for glob in self.exclude):
                if self._differs(tensor):
                    self.excluded.append(tensor)
            else:
                self._take(tensor)
            self.progress(self.old[tensor].entry.nbytes if tensor in self.old else 0)
        whole = dict(self._whole_tensors())
        if self.problems:
            raise InputRefused(
                f"{len(self.problems)} differences between {self.base.path} and {self.tuned.path} are none of a PEFT "
                "adapter:",
                listed(self.problems),
                f"{named('exclude', 'NAME')} (a tensor, a module or a glob) leaves them out of the adapter",
            )
        if not self.pairs and not whole:
            what = f"all that differs from {self.base.path} is excluded ({named('exclude')})"
            what = what if self.excluded else f"it has the weights of {self.base.path}"
            raise InputRefused(f"there is nothing to extract from {self.tuned.path}: {what}")
        adapter = Adapter(name, "extracted", self.pairs, replaced=whole, layouts=self.layouts, tied=self.tied)
        return Extracted(adapter, tuple(self.layers), tuple(whole), tuple(self.excluded))

    def _differs(self, tensor: str) -> bool:
        if tensor not in self.new or tensor not in self.old:
            return True
        old, new = self.old[tensor], self.new[tensor]
        return old.entry.shape != new.entry.shape or not have_equal_bits(old, new)

    # --- one tensor ---

    def _take(self, tensor: str) -> None:
        if tensor not in self.new:
            self.problems.append(f"{tensor} {self.old[tensor].entry.shape}: only BASE has it")
            return
        if tensor not in self.old:  # of a new head
            self.others.append(tensor)
            return
        old, new = self.old[tensor], self.new[tensor]
        if old.entry.shape != new.entry.shape:
            self.problems.append(f"{tensor}: BASE has {old.entry.shape}, TUNED {new.entry.shape}")
        elif not math.prod(old.entry.shape):
            return
        elif not self._may_have_pair(tensor) or str(new.entry.dtype) not in FLOATS:
            if not have_equal_bits(old, new):
                self.others.append(tensor)
        else:
            difference = Difference(old, new)
            if difference.energy and (problem := self._problem_of_pair(tensor)):
                self.problems.append(f"{tensor}: {problem}")
            elif difference.energy:
                self._add_pair(tensor, difference)

    def _spec(self, tensor: str) -> TensorSpec:
        return self.specs[self.old[tensor].name]

    def _may_have_pair(self, tensor: str) -> bool:
        """Whether LoRA has a layer for this tensor.

        A convolution with one channel for each group is left to PEFT as a whole: its LoRA mixes the channels.
        """
        spec = self._spec(tensor)
        is_depthwise = len(spec.shape) > 2 and spec.shape[1] == 1 and spec.shape[0] > 1
        return tensor.endswith(".weight") and 2 <= len(spec.shape) <= 5 and spec.is_float and not is_depthwise

    def _problem_of_pair(self, tensor: str) -> str:
        spec = self._spec(tensor)
        if tensor in self.converted:
            return "transformers joins it with other tensors, or splits it, when it loads the model"
        if self._layout(spec) is Layout.UNKNOWN:
            stated = named("layout", {tensor: "out_in"})
            return f"how it is stored is unknown. State it by {stated} (nn.Linear), or as in_out (Conv1D)"
        if spec.aliases:
            return f"it is {' and '.join(spec.aliases)} too (the header of the file ties them)"
        heads = (f"{tied_head(self._architecture)}.weight",) if self._is_tied_table(tensor) else ()
        names = [name for name, of in self.unstored.items() if of == spec.name and name not in heads]
        if names and self._layout(spec) is Layout.EMBEDDING:
            return f"it is {', '.join(names)} too, which BASE does not store: a pair would change the table alone"
        if self._is_tied_table(tensor) and not tied_head(self._architecture):
            return (
                "the input embeddings are the output embeddings too (tie_word_embeddings), and the name of these in "
                f"{self._architecture} is not known"
            )
        return ""

    def _layout(self, spec: TensorSpec) -> Layout:
        if len(spec.shape) > 2:
            return Layout.OUT_IN
        if is_embedding(spec.name.removesuffix(".weight")):
            return Layout.EMBEDDING
        if spec.layout is Layout.UNKNOWN:
            stated = stated_layout(spec.name, self.layout)
            found = list(self.evidence.of(spec.name)) if stated is None else [stated]
            return found[0] if len(found) == 1 else Layout.UNKNOWN
        return Layout.IN_OUT if spec.layout is Layout.IN_OUT else Layout.OUT_IN

    @property
    def _architecture(self) -> str:
        return str((self.base.config.get("architectures") or [""])[0])

    @functools.cached_property
    def _tied_table(self) -> str:
        """The input embeddings of a language model that are the output embeddings too; empty where none are."""
        tables = word_tables(self.base, self.specs.values())
        is_tied = len(tables) == 1 and self.base.config.get(TIED, True) and WORD_HEAD.search(self._architecture)
        return tables[0] if is_tied else ""

    def _is_tied_table(self, tensor: str) -> bool:
        return is_embedding(tensor.removesuffix(".weight")) and self._spec(tensor).name == self._tied_table

    def _add_pair(self, tensor: str, difference: Difference) -> None:
        spec = self._spec(tensor)
        values, layout = difference.singular_values(self.truncation), self._layout(spec)
        rank = self.truncation.rank_of(values)
        module = tensor.removesuffix(".weight")
        shape = spec.shape[::-1] if layout.is_transposed else spec.shape
        self.pairs[module] = _pair(values, rank, shape, layout)
        if len(shape) == 2 and layout is not Layout.EMBEDDING:
            self.layouts[module] = layout.value
        if self._is_tied_table(tensor):  # PEFT has the same pair for both, transposed (ensure_weight_tying)
            head = tied_head(self._architecture)
            self.pairs[head], self.tied[head] = self.pairs[module].transposed, module
        norm = math.sqrt(difference.energy)
        self.layers.append(LayerShare(module, shape, rank, min(difference.shape), values.captured(rank), norm))

    # --- tensors that are saved whole ---

    def _whole_tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The other tensors that differ or are new, with all those of their modules."""
        seen: set[str] = set()
        for tensor in self.others:
            module, _, kind = tensor.rpartition(".")
            if tensor in self.converted or not module:
                why = "transformers joins or splits it" if module else "it is a parameter of the model itself"
                self.problems.append(f"{tensor}: no module that PEFT could save has it ({why})")
            elif module in self.pairs:
                if kind == "bias":
                    yield tensor, self._read(tensor)
                else:
                    self.problems.append(f"{tensor}: its module has a pair, and PEFT saves its bias alone beside that")
            elif len(self.new[tensor].entry.shape) > 2 and kind != "weight":
                self.problems.append(f"{tensor}: a parameter of {module}, such as experts, of which no pair is made")
            elif any("." in name.removeprefix(f"{module}.") for name in self.new if name.startswith(f"{module}.")):
                self.problems.append(f"{tensor}: a parameter of {module}, which has other modules: PEFT would save all")
            elif module not in seen:
                seen.add(module)
                yield from ((name, self._read(name)) for name in self.new if name.rpartition(".")[0] == module)

    def _read(self, tensor: str) -> NDArray[Any]:
        return self.new[tensor].file.read(self.new[tensor].name)


def _tensors(checkpoint: Checkpoint) -> tuple[dict[str, TensorInFile], set[str]]:
    """The tensors by their names in the loaded model; those that are joined or split there by the names in the file.

    The second result is the names of the latter.
    """
    stored = {name: TensorInFile(file, name) for file in checkpoint.shards.values() for name in file.entries}
    if checkpoint.rules is None:
        return stored, set()
    loaded = {tensor.stored: name for name, tensor in LoadedNames(checkpoint.rules, stored).items() if tensor.stored}
    return {loaded.get(name, name): tensor for name, tensor in stored.items()}, set(stored) - set(loaded)


def _prefix(old: Iterable[str], new: Collection[str]) -> str:
    """What precedes all names of the base in the tuned model, which has a head; empty where that is nothing."""
    first, *others = old
    candidates = [name.removesuffix(first) for name in new if name.endswith(f".{first}")]
    if first in new:
        return ""
    return next((p for p in candidates if all(p + name in new for name in others)), "")


def _pair(values: SingularValues, rank: int, shape: Sequence[int], layout: Layout) -> LoraPair:
    a, b = values.factors(rank)
    if layout.is_transposed:
        a, b = b.T, a.T
    kernel = [1] * (len(shape) - 2)
    return LoraPair(
        a.reshape(rank, *shape[1:]), b.reshape(-1, rank, *kernel), 1.0, embedding=layout is Layout.EMBEDDING
    )
