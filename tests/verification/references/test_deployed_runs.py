"""Runs of PyTorch as deployed: its error where adapters are merged, and where its weights are moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.lora import Adapter, LoraPair
from lora_export.models import model
from lora_export.verification import parity, proof
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import judging
from lora_export.verification.proof import prove
from lora_export.verification.references import deployed_runs
from support.proofs import folded


def a_large_adapter(std: float) -> tuple[model.Model, Adapter]:
    """Two wide layers, and an adapter whose change is several times as large as their weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64)).eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layers(x)
            return output

    def make(sizes: model.Sizes, generator: torch.Generator) -> model.ModelInputs:
        return {"x": torch.randn(sizes["batch"], 64, 256, generator=generator)}

    base = model.Model("layers", Named(), axes={"x": {0: "batch"}}, make_inputs=make, traced_sizes={"batch": 2})
    rng = np.random.default_rng(0)
    pairs = {
        name: LoraPair(a=std * rng.standard_normal((2, 256)), b=std * rng.standard_normal((out, 2)), scale=2.0)
        for name, out in (("layers.0", 256), ("layers.1", 64))
    }
    return base, Adapter(name="a", format="test", pairs=pairs, sha256="0a")


def test_peers_of_a_run_in_fp32_are_its_merge_and_moved_weights() -> None:
    base, adapter = a_large_adapter(0.05)
    references = PyTorchReferences(base, [adapter])
    candidate = folded(base, adapter)
    prepared = references.prepare(candidate, references.inputs(candidate))
    peers = list(prepared.further_peers(lambda _: None))
    assert [peer.note for peer in peers] == [
        deployed_runs.MERGED_MODULE,
        *[deployed_runs.MOVED_WEIGHTS] * deployed_runs.DRAWS_OF_ROUNDING,
    ]
    for name, arrays in prepared.inputs.cases.items():
        own = prepared.deployed.run(arrays)["output_0"]
        outputs = [peer.outputs[name]["output_0"] for peer in peers]
        assert len({output.tobytes() for output in (own, *outputs)}) == len(peers) + 1
        assert max(np.abs(output - own).max() for output in outputs) < 1e-5 * np.abs(own).max()


def test_right_merge_of_a_large_adapter_is_same_beside_a_merged_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = a_large_adapter(1.0)
    # The error of the merge is 1.3 to 3 times that of PyTorch, depending on the processor, and 1 once PyTorch merges.
    with monkeypatch.context() as unmerged:
        unmerged.setattr(proof, "differs_in_precision_alone", lambda _: False)
        comparisons = prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.comparisons
    apart = max(comparison.figures.ratio for comparison in comparisons)
    assert apart > 1.1
    monkeypatch.setattr(judging, "ratio_limit", lambda *_: (1 + apart) / 2)
    result = prove(folded(base, adapter), PyTorchReferences(base, [adapter]))
    assert result.verdict.same and deployed_runs.MERGED_MODULE in result.verdict.notes, str(result.verdict)
    assert result.diagnosis is None
    wrong = prove(folded(base, adapter, strength=1.00001), PyTorchReferences(base, [adapter]))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT and deployed_runs.MERGED_MODULE not in wrong.verdict.notes
    ordinary, usual = a_large_adapter(0.05)
    usual_notes = prove(folded(ordinary, usual), PyTorchReferences(ordinary, [usual])).verdict.notes
    assert deployed_runs.MERGED_MODULE not in usual_notes
    monkeypatch.setattr(proof, "differs_in_precision_alone", lambda _: False)
    assert prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.outcome is parity.Outcome.DIFFERENT
