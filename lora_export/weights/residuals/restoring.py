"""`unmerge`: the base again, bit for bit, from merged weights, the adapters and a residual."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_export.errors import InputRefused
from lora_export.plan import Plan
from lora_export.storage import block_copy, input_files, json_files, safetensors_file
from lora_export.storage.block_copy import Block, Bytes
from lora_export.storage.hashes import ALGORITHMS, file_hash
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights import tensor_blocks
from lora_export.weights.checkpoint import CONFIG, Checkpoint, checkpoint_of_headers
from lora_export.weights.merge_report import OnBytesWritten
from lora_export.weights.residuals.archive import Residual, changed_tensors
from lora_export.weights.residuals.prediction import ChangedTensor, Predictor, add_differences, unpacked_differences


def base_of(residual: Residual, merged: Path) -> Checkpoint:
    """The headers of the base, as the residual has them. Raises InputRefused where they are damaged."""
    shards, config = {}, {}
    for name, facts in _shards(residual).items():
        _refuse_path(residual, name)
        header = residual.header(facts["number"])
        shards[name] = safetensors_file.file_of_header(merged / name, header, facts["base"]["bytes"])
    if CONFIG in residual.facts["files"]:
        config = json_files.parse_json(residual.read(f"file/{CONFIG}"), f"{CONFIG} in {residual.path}")
    return checkpoint_of_headers(merged, shards, config)


def restore_base(
    residual: Residual,
    plan: Plan | None,
    base: Checkpoint,
    merged: Path,
    stage: Path,
    *,
    file_name: str,
    progress: OnBytesWritten = lambda _: None,
) -> None:
    """Write the base into the folder `stage`: its weight files, and for a folder the files that the merge carried over.

    `plan` is that of the merge, None where nothing is subtracted. `base` is `base_of` the residual. Memory is a few
    blocks. Raises InputRefused where the merged weights are not those that the residual was made for, and where a file
    would differ from the base's own, by their hashes. Files that are in `stage` then stay there.
    """
    plan = plan or Plan((), (), (), (), name_prefix=str(residual.facts.get("name_prefix", "")))
    hashing, is_folder = residual.facts["hashing"], residual.facts.get("is_folder")
    with threadpool_limits(1, user_api="blas"):
        for name, facts in _shards(residual).items():
            opened = safetensors_file.open_file(merged / name if is_folder else merged)
            target = stage / (name if is_folder else file_name)
            _RestoredShard(residual, plan, base.shards[name], opened, facts).write(target, progress)
    for name, facts in residual.facts["files"].items():
        _refuse_path(residual, name)
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        if facts.get("stored"):
            (stage / name).write_bytes(residual.read(f"file/{name}"))
        elif (merged / name).is_file():
            input_files.copy_file(merged / name, stage / name)
        else:
            raise InputRefused(f"{merged} has no {name}, which the base had: it is not as the merge wrote it")
        if file_hash(stage / name, hashing) != facts.get("hash"):
            raise InputRefused(f"{merged / name} is not the file that the merge wrote")


def _shards(residual: Residual) -> Mapping[str, Any]:
    """The facts on the weight files, checked for what is used of them."""
    shards: Mapping[str, Any] = residual.facts["shards"]
    if residual.facts["hashing"] not in ALGORITHMS:
        raise InputRefused(f"{residual.path} has hashes that this version does not know: {residual.facts['hashing']}")
    for name, facts in shards.items():
        try:
            known = isinstance(facts["number"], int) and isinstance(facts["changed"], dict)
            known = known and all(isinstance(facts[side]["bytes"], int) for side in ("base", "merged"))
            known = known and all(isinstance(facts[side]["hash"], str) for side in ("base", "merged"))
        except (KeyError, TypeError):
            known = False
        if not known:
            raise InputRefused(f"{residual.path} is damaged: its facts on {name} are not those of a weight file")
    return shards


def _refuse_path(residual: Residual, name: str) -> None:
    """Raise InputRefused for a name that leads out of a folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise InputRefused(f"{residual.path} names the file {name!r}, which is outside the model")


@dataclass(frozen=True, eq=False)
class _RestoredShard:
    """A weight file of the base, from the merged one and the facts on it in the residual."""

    residual: Residual
    plan: Plan
    base: TensorFile
    merged: TensorFile
    facts: Mapping[str, Any]

    def write(self, target: Path, progress: OnBytesWritten) -> None:
        """Write the file. Raises InputRefused as `restore_base` does."""
        merged, source = self.merged, self.merged.path
        not_merged = f"{source} is not what the merge wrote: the residual belongs to other weights"
        lacks = any(self.plan.output_name(name) not in merged.entries for name in self.base.entries)
        if merged.size != self.facts["merged"]["bytes"] or lacks:
            raise InputRefused(not_merged)
        changed = self._changed()
        hashes = block_copy.RunningHashes(self.residual.facts["hashing"])
        header = self.residual.header(self.facts["number"])
        hashes.target.update(header)
        with (
            source.open("rb") as reader,
            target.open("xb") as writer,
            self.residual.stream(f"data/{self.facts['number']}") as read,
        ):
            hashes.source.update(reader.read(merged.data_start))
            block_copy.write(writer.fileno(), memoryview(header), 0)
            blocks = self._blocks(reader.fileno(), writer.fileno(), changed, _exactly(self.residual, read))
            size = max([block_copy.BLOCK, *map(_block_bytes, changed.values())])
            for block, _ in block_copy.transfer(source, writer.fileno(), blocks, hashes, buffer_bytes=size):
                progress(block.target_stop - block.target_start)
        if hashes.source.hexdigest() != self.facts["merged"]["hash"]:
            raise InputRefused(not_merged)
        if hashes.target.hexdigest() != self.facts["base"]["hash"]:
            raise InputRefused(
                f"{source}: the result would not be the base. The adapters or the options are others than those of the "
                "merge, or the residual is damaged"
            )

    def _changed(self) -> dict[str, ChangedTensor]:
        """The tensors in as many rows as the merge cut them in; without their steps where the plan is another one."""
        by_plan = {tensor.base.name: tensor for tensor in changed_tensors(self.plan, self.base, self.merged)}
        changed = {}
        for name, rows in self.facts["changed"].items():
            entry, tensor = self.base.entries.get(name), by_plan.get(name)
            if tensor is not None and tensor.rows == rows:
                changed[name] = tensor
                continue
            if entry is None or type(rows) is not int or rows < 0 or (rows and math.prod(entry.shape) % rows):
                raise InputRefused(
                    f"{self.residual.path} is damaged: it has differences of {name}, which the base has not"
                )
            changed[name] = ChangedTensor(entry, self.merged.entries[self.plan.output_name(name)], (), rows)
        return changed

    def _blocks(
        self, read_fd: int, write_fd: int, changed: Mapping[str, ChangedTensor], read: Callable[[int], bytes]
    ) -> Iterator[Block]:
        """All data of the merged file, in its order; what it has more than the base is read for its hash."""
        position = self.merged.data_start
        for entry in self.base.entries.values():
            source = self.merged.entries[self.plan.output_name(entry.name)]
            if source.start < position:
                raise InputRefused(f"{self.merged.path} has its tensors in another order than the merge wrote them")
            yield from tensor_blocks.skipped_blocks(position, entry.start, source.start - position)
            position = source.stop
            if entry.name in changed:
                yield from _changed_blocks(changed[entry.name], read)
            elif source.nbytes != entry.nbytes:
                raise InputRefused(f"{self.merged.path}: {source.name} has another size than in the base")
            else:
                yield from tensor_blocks.copied_blocks(read_fd, write_fd, source.start, entry.start, source.nbytes)
        yield from tensor_blocks.skipped_blocks(position, self.base.size, self.merged.size - position)


def _exactly(residual: Residual, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def read_exactly(count: int) -> bytes:
        data = read(count)
        if len(data) != count:
            raise InputRefused(f"{residual.path} is damaged: it ends too early")
        return data

    return read_exactly


def _changed_blocks(tensor: ChangedTensor, read: Callable[[int], bytes]) -> Iterator[Block]:
    predictor, columns = Predictor(tensor), tensor.shape[1]
    old, new = (columns * entry.dtype.itemsize for entry in (tensor.base, tensor.merged))
    for rows in tensor.pieces():
        differences = unpacked_differences(read, (rows.stop - rows.start) * columns, tensor.base.dtype.itemsize)
        yield Block(
            tensor.merged.start + rows.start * new,
            tensor.merged.start + rows.stop * new,
            tensor.base.start + rows.start * old,
            tensor.base.start + rows.stop * old,
            work=functools.partial(_restore_rows, predictor, rows, differences),
        )


def _restore_rows(
    predictor: Predictor, rows: slice, differences: Any, source: Bytes, target: Bytes, _scratch: Bytes
) -> None:
    merged = source.view(predictor.tensor.merged.dtype).reshape(rows.stop - rows.start, -1)
    target[:] = add_differences(predictor.rows(rows, merged), differences).view(np.uint8)


def _block_bytes(tensor: ChangedTensor) -> int:
    rows = next(tensor.pieces(), slice(0, 0))
    itemsize = max(tensor.base.dtype.itemsize, tensor.merged.dtype.itemsize)
    return (rows.stop - rows.start) * tensor.shape[1] * itemsize
