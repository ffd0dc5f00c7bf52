"""Proofs that share a base: each has the figures that it has alone, and what is shared is computed once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.api import load_model
from lora_export.models import cached_decoder, export, stored_parameter
from lora_export.models.model import Model
from lora_export.report.json_document import as_dict
from lora_export.verification.references.attached_module import AttachedModule
from support.endpoints import save_adapter, save_base
from support.folder_contents import folder_contents
from support.slow import slow

OF_THE_RUN = ("seconds", "created")
DTYPES = ["float32", "bfloat16"]  # of the merged weights: the references round theirs to it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    base = save_base(folder / "base")
    for seed in (1, 2):
        made = save_adapter(base, folder / f"adapter{seed}", seed=seed)
        for dtype in DTYPES:
            le.merge(base, [made], output=folder / f"{dtype}{seed}", dtype=dtype)
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a role ran, a model was loaded, and its weights were hashed."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str, labels: Any) -> None:
        original = getattr(owner, name)

        def count(*arguments: Any, **options: Any) -> Any:
            counts.update(labels(arguments))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, count)

    counted(AttachedModule, "_in_role", lambda arguments: [arguments[1]])
    counted(Model, "fingerprint", lambda arguments: ["hash"])
    counted(load_model, "resolve_model", lambda arguments: ["load"])
    counted(export, "to_onnx", lambda arguments: ["export"])
    counted(cached_decoder, "exported_with_cache", lambda arguments: ["export"])
    return counts


def proven(place: Path, number: int, dtype: str = "float32", **options: Any) -> dict[str, Any]:
    found = le.verify(place / f"{dtype}{number}", place / "base", adapters=[place / f"adapter{number}"], **options)
    document = found.as_document()
    assert found.verdict.outcome == "same", document["reasons"]
    for name in OF_THE_RUN:
        del document["about"][name]
    return document


@pytest.mark.parametrize(("dtype", "streamed"), [("float32", False), ("bfloat16", True)])
def test_every_figure_is_that_of_a_lone_proof(
    dtype: str, streamed: bool, place: Path, ran: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)
        monkeypatch.setattr(stored_parameter, "SMALLEST_STREAMED", 0)
    alone = [proven(place, number, dtype) for number in (1, 2)]
    assert alone[0] != alone[1]
    assert ran["load"] == ran["hash"] == ran["base"] == 2
    ran.clear()
    session = le.ProofSession()
    assert [proven(place, number, dtype, session=session) for number in (1, 2, 1)] == [*alone, alone[0]]
    assert ran["load"] == ran["hash"] == ran["base"] == 1
    assert ran["reference"] == ran["scaled"] == 3


COMMON = ("load", "export", "base")  # what exports of one base do once
EXPORTS: dict[str, dict[str, Any]] = {"inputs": {"lora": "inputs"}, "with a cache": {"with_cache": True}}


# The second export has what the first one left in the session.
@pytest.mark.parametrize("compared", [(2,), slow((1, 2))], ids=["the second", "both"])
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_and_their_proofs_are_those_of_lone_ones(
    name: str, compared: tuple[int, ...], place: Path, ran: Counter[str], tmp_path: Path
) -> None:
    def exported(folder: Path, number: int, **shared: Any) -> dict[str, Any]:
        file = folder / str(number) / "model.onnx"
        file.parent.mkdir(parents=True)
        found = le.export_onnx(place / "base", file, adapters=[place / f"adapter{number}"], **EXPORTS[name], **shared)
        proofs = found.proofs
        assert proofs is not None
        every = [proofs.whole, *proofs.adapters.values()]
        assert all(proof.verdict.same for proof in every)
        return {"verdicts": [as_dict(proof.verdict) for proof in every], "files": folder_contents(file.parent)}

    alone = {number: exported(tmp_path / "alone", number) for number in compared}
    assert [ran[one] for one in COMMON] == [len(compared)] * 3
    ran.clear()
    shared = {"session": le.ProofSession(), "graphs": tmp_path / "graphs"}
    found = {number: exported(tmp_path / "shared", number, **shared) for number in (1, 2)}
    assert found[1] != found[2] and alone == {number: found[number] for number in compared}
    assert [ran[one] for one in COMMON] == [1, 1, 1]
    proven(place, 1, session=shared["session"])
    assert ran["load"] == 1  # a proof of weights has the same model


@pytest.mark.parametrize("changed", ["inputs", "base"])
def test_what_depends_on_other_inputs_or_another_base_is_computed_again(
    changed: str, place: Path, ran: Counter[str]
) -> None:
    session = le.ProofSession()
    proven(place, 1, session=session)
    options: dict[str, Any] = {"input_seed": 5} if changed == "inputs" else {}
    weights = place / "base" / "model.safetensors"
    times, tensors = weights.stat(), load_file(weights)
    if changed == "base":
        tensors["lm_head.weight"][0] += 1
        save_file(tensors, weights, {"format": "pt"})
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = le.verify(place / "float322", place / "base", adapters=[place / "adapter2"], session=session, **options)
    assert ran["base"] == 2 and ran["load"] == (1 if changed == "inputs" else 2)
    assert found.verdict.outcome == ("same" if changed == "inputs" else "different")
    if changed == "base":
        tensors["lm_head.weight"][0] -= 1
        save_file(tensors, weights, {"format": "pt"})


def test_inputs_in_bfloat16_are_told_apart_too() -> None:
    cases = {"first": {"image": np.zeros(2, ml_dtypes.bfloat16)}}
    assert le.ProofSession().without_adapters(torch.nn.Linear(1, 1), {}, cases).value is None
