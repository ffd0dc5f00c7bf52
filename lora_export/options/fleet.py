"""The options of `fleet`, and those of other commands read from the tables of its file.

The keys of a table are the options' long spellings, without dashes.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_export.errors import EscapedLines, WrongUsage, hint_of_name, one_line
from lora_export.options.common import JOBS_AT_ONCE, RAY_ADDRESS, Reported
from lora_export.options.declaring import (
    Declared,
    Only,
    OptionKind,
    Options,
    Section,
    argument,
    means,
    nested_in,
    once_a_record,
    option,
    options_of,
)
from lora_export.options.spelling import UNSET, as_entries

VERIFY_WEIGHTS = "verify --base"  # the step that proves merged weights, as the file of a fleet names it
RUN = Only("action", ("run",), words="`fleet run`")


@dataclass(frozen=True, kw_only=True)
class FleetOptions(Reported):
    """What `fleet` takes."""

    action: Literal["plan", "run", "status"] = field(kw_only=False, metadata=argument(metavar="plan|run|status"))
    fleet: str | Path = field(kw_only=False, metadata=argument(metavar="FLEET.toml", kind="path"))
    jobs: int = means(1, replace(JOBS_AT_ONCE, only=(RUN,)))
    ray: str | None = means(None, replace(RAY_ADDRESS, only=(RUN,)))
    reports: Sequence[str | Path] = option(
        (),
        "Write the status as JSON, JUnit XML (a case for each adapter and step) or HTML. May be repeated.",
        section=Section.FILES,
        flags=("--report",),
        metavar="FILE.json|.xml|.html",
        kind="path",
        only=(Only("action", ("run", "status"), words="`fleet run` and `fleet status`"),),
    )


# --- options of a command, read from a table of TOML ---

_Record = TypeVar("_Record", bound=Options)
TYPES: Mapping[OptionKind, tuple[tuple[type, ...], str]] = {
    "flag": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
}


@once_a_record
def keys_of(record: type[Options]) -> Mapping[str, tuple[str, Declared]]:
    """Key -> the field of the nested record that has the option (empty: the record itself), and the option."""
    found = {_key(one): ("", one) for one in options_of(record) if not one.option.python_only}
    for name, nested in nested_in(record).items():
        own = (one.with_flags(nested.flags.get(one.name, ())) for one in options_of(nested.record))
        found |= {_key(one): (name, one) for one in own}
    return found


def options_from_table(record: type[_Record], table: Mapping[str, Any], place: str, **fixed: Any) -> _Record:
    """The record of a table's options. `fixed` are fields that the caller sets.

    Raises WrongUsage, which names the `place` of the table, for an unknown key, for a value of a wrong type, and as the
    record does.
    """
    keywords, inner = dict[str, Any](), dict[str, dict[str, Any]]()
    known = keys_of(record)
    for key, value in table.items():
        if key.replace("_", "-") not in known:
            raise unknown_key(place, key, known)
        name, declared = known[key.replace("_", "-")]
        try:
            (inner.setdefault(name, {}) if name else keywords)[declared.name] = _value(declared, value)
        except ValueError as error:
            raise WrongUsage(f"{place}: `{key}` is {value!r}; {error}") from error
    try:
        with entries_of(record):
            records = {name: nested_in(record)[name].record(**values) for name, values in inner.items()}
            return record(**keywords | records | fixed)
    except WrongUsage as error:
        raise WrongUsage(EscapedLines(f"{one_line(place)}: {error.lines}")) from error


def entries_of(record: type[Options]) -> contextlib.AbstractContextManager[None]:
    """Within the block, messages name the options of a record as its table has them: `overwrite = true`."""
    known = keys_of(record)
    by_name = {declared.name: key for key, (_, declared) in known.items()}

    def entry(name: str, value: object) -> str | None:
        key = name.replace("_", "-")
        key = key if key in known else by_name.get(name, "")
        return f"`{_entry(key, known[key][1], value)}`" if key else None

    return as_entries(entry)


def _entry(key: str, declared: Declared, value: object) -> str:
    """An option as TOML has it. A flag is named with its value: that is how one switches it on."""
    is_switched_off_by_key = declared.default is True
    if declared.kind == "flag" and not (value is UNSET and is_switched_off_by_key):
        value = (value is not False) is not is_switched_off_by_key
    return key if value is UNSET else f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml(str(name))} = {_toml(each)}' for name, each in value.items())}}}"
    if isinstance(value, tuple):  # several flags of one entry, as `read` of its option takes them
        return json.dumps(",".join(str(int(each)) for each in value))
    return json.dumps(value if isinstance(value, bool | int | float) else str(value), ensure_ascii=False)


def unknown_key(place: str, key: str, known: Iterable[str]) -> WrongUsage:
    """The error of a key that a table may not have."""
    return WrongUsage(f"{place}: there is no key `{key}`{hint_of_name(key.replace('_', '-'), known)}")


def _key(declared: Declared) -> str:
    return max((flag.partition("/")[0] for flag in declared.flags), key=len).lstrip("-")


def _value(declared: Declared, value: Any) -> Any:
    """A value of TOML as the record takes it. Raises ValueError with what is wrong."""
    if isinstance(value, Mapping) and declared.option.read is not None:
        value = [f"{name}={each}" for name, each in value.items()]
    values = (
        list(value) if declared.multiple and isinstance(value, Sequence) and not isinstance(value, str) else [value]
    )
    types, words = TYPES.get(declared.kind, ((str,), "text"))
    if declared.choices:
        words = f"one of {', '.join(declared.choices)}"
    if declared.option.read is not None:
        types, words = (str,), declared.option.metavar
    for each in values:
        is_other = isinstance(each, bool) is not (declared.kind == "flag") or not isinstance(each, types)
        if is_other or (declared.choices and each not in declared.choices):
            raise ValueError(f"it must be {words}")
    if declared.option.read is not None:
        return declared.option.read(values)
    if declared.kind == "flag" and declared.default is True:  # the key is that of the flag which switches it off
        return not value
    return values if declared.multiple else value
