"""The names that `lora_export` offers."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import lora_export
from lora_export.options.commands import RECORDS
from lora_export.options.declaring import nested_in


def test_every_public_name_can_be_had() -> None:
    assert sorted(lora_export._HOMES) == lora_export.__all__
    for name in lora_export.__all__:
        home, _, attribute = lora_export._HOMES[name].partition(":")
        assert getattr(lora_export, name) is getattr(importlib.import_module(f"lora_export.{home}"), attribute)


def test_records_that_an_option_takes_can_be_made() -> None:
    taken = {nested.record.__name__ for record in RECORDS.values() for nested in nested_in(record).values()}
    assert taken <= set(lora_export.__all__)


def test_no_public_name_is_a_files_name() -> None:
    # Importing the file would put the module in the name's place.
    files = {module.name for module in pkgutil.iter_modules(lora_export.__path__)}
    assert not files & set(lora_export.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lora_export.no_such_name
