"""What is left of the machine's memory and of a control group's limit, and the refusal of what needs more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import EnvironmentLacking, WrongUsage
from lora_export.runtime.memory import AVAILABLE, available_memory, release_memory, require_memory
from lora_export.storage.system_calls import c_function

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nSwapFree:   1000 kB\n"}
STATISTICS = "anon 1\ninactive_file 200\nactive_file 100\ntotal_inactive_file 30\ntotal_active_file 20\n"
VERSION_2 = {
    "proc/self/cgroup": "0::/user/one\n",
    "sys/fs/cgroup/user/one/memory.max": "5000\n",
    "sys/fs/cgroup/user/one/memory.current": "1000\n",
    "sys/fs/cgroup/user/one/memory.stat": STATISTICS,
}
VERSION_1 = {
    "proc/self/cgroup": "8:pids:/\n4:memory:/job/7\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000",  # a container shows its own group as the root
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
    "sys/fs/cgroup/memory/memory.stat": STATISTICS,
}


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AVAILABLE, raising=False)


def system(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        (MACHINE, 5000 * 1024),
        (MACHINE | VERSION_2, 4300),
        (MACHINE | VERSION_1, 4050),
        (MACHINE | VERSION_2 | {"sys/fs/cgroup/user/one/memory.max": "max"}, 5000 * 1024),
        (MACHINE | VERSION_2 | {"sys/fs/cgroup/user/one/memory.current": "9000"}, 0),
        (MACHINE | VERSION_2 | {"sys/fs/cgroup/user/one/memory.max": str(1 << 50)}, 5000 * 1024),
        (MACHINE | VERSION_2 | {"proc/self/cgroup": "0::/user/one/step/task\n"}, 4300),  # Slurm bounds the outer ones
        (MACHINE | VERSION_2 | {"proc/self/cgroup": "0::/user\n"}, 5000 * 1024),
    ],
)
def test_the_least_that_is_left_counts(files: Mapping[str, str], left: int | None, tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, files)) == left


def test_this_machine_has_some_memory_left() -> None:
    left = available_memory()
    assert left is None or left > 1 << 20


def test_what_the_user_states_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(AVAILABLE, "12")
    assert available_memory(system(tmp_path, MACHINE)) == 12
    monkeypatch.setenv(AVAILABLE, "2 GB")
    with pytest.raises(WrongUsage, match="is no number of bytes"):
        available_memory()


def test_more_than_is_left_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AVAILABLE, str(3 << 30))
    require_memory(3 << 30, "the proof", "Use less.")
    with pytest.raises(EnvironmentLacking) as refused:
        require_memory((3 << 30) + (1 << 29), "the proof", "Use less.")
    assert str(refused.value).splitlines() == [
        "the proof needs about 3.5 GiB of memory, and 3.0 GiB are available. Nothing was started.",
        "Use less.",
        f"{AVAILABLE}=BYTES replaces what the system reports.",
    ]


@pytest.mark.skipif(c_function("malloc_trim") is None, reason="only glibc gives freed memory back on request")
def test_freed_memory_is_given_back() -> None:
    """Small blocks are freed below one that stays, which keeps the allocator from giving them back by itself."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    blocks = [np.ones(60_000, np.uint8) for _ in range(2000)]
    last = np.ones(60_000, np.uint8)
    del blocks
    before = resident()
    release_memory(of=1000)
    assert abs(before - resident()) < 10_000_000
    release_memory(of=1 << 30)
    assert before - resident() > 60_000_000 and last.all()
