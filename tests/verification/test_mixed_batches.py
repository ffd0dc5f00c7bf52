"""Batches that mix adapters, judged row by row."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.proof import Proof, prove_mixed


@pytest.mark.parametrize(("position", "outcome"), [(0, parity.Outcome.SAME), (1, parity.Outcome.DIFFERENT)])
def test_mixed_batch_is_judged_from_each_rows_first_token(position: int, outcome: parity.Outcome) -> None:
    rng = np.random.default_rng(0)
    arrays = {"attention_mask": np.array([[0, 0, 1, 1, 1]] * 200)}
    truths = [rng.standard_normal((200, 5, 4)) for _ in range(3)]
    alone = []
    for truth in truths:
        deployed = {"logits": (truth + 1e-6 * rng.standard_normal(truth.shape)).astype(np.float32)}
        scaled = {"logits": truths[0] + 1.1 * (truth - truths[0])}
        runs = {"reference": {"logits": truth}, "deployed": deployed, "candidate": deployed, "scaled": scaled}
        unjudged = np.cumsum(arrays["attention_mask"], 1) == 0
        case = parity.Case("padded", "", base={"logits": truths[0]}, unjudged=unjudged, **runs)
        alone.append(Proof(parity.judge([case]), None, {}, {"padded": arrays}, (case,)))
    rows = np.resize([1, 2, 0], 200)

    class Mixing(torch_runners.ModuleRunner):
        def run(self, inputs: Arrays) -> Arrays:
            logits = np.stack([alone[chosen].cases[0].deployed["logits"][row] for row, chosen in enumerate(rows)])
            logits[np.cumsum(inputs["attention_mask"], 1) == position] += 1.0
            return {"logits": logits}

    verdict = prove_mixed(Mixing(nn.Identity()), alone, [1, 2, 0]).verdict
    assert verdict.outcome is outcome, str(verdict)
