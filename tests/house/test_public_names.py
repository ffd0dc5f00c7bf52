"""The names that `lora_export` offers."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import lora_export


def test_every_public_name_can_be_had() -> None:
    assert sorted(lora_export._HOMES) == lora_export.__all__
    for name in lora_export.__all__:
        home, _, attribute = lora_export._HOMES[name].partition(":")
        assert getattr(lora_export, name) is getattr(importlib.import_module(f"lora_export.{home}"), attribute)


def test_no_public_name_is_a_files_name() -> None:
    # Importing the file would put the module in the name's place.
    files = {module.name for module in pkgutil.iter_modules(lora_export.__path__)}
    assert not files & set(lora_export.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lora_export.no_such_name
