"""Batches that mix adapters, judged row by row."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from lora_export.formats.row_adapters import ABSENT_LABEL
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.mixed_batches import mixed_cases
from lora_export.verification.proof import Proof
from lora_export.verification.row_proofs import judge_mixed


def test_unjudged_positions_are_those_of_each_rows_adapter() -> None:
    truth = np.ones((3, 2, 2))
    masks = [np.array([[True, False]] * 3), np.array([[False, True]] * 3)]
    cases = [
        parity.Case("a", "", {"y": truth}, {"y": truth}, {"y": truth}, unjudged_by_output={"y": own}) for own in masks
    ]

    class Same(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            return {"y": truth}

    (mixed,) = mixed_cases(Same(nn.Identity()), {"a": {"ids": np.zeros((3, 2))}}, [[case] for case in cases], [1, 0])
    assert mixed.unjudged_by_output["y"].tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize(("position", "outcome"), [(0, parity.Outcome.SAME), (1, parity.Outcome.DIFFERENT)])
@pytest.mark.parametrize("labels", [(4, 4, 4), (4, 3, 6)], ids=["equal heads", "heads of their own"])
def test_mixed_batch_is_judged_from_each_rows_first_token(
    labels: tuple[int, ...], position: int, outcome: parity.Outcome
) -> None:
    rng = np.random.default_rng(0)
    arrays = {"attention_mask": np.array([[0, 0, 1, 1, 1]] * 200)}
    truths = [rng.standard_normal((200, 5, count)) for count in labels]
    alone = []
    for truth in truths:
        deployed = {"logits": (truth + 1e-6 * rng.standard_normal(truth.shape)).astype(np.float32)}
        base = truths[0] if truth.shape == truths[0].shape else rng.standard_normal(truth.shape)
        scaled = {"logits": base + 1.1 * (truth - base)}
        runs = {"reference": {"logits": truth}, "deployed": deployed, "candidate": deployed, "scaled": scaled}
        unjudged = np.cumsum(arrays["attention_mask"], 1) == 0
        case = parity.Case("padded", "", base={"logits": base}, unjudged=unjudged, **runs)
        alone.append(Proof(parity.judge([case]), None, {}, {"padded": arrays}, (case,)))
    rows = np.resize([1, 2, 0], 200)

    def padded(case: parity.Case, row: int) -> NDArray[np.float32]:
        own: NDArray[np.float32] = case.deployed["logits"][row]
        return np.pad(own, ((0, 0), (0, max(labels) - own.shape[-1])), constant_values=absent)

    class Mixing(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            logits = np.stack([padded(alone[chosen].cases[0], row) for row, chosen in enumerate(rows)])
            logits[np.cumsum(inputs["attention_mask"], 1) == position, :3] += 1.0
            return {"logits": logits}

    absent = ABSENT_LABEL
    verdict = judge_mixed(Mixing(nn.Identity()), alone, [1, 2, 0]).verdict
    assert verdict.outcome is outcome, str(verdict)
    absent = 0.0  # such a label is no longer absent
    verdict = judge_mixed(Mixing(nn.Identity()), alone, [1, 2, 0]).verdict
    assert verdict.outcome is (parity.Outcome.DIFFERENT if len(set(labels)) > 1 else outcome)
