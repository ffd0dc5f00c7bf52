"""Classes that are completed later are the same as those that are complete at once."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from lora_export.cli import lazy_dataclasses

SOURCE = """
from __future__ import annotations
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

T = TypeVar("T")

@dataclass(frozen=True)
class Point:
    '''A point.'''
    unit: ClassVar[str] = "m"
    x: int
    y: list[int] = field(default_factory=list)

    def __post_init__(self):
        object.__setattr__(self, "double", 2 * self.x)

@dataclass(frozen=True)
class Higher(Point):
    _: KW_ONLY
    z: int = 3
    start: InitVar[int] = 0

    def __post_init__(self, start):
        super().__post_init__()
        object.__setattr__(self, "sum", start + self.z)

@dataclass(eq=False)
class Identity(Generic[T]):
    value: T

@dataclass
class Named:
    name: str

    def __init__(self):
        self.name = "own"

@dataclass(slots=True)
class Slotted:
    value: int

@dataclass
class Failure(Exception):
    reason: str

class Both(Identity[int], Point):
    def __init__(self, value, x):
        Identity.__init__(self, value)
        Point.__init__(self, x)

@dataclass
class Answering(Protocol):
    word: str
    def answer(self) -> str: ...

@dataclass
class Answer(Answering):
    def answer(self) -> str:
        return self.word
"""


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(SOURCE, name, "exec"), made.__dict__)
    return made


def lazy_module(monkeypatch: pytest.MonkeyPatch, name: str = "lora_export.made") -> Any:
    with lazy_dataclasses.lazy_dataclasses():
        return module(name, monkeypatch)


def is_complete(cls: type) -> bool:
    return "__init__" in vars(cls)


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises((TypeError, AttributeError)) as found:
        work()
    return f"{found.type.__name__}: {found.value}"


USES: dict[str, Callable[[Any], object]] = {
    "repr": lambda made: made.Point(1),
    "defaults": lambda made: [made.Point(1).y is not made.Point(1).y, made.Point.unit, made.Point.__doc__],
    "post_init": lambda made: [made.Point(2).double, made.Higher(2, start=4).sum],
    "equality": lambda made: [made.Point(1) == made.Point(1), made.Point(1) != made.Point(2), made.Point(1) == 1],
    "hash": lambda made: error_of(lambda: hash(made.Point(1))),
    "frozen": lambda made: error_of(lambda: setattr(made.Point(1), "x", 3)),
    "frozen, an instance that init did not make": lambda made: error_of(
        lambda: setattr(made.Point.__new__(made.Point), "x", 3)
    ),
    "fields": lambda made: [(one.name, one.type, one.kw_only) for one in dataclasses.fields(made.Higher)],
    "is_dataclass": lambda made: [dataclasses.is_dataclass(made.Higher), dataclasses.is_dataclass(made.Both)],
    "replace": lambda made: dataclasses.replace(made.Higher(1, [2]), z=5, start=1),
    "subclass": lambda made: [made.Higher(1, z=2), error_of(lambda: made.Higher(1, [], 2))],
    "subclass before its base": lambda made: [made.Higher(1), made.Point(1)],
    "base before its subclass": lambda made: [made.Point(1), made.Higher(1)],
    "missing argument": lambda made: error_of(made.Point),
    "generic": lambda made: [made.Identity[int](1), made.Identity(1) == made.Identity(1)],
    "of two bases": lambda made: vars(made.Both(1, 2)),
    "its own init": lambda made: made.Named(),
    "slots": lambda made: [made.Slotted(1), error_of(lambda: setattr(made.Slotted(1), "more", 1))],
    "exception": lambda made: [made.Failure("r"), isinstance(made.Failure("r"), Exception)],
    "protocol": lambda made: made.Answer("a").answer(),
    "match": lambda made: [made.Point(7, [1]).__match_args__, dataclasses.asdict(made.Point(7, [1]))],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_class_that_is_completed_later_is_the_same(
    use: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = repr(use(module("lora_export.made", monkeypatch)))
    assert repr(use(lazy_module(monkeypatch))) == expected


def test_a_class_is_complete_from_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lazy_module(monkeypatch)
    assert not is_complete(made.Point) and not is_complete(made.Higher)
    made.Higher(1)
    assert is_complete(made.Point) and is_complete(made.Higher) and not is_complete(made.Identity)


def test_a_pickle_of_another_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pickle.dumps(module("lora_export.made", monkeypatch).Point(1, [2]))
    lazy_module(monkeypatch)
    assert repr(pickle.loads(stored)) == "Point(x=1, y=[2])"  # noqa: S301 - made above


def test_threads_wait_for_a_class_that_another_one_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found, complete = lazy_module(monkeypatch), list[str](), dataclasses.dataclass

    def slowly(cls: type, **settings: Any) -> type:
        time.sleep(0.05)
        return complete(cls, **settings)

    monkeypatch.setattr(lazy_dataclasses, "_complete", slowly)
    threads = [threading.Thread(target=lambda: found.append(repr(made.Higher(1)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [repr(made.Higher(1))] * 4


def test_classes_of_others_and_later_ones_are_complete_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_complete(lazy_module(monkeypatch, "other.made").Point)
    assert is_complete(module("lora_export.made", monkeypatch).Point)
