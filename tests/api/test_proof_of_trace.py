"""Proofs of files that follow a model up to a length alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from torch import nn

from lora_export.api.publish import prove_trace
from lora_export.errors import Different
from lora_export.models.model import Model
from lora_export.provenance import LONGEST_KEY
from lora_export.verification.parity import Outcome, Reason, Verdict
from lora_export.verification.proof import Proof

AXES = {"input_ids": {0: "batch", 1: "sequence"}}
INPUTS = {name: {"input_ids": np.zeros((1, int(name)), np.int64)} for name in ("8", "40")}


def a_model(longest: int | None, long: int) -> Model:
    traced = {} if longest is None else {"sequence": (2, longest)}
    return Model("m", nn.Identity(), AXES, lambda *_: {}, {}, traced=traced, further=({"sequence": long},))


@dataclass
class Trace:
    """A file that is wrong in these cases, until it states a length."""

    wrong: tuple[str, ...]
    messages: list[str] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    proofs: int = 0

    def prove(self) -> str:
        self.proofs += 1
        if self.wrong and not self.properties:
            reasons = tuple(Reason(Outcome.DIFFERENT, "error", "wrong", case) for case in self.wrong)
            verdict = Verdict(Outcome.DIFFERENT, reasons, comparisons=(), sensitivity=(), dtype="float32")
            raise Different("wrong", proof=Proof(verdict, inputs=INPUTS))
        return "same"

    def state(self, properties: Mapping[str, str]) -> None:
        self.properties |= properties

    def judge(self, model: Model, *, verify: bool = True) -> str | None:
        return prove_trace(model, self.prove if verify else None, self.state, self.messages.append)


STATED = {LONGEST_KEY: json.dumps({"sequence": 32})}


@pytest.mark.parametrize(
    ("wrong", "longest", "long", "stated", "proofs"),
    [
        ((), None, 40, {}, 1),
        ((), 32, 40, {}, 1),  # right on both sides
        (("40",), 32, 40, STATED, 2),
        ((), 32, 8, STATED, 1),  # no text is longer
    ],
)
def test_the_length_is_stated_where_longer_texts_are_not_proven(
    wrong: tuple[str, ...], longest: int | None, long: int, stated: Mapping[str, str], proofs: int
) -> None:
    trace = Trace(wrong)
    assert trace.judge(a_model(longest, long)) == "same"
    assert (trace.properties, trace.proofs, bool(trace.messages)) == (stated, proofs, bool(stated))
    assert not stated or "up to 32 in sequence: Identity computes larger ones in another way" in trace.messages[0]


@pytest.mark.parametrize(("wrong", "longest"), [(("40",), None), (("8", "40"), 32), (("",), 32)])
def test_other_differences_are_raised(wrong: tuple[str, ...], longest: int | None) -> None:
    trace = Trace(wrong)
    with pytest.raises(Different):
        trace.judge(a_model(longest, 40))
    assert not trace.properties


def test_without_a_proof_the_length_is_stated() -> None:
    trace = Trace(())
    assert trace.judge(a_model(32, 40), verify=False) is None
    assert trace.properties == STATED
