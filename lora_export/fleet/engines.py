"""Where jobs run: processes of this machine, or Ray. Both schedule by themselves, and give a future for each job.

Imports nothing heavy: a process of the pool imports this file before it knows how many threads it may use.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from lora_export.fleet.worker import JobBatch, perform

JobRecords = list[dict[str, Any]]
TRIES_OF_JOB = 3  # of a job whose worker dies
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerDied(Exception):
    """A worker ended before its job, by a signal or for lack of memory. The text is the reason."""


class Engine(Protocol):
    """Something that runs jobs."""

    at_once: int  # batches that are given to it at the same time
    workers: int  # that work at the same time
    is_tried_again: bool  # a job whose worker died has to be given to it again

    def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[JobRecords]:
        """Start jobs, or let them wait for a free worker. `memory` is in bytes."""

    def died(self, error: BaseException) -> str:
        """Why the worker of a job died, if that is what the error of a future means; else empty."""


@contextlib.contextmanager
def processes(number: int) -> Iterator[Engine]:
    """Processes of this machine. Their jobs are ended where the block ends with an exception."""
    engine = _Processes(number)
    before = multiprocessing.active_children()
    try:
        yield engine
    except BaseException:
        engine.pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - set(before):
            process.terminate()  # it ends its job as Ctrl-C does: nothing unfinished is left
        raise
    finally:
        engine.pool.shutdown()


class _Processes:
    is_tried_again = True

    def __init__(self, number: int):
        self.at_once = self.workers = number
        self.pool = self._new_pool()

    def _new_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        context = multiprocessing.get_context(
            "spawn"
        )  # a copy of this process would have its locks, without its threads
        return concurrent.futures.ProcessPoolExecutor(self.at_once, context, _begin, (threads,))

    def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[JobRecords]:  # noqa: ARG002
        try:
            return self.pool.submit(perform, batch)
        except BrokenProcessPool:
            self.pool = self._new_pool()
            return self.pool.submit(perform, batch)

    def died(self, error: BaseException) -> str:
        return "its process ended, by a signal or for lack of memory" if isinstance(error, BrokenProcessPool) else ""


def _begin(threads: int) -> None:
    """Prepare a process of the pool: its number of threads, and how it is ended."""
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def require_ray() -> Any:
    """The package ray. Raises EnvironmentLacking where it is missing."""
    from lora_export.errors import EnvironmentLacking
    from lora_export.extras import pip_install

    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise EnvironmentLacking(f"a fleet on Ray needs the package ray ({error}): {pip_install('fleet')}") from error


@contextlib.contextmanager
def on_ray(address: str, number: int) -> Iterator[Engine]:
    """A cluster of Ray by its address, `auto` or `local`. `number` is that of CPUs of a local one, if above 1."""
    from lora_export.errors import EnvironmentLacking

    ray = require_ray()
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "WARNING"}
    if address == "local":
        settings |= {"include_dashboard": False, **({"num_cpus": number} if number > 1 else {})}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints notices, and stdout has the result alone
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EnvironmentLacking(f"Ray does not start or answer at {address}: {error}") from error
        with contextlib.suppress(ValueError):  # Ray sets its own handlers, unless this is no main thread
            for number, handler in handlers.items():
                signal.signal(number, handler)
        engine = _Ray(ray, ray.cluster_resources() if address == "local" else None)
        try:
            yield engine
        except BaseException:
            engine.cancel()
            raise
        finally:
            ray.shutdown()


class _Ray:
    at_once = 1000
    is_tried_again = False  # Ray does it itself, on another worker

    def __init__(self, ray: Any, most: Mapping[str, float] | None):
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._ray, self._most, self._references = ray, most, dict[concurrent.futures.Future[JobRecords], Any]()
        self._perform = ray.remote(max_retries=TRIES_OF_JOB - 1, retry_exceptions=False)(perform)

    def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[JobRecords]:
        requested = {"memory": memory, "GPU": int(on_gpu)}
        if self._most is not None:  # a cluster may grow; here the job itself tells what is missing
            requested = {name: min(number, int(self._most.get(name, 0))) for name, number in requested.items()}
        memory, gpus = requested["memory"], requested["GPU"]
        reference = self._perform.options(memory=memory, num_gpus=gpus, name=batch.name).remote(batch)
        future: concurrent.futures.Future[JobRecords] = reference.future()
        self._references[future] = reference
        future.add_done_callback(lambda done: self._references.pop(done, None))
        return future

    def died(self, error: BaseException) -> str:
        return "" if not isinstance(error, self._ray.exceptions.RayError) else str(error).splitlines()[0]

    def cancel(self) -> None:
        """End the jobs that run, as Ctrl-C does, and wait for that: nothing unfinished is left."""
        references = list(self._references.values())
        for reference in references:
            self._ray.cancel(reference)
        self._ray.wait(references, num_returns=len(references), timeout=30) if references else None
