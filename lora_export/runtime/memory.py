"""How much memory a process can still take, and the refusal of work that needs more: no kernel has to end it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lora_export.errors import EnvironmentLacking, WrongUsage
from lora_export.isolation.limits import GIB
from lora_export.storage.system_calls import c_function

AVAILABLE = "LORA_EXPORT_AVAILABLE_MEMORY"  # bytes: what the user states in place of what the system reports
WORTH_A_COLLECTION = 1 << 28
# Of a control group: its limit, its use, and the file with its cached files, which can be dropped.
_VERSION_2 = ("memory.max", "memory.current", "memory.stat")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine and the process's control group have left, swap included. None where it is unknown.

    Raises WrongUsage where LORA_EXPORT_AVAILABLE_MEMORY is no number of bytes.
    """
    if stated := os.environ.get(AVAILABLE):
        if not stated.isdecimal():
            raise WrongUsage(f"{AVAILABLE}={stated} is no number of bytes")
        return int(stated)
    fields = _numbers(root / "proc/meminfo")
    if "MemAvailable" not in fields:
        return None
    machine = 1024 * (fields["MemAvailable"] + fields.get("SwapFree", 0))
    return min([machine, *_left_in_groups(root)])


def release_memory(of: int | None = None) -> None:
    """Give the memory of what is no longer used back to the system, where that is possible.

    Visits every object of the process, for up to half a second. `of` is the size in bytes of what was used: nothing is
    done for less than 256 MiB.
    """
    if of is not None and of < WORTH_A_COLLECTION:
        return
    gc.collect()
    trim = c_function("malloc_trim")  # of glibc
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
        trim(0)


def require_memory(needed: int, purpose: str, *ways_out: str) -> None:
    """Raise EnvironmentLacking where less than the needed bytes are available."""
    available = available_memory()
    if available is not None and needed > available:
        raise EnvironmentLacking(
            f"{purpose} needs about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available. "
            "Nothing was started.",
            *ways_out,
            f"{AVAILABLE}=BYTES replaces what the system reports.",
        )


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group with a limit has left: that of the process and those around it.

    A container may show its own group as the root, and name it by its path outside.
    """
    text = _text(root / "proc/self/cgroup")
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        own = mounted / path.lstrip("/")
        for folder in (each for each in (own, *own.parents) if each.is_relative_to(mounted)):
            limit, used, statistics = (folder / name for name in (_VERSION_1 if controllers else _VERSION_2))
            if _text(limit).strip().isdecimal() and _text(used).strip().isdecimal():
                fields, prefix = _numbers(statistics), "total_" if controllers else ""
                cached = sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
                yield max(int(_text(limit)) - int(_text(used)) + cached, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The fields of a file of the kernel: a name and a number in each line."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.M)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
