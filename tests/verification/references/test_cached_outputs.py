"""What the reference said is believed only where it is of the same model, adapters, inputs and code, and whole."""

from __future__ import annotations

import dataclasses
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
from lora_export.verification import against_pytorch, parity, proof
from lora_export.verification.references import cached_outputs
from support import FACTORIES
from support.proofs import an_adapter, bf16_merge, folded


@pytest.fixture
def scaled() -> model.Model:
    return load_model(f"{FACTORIES}:scaled")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Arrays]:
    """What the reference was asked, in order."""
    questions: list[Arrays] = []
    run = Fp64Runner.run

    def listened(self: Fp64Runner, inputs: Arrays) -> Arrays:
        questions.append(inputs)
        return run(self, inputs)

    monkeypatch.setattr(Fp64Runner, "run", listened)
    return questions


def proven(
    base: model.Model, folder: Path, adapter: Adapter | None = None, candidate: Any = None, **more: Any
) -> tuple[proof.Proof, list[str]]:
    said: list[str] = []
    candidate = candidate or folded(base, an_adapter())
    return against_pytorch.prove(
        candidate, base, [adapter or an_adapter()], cache=folder, say=said.append, **more
    ), said


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_second_proof_asks_nothing_and_says_the_same(scaled, asked, tmp_path):
    first, told = proven(scaled, tmp_path / "new" / "cache")
    assert len(asked) == 9 and told == []
    second, told = proven(scaled, tmp_path / "new" / "cache")
    assert len(asked) == 9 and told == []
    assert second.verdict == first.verdict and second.verdict.same
    wrong, _ = proven(scaled, tmp_path / "new" / "cache", candidate=folded(scaled, an_adapter(), strength=1.1))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"strengths": [0.5]},
        {"adapter": dataclasses.replace(an_adapter(), sha256="0b")},
    ],
    ids=str,
)
def test_another_question_is_asked(scaled, asked, tmp_path, change):
    proven(scaled, tmp_path)
    before = len(asked)
    _, told = proven(scaled, tmp_path, **change)
    assert len(asked) >= before + 9 and told == []
    assert len(list(tmp_path.iterdir())) == 2


def test_other_weights_are_another_question(scaled, asked, tmp_path):
    proven(scaled, tmp_path)
    scaled.module.dense.bias.data[0] += 1
    proven(scaled, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["torch", "structure", "code of factories.py"])
def test_an_answer_of_other_code_is_stale(scaled, asked, tmp_path, monkeypatch, name):
    proven(scaled, tmp_path)
    made_with = cached_outputs._made_with
    assert name in made_with(scaled.module)
    monkeypatch.setattr(cached_outputs, "_made_with", lambda module: {**made_with(module), name: "another"})
    result, told = proven(scaled, tmp_path)
    assert result.verdict.same and len(asked) == 18
    assert f"is stale ({name} " in told[0] and "another now" in told[0]
    assert proven(scaled, tmp_path)[1] == [] and len(asked) == 18, "the new answer was kept in its place"


def test_a_damaged_entry_is_a_miss_that_is_told_and_replaced(scaled, asked, tmp_path):
    proven(scaled, tmp_path)
    whole = entry(tmp_path).read_bytes()
    for damage in (whole[:-1], b"", whole[:-8] + bytes(8), whole.replace(b"digest", b"tsegid")):
        entry(tmp_path).write_bytes(damage)
        before = len(asked)
        result, told = proven(scaled, tmp_path)
        assert result.verdict.same and len(asked) == before + 9
        assert len(told) == 1 and "is damaged" in told[0]
        assert entry(tmp_path).read_bytes() == whole


def test_an_entry_that_was_changed_with_care_is_still_found_out(scaled, asked, tmp_path):
    proven(scaled, tmp_path)
    there = safetensors_file.open_file(entry(tmp_path))
    tensors = {name: there.read(name) for name in there.entries}
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    safetensors_file.write(entry(tmp_path), tensors, there.metadata)
    _, told = proven(scaled, tmp_path)
    assert "not those that were written" in told[0] and len(asked) == 18


def test_what_cannot_be_kept_is_said_and_the_proof_goes_on(scaled, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result, told = proven(scaled, tmp_path / "file")
    assert result.verdict.same and "nothing was kept" in told[0]
    result, told = proven(scaled, tmp_path / "a", dataclasses.replace(an_adapter(), sha256=""))
    assert result.verdict.same and "came from no file" in told[0]
    assert not (tmp_path / "a").exists()


def test_a_merge_in_low_precision_is_asked_about_once(scaled, asked, tmp_path):
    first, told = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    assert len(asked) == 12 and told == []  # the adapters as they are, too, for the merge's loss
    second, told = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    assert len(asked) == 12 and told == []
    assert second.verdict == first.verdict and second.verdict.same
    assert all(there.figures.merge_loss for there in second.verdict.comparisons)
    wrong, _ = proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter(), strength=1.1))
    assert wrong.verdict.outcome is parity.Outcome.DIFFERENT


def test_what_a_merge_was_rounded_to_is_part_of_the_question(scaled, tmp_path):
    """The dtype, and where two numbers are as near the one that it chose."""
    proven(scaled, tmp_path, candidate=bf16_merge(scaled, an_adapter()))
    other = bf16_merge(scaled, an_adapter())
    other.stored = dict.fromkeys(other.stored, "float16")
    proven(scaled, tmp_path, candidate=other)
    assert len(list(tmp_path.iterdir())) == 2
    keys = []
    for step in (0, 2**-7):
        module = bf16_merge(scaled, an_adapter()).module
        with torch.no_grad():
            module.dense.weight[0, 0] *= 1 + step
        there = cached_outputs.question(scaled, [an_adapter()], None, {}, {"dense.weight": "bfloat16"}, module)
        keys.append(there.key)
    assert keys[0] != keys[1]


def test_a_layer_that_is_not_torchs_is_known_by_its_code(scaled):
    told = cached_outputs._made_with(scaled.module)
    assert {"torch", "lora_export", "structure", "code of factories.py"} <= set(told)
    assert np.all([len(value) > 2 for value in told.values()])
