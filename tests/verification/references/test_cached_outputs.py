"""Cached outputs are used only for the same model, adapters, inputs and code, and only where they are intact."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_export.lora import Adapter
from lora_export.models import model
from lora_export.models.load import load_model
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.storage import safetensors_file
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import cached_outputs
from lora_export.verification.references.proof_weights import proof_weights
from support import FACTORIES
from support.proofs import an_adapter, bf16_merge, folded

PROOF = 3 * 3 + 1  # runs: three roles of three cases, and the control of the only pair


@pytest.fixture
def scaled() -> model.Model:
    return load_model(f"{FACTORIES}:scaled")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Arrays]:
    """The inputs of every run of the reference, in order."""
    recorded: list[Arrays] = []
    run = Fp64Runner.run

    def recording(self: Fp64Runner, inputs: Arrays) -> Arrays:
        recorded.append(inputs)
        return run(self, inputs)

    monkeypatch.setattr(Fp64Runner, "run", recording)
    return recorded


def proven(
    base: model.Model, folder: Path, adapter: Adapter | None = None, candidate: Any = None, **more: Any
) -> tuple[Proof, list[str]]:
    warnings: list[str] = []
    candidate = candidate or folded(base, an_adapter())
    adapters = [adapter or an_adapter()]
    references = PyTorchReferences(base, adapters, cache=folder, say=warnings.append, **more)
    return prove(candidate, references), warnings


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_second_proof_runs_no_reference_and_gives_the_same_verdict(scaled, runs, tmp_path):
    first, warnings = proven(scaled, tmp_path / "new" / "cache")
    assert len(runs) == PROOF and warnings == []
    second, warnings = proven(scaled, tmp_path / "new" / "cache")
    assert len(runs) == PROOF and warnings == []
    assert second.verdict == first.verdict and second.verdict.same
    wrong, _ = proven(scaled, tmp_path / "new" / "cache", candidate=folded(scaled, an_adapter(), strength=1.1))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"strengths": [0.5]}, {"adapter": dataclasses.replace(an_adapter(), sha256="0b")}], ids=str
)
def test_other_seed_strengths_or_adapter_miss_the_cache(scaled, runs, tmp_path, change):
    proven(scaled, tmp_path)
    before = len(runs)
    _, warnings = proven(scaled, tmp_path, **change)
    assert len(runs) >= before + PROOF and warnings == []
    assert len(list(tmp_path.iterdir())) == 2


def test_other_weights_miss_the_cache(scaled, runs, tmp_path):
    proven(scaled, tmp_path)
    scaled.module.dense.bias.data[0] += 1
    proven(scaled, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["torch", "structure", "code of factories.py"])
def test_outputs_of_other_code_are_stale(scaled, runs, tmp_path, monkeypatch, name):
    proven(scaled, tmp_path)
    made_with = cached_outputs.code_of
    assert name in made_with(scaled.module)
    monkeypatch.setattr(cached_outputs, "code_of", lambda module: {**made_with(module), name: "another"})
    result, warnings = proven(scaled, tmp_path)
    assert result.verdict.same and len(runs) == 2 * PROOF
    assert f"is stale ({name} " in warnings[0] and "another now" in warnings[0]
    assert proven(scaled, tmp_path)[1] == [] and len(runs) == 2 * PROOF, "the new outputs were saved in its place"


def test_damaged_entry_is_reported_and_replaced(scaled, runs, tmp_path):
    proven(scaled, tmp_path)
    whole = entry(tmp_path).read_bytes()
    for damage in (whole[:-1], b"", whole[:-8] + bytes(8), whole.replace(b"digest", b"tsegid")):
        entry(tmp_path).write_bytes(damage)
        before = len(runs)
        result, warnings = proven(scaled, tmp_path)
        assert result.verdict.same and len(runs) == before + PROOF
        assert len(warnings) == 1 and "is damaged" in warnings[0]
        assert entry(tmp_path).read_bytes() == whole


def test_changed_values_are_detected_by_their_hash(scaled, runs, tmp_path):
    proven(scaled, tmp_path)
    file = safetensors_file.open_file(entry(tmp_path))
    tensors = {name: file.read(name) for name in file.entries}
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    safetensors_file.write(entry(tmp_path), tensors, file.metadata)
    _, warnings = proven(scaled, tmp_path)
    assert "not those that were written" in warnings[0] and len(runs) == 2 * PROOF


def test_changed_list_of_detected_pairs_is_noticed_by_the_hash(scaled, runs, tmp_path):
    """With another list, a pair that the candidate lacks would not be looked for."""
    proven(scaled, tmp_path)
    file = safetensors_file.open_file(entry(tmp_path))
    record = json.loads(file.metadata[cached_outputs.METADATA])
    assert record["detected"] == ["dense"]
    metadata = {cached_outputs.METADATA: json.dumps(record | {"detected": ["another"]})}
    safetensors_file.write(entry(tmp_path), {name: file.read(name) for name in file.entries}, metadata)
    _, warnings = proven(scaled, tmp_path)
    assert "not those that were written" in warnings[0] and len(runs) == 2 * PROOF


def test_unusable_cache_is_reported_and_the_proof_goes_on(scaled, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result, warnings = proven(scaled, tmp_path / "file")
    assert result.verdict.same and "nothing was saved" in warnings[0]
    result, warnings = proven(scaled, tmp_path / "a", dataclasses.replace(an_adapter(), sha256=""))
    assert result.verdict.same and "came from no file" in warnings[0]
    assert not (tmp_path / "a").exists()


def test_low_precision_merge_is_cached(scaled, runs, tmp_path):
    first, warnings = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    assert len(runs) == 3 + PROOF and warnings == []  # the unrounded adapters too, for the merge loss
    second, warnings = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    assert len(runs) == 3 + PROOF and warnings == []
    assert second.verdict == first.verdict and second.verdict.same
    assert all(each.figures.merge_loss for each in second.verdict.comparisons)
    wrong, _ = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter(), strength=1.1))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT


def test_rounding_of_a_merge_is_part_of_the_key(scaled, tmp_path):
    """The dtype is hashed, and the choice between two equally near values."""
    proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    other = bf16_merge(scaled, an_adapter())
    other.stored_dtypes = dict.fromkeys(other.stored_dtypes, "float16")
    proven(scaled, tmp_path, candidate=other)
    assert len(list(tmp_path.iterdir())) == 2
    digests = []
    for step in (0, 2**-7):
        module = bf16_merge(scaled, an_adapter()).module
        with torch.no_grad():
            module.dense.weight[0, 0] *= 1 + step
        weights = proof_weights(other, scaled, [an_adapter()], None, {}, None, has_own_heads=False)
        key = cached_outputs.cache_key(weights, {}, module, {})
        digests.append(key.digest)
    assert digests[0] != digests[1]


def test_layers_outside_torch_are_identified_by_their_code(scaled):
    code = cached_outputs.code_of(scaled.module)
    assert {"torch", "lora_export", "structure", "code of factories.py"} <= set(code)
    assert np.all([len(value) > 2 for value in code.values()])


def test_each_of_several_files_of_one_name_counts(tmp_path):
    made = []
    for name in ("one", "other"):
        path = tmp_path / name / "layers.py"
        path.parent.mkdir()
        path.write_text("import torch\nclass Layer(torch.nn.Identity): pass\n")
        made.append(runpy.run_path(str(path))["Layer"])
        made[-1].__module__ = f"layers_{name}"
        sys.modules[made[-1].__module__] = types.ModuleType("layers")
        sys.modules[made[-1].__module__].__file__ = str(path)
    net = torch.nn.Sequential(*(layer() for layer in made))
    before = cached_outputs.code_of(net)
    for layer in made:
        path = Path(sys.modules[layer.__module__].__file__)
        path.write_text(path.read_text() + "# more")
        assert before != (before := cached_outputs.code_of(net))
        del sys.modules[layer.__module__]


def test_arguments_of_a_factory_that_no_weight_shows_miss_the_cache(scaled, runs, tmp_path):
    """The same weights and code; an attribute that a factory sets changes what the module computes."""

    class Powered(type(scaled.module)):
        power = 1.0

        def forward(self, rows, weights):
            hidden, total = super().forward(rows, weights)
            return hidden * self.power, total

    scaled.module.__class__ = Powered
    assert proven(scaled, tmp_path)[0].verdict.same
    before = folded(scaled, an_adapter())
    scaled.module.power = 3.0
    wrong, warnings = proven(scaled, tmp_path, candidate=before)
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT and warnings == []
