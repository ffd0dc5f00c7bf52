"""Where jobs run: processes of this machine, or Ray. Both schedule by themselves, and give a future for each job.

An engine is made for a function, which it calls with a request in another process. Both are pickled: the function by
its name, and the request has no weights, which are in files. Imports nothing heavy: a process of the pool imports this
file before it knows how many threads it may use.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from lora_export.errors import EnvironmentLacking, first_line
from lora_export.extras import optional_package

TRIES_OF_JOB = 3  # of a job whose worker dies
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Request(Protocol):
    """What a worker needs of a job. It is pickled."""

    @property
    def name(self) -> str:
        """What a cluster shows of it."""


_R = TypeVar("_R", bound=Request)
Perform = Callable[[Any], Any]  # what a worker does with a request, and returns


class Engine(Protocol):
    """Something that runs jobs."""

    at_once: int  # jobs that are given to it at the same time
    workers: int  # that work at the same time
    memory_of_worker: int | None  # bytes that each may take without others waiting for it, where the engine knows it
    is_tried_again: bool  # a job whose worker died has to be given to it again

    def submit(self, request: Request, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[Any]:
        """Start a job, or let it wait for a free worker. `memory` is in bytes."""

    def died(self, error: BaseException) -> str:
        """Why the worker of a job died, if that is what the error of a future means; else empty."""


@contextlib.contextmanager
def processes(perform: Perform, number: int) -> Iterator[Engine]:
    """Processes of this machine. Their jobs are ended where the block ends with an exception, and with this process."""
    engine = _Processes(perform, number)
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
    memory_of_worker: int | None = None

    def __init__(self, perform: Perform, number: int):
        self._perform, self.at_once, self.workers = perform, number, number
        self.pool = self._new_pool()

    def _new_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        # A copy of this process would have its locks, without its threads.
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(self.at_once, context, _begin, (threads,))

    def submit(self, request: Request, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[Any]:  # noqa: ARG002
        with _interrupts_later():
            try:
                return self.pool.submit(self._perform, request)
            except BrokenProcessPool:
                self.pool = self._new_pool()
                return self.pool.submit(self._perform, request)

    def died(self, error: BaseException) -> str:
        return "its process ended, by a signal or for lack of memory" if isinstance(error, BrokenProcessPool) else ""


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let Ctrl-C wait, here and in processes that are started: it would end these with a traceback before `_begin`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(threads: int) -> None:
    """Prepare a process of the pool: its number of threads, where it prints, and how it is ended."""
    with contextlib.suppress(OSError):  # stderr is closed
        os.dup2(2, 1)  # stdout has the result of the first process alone
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process ends the others
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process where the first one was killed: the next run writes the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def on_ray(perform: Perform, address: str, number: int) -> Iterator[Engine]:
    """A cluster of Ray by its address, `auto` or `local`. `number` is that of CPUs of a local one, if above 1.

    Raises EnvironmentLacking where Ray is not installed, does not start or does not answer.
    """
    from lora_export.options.spelling import named

    ray = optional_package("ray", f"{named('ray', address)} needs the package", "fleet")
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "WARNING"}
    if address == "local":
        settings |= {"include_dashboard": False, **({"num_cpus": number} if number > 1 else {})}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints notices, and stdout has the result alone
        try:
            ray.init(**settings)
        except Exception as error:  # on a busy machine, Ray itself raises a plain Exception
            raise EnvironmentLacking(f"Ray does not start or answer at {address}: {error}") from error
        with contextlib.suppress(ValueError):  # Ray sets its own handlers, unless this is no main thread
            for number, handler in handlers.items():
                signal.signal(number, handler)
        engine = _Ray(ray, perform, ray.cluster_resources() if address == "local" else None)
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

    def __init__(self, ray: Any, perform: Perform, most: Mapping[str, float] | None):
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # A task that asks for more than the largest node has would wait for ever.
        shares = (int(one["memory"] // one["CPU"]) for one in nodes if one.get("CPU") and "memory" in one)
        self.memory_of_worker = max(shares, default=None)
        self._ray, self._most, self._references = ray, most, dict[concurrent.futures.Future[Any], Any]()
        self._perform = ray.remote(max_retries=TRIES_OF_JOB - 1, retry_exceptions=False)(perform)

    def submit(self, request: Request, memory: int, *, on_gpu: bool) -> concurrent.futures.Future[Any]:
        requested = {"memory": memory, "GPU": int(on_gpu)}
        if self._most is not None:  # a cluster may grow; here the job itself tells what is missing
            requested = {name: min(number, int(self._most.get(name, 0))) for name, number in requested.items()}
        memory, gpus = requested["memory"], requested["GPU"]
        reference = self._perform.options(memory=memory, num_gpus=gpus, name=request.name).remote(request)
        future: concurrent.futures.Future[Any] = reference.future()
        self._references[future] = reference
        future.add_done_callback(lambda done: self._references.pop(done, None))
        return future

    def died(self, error: BaseException) -> str:
        known = self._ray.exceptions
        is_death = isinstance(error, known.RayError) and not isinstance(error, known.RayTaskError)  # which a job raised
        return first_line(error) if is_death else ""

    def cancel(self) -> None:
        """End the jobs that run, as Ctrl-C does, and wait for that: nothing unfinished is left."""
        references = list(self._references.values())
        for reference in references:
            self._ray.cancel(reference)
        self._ray.wait(references, num_returns=len(references), timeout=30) if references else None


# --- Requests that need nothing of each other: all of them are done, also those whose worker dies ---


def each_result(engine: Engine, requests: Iterable[_R], memory: int) -> Iterator[tuple[_R, Any]]:
    """Yield each request with what came of it, in the order in which they end. `memory` is that of one, in bytes.

    The death of a process ends all that run beside it. These are tried again one at a time, so that one that takes all
    memory ends no other. Raises EnvironmentLacking where one ended its worker TRIES_OF_JOB times, and what the
    function of the engine raises.
    """
    waiting = [(request, 1) for request in reversed(list(requests))]  # with the number of the try; the last is next
    running: dict[concurrent.futures.Future[Any], tuple[_R, int]] = {}
    while waiting or running:
        while waiting and _has_place(waiting[-1][1], [tries for _, tries in running.values()], engine.at_once):
            request, tries = waiting.pop()
            running[engine.submit(request, memory, on_gpu=False)] = request, tries
        for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
            request, tries = running.pop(future)
            error = future.exception()
            if error is None:
                yield request, future.result()
            elif not (reason := engine.died(error)):
                raise error
            elif engine.is_tried_again and tries < TRIES_OF_JOB:
                waiting.append((request, tries + 1))
            else:
                raise EnvironmentLacking(f"{request.name}: {reason} ({TRIES_OF_JOB} times)")


def _has_place(tries: int, running: Sequence[int], at_once: int) -> bool:
    """Whether a request may run beside others, by the number of its try and of theirs: a second try runs alone."""
    return not running or (max(tries, *running) == 1 and len(running) < at_once)
