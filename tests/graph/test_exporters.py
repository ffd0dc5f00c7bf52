"""Graphs of exporters and optimisers: the names that are recovered, and folding into them, against PyTorch.

A cell is an exporter and an optimiser. In each cell, every recovered name must be that of the parameter with this
content, and an adapter folded into all layers must give the outputs of PyTorch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.verification.references.candidate_tensors import compare_tensors
from lora_export.verification.references.compare_tensors import tensors_of_graph
from lora_export.weights.checkpoint import open_checkpoint
from support.exporters import (
    EXPORTERS,
    MODELS,
    OPTIMISERS,
    assert_folds_like_pytorch,
    checkpoint_of,
    linear_weights,
    model_of,
    torchscript,
)

slow = pytest.mark.slow


def assert_names_match_content(found: Sites, name: str, *, prefix: str = "", dtype: Any = np.float32) -> None:
    """Each named site holds the weight of this name."""
    weights = linear_weights(model_of(name))
    for site in found.linear:
        expected = weights[site.name.removeprefix(prefix)]  # a KeyError means a wrong name
        assert site.matrix.shape == expected.shape, site.name
        assert np.array_equal(site.matrix, expected.astype(dtype).astype(site.matrix.dtype)), site.name


# Linear layers that a base cannot name: a tied head without a name of its own.
LOST = {"gpt2": {"lm_head.weight"}, "llama": set(), "bert": set()}
FAST = {("bert", "torchscript", after) for after in OPTIMISERS} | {
    ("gpt2", "torchscript", ""), ("llama", "torchscript", "extended"),
}  # fmt: skip
CELLS = [
    pytest.param(model, exporter, after, marks=[] if (model, exporter, after) in FAST else slow)
    for model in MODELS
    for exporter in EXPORTERS
    for after in OPTIMISERS
    if not (exporter == "transformers, fused" and after)  # these optimisers reject onnxruntime's own operators
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    @functools.cache
    def make(name: str, exporter: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        EXPORTERS[exporter](name, path)
        return path

    return make


@pytest.mark.parametrize(("name", "exporter", "after"), CELLS)
def test_every_layer_is_found_and_folded_like_pytorch(
    name: str, exporter: str, after: str, made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = made(name, exporter)
    if after:
        source, path = path, path.with_name(f"{after}.onnx")  # its weights may be in a file beside it
        OPTIMISERS[after](source, path)
    weights = linear_weights(model_of(name))
    assert_names_match_content(find_sites(load_graph(path)), name, prefix="model." if exporter == "torchscript" else "")
    compared = compare_tensors(tensors_of_graph(load_graph(path)), model_of(name), None)
    assert not [*compared.faults, *compared.doubts] and re.search(r"(9[6-9]|100) % of its numbers", compared.notes[0])
    found = find_sites(load_graph(path), open_checkpoint(checkpoint_of(name)))
    assert_names_match_content(found, name)
    named = {site.name for site in found.linear}
    assert named | LOST[name] == weights.keys() | LOST[name]
    unnamed = [site for site in found.unnamed if not site.equal_tensors]
    assert not unnamed, str(found)
    assert_folds_like_pytorch(path, name, tmp_path / "folded")


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=slow)])
@pytest.mark.parametrize("after", ["", "stripped"])
def test_half_precision_graph_is_named_by_float32_base(name: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    torchscript(name, path, torch.float16)
    OPTIMISERS[after](path, tmp_path / "after.onnx")
    found = find_sites(load_graph(tmp_path / "after.onnx" if after else path), open_checkpoint(checkpoint_of(name)))
    assert_names_match_content(found, name, dtype=np.float16)
    assert {site.name for site in found.linear} == linear_weights(model_of(name)).keys()
    # The exporter stores some folded weights in float32, rounded to half precision.
    assert {spec.dtype for spec in found.specs} == {"float16", "float32"}
