"""Functions of the user: `package.module:function` or `file.py:function`. Only what a user names on purpose is run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused, LoraExportError
from lora_export.storage import input_files

has_run = False  # in this process


def find_function(location: str, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, or of a module that is imported by its dotted name.

    Runs the file or module. Raises InputRefused where it is missing or fails, or has no such function.
    """
    global has_run  # noqa: PLW0603 - a process is one
    has_run = True
    module = _run_file(Path(location)) if location.endswith(".py") else _import(location)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputRefused(f"{location} has no function {name}; it has {', '.join(known) or 'none'}")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def failures_of_user_code(source: str) -> Iterator[None]:
    """Turn any exception but our own errors into InputRefused, with the file and line that raised it.

    Also SystemExit, of a script that is not guarded by `__main__`: the process would end with its code, 0 for `same`.
    """
    try:
        yield
    except LoraExportError:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputRefused(
            f"{source} failed at {frame.filename}:{frame.lineno}: {type(error).__name__}: {error}"
        ) from error


def _run_file(path: Path) -> Any:
    if not path.exists():
        raise InputRefused(f"there is no file {path}")
    input_files.must_be_regular(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that the classes it defines can be pickled and deep-copied
    with failures_of_user_code(str(path)):
        spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a package in the current folder; last, so that it shadows nothing
    with failures_of_user_code(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputRefused(f"cannot import {name}: {error}") from error
