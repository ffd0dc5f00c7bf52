"""Python as on a system that is not Linux: what only Linux has is missing, and Windows's refusals are in place.

Python imports this file at its start when the folder is on PYTHONPATH. So it also applies to the children of a child.
`os.name` stays "posix": the standard library would fail to import with another.
"""

import builtins
import ctypes
import errno
import io
import os
import sys
from pathlib import Path

MISSING = (
    *("preadv", "pwritev", "pread", "pwrite", "copy_file_range", "sendfile", "posix_fallocate", "posix_fadvise"),
    *("sched_getaffinity", "sched_setaffinity", "fstatvfs"),
    *("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "O_PATH", "O_TMPFILE"),
)
DESCRIPTORS = Path("/proc/self/fd")


def _called_by_filelock():
    """filelock looks at `sys.platform`, which is Linux here, and has other code for Windows."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("filelock."):
        frame = frame.f_back
    return frame is not None


def _refuse_open(action, *paths):
    """Windows renames and removes no file that is open, and no folder with such a file in it."""
    if _called_by_filelock():
        return
    for path in map(os.path.abspath, paths):
        for name in os.listdir(DESCRIPTORS):  # noqa: PTH208
            try:
                held = os.readlink(DESCRIPTORS / name)  # noqa: PTH115
            except OSError:
                continue
            if held == path or held.startswith(f"{path}{os.sep}"):
                raise PermissionError(errno.EACCES, f"{action}: {held} is open", path)


def _rename(source, target, **options):
    _refuse_open("rename", source, target)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    _call["rename"](source, target, **options)


def _replace(source, target, **options):
    _refuse_open("replace", source, target)
    _call["replace"](source, target, **options)


def _unlink(path, **options):
    _refuse_open("unlink", path)
    _call["unlink"](path, **options)


def _open(path, flags, mode=0o777, **options):
    if os.path.isdir(path):  # noqa: PTH112
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    return _call["open"](path, flags, mode, **options)


def _open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **options):
    """A text file that is written has Windows's line ends, unless others are requested."""
    if newline is None and "b" not in mode and set(mode) & set("wax"):
        newline = "\r\n"
    return _call["open_file"](file, mode, buffering, encoding, errors, newline, **options)


def _fsync(descriptor):
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    with open(f"/proc/self/fdinfo/{number}") as facts:  # noqa: PTH123
        flags = next(int(line.split()[1], 8) for line in facts if line.startswith("flags:"))
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _call["fsync"](descriptor)


def _no_default_library(self, name, *arguments, **options):
    if name is None and not _called_by_filelock():
        raise TypeError("argument 1 must be str, not None")
    _load_library(self, name, *arguments, **options)


if os.environ.get("WITHOUT_LINUX", "1") == "1":
    sys.modules["fcntl"] = None
    for name in MISSING:
        if hasattr(os, name):
            delattr(os, name)
    replaced = {"rename": _rename, "replace": _replace, "unlink": _unlink, "remove": _unlink, "open": _open}
    replaced["fsync"] = _fsync
    _call = {name: getattr(os, name) for name in replaced}
    for name, function in replaced.items():
        setattr(os, name, function)
    _call["open_file"] = io.open
    io.open = builtins.open = _open_file
    for supported in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        supported.clear()
    _load_library = ctypes.CDLL.__init__
    ctypes.CDLL.__init__ = _no_default_library
