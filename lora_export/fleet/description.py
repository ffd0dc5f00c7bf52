"""FLEET.toml: bases, adapters by globs, steps with their options. Each adapter and step is a job."""

from __future__ import annotations

import glob
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused, WrongUsage, listed
from lora_export.fleet.steps import FLEET_STEPS, NOT_IN_STEPS, PATHS, FleetJob
from lora_export.formats import default_name
from lora_export.isolation.limits import MAX_SETTINGS
from lora_export.options.common import is_address
from lora_export.options.fleet import keys_of, options_from_table, unknown_key
from lora_export.storage.input_files import must_exist, read_bytes
from lora_export.storage.store_path import StorePath, is_hub_address
from lora_export.storage.store_path import place as stored_place

OF_A_GLOB = frozenset("*?[")
NAME_IN_TEXT = re.compile(r"\{(\w*)\}")
NAMES_IN_BRACES = ("adapter", "adapter_path", "base", "base_path")
KEYS_OF_FILE, KEYS_OF_BASE = ("records", "bases", "steps"), ("path", "name", "adapters")


@dataclass(frozen=True)
class FleetFile:
    """A fleet: its jobs, an adapter after the other, and the folder of its records."""

    path: Path
    records: Path
    jobs: tuple[FleetJob, ...]


def read_fleet(path: Path) -> FleetFile:
    """Read FLEET.toml, and find its adapters. Opens no adapter and no base.

    Raises InputRefused for a file that is damaged and for a glob without a match, and WrongUsage for keys and values
    that no fleet or no step has, with their place.
    """
    must_exist(path, "file of a fleet")
    try:
        table = tomllib.loads(read_bytes(path, MAX_SETTINGS).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path} is not valid TOML: {error}") from error
    _check_keys(table, KEYS_OF_FILE, str(path))
    records = _of_type(table, "records", str, str(path), str(path.with_suffix(".records")))
    steps = _tables(table, "steps", path)
    jobs = [job for place, base in _tables(table, "bases", path) for job in _jobs_of_base(base, place, steps)]
    _refuse_equal([job.id for job in jobs], f"{path}: several adapters have one name. Rename their folders:")
    outputs = [os.path.normpath(job.output) for job in jobs if job.output is not None]
    _refuse_equal(outputs, f"{path}: several jobs write one output. Put {{adapter}}, {{base}} or a step's name into:")
    for job in {job.number: job for job in jobs}.values():
        options_from_table(job.kind.record, job.values, job.place, **job.fixed())
    return FleetFile(path, Path(records), tuple(jobs))


def _tables(table: Mapping[str, Any], key: str, path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables of an array, each with its place."""
    found = table.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise WrongUsage(f"{path}: there is no [[{key}]]. `guide fleet` shows such a file")
    return [(f"{path}: [[{key}]] {number}", each) for number, each in enumerate(found, 1)]


def _jobs_of_base(
    table: Mapping[str, Any], place: str, steps: Sequence[tuple[str, Mapping[str, Any]]]
) -> Iterator[FleetJob]:
    _check_keys(table, KEYS_OF_BASE, place)
    base = _of_type(table, "path", str, place)
    name = _of_type(table, "name", str, place, default_name(Path(base)))
    if name in ("", ".", "..") or set(name) & {"/", os.sep}:
        raise WrongUsage(f"{place}: {name!r} is no name of a folder. State another `name`")
    patterns = _of_type(table, "adapters", list, place)
    found: dict[str, None] = {}
    for pattern in patterns:
        if not (matches := _matching(pattern)):
            raise InputRefused(f"{place}: {pattern!r} matches no adapter")
        found |= dict.fromkeys(matches)
    for path in found:
        names = {"adapter": default_name(Path(path)), "adapter_path": path, "base": name, "base_path": base}
        yield from _jobs_of_adapter(names, steps)


def _matching(pattern: str) -> list[str]:
    """The files and folders that a glob matches, on the disk or in a store; an address of the Hub is what it names."""
    if is_hub_address(pattern):
        if not OF_A_GLOB.isdisjoint(pattern):
            raise InputRefused(f"{pattern}: globs are for the disk and for stores. List the addresses of the Hub")
        return [pattern]
    path = stored_place(pattern)
    if not isinstance(path, StorePath):
        return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - it may be absolute
    folder = next(each for each in (path, *path.parents) if OF_A_GLOB.isdisjoint(str(each)))
    found = [path] if folder == path else folder.newly().glob(path.relative_to(folder).as_posix())
    return sorted(str(each) for each in found if each.exists())


def _jobs_of_adapter(names: Mapping[str, Any], steps: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[FleetJob]:
    before: list[FleetJob] = []
    for number, (place, table) in enumerate(steps, 1):
        step = _of_type(table, "step", str, place)
        if step not in FLEET_STEPS:
            raise WrongUsage(f"{place}: there is no step {step!r}. The steps are: {', '.join(FLEET_STEPS)}")
        values = {key.replace("_", "-"): _named(value, names, place) for key, value in table.items() if key != "step"}
        set_by_fleet = NOT_IN_STEPS | ({FLEET_STEPS[step].base} if FLEET_STEPS[step].writes_model else set())
        known = {key for key, (_, one) in keys_of(FLEET_STEPS[step].record).items() if one.name not in set_by_fleet}
        _check_keys(values, known, f"{place} ({step})")
        _check_paths(values, step, f"{place} ({step})")
        if "candidate" in known and "candidate" not in values:
            made = next((job.output for job in reversed(before) if job.kind.writes_model), None)
            if made is None:
                raise WrongUsage(f"{place}: no step before it writes a model: give `candidate`, the file to judge")
            values["candidate"] = made
        job = FleetJob(**names, number=number, step=step, values=values, place=f"{place} ({step})")
        paths = [path for paths in job.inputs().values() for path in paths]
        if address := next(filter(is_address, paths), None):
            raise WrongUsage(f"{job.place}: {address} is a server, whose answers are in no file that could be done")
        read = set(map(os.path.normpath, paths))
        after = tuple(one.id for one in before if one.output is not None and os.path.normpath(one.output) in read)
        before.append(replace(job, after=after))
    yield from before


def _named(value: Any, names: Mapping[str, str], place: str) -> Any:
    """A value of a table, with the names of the adapter and the base put into its texts."""

    def name(found: re.Match[str]) -> str:
        if found[1] not in NAMES_IN_BRACES:
            names_in_braces = ", ".join(f"{{{name}}}" for name in NAMES_IN_BRACES)
            raise WrongUsage(f"{place}: {found[0]} is no name of a fleet. The names are: {names_in_braces}")
        return names[found[1]]

    if isinstance(value, str):
        return NAME_IN_TEXT.sub(name, value)
    if isinstance(value, list):
        return [_named(each, names, place) for each in value]
    return {key: _named(each, names, place) for key, each in value.items()} if isinstance(value, dict) else value


def _check_keys(table: Mapping[str, Any], known: Sequence[str] | set[str], place: str) -> None:
    for key in table:
        if key.replace("_", "-") not in known:
            raise unknown_key(place, key, sorted(known))


def _check_paths(values: Mapping[str, Any], step: str, place: str) -> None:
    """Raise WrongUsage for a path that is no text: the jobs of a file are put in order by their paths."""
    known = keys_of(FLEET_STEPS[step].record)
    for key, value in values.items():
        texts = value if isinstance(value, list) else [value]
        if known[key][1].kind in PATHS and not all(isinstance(one, str) for one in texts):
            raise WrongUsage(f"{place}: `{key}` is {value!r}; it must be text")


def _of_type(table: Mapping[str, Any], key: str, type_: type, place: str, default: Any = None) -> Any:
    value: Any = table.get(key, default)
    if value is None:
        raise WrongUsage(f"{place}: the key `{key}` is missing")
    is_wrong = not isinstance(value, type_)
    if is_wrong or (type_ is list and not (value and all(isinstance(one, str) for one in value))):
        raise WrongUsage(f"{place}: `{key}` is {value!r}; it must be {'a list of texts' if type_ is list else 'text'}")
    return value


def _refuse_equal(names: Sequence[str], message: str) -> None:
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise WrongUsage(message, listed(repeated))
