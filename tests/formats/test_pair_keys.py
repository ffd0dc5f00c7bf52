"""Keys of pairs by module, and pairs with everything that is wrong with them at once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export.errors import InputRefused
from lora_export.formats.pair_keys import Sides, keys_by_module, read_pairs
from lora_export.formats.tensor_files import TensorSource, open_tensors
from lora_export.lora import LoraPair
from lora_export.options.reading import DEFAULTS

KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ABab])")


def source(path: Path, *names: str) -> TensorSource:
    save_file({name: np.ones((1, 1), np.float32) for name in names}, path)
    return open_tensors(path, DEFAULTS)


def one_pair(module: str, _sides: Sides) -> dict[str, LoraPair]:
    if module == "bad":
        raise InputRefused("is bad")
    return {module.removesuffix("_again"): LoraPair(a=np.ones((1, 1)), b=np.ones((1, 1)), scale=1.0)}


def test_keys_are_sorted_by_module_and_side(tmp_path: Path) -> None:
    modules, others = keys_by_module(source(tmp_path / "f.safetensors", "x.lora_A", "x.lora_b", "bias"), KEY)
    assert (modules, others) == ({"x": {"a": "x.lora_A", "b": "x.lora_b"}}, ["bias"])


def test_a_side_under_two_names_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"contains one tensor under two names: x\.lora_. and x\.lora_."):
        keys_by_module(source(tmp_path / "f.safetensors", "x.lora_A", "x.lora_a"), KEY)
    with pytest.raises(InputRefused, match="contains no tensor"):
        keys_by_module(source(tmp_path / "f.safetensors"), KEY)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    names = [f"{module}.lora_{side}" for module in ("bad", "x", "x_again") for side in "AB"]
    file = source(tmp_path / "f.safetensors", *names, "alone.lora_B", "bias")
    modules, others = keys_by_module(file, KEY)
    with pytest.raises(InputRefused) as refused:
        read_pairs(file, modules, one_pair, others=others)
    assert str(refused.value).splitlines()[1:] == [
        "  alone: A is missing",
        "  bad: is bad",
        "  bias: unknown kind of tensor",
        "  x_again: x.lora_A has the name x too",
    ]


def test_pairs_have_the_key_of_their_first_tensor(tmp_path: Path) -> None:
    file = source(tmp_path / "f.safetensors", "x.lora_A", "x.lora_B")
    pairs, spelling = read_pairs(file, keys_by_module(file, KEY)[0], one_pair)
    assert (list(pairs), spelling) == (["x"], {"x": "x.lora_A"})
