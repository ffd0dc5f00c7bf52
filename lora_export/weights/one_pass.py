"""Merges of one base that are made in one pass over it: a block of the base is read once, for the outputs of all.

A merge is a generator. It yields each file that it is about to write (`FileCopy`), and goes on when that is written. So
a merge alone and one of several are the same code, with outputs, hashes and figures of their own. What goes wrong in
one merge is raised there, and the others go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from lora_export.storage.block_copy import Block, Copy, transfer_together
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.apply_step import Backend

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class FileCopy:
    """A file of an output that is to be written now."""

    source: TensorFile
    number: int  # of the source among the files of the base
    copy: Copy
    buffer_bytes: int
    backend: Backend
    on_block: Callable[[Block, Any], None]  # receives each block that is written, with what its work returned
    is_apart: bool = False  # its changes take what is made of a whole weight, and memory has that of few weights

    @property
    def pass_over(self) -> tuple[Path, str, Copy | None]:
        """What files have in common that one pass writes: the source, and how it is hashed."""
        return self.source.path, self.copy.hashes.algorithm, self.copy if self.is_apart else None


Merging = Generator[FileCopy, None, _T]


def alone(merging: Merging[_T]) -> _T:
    """The result of one merge. Raises what it raises."""
    (result,) = together([merging])
    if isinstance(result, Exception):
        raise result
    return result


def together(merges: Sequence[Merging[_T]]) -> list[_T | Exception]:
    """The result of each merge, or the error that ended it. Those that wait for the same file write it in one pass."""
    results: dict[int, _T | Exception] = {}
    waiting: dict[int, FileCopy] = {}

    def go_on(number: int, error: Exception | None = None) -> None:
        try:
            waiting[number] = next(merges[number]) if error is None else merges[number].throw(error)
        except StopIteration as end:
            results[number] = end.value
        except Exception as error:  # noqa: BLE001 - it ends this merge alone
            results[number] = error

    try:
        for number in range(len(merges)):
            go_on(number)
        while waiting:
            first = min(waiting.values(), key=lambda one: one.number)
            own = [number for number, one in waiting.items() if one.pass_over == first.pass_over]
            errors = _write([waiting[number] for number in own])
            for number in own:
                go_on(number, errors.get(waiting.pop(number)))
    finally:
        for merging in reversed(merges):  # after an interrupt. The first one may have made the folder of all outputs
            merging.close()
    return [results[number] for number in range(len(merges))]


def _write(files: Sequence[FileCopy]) -> dict[FileCopy, Exception]:
    """Write files of one source in one pass. Returns the errors that ended some of them."""
    by_copy, errors = {one.copy: one for one in files}, dict[FileCopy, Exception]()
    for one in files[1:]:
        one.copy.hashes.source = files[0].copy.hashes.source
    backend, size = files[0].backend, max(one.buffer_bytes for one in files)
    passing = transfer_together(
        files[0].source.path, list(by_copy), buffer_bytes=size, threads=backend.threads, memory=backend.memory
    )
    try:
        with threadpool_limits(1, user_api="blas"), contextlib.closing(passing):  # it has a thread for each core
            for copy, block, found, error in passing:
                ending = error or _error_of_callback(by_copy[copy], block, found)
                if ending is not None:
                    errors.setdefault(by_copy[copy], ending)
                if len(errors) == len(files):
                    break
    except Exception as error:  # noqa: BLE001 - of the source, which all of them need
        return dict.fromkeys(files, error) | errors
    return errors


def _error_of_callback(file: FileCopy, block: Block | None, found: Any) -> Exception | None:
    """Report a block that is written. Returns what that raises: it ends one merge alone."""
    try:
        if block is not None:
            file.on_block(block, found)
    except Exception as error:  # noqa: BLE001
        return error
    return None
