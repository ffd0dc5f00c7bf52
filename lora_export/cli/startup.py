"""Faster start and end of a short command, in a process that the command owns.

Merging half a gigabyte takes less time than importing every package. Measured processor time on a quiet machine: 200 ms
for sympy, which onnx_ir imports for symbolic dimensions that no merge has; 60 ms for the garbage collector, which scans
objects that stay until the end; 20 ms for OpenBLAS's threads, which a merge does not use because it has its own.

At the end, Python frees each object of each module: 1.0 to 1.5 s where PyTorch was imported. The system takes no time.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_export.callbacks import OnProgress, Progress

TYPES_OF_ARRAYS = {"numpy._typing", "numpy.typing"}  # NumPy and we import NDArray of them alone
INSTALLED_VERSIONS = "importlib.metadata"  # it imports the package email, and onnx asks it for its own version alone
# Each is loaded when an attribute of it is first used, which a merge never does.
DEFERRED = frozenset(
    {
        *("sympy", "onnx_ir._symbolic_shapes"),  # the second imports the first
        *("onnx.serialization", "google.protobuf.text_encoding"),  # as text
        *("google.protobuf.descriptor_database", "google.protobuf.internal.python_message"),  # its C code has both
        *("onnx.compose", "onnx.gen_proto", "onnx.helper", "onnx.numpy_helper", "onnx.parser", "onnx.printer"),
        *("onnx.shape_inference", "onnx.utils", "onnx.version_converter"),
        *("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars"),  # the docstrings of NumPy's functions
        *("onnx_ir.passes", "onnx_ir.schemas"),
        "packaging.version",  # for comparisons of versions in onnx_ir, which no merge needs
        *("ipaddress", "pickle", "tempfile", "tokenize"),  # that others import
        *TYPES_OF_ARRAYS,
        INSTALLED_VERSIONS,
    }
)

# Collections of young objects between two full ones. With Python's 10, importing PyTorch and transformers has eight
# full ones, each of which scans all modules again: 1.3 s of the 10 s of processor time of a small model's proof. A
# small proof has 102 of the others, and an export with its proof 151.
BETWEEN_FULL_COLLECTIONS = 200

# What importing NumPy takes of the addresses of a process: 84 MiB with one thread of OpenBLAS, and some for other
# versions. A merge takes more.
NUMPY_BYTES = 96 << 20

_process_is_ours = False
_exit_code: int | None = None  # with which a process of ours ends, once it is known


def take_process() -> None:
    """Declare that the command line owns this process. Without it, `brisk` and `end_with` do nothing."""
    global _process_is_ours  # noqa: PLW0603 - a process is one
    _process_is_ours = True
    # What was to run at the end before, such as a measurement of coverage, would not run.
    if _is_whole_program() and not atexit._ncallbacks():
        atexit.register(_end)  # the first one registered runs last
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, BETWEEN_FULL_COLLECTIONS)


def end_with(code: int) -> None:
    """Let a process of ours end with this exit code after all that runs at the end, and without freeing its objects."""
    global _exit_code  # noqa: PLW0603 - a process is one
    _exit_code = code


def _is_whole_program() -> bool:
    """Whether Python runs `lora-export` or `python -m lora_export`, and no script that calls `main` and goes on."""
    program = sys.modules.get("__main__")
    name = getattr(getattr(program, "__spec__", None), "name", None)
    return name == "lora_export.__main__" or os.path.basename(getattr(program, "__file__", None) or "") == "lora-export"  # noqa: PTH119


def _end() -> None:
    user_code = sys.modules.get("lora_export.user_code")
    # After an error of ours, Python shows it. Code of the user may have written to files that it left open.
    if _exit_code is None or (user_code is not None and user_code.has_run):
        return
    with contextlib.suppress(OSError, ValueError):  # Python reports what it cannot write
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(_exit_code)


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Import packages and read headers in less time.

    Objects made inside are never scanned for garbage: they are used until the process ends. An import of NumPy raises
    MemoryError where it does not fit with one thread: OpenBLAS would end the process, with the code of a bug.
    """
    if not _process_is_ours:
        yield
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read once, when numpy is imported
    with _deferring():
        yield


def brisk_imports() -> AbstractContextManager[None]:
    """As `brisk`, for what the command line itself imports, before anybody has declared whose process it is."""
    return _deferring() if _is_whole_program() else contextlib.nullcontext()


@contextlib.contextmanager
def _deferring() -> Iterator[None]:
    finder = _Deferring()
    sys.meta_path.insert(0, finder)
    gc.disable()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        gc.freeze()
        gc.enable()


def frozen_at_first(on_progress: OnProgress) -> OnProgress:
    """The callback. At its first call, what a process of ours has made is not scanned for garbage any more.

    These are modules, half of them PyTorch's, and in a training the weights. They are used until the process ends.
    """
    is_first = True

    def show(event: Progress) -> None:
        nonlocal is_first
        if is_first and _process_is_ours:
            gc.freeze()
        is_first = False
        on_progress(event)

    return show


class _Deferring:
    """Finds the deferred modules: each is loaded when it is first used.

    It has no base class: `importlib.abc` imports tempfile and what that needs.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "numpy":
            _refuse_too_little_memory()
        spec = PathFinder.find_spec(name, path, target) if name in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Deferred(spec.loader)  # type: ignore[assignment]
        return spec


def _refuse_too_little_memory() -> None:
    try:
        mmap.mmap(-1, NUMPY_BYTES).close()
    except OSError as error:
        raise MemoryError(f"NumPy takes {NUMPY_BYTES:,} bytes of addresses") from error


class _Deferred:
    """Loads a module when a name is looked up in it that it does not have.

    The standard library's LazyLoader loads it when it is imported again, because Python then asks for its `__spec__`.
    """

    def __init__(self, loader: Any):
        self.loader, self.lock, self.is_loading = loader, threading.RLock(), False

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module without its names, but for those that the start needs."""
        names = vars(module)

        def load(name: str) -> Any:
            with self.lock:  # another thread waits for the whole module
                if names.get("__getattr__") is load:
                    if self.is_loading or name == "__module__":  # the module's own imports; onnx_ir of all it has
                        raise AttributeError(name)
                    self.is_loading = True
                    try:
                        self.loader.exec_module(module)
                    finally:
                        self.is_loading = False
                    if names["__getattr__"] is load:
                        del names["__getattr__"]
            return getattr(module, name)

        def version(package: str) -> str:
            return _installed_version(package) or load("version")(package)

        names["__getattr__"] = load
        if module.__name__ == INSTALLED_VERSIONS:
            names["version"] = version
        elif module.__name__ in TYPES_OF_ARRAYS:
            names["NDArray"] = _AnyArray


class _AnyArray:
    """NumPy's NDArray in hints, which nothing evaluates in a merge."""

    def __class_getitem__(cls, _: object) -> type[_AnyArray]:
        return cls


def _installed_version(name: str) -> str:
    """The version of a package by the folder of its metadata, whose name contains it. Empty where there is none.

    Also empty where a package that is edited has metadata without a version in the name.
    """
    for folder in sys.path:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name == f"{name}.egg-info":
                    return ""
                start, _, version = entry.name.removesuffix(".dist-info").partition("-")
                if start == name and entry.name.endswith(".dist-info"):
                    return version
    return ""
