"""A context of the process ends when the last thread leaves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest

from lora_export.models.shared_context import SharedContext


def test_the_last_one_out_puts_back_what_was_there_before() -> None:
    library = SimpleNamespace(value="own")
    shared = SharedContext(lambda: mock.patch.object(library, "value", "other"))
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(shared)
    second.enter_context(shared)
    first.close()
    assert library.value == "other"
    second.close()
    assert library.value == "own"
    with shared:
        assert library.value == "other"
    assert library.value == "own"


def test_a_context_that_fails_leaves_nothing_behind() -> None:
    library = SimpleNamespace(value="own")

    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        raise OSError("no")
        yield

    shared = SharedContext(lambda: mock.patch.object(library, "value", "other"), failing)
    for _ in range(2):
        with pytest.raises(OSError, match="no"), shared:
            raise AssertionError
    assert library.value == "own"
