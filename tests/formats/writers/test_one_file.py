"""The tensors of an adapter of one file: alphas that float32 does not hold, and what no format of this kind has."""

from __future__ import annotations

from lora_export.formats.writers.one_file import OneFile, without_component
from support.written import adapter_of, low_rank


def file_of(pairs, **fields) -> OneFile:
    return OneFile(adapter_of(pairs, **fields), "x", lambda module, ending: f"{module}.{ending}")


def test_an_alpha_is_stored_in_the_type_that_holds_it():
    file = file_of({"a": low_rank(3, 2, 4, scale=0.5), "b": low_rank(3, 2, 4, scale=0.1)})
    file.add_changes(("A", "B"))
    assert {key: (str(value.dtype), float(value)) for key, value in file.alphas.items()} == {
        "a.alpha": ("float32", 2.0),
        "b.alpha": ("float64", 0.4),
    }
    assert set(file.tensors) == {"a.A", "a.B", "b.A", "b.B"}


def test_names_without_a_component_are_noted():
    assert without_component(adapter_of({"denoiser/a": low_rank(3, 2, 1)})) == ()
    assert len(without_component(adapter_of({"a": low_rank(3, 2, 1)}))) == 1
