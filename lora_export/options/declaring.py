"""How an option is declared: as a field of a record, with what it means beside its type and its default.

    @dataclass(frozen=True, kw_only=True)
    class Output(Options):
        overwrite: bool = option(False, "Replace an existing output, in one step.", section=FILES)

The field is the whole declaration. The keyword of the Python function, the parameter of the command line, the entry of
`[tool.lora-export]`, the usage check and the record of provenance come from it. Records are dataclasses and no
`TypedDict`, which has no defaults and no attributes. A record of one concern is inherited by the records of the
commands that have it: a function that takes an `Output` takes each of them, and passes it on whole.

`lora-export --help` reads the records, so that their modules import nothing heavy: heavy types are quoted.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, ClassVar, Literal, Never, ParamSpec, TypeVar, Union, cast, get_args, get_origin

from lora_export.errors import WrongUsage
from lora_export.options.spelling import as_python, entry_text, named


class Section(StrEnum):
    """What options are about."""

    OPTIONS = "Options"
    DATA = "Data"
    ADAPTER = "The adapter"
    FROZEN_BASE = "The frozen base"
    STEPS = "The steps"
    MEASUREMENTS = "Measurements and checkpoints"
    BASE = "The base"
    OUTPUT = "The output"
    GRAPH = "The graph"
    PROOF = "The proof"
    EXPECTED = "What the adapter and the base must be"
    READING = "How adapters are read"
    COMBINING = "How adapters are combined"
    FILES = "Files and messages"


_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")
_MEANING = "meaning"  # in the metadata of a field

# What an option takes. `source` is a path or a name that is looked up, `folder` a path that is no file.
OptionKind = Literal["flag", "choice", "int", "float", "text", "path", "folder", "source"]
KIND_OF_TYPE: Mapping[Any, OptionKind] = {bool: "flag", int: "int", float: "float", str: "text", Path: "path"}
VALUES_OF_KIND = {"flag": "True or False", "int": "a whole number", "float": "a number", "path": "a path"}
VALUES_OF_KIND |= {"folder": "a path", "source": "a path, or what is loaded already"}
OPTION_IN_TEXT = re.compile(r"\{(\w+)(?:=([^}]*))?\}")  # `{lora=inputs}` in a help text names an option


@dataclass(frozen=True)
class Only:
    """What an option goes together with: some values of another option, or of a fact that the caller states.

    The message is "OPTION `verb` WORDS: `because`". `words` name the values of a fact, and `instead` has the message
    for single values of it.
    """

    other: str
    values: tuple[Any, ...]
    because: str = ""
    words: str = ""
    verb: str = "is for"
    instead: Mapping[str, str] = field(default_factory=dict)

    def problem(self, found: Any) -> str:
        """The message on an option that was given beside something else, without the option's name."""
        if found in self.instead:
            return spelled(self.instead[found])
        first, *more = self.values
        *others, last = [named(self.other, first), *map(str, more)]
        words = spelled(self.words) or " and ".join(filter(None, [", ".join(others), last]))
        return f"{self.verb} {words}{f': {spelled(self.because)}' if self.because else ''}"


@dataclass(frozen=True)
class Option:
    """The meaning of a field: what `--help` and Python's `help` show of it, and which values it may have."""

    help: str
    section: Section | None = None  # None: that of the record
    flags: tuple[str, ...] = ()  # by default the name, with dashes
    metavar: str = ""
    shown_default: str = ""  # where the default itself does not tell
    kind: OptionKind | None = None  # where the type does not tell
    multiple: bool | None = None  # whether it may be repeated, where the type does not tell
    choices: tuple[str, ...] = ()  # where they are no Literal of the type
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    read: Callable[[Iterable[str]], Any] | None = None  # texts of the command line -> the value; raises ValueError
    only: tuple[Only, ...] = ()
    python_only: bool = False  # no option of the command line
    often: bool = False  # whether `--help` shows it in a command that has many options
    command_line_default: Callable[[], Any] | None = None  # there, in place of the default of the field

    def help_text(self) -> str:
        """The help, with other options as the interface spells them."""
        return spelled(self.help)


@dataclass(frozen=True)
class Positional(Option):
    """A positional argument of the command line."""

    help: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Nested:
    """A field that is a record itself, whose options the command line has beside the others.

    `flags` are other spellings of them in this command.
    """

    record: type[Options]
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """An option of a record, with what its type and its default tell."""

    name: str  # of the field
    option: Option
    kind: OptionKind
    choices: tuple[str, ...]
    multiple: bool
    section: Section  # of `--help`
    default: Any  # MISSING: it has to be given
    types: tuple[Any, ...]  # those of the field; a quoted one is a text

    @property
    def flags(self) -> tuple[str, ...]:
        """The spellings on the command line, the short one first. A flag that is on by default is switched off."""
        usual = f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"
        return self.option.flags or (usual,)

    def with_flags(self, flags: tuple[str, ...]) -> Declared:
        """The same, with other spellings where there are any."""
        return dataclasses.replace(self, option=dataclasses.replace(self.option, flags=flags)) if flags else self

    def taken(self, value: Any) -> Any:
        """The value as a record has it: numbers as Python's own, several values as a sequence.

        Numbers of NumPy and PyTorch would fail where a record is written as JSON, and an iterator could be read once.
        Raises WrongUsage for a value that the option cannot have.
        """
        if value is self.default or (value is None and NoneType in self.types):
            return value
        if value is None and self.default is not dataclasses.MISSING:
            return self.default
        if any(get_origin(part) is Mapping for part in self.types):
            return self._table(value)
        if not self.multiple or isinstance(value, str | bytes | os.PathLike) or not _is_collection(value):
            one = self._one(value)
            return (one,) if self.multiple and all(map(_is_sequence, self.types)) else one
        if isinstance(value, Mapping | Set):
            self._refuse(value, "a list")
        values = tuple(map(self._one, value))
        return value if isinstance(value, Sequence) and all(map(operator.is_, value, values)) else values

    def _table(self, value: Any) -> Any:
        """A table, whose entries are what the command line would take."""
        expected = f"a dict of {self.option.metavar}" if self.option.metavar else "a dict"
        if not isinstance(value, Mapping):
            self._refuse(value, expected)
        if self.option.read is None:
            return value
        table: dict[str, Any] = {}
        for name, entry in value.items():
            try:
                found = self.option.read([f"{name}={entry_text(entry)}"])
            except TypeError:  # of a list that is no list of flags
                self._refuse(value, expected)
            except ValueError as error:
                raise WrongUsage(f"{named(self.name)}: {error}") from error
            if list(found) != [name]:
                self._refuse(value, expected)
            table |= found
        return value if table == value else table

    def _one(self, value: Any) -> Any:
        if self.choices:
            is_choice = _is_one_of(value, (*self.choices, self.default))
            return value if is_choice else self._refuse(value, _either(self.choices))
        if self.kind in ("int", "float"):
            number = _number(self.kind, value)
            if number is None:
                self._refuse(value, VALUES_OF_KIND[self.kind])
            if isinstance(number, int) and abs(number) > sys.float_info.max:
                raise WrongUsage(f"{named(self.name)} has more than {sys.float_info.max_10_exp} digits")
            if limit := self._limit_of(number):
                raise WrongUsage(f"{named(self.name)} is {number:g}; it must be {limit}")
            return number
        if self.kind == "flag":
            is_flag = type(value).__name__ in ("bool", "bool_") or _is_one_of(value, (0, 1))  # NumPy's, too
            return bool(value) if is_flag else self._refuse(value, VALUES_OF_KIND[self.kind])
        if self.kind == "text" and isinstance(value, re.Pattern | bytes | int | float):
            self._refuse(value, "a text")
        if self.kind == "text" or isinstance(value, str | Path):
            return value
        if isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
            return Path(path)
        are_paths = {str, Path, NoneType}.issuperset(self.types)
        if are_paths or value is None or isinstance(value, bytes | int | float | list):
            self._refuse(value, VALUES_OF_KIND["path" if are_paths else self.kind])
        return value

    def _refuse(self, value: Any, expected: str) -> Never:
        raise WrongUsage(f"{named(self.name)} is {_shown(value)}; it must be {expected}")

    def _limit_of(self, value: float) -> str:
        """The limits, where the value is beyond them or no number; empty where it is within."""
        option = self.option
        limits = {
            "at least": (option.at_least, operator.ge),
            "above": (option.above, operator.gt),
            "at most": (option.at_most, operator.le),
            "below": (option.below, operator.lt),
        }
        stated = {words: (limit, holds) for words, (limit, holds) in limits.items() if limit is not None}
        if not stated or (math.isfinite(value) and all(holds(value, limit) for limit, holds in stated.values())):
            return ""
        return " and ".join(f"{words} {limit:g}" for words, (limit, _) in stated.items())


def declares(meaning: Option | Nested) -> Mapping[str, Any]:
    """What a field means, as its metadata."""
    return {_MEANING: meaning}


def argument(help: str = "", **settings: Any) -> Mapping[str, Any]:
    """A positional argument of the command line, as the metadata of a field. `settings` are those of `Positional`."""
    return declares(Positional(help, **settings))


def means(default: _T, meaning: Option) -> _T:
    """A field with a default and a meaning."""
    return field(default=default, metadata=declares(meaning))


def option(default: _T, help: str, **settings: Any) -> _T:
    """A field that is an option with a default. `settings` are those of `Option`."""
    return means(default, Option(help, **settings))


def nested(record: Callable[[], _R], flags: Mapping[str, tuple[str, ...]] = MappingProxyType({})) -> _R:
    """A field that is a record itself, by default without settings. See `Nested`."""
    return field(default_factory=record, metadata=declares(Nested(record, flags)))  # type: ignore[arg-type]


def table_of(
    form: str, value: Callable[[str], _T], *, at_last: bool = False
) -> Callable[[Iterable[str]], dict[str, _T]]:
    """A function that reads NAME=VALUE... as a table. `at_last`: the last equals sign of a text counts, not the first.

    Of several values of a name the last one counts, and is the last in the table. The function raises ValueError for a
    text of another form, and where `value` raises ValueError or KeyError.
    """

    def read(texts: Iterable[str]) -> dict[str, _T]:
        table: dict[str, _T] = {}
        for text in texts:
            name, _, written = text.rpartition("=") if at_last else text.partition("=")
            try:
                found = value(written)
            except (ValueError, KeyError):
                found = None
            if found is None or not name or not written:
                raise ValueError(f"{text} is not {form}")
            table.pop(name, None)
            table[name] = found
        return table

    return read


class Options:
    """The base of all records. A record checks its values when it is made, and raises WrongUsage.

    `SECTION` of a record is that of the options that it declares itself and that name none.
    """

    SECTION: ClassVar[Section] = Section.OPTIONS

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            given = getattr(self, declared.name)
            if (taken := declared.taken(given)) is not given:
                object.__setattr__(self, declared.name, taken)  # a record is frozen
        for name, types in _types_of_nested(type(self)).items():
            if not isinstance(given := getattr(self, name), types):
                raise WrongUsage(f"{named(name)} is {_shown(given)}; it must be a {types[-1].__name__}")

    def chosen(self) -> dict[str, Any]:
        """The options whose values are not their defaults. An empty list or table is the default of several values."""
        values = [(one, getattr(self, one.name)) for one in options_of(type(self))]
        chosen = [(one.name, value) for one, value in values if value != one.default]
        return {name: value for name, value in chosen if not isinstance(value, Sequence | Mapping) or value}

    def chosen_of(self, record: type[Options]) -> dict[str, Any]:
        """The same, of the options that another record has too."""
        names = {declared.name for declared in options_of(record)}
        return {name: value for name, value in self.chosen().items() if name in names}

    def check_usage(self, **facts: str) -> None:
        """Raise WrongUsage for options that do not go together with others, or with facts such as `base="graph"`."""
        if problems := self.without_effect(**facts):
            raise WrongUsage(*problems)

    def without_effect(self, **facts: str) -> list[str]:
        """Why each option has no place beside others, or beside these facts."""
        chosen, problems = self.chosen(), []
        for declared in options_of(type(self)):
            for only in declared.option.only if declared.name in chosen else ():
                found = facts.get(only.other, getattr(self, only.other, None))
                if found not in only.values:
                    problems.append(f"{named(declared.name)} {only.problem(found)}")
        return problems


def spelled(text: str) -> str:
    """A text in which `{lora=inputs}` names an option, as the interface spells it."""
    return OPTION_IN_TEXT.sub(lambda found: named(found[1]) if found[2] is None else named(found[1], found[2]), text)


def extended(options: Options, record: Callable[..., _R], **more: Any) -> _R:
    """A record that inherits from that of `options`: its values, and more or others."""
    return record(**{one.name: getattr(options, one.name) for one in dataclasses.fields(options)} | more)  # type: ignore[arg-type]


def narrowed(options: Options, record: Callable[..., _R], **others: Any) -> _R:
    """The options of one concern: a record from which that of `options` inherits, with other values where given."""
    own = (one.name for one in dataclasses.fields(record))  # type: ignore[arg-type]
    return record(**{name: getattr(options, name) for name in own} | others)


def once_a_record(function: Callable[[type[Options]], _T]) -> Callable[[type[Options]], _T]:
    """A function that finds once for each class what it declares: records are made often."""
    return cast("Callable[[type[Options]], _T]", functools.cache(function))


@once_a_record
def options_of(record: type[Options]) -> tuple[Declared, ...]:
    """The options of a record, without those of nested records: arguments first, then its own, then inherited ones."""
    classes = reversed(list(enumerate(record.__mro__)))
    order = {name: depth for depth, cls in classes for name in inspect.get_annotations(cls)}
    found = [_declared(*found) for found in _fields(record) if isinstance(found[2], Option)]
    return tuple(sorted(found, key=lambda one: (not isinstance(one.option, Positional), order[one.name])))


@once_a_record
def nested_in(record: type[Options]) -> Mapping[str, Nested]:
    """The fields of a record that are records."""
    return {one.name: meaning for one, _, meaning, _ in _fields(record) if isinstance(meaning, Nested)}


@once_a_record
def _types_of_nested(record: type[Options]) -> Mapping[str, tuple[type, ...]]:
    """The types of the fields of a record that are records. The record is the last one."""
    found = _fields(record)
    return {one.name: get_args(type_) or (type_,) for one, type_, meaning, _ in found if isinstance(meaning, Nested)}


def takes(record: Callable[_P, _R]) -> Callable[[Callable[[_R], _T]], Callable[_P, _T]]:
    """Make a function of a record one of the record's fields, as keywords. Its documentation lists the options.

    Raises TypeError for a keyword that is no field, and WrongUsage as the record does.
    """

    def decorate(function: Callable[[_R], _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*arguments: _P.args, **keywords: _P.kwargs) -> _T:
            try:
                options = record(*arguments, **keywords)
            except TypeError as error:  # of Python names the record, which a caller has not seen
                message = re.sub(r"^\w+\.__init__\(\)", f"{function.__name__}()", str(error))
                raise TypeError(message) from error
            return function(options)

        call.__signature__ = inspect.signature(record)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{documentation(record)}"  # type: ignore[arg-type]
        return call

    return decorate


def documentation(record: type[Options]) -> str:
    """The options of a record as Python spells them, one a line, with the records that are nested in it."""
    with as_python():  # also where the command line imports the function, which needs no flags of other commands
        lines = [f"    {one.name}: {one.option.help_text()}" for one in options_of(record) if one.option.help]
    lines += [f"    {name}: a {nested.record.__name__}." for name, nested in nested_in(record).items()]
    return "\n".join(["Options:", *lines])


def _fields(record: type[Options]) -> Iterator[tuple[dataclasses.Field[Any], Any, Any, Section]]:
    """The fields that are declared, each with its type, its meaning and the section of its record.

    A record whose values are found and loaded narrows types of the one that it inherits from. The meaning stays.
    """
    for one in dataclasses.fields(record):  # type: ignore[arg-type]
        for cls in record.__mro__:
            own = inspect.get_annotations(cls).get(one.name)
            meaning = vars(cls)["__dataclass_fields__"][one.name].metadata.get(_MEANING) if own is not None else None
            if meaning is not None:
                yield one, own, meaning, vars(cls).get("SECTION", Section.OPTIONS)
                break


def _declared(one: dataclasses.Field[Any], type_: Any, option: Option, section: Section) -> Declared:
    union = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
    parts, multiple = [part for part in union if part is not NoneType], False
    if several := [part for part in parts if get_origin(part) in (Sequence, tuple)]:
        parts, multiple = [get_args(several[0])[0]], True
    if option.multiple is not None or option.read is not None:
        multiple = option.multiple is not False
    literals = [part for part in parts if get_origin(part) is Literal]
    choices = option.choices or tuple(value for part in literals for value in get_args(part) if value != "")
    known = [KIND_OF_TYPE[part] for part in parts if isinstance(part, type) and part in KIND_OF_TYPE]
    kind: OptionKind = option.kind or (
        "choice" if choices else "path" if "path" in known else known[0] if known else "text"
    )
    default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
    return Declared(one.name, option, kind, choices, multiple, option.section or section, default, union)


def _is_one_of(value: Any, others: Sequence[Any]) -> bool:
    """Whether a value equals one of these. An array equals none: its entries are compared one by one."""
    return not getattr(value, "ndim", 0) and value in others


def _is_sequence(type_: Any) -> bool:
    return get_origin(type_) is Sequence or str(type_).startswith("Sequence[")


def _is_collection(value: Any) -> bool:
    """Whether there are several values in it. An array without axes can be iterated over by its type alone."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def _number(kind: OptionKind, value: Any) -> int | float | None:
    """The number as Python's own, or None where it is none. A text is none."""
    if isinstance(value, int) or (kind == "float" and isinstance(value, float)):
        return value
    try:
        return operator.index(value) if kind == "int" else float(type(value).__float__(value))
    except (TypeError, ValueError, AttributeError):
        return None


def _shown(value: Any) -> str:
    """A value in a message: a short one as Python writes it, another by its type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a value of the type {type(value).__name__}"


def _either(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
