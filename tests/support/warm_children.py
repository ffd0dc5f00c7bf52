"""Processes that run TorchScript files, for tests that are about something else: PyTorch is imported once for them all.

A server imports the module that the package would start in a fresh interpreter, and forks for each file. What runs in
the process is the package's own. Tests of the isolation itself start it as the package does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from lora_export.isolation.process import IsolatedProcess
from lora_export.runtime.torchscript.runner import CHILD

TESTS = Path(__file__).resolve().parents[1]
SERVER = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from support.warm_children import serve; serve()"
LONGEST = 1 << 17  # bytes of a request
NUMBER = struct.Struct("<i")
use = SimpleNamespace(warm=False)  # whether the test that runs gets such processes


# --- the server ---


def serve() -> None:
    """Fork for each request, until the parent ends."""
    importlib.import_module(CHILD)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are waited for by nobody
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        request, descriptors, *_ = socket.recv_fds(control, LONGEST, 3)
        if not request:
            return
        if not os.fork():
            _watch(json.loads(request), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Fork the process itself, and tell its number, then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = descriptors
    child = os.fork()
    if not child:
        _run(request, streams)
    for descriptor in streams:
        os.close(descriptor)
    os.write(told, NUMBER.pack(child))
    os.write(told, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def _run(request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    code = 1
    try:
        for descriptor, own in zip((*streams, os.open(os.devnull, os.O_WRONLY)), (0, 1, 2), strict=True):
            os.dup2(descriptor, own)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["-c", *request["arguments"]]
        sys.modules[CHILD].main()
        code = 0
    finally:
        os._exit(code)


# --- its client ---


class WarmChild:
    """Such a process, with the methods of `Popen` that are used."""

    def __init__(self, arguments: Sequence[object]) -> None:
        (stdin, requests), (answers, stdout), (self._told, told) = os.pipe(), os.pipe(), os.pipe()
        request = {"folder": str(Path.cwd()), "environment": dict(os.environ), "arguments": list(map(str, arguments))}
        socket.send_fds(_server(), [json.dumps(request).encode()], [stdin, stdout, told])
        for descriptor in (stdin, stdout, told):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        self._number, self._code = self._read(), None

    def _read(self) -> int:
        return int(NUMBER.unpack(os.read(self._told, NUMBER.size))[0])

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._number, signal.SIGKILL)

    def poll(self) -> int | None:
        return self.wait() if self._code is None and select.select([self._told], [], [], 0)[0] else self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = self._read()
            os.close(self._told)
        return self._code


@functools.cache
def _server() -> socket.socket:
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folders = f"{TESTS}:{TESTS.parent}"
    command = [sys.executable, "-P", "-c", SERVER, folders, str(its.fileno())]
    subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    its.close()
    return own


@functools.cache
def install() -> None:
    """TorchScript files of this process run in warm children from now on, where `use.warm`."""
    fresh = IsolatedProcess.start

    def start(module: str, *arguments: object, memory: int | None) -> IsolatedProcess:
        if not use.warm or module != CHILD:
            return fresh(module, *arguments, memory=memory)
        child = WarmChild(arguments)
        return IsolatedProcess(child, (child.stdin, child.stdout), memory)

    IsolatedProcess.start = start  # type: ignore[method-assign, assignment]
