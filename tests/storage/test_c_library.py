"""Functions of the C library: where they exist, where not, and what they report."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from lora_export.storage.c_library import c_function


def test_a_function_is_found_and_stores_its_error():
    getpid, close = c_function("getpid"), c_function("close")
    assert getpid is not None and getpid() == os.getpid()
    ctypes.set_errno(0)
    assert close is not None and close(-1) == -1
    assert ctypes.get_errno() == errno.EBADF


def test_a_function_that_does_not_exist_is_none():
    assert c_function("no_such_function_of_any_system") is None


@pytest.mark.parametrize("error", [TypeError("argument 1 must be str, not None"), OSError("no library")])
def test_a_system_without_a_default_library_has_no_function(monkeypatch, error):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert c_function("getpid") is None
