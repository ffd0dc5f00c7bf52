"""The record of where a graph's nodes ran."""

from __future__ import annotations

import threading
import weakref

import pytest

from lora_export.errors import EnvironmentLacking
from lora_export.runtime.runner import Placement, deadline


def test_compute_node_on_another_provider_is_named_and_raises() -> None:
    placement = Placement(
        requested_provider="CUDAExecutionProvider",
        by_provider={
            "CUDAExecutionProvider": (("/q/MatMul", "MatMul"),),
            "CPUExecutionProvider": (("/shape", "Shape"), ("/k/MatMul", "MatMul")),
        },
        options={},
        version="1",
    )
    assert placement.off_provider == (("CPUExecutionProvider", "/k/MatMul", "MatMul"),)
    with pytest.raises(EnvironmentLacking, match=r"1 of 2 compute nodes ran elsewhere: /k/MatMul"):
        placement.require_provider()


def test_provider_without_any_node_raises() -> None:
    nothing = Placement("CUDAExecutionProvider", {}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="reports no node that ran on it"):
        nothing.require_provider()
    elsewhere = Placement("CUDAExecutionProvider", {"CPUExecutionProvider": (("a", "Add"),)}, {}, "1")
    with pytest.raises(EnvironmentLacking, match="reports no node that ran on it"):
        elsewhere.require_provider()
    Placement("CPUExecutionProvider", {}, {}, "1").require_provider()  # a graph of constants runs nothing


def test_run_that_is_too_long_is_stopped_and_known_as_such() -> None:
    stopped = threading.Event()
    with deadline(0.01, stopped.set) as expired:
        assert stopped.wait(10)
    assert expired.is_set()


def test_run_that_ends_in_time_is_not_stopped() -> None:
    stopped = threading.Event()
    with deadline(0.05, stopped.set) as expired:
        pass
    assert not stopped.wait(0.2) and not expired.is_set()


def test_nothing_keeps_what_is_stopped_alive_afterwards() -> None:
    """A graph's weights may be views of a mapped file, which cannot be closed before the last view is gone."""

    class Run:
        def stop(self) -> None: ...

    run = Run()
    alive, threads = weakref.ref(run), threading.active_count()
    with deadline(60, run.stop):
        pass
    del run
    assert alive() is None and threading.active_count() == threads
