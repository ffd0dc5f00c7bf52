"""Audits of several merges of one base, tensor by tensor in step: what all of them read of the base is read once.

Each audit has a thread. One at a time, they go on until they have their judgements. Then the tensors of the base are
judged one after the other, and of each the judgements of all audits at once. Who needs bytes of the base waits until
every other audit needs some too, or is through with this tensor. What several need is then read once, and copied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from lora_export.runtime.runs_in_step import InTurn
from lora_export.storage.file_pieces import PiecesAhead, read_piece
from lora_export.verification.against_checkpoint.result import AuditedWeight

_T = TypeVar("_T")
OnJudged = Callable[[int], None]
TIME_TO_END = 2.0  # seconds in which audits end after Ctrl-C; one that hashes a large file is left to the process's end


@dataclass(frozen=True, eq=False)
class Judgement:
    """What one thread does at a time: a tensor, or a part of one. It returns None where there is nothing to judge."""

    nbytes: int
    judge: Callable[[], AuditedWeight | None]


@dataclass(eq=False)
class _Read:
    """Bytes of the base that an audit waits for."""

    path: Path
    position: int
    buffer: Any
    until: int
    is_done: bool = False
    error: Exception | None = None

    @property
    def key(self) -> tuple[Path, int, int]:
        return self.path, self.position, len(self.buffer)


class _SharedReads:
    """What some audits read of one tensor."""

    def __init__(self, readers: int):
        self._readers, self._waiting, self._changed = readers, list[_Read](), threading.Condition()
        self._pieces = PiecesAhead()

    def read(self, one: _Read) -> None:
        with self._changed:
            self._waiting.append(one)
            self._read_together()
            self._changed.wait_for(lambda: one.is_done)
        if one.error is not None:
            raise one.error

    def leave(self) -> None:
        """One of the audits is through with the tensor."""
        with self._changed:
            self._readers -= 1
            self._read_together()

    def _read_together(self) -> None:
        if len(self._waiting) < self._readers:
            return
        first: dict[tuple[Path, int, int], _Read] = {}
        for one in self._waiting:
            like = first.setdefault(one.key, one)
            if like is one:
                self._read_now(one)
            else:
                one.buffer[:], one.error = like.buffer, like.error
            one.is_done = True
        self._waiting.clear()
        self._changed.notify_all()

    def _read_now(self, one: _Read) -> None:
        try:
            self._pieces.read(one.path, one.buffer, one.position, one.until)
        except Exception as error:  # noqa: BLE001 - each audit that needs these bytes raises it
            one.error = error


class AuditInStep(InTurn[_T]):
    """One of several audits. `function` does it, and receives this object. It waits for the results of judgements."""

    def __init__(self, function: Callable[[AuditInStep[_T]], _T]):
        super().__init__(lambda: function(self))
        self.judgements: dict[str, list[Judgement]] = {}  # by tensor of the base
        self.found: dict[Judgement, Any] = {}
        self.on_judged: OnJudged = lambda _: None
        self.error: Exception | None = None  # of a judgement: it ends the audit
        self._reads: _SharedReads | None = None

    def judge_all(
        self, tensors: Sequence[str], by_tensor: Sequence[Sequence[Judgement]], on_judged: OnJudged
    ) -> list[Any]:
        """As `audit_checkpoint.judge_all`, once all audits have their judgements. `tensors` are those of the base."""
        self.judgements, self.on_judged = {}, on_judged
        for tensor, own in zip(tensors, by_tensor, strict=True):
            self.judgements.setdefault(tensor, []).extend(own)
        self.wait_for(self.judgements)
        return [self.found[one] for own in by_tensor for one in own]

    def read(self, path: Path, buffer: Any, position: int, until: int) -> None:
        """Fill a buffer from a position of a file of the base, whose bytes are read on up to `until`.

        Raises InputRefused where the file ends before.
        """
        if self._reads is None:
            read_piece(path, buffer, position)
        else:
            self._reads.read(_Read(path, position, buffer, until))

    def judge(self, tensor: str, reads: _SharedReads) -> None:
        """Judge a tensor of the base. Errors are kept."""
        self._reads = reads
        try:
            for one in self.judgements[tensor]:
                self.found[one] = one.judge()
        except Exception as error:  # noqa: BLE001 - it ends this audit alone
            self.error = error
        finally:
            self._reads = None
            reads.leave()


def audits_in_step(functions: Sequence[Callable[[AuditInStep[_T]], _T]]) -> list[_T | Exception]:
    """What each function returns, or the error that it raises."""
    audits = [AuditInStep(function) for function in functions]
    try:
        for one in audits:
            one.advance()
        while waiting := [one for one in audits if one.request is not None]:
            _judge(waiting)
            for one in waiting:
                one.advance(one.error)
    except BaseException as error:  # Ctrl-C: all of them end, too
        for one in audits:
            one.end(error)
        until = time.monotonic() + TIME_TO_END
        for one in audits:
            one.join(max(0, until - time.monotonic()))
        raise
    return [_returned(one) for one in audits]


def _returned(audit: AuditInStep[Any]) -> Any:
    try:
        return audit.result
    except Exception as error:  # noqa: BLE001 - the caller gets it
        return error


def _judge(audits: Sequence[AuditInStep[Any]]) -> None:
    """Judge all tensors, the largest first."""
    sizes: dict[str, int] = {}
    for audit in audits:
        for tensor, own in audit.judgements.items():
            sizes[tensor] = max(sizes.get(tensor, 0), sum(one.nbytes for one in own))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(len(audits)) as pool:
        for tensor in sorted(sizes, key=lambda name: -sizes[name]):
            having = [audit for audit in audits if tensor in audit.judgements and audit.error is None]
            reads = _SharedReads(len(having))
            for future in [pool.submit(audit.judge, tensor, reads) for audit in having]:
                future.result()
            for audit in having:
                audit.on_judged(sum(one.nbytes for one in audit.judgements[tensor]))
