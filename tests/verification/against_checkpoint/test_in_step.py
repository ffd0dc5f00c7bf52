"""Audits in step: each has the verdict, the figures and the error that it has alone, and the base is read once."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.api.verify import verify_together
from lora_export.errors import InputRefused
from lora_export.options.verify import VerifyOptions
from lora_export.storage import block_copy
from lora_export.verification.against_checkpoint import in_step, stored_tensor
from lora_export.verification.against_checkpoint.in_step import AuditInStep, Judgement, audits_in_step
from support.handmade import base_file, peft_adapter

NAMES = ("de", "es", "fr")
WEIGHTS = "model.safetensors"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of four tensors, and three merges of it; each tensor is compared in several pieces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", 1 << 10)
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (48, 16), "down.weight": (16, 48), "norm.weight": (16,), "words.weight": (64, 16)}
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base" / WEIGHTS, {name: rng.integers(-8, 8, shape) for name, shape in shapes.items()})
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in NAMES:
        pairs = {"up": (rng.integers(1, 4, (2, 16)), rng.integers(1, 4, (48, 2)))}
        if name != "fr":
            pairs["down"] = (rng.integers(1, 4, (2, 48)), rng.integers(1, 4, (16, 2)))
        le.merge("base", peft_adapter(tmp_path / "adapters" / name, pairs), f"merged/{name}")
    return tmp_path


def options(name: str) -> VerifyOptions:
    return VerifyOptions(f"merged/{name}", base="base", adapters=(f"adapters/{name}",))


def change(name: str) -> None:
    """Change a number of a merge."""
    path = Path("merged") / name / WEIGHTS
    tensors = load_file(path)
    tensors["up.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def document(found: Any) -> Any:
    """What a proof found, or the error that ended it."""
    if isinstance(found, Exception):
        return repr(found)
    facts = found.as_document()
    facts.pop("seconds")
    for key in ("seconds", "created"):
        facts["about"].pop(key)
    return facts


def alone(name: str) -> Any:
    try:
        return document(le.verify(**vars(options(name))))
    except InputRefused as error:
        return repr(error)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often bytes of a file were read, by folder and position."""
    counts: Counter[tuple[str, int]] = Counter()
    read = block_copy.read

    def counted(source: Path, fd: int, buffer: Any, position: int) -> None:
        counts[source.parent.name, position] += 1
        read(source, fd, buffer, position)

    monkeypatch.setattr(block_copy, "read", counted)
    return counts


@pytest.mark.parametrize("fault", ["none", "a number", "no file", "another adapter"])
def test_each_has_what_it_has_alone(fault: str, place: Path) -> None:
    if fault == "a number":
        change("es")
    elif fault == "no file":
        (place / "merged/es" / WEIGHTS).unlink()
    elif fault == "another adapter":
        peft_adapter(place / "adapters/es", {"up": ([[1, 2, 3]], [[1]] * 48)})
    expected = [alone(name) for name in NAMES]
    found = [document(one) for one in verify_together(list(map(options, NAMES)))]
    assert found == expected
    assert [isinstance(one, str) or one["outcome"] != "same" for one in found] == [False, fault != "none", False]


def test_the_base_is_read_once(place: Path, reads: Counter[tuple[str, int]]) -> None:
    alone("de")
    of_one = {position: count for (folder, position), count in reads.items() if folder == "base"}
    reads.clear()
    assert all(verify_together([options("de"), options("es")]))
    assert {position: count for (folder, position), count in reads.items() if folder == "base"} == of_one
    reads.clear()
    assert all(verify_together(list(map(options, NAMES))))  # of which one changes other tensors
    found = {position: count for (folder, position), count in reads.items() if folder == "base"}
    assert found.keys() == of_one.keys() and sum(found.values()) < 2 * sum(of_one.values())


def test_an_error_of_a_judgement_is_that_of_its_audit_alone() -> None:
    """Other threads than the audit make its judgements. It raises their error, and none of its further ones is made."""
    error, judged = InputRefused("a damaged weight"), list[str]()

    def audit(name: str, one: AuditInStep[list[Any]]) -> list[Any]:
        def judge() -> None:
            judged.append(name)
            if name == "es":
                raise error

        return one.judge_all(["a", "b"], [[Judgement(2, judge)], [Judgement(1, judge)]], lambda _: None)

    found = audits_in_step([functools.partial(audit, name) for name in NAMES])
    assert found == [[None, None], error, [None, None]]
    assert Counter(judged) == {"de": 2, "es": 1, "fr": 2}


@pytest.mark.parametrize(("at_work", "is_long"), [(False, False), (True, False), (True, True)])
def test_an_interrupt_ends_all(at_work: bool, is_long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait, the one that is at work, and those that have not begun. What takes long is not waited for."""
    ended, may_go_on, threads = list[AuditInStep[None]](), threading.Event(), threading.active_count()

    def audit(one: AuditInStep[None]) -> None:
        try:
            one.judge_all([], [], print)
        finally:
            ended.append(one)

    def working(one: AuditInStep[None]) -> None:
        assert may_go_on.wait(20 if is_long else 60)
        audit(one)

    class Interrupted(AuditInStep[None]):
        def __init__(self, function: Callable[[AuditInStep[None]], None]) -> None:
            super().__init__(function)
            self.is_working = function is working

        def advance(self, answer: Any = None) -> None:
            if not self.is_working:
                return super().advance(answer)
            if at_work:
                self._thread.start()
            if not is_long:
                may_go_on.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(in_step, "AuditInStep", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        audits_in_step([audit, working, audit])
    assert len(ended) == 1 + (at_work and not is_long) and threading.active_count() == threads + is_long
    may_go_on.set()
