"""The memory of this process, bounded for a while."""

from __future__ import annotations

import resource
import sys
import threading

import numpy as np
import pytest

from lora_export.isolation.bounds import bounded_memory, is_out_of_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
MIB = 1 << 20


def limit() -> int:
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def test_what_is_too_large_gets_no_memory_and_all_is_as_before() -> None:
    before = limit()
    with bounded_memory(256 * MIB):
        assert len(bytes(64 * MIB)) == 64 * MIB
        with pytest.raises(MemoryError) as refused:
            bytes(1024 * MIB)
        with pytest.raises(MemoryError):
            np.ones(128 * MIB)
    assert is_out_of_memory(refused.value) and limit() == before
    with bounded_memory(1 << 80):  # more than the system can state
        assert len(bytes(1024 * MIB)) == 1024 * MIB
    assert limit() == before


def test_the_least_of_several_bounds_counts() -> None:
    before = limit()
    with bounded_memory(4096 * MIB):
        with bounded_memory(64 * MIB):
            inner = limit()
            with bounded_memory(8192 * MIB):
                assert limit() == inner
        assert inner < limit() < before or before == resource.RLIM_INFINITY
    assert limit() == before


def test_an_error_takes_the_bound_away() -> None:
    before = limit()
    with pytest.raises(ValueError, match="own"), bounded_memory(MIB):
        raise ValueError("own")
    assert limit() == before


def test_another_thread_sets_no_bound() -> None:
    found: list[bool] = []

    def look() -> None:
        before = limit()
        with bounded_memory(MIB):
            found.append(limit() == before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("no such operator"), False),
    ],
)
def test_errors_of_libraries_without_memory_are_known(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
