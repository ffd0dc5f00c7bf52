"""The tensors of an adapter of one file: alphas that float32 does not hold, and what no format of this kind has."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.writers.one_file import OneFile, without_component
from lora_export.structured_pairs import HadamardPair
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


def test_a_part_of_a_loha_is_refused(tmp_path):
    factors = {name: np.ones(shape) for name, shape in (("a1", (2, 5)), ("b1", (6, 2)), ("a2", (2, 5)), ("b2", (6, 2)))}
    file = file_of({"a": HadamardPair(factors, 1.0).part(np.arange(3), None)})
    file.add_changes(("A", "B"))
    with pytest.raises(InputRefused, match="a: a LoHa with a core, of two ranks or of a part of a weight"):
        file.write(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_names_without_a_component_are_noted():
    assert without_component(adapter_of({"denoiser/a": low_rank(3, 2, 1)})) == ()
    assert len(without_component(adapter_of({"a": low_rank(3, 2, 1)}))) == 1
