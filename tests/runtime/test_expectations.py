"""What a deployment gate expects: differences are exit 4 with both values, what is not recorded is exit 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import Different, Undecided, WrongUsage
from lora_export.options.verify import Expectations
from lora_export.runtime.expectations import recorded_base, refuse_unexpected

ONE, TWO, THREE = (digit * 64 for digit in "123")
ADAPTERS = [
    {"name": "en", "sha256": ONE, "ranks": [8], "alphas": [16.0]},
    {"name": "fr", "sha256": TWO, "ranks": [8], "alphas": [16.0]},
]


def refused(kind: type[Exception], expected: Expectations, adapters: Any = ADAPTERS, base: Any = (THREE,)) -> list[str]:
    with pytest.raises(kind) as error:
        refuse_unexpected(Path("out"), expected, adapters, base)
    return str(error.value).splitlines()


def test_what_is_expected_passes_in_any_order() -> None:
    expected = Expectations((TWO, ONE.upper()), rank=8, alpha=16, base_sha256=(THREE,))
    assert expected and not Expectations()
    refuse_unexpected(Path("out"), expected, ADAPTERS, [THREE])


def test_every_difference_is_shown_with_both_values() -> None:
    expected = Expectations((ONE, THREE), rank=4, alpha=0.5, base_sha256=(ONE, TWO))
    assert refused(Different, expected) == [
        "out is not what was expected:",
        f"  the SHA-256 of the adapters is {ONE}, {TWO}, expected: {ONE}, {THREE}",
        "  the rank of the adapter 'en' is 8, expected: 4",
        "  the alpha of the adapter 'en' is 16, expected: 0.5",
        "  the rank of the adapter 'fr' is 8, expected: 4",
        "  the alpha of the adapter 'fr' is 16, expected: 0.5",
        f"  the SHA-256 of the base is {THREE}, expected: {ONE}, {TWO}",
    ]


def test_the_hash_of_the_tensors_alone_is_one_of_the_adapter() -> None:
    own = [{"name": "en", "sha256": ONE, "file_sha256": THREE}, {"name": "fr", "sha256": TWO}]
    refuse_unexpected(Path("f"), Expectations((TWO, THREE)), own, [])  # that of the file of tensors alone
    assert refused(Different, Expectations((TWO, THREE, ONE)), own)
    assert refused(Different, Expectations((THREE, THREE)), own)


@pytest.mark.parametrize("expected", [Expectations((ONE,)), Expectations((ONE, ONE)), Expectations((ONE, TWO, THREE))])
def test_one_adapter_more_or_fewer_is_different(expected: Expectations) -> None:
    assert len(refused(Different, expected)) == 2


def test_one_rank_of_several_is_different() -> None:
    adapter = {"name": "en", "ranks": [4, 8]}
    assert refused(Different, Expectations(rank=8), [adapter])[1:] == [
        "  the rank of the adapter 'en' is 4, 8, expected: 8"
    ]


def test_values_that_are_not_recorded_are_undecided() -> None:
    old = [{"name": "en", "sha256": ""}]
    lines = refused(Undecided, Expectations((ONE,), 8, 16, (THREE,)), old, [None])
    assert lines[0] == "out does not show whether it is what was expected:" and len(lines) == 5
    assert refused(Undecided, Expectations(rank=8), [])[1:] == ["  no adapter is recorded"]
    assert '`merge(hashing="sha256")` records it' in refused(Undecided, Expectations(base_sha256=(ONE,)), base=[])[1]
    assert len(refused(Different, Expectations((TWO,), rank=8), [{"name": "en", "sha256": ONE}])) == 3


@pytest.mark.parametrize("value", ["", "12", "g" * 64, "1" * 65])
def test_a_hash_that_is_no_sha256_is_refused(value: str) -> None:
    with pytest.raises(WrongUsage, match=r"^adapter_sha256= .* is no SHA-256"):
        Expectations(adapter_sha256=(value,))
    with pytest.raises(WrongUsage, match=r"^base_sha256="):
        Expectations(base_sha256=(value,))


def test_the_base_of_a_record_is_files_or_a_whole_model() -> None:
    assert recorded_base({"a": {"sha256": ONE}, "b": {"xxh3_128": "00"}, "c": 3}) == [ONE, None, None]
    assert recorded_base({"sha256": TWO}) == [TWO] and recorded_base({}) == []
