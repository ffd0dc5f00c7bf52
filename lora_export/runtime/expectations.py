"""What a deployment gate expects of a file: which adapters, of which rank and alpha, on which base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import Different, Undecided, listed
from lora_export.options.spelling import command
from lora_export.options.verify import Expectations


def refuse_unexpected(
    path: Path, expected: Expectations, adapters: Sequence[Mapping[str, Any]], base: Iterable[str | None]
) -> None:
    """Raise Different where adapters or base are not those that were expected, with both values of each.

    `adapters` are records (see `provenance.adapter_records`). `base` has the SHA-256 of each of its files, None for a
    file of which it is not known. Raises Undecided where a value that is expected is unknown.
    """
    unknown = list(_unknown(expected, adapters, base := list(base)))
    differences = list(_differences(expected, adapters, [value for value in base if value]))
    if differences:
        problems = differences + unknown
        raise Different(f"{path} is not what was expected:", listed(problems, most=len(problems)))
    if unknown:
        raise Undecided(f"{path} does not show whether it is what was expected:", listed(unknown))


def _unknown(
    expected: Expectations, adapters: Sequence[Mapping[str, Any]], base: Sequence[str | None]
) -> Iterator[str]:
    """What is expected and not recorded."""
    for adapter in adapters:
        for wanted, field, what in (
            (expected.adapter_sha256, "sha256", "SHA-256"),
            (expected.rank, "ranks", "rank"),
            (expected.alpha, "alphas", "alpha"),
        ):
            if wanted not in ((), None) and not adapter.get(field):
                yield f"the {what} of the adapter {adapter.get('name', '')!r} is not recorded"
    if not adapters and (expected.adapter_sha256 or expected.rank is not None or expected.alpha is not None):
        yield "no adapter is recorded"
    if expected.base_sha256 and (not base or None in base):
        yield f"the SHA-256 of the base is not recorded (`{command('merge', hashing='sha256')}` records it)"


def _differences(expected: Expectations, adapters: Sequence[Mapping[str, Any]], base: Sequence[str]) -> Iterator[str]:
    known = [adapter for adapter in adapters if adapter.get("sha256")]
    if expected.adapter_sha256 and known and not _are_expected(known, expected.adapter_sha256):
        own = sorted(str(adapter["sha256"]) for adapter in known)
        yield _both("the SHA-256 of the adapters", own, sorted(expected.adapter_sha256))
    for adapter in adapters:
        for wanted, field, what in ((expected.rank, "ranks", "rank"), (expected.alpha, "alphas", "alpha")):
            values = adapter.get(field)
            if wanted is not None and values is not None and list(values) != [wanted]:
                yield _both(f"the {what} of the adapter {adapter.get('name', '')!r}", values, [wanted])
    if expected.base_sha256 and base and sorted(base) != sorted(expected.base_sha256):
        yield _both("the SHA-256 of the base", sorted(base), sorted(expected.base_sha256))


def _are_expected(adapters: Sequence[Mapping[str, Any]], hashes: Sequence[str]) -> bool:
    """Whether each adapter has one of the hashes, as a whole or of its tensors alone, and no hash is left."""
    left = list(hashes)
    for adapter in adapters:
        own = next((adapter.get(field) for field in ("sha256", "file_sha256") if adapter.get(field) in left), None)
        if own is None:
            return False
        left.remove(own)
    return not left


def _both(what: str, values: Iterable[Any], wanted: Iterable[Any]) -> str:
    found, right = (
        ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in each) or "none"
        for each in (values, wanted)
    )
    return f"{what} is {found}, expected: {right}"


def recorded_base(base: Mapping[str, Any]) -> list[str | None]:
    """The SHA-256 of each file of a base that a record names; of a PyTorch model, that of all its weights."""
    if isinstance(whole := base.get("sha256"), str):
        return [whole]
    return [file.get("sha256") if isinstance(file, Mapping) else None for file in base.values()]
