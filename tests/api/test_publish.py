"""What functions that publish a proven file share: records, verdicts, and what a verdict means."""

from __future__ import annotations

from typing import Any

import pytest

from lora_export.api import publish
from lora_export.errors import Different, EnvironmentLacking, InputRefused, Undecided
from lora_export.models.load import load_model
from lora_export.runtime import environment
from lora_export.verification.parity import Outcome, Verdict
from lora_export.verification.proof import Proof
from support.api import MODEL
from support.plans import adapter, pair
from support.verdicts import DIAGNOSIS, DIFFERENT, NOTHING, ON_CPU, SAME, UNDECIDED


def a_proof(verdict: Verdict = SAME, **fields: Any) -> Proof:
    about = {"torch": "2.13", "onnxruntime": "1.31", "seed": 3, "against": "the base graph"}
    return Proof(verdict, **({"placement": ON_CPU, "about": about} | fields))


def test_a_file_records_its_verdict() -> None:
    assert publish.recorded_verdict(a_proof()) == {
        "outcome": "same",
        "against": "the base graph",
        "provider": "CPUExecutionProvider",
        "error_relative_to_effect": 0.25 / 64,
        "versions": {"torch": "2.13", "onnxruntime": "1.31"},
        "variables": {},
    }
    inputs = {"one": {"ids": (4, 29), "x": (4,)}, "long": {"ids": (1, 704), "x": (1,)}}
    recorded = publish.recorded_verdict(a_proof(about={"inputs": inputs}))
    assert recorded["largest_inputs"] == {"ids": [1, 704], "x": [4]}
    worst = publish.recorded_verdict(a_proof(DIFFERENT))
    assert (worst["outcome"], worst["error_relative_to_effect"]) == ("different", 1 / 64)
    assert publish.recorded_verdict(None) == {"outcome": "not verified", "why": "--no-verify"}


def test_a_verdict_without_figures_records_none() -> None:
    recorded = publish.recorded_verdict(a_proof(NOTHING, placement=None, about={"OMP_NUM_THREADS": "1"}))
    assert (recorded["provider"], recorded["error_relative_to_effect"], recorded["versions"]) == ("PyTorch", None, {})
    assert "against" not in recorded


def test_a_record_has_the_hashes_of_model_and_adapters() -> None:
    base, one = load_model(MODEL), adapter("fr", fc=pair())
    record = publish.record_of_model(base, [one], (), {"lora": "merged"})
    assert record["base"] == {"sha256": base.fingerprint()}
    assert [(each["name"], each["weight"]) for each in record["adapters"]] == [("fr", 1.0)]
    weighted = publish.record_of_model(base, [one], (0.5,), {})
    assert weighted["adapters"][0]["weight"] == 0.5


def test_only_a_proof_that_is_the_same_is_returned() -> None:
    proof = a_proof()
    assert publish.require_same(proof) is proof
    for verdict, kind in ((DIFFERENT, Different), (UNDECIDED, Undecided), (NOTHING, Undecided)):
        with pytest.raises(kind) as refused:
            publish.require_same(a_proof(verdict, diagnosis=DIAGNOSIS), "fr")
        text = str(refused.value)
        assert text.startswith(f"fr: {verdict.outcome}") and "encoder.1" in text
        assert text.endswith("\nverify=False would publish the file without a proof.")
        assert refused.value.proof.verdict is verdict


def test_cuda_must_run_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    publish.require_provider("cpu")
    result = type("Result", (), {"fault": "no GPU"})()
    monkeypatch.setattr(environment, "try_provider", lambda _: result)
    with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider does not run here: no GPU"):
        publish.require_provider("cuda")
    result.fault = ""
    publish.require_provider("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(EnvironmentLacking, match="NVIDIA_TF32_OVERRIDE=1 turns TF32 on"):
        publish.require_provider("cuda")
    publish.require_provider("cpu")


def test_steps_of_a_proof_are_reported_as_stages() -> None:
    stages: list[str] = []
    publish.stage_of_proof(stages.append)("case one")
    publish.stage_of_proof(stages.append, "fr")("case one")
    assert stages == ["verifying, case one", "verifying fr, case one"]


@pytest.mark.parametrize(
    ("error", "outcome", "gate", "code"),
    [
        (Different("it cannot be run"), Outcome.DIFFERENT, "structure", 4),
        (EnvironmentLacking("a node ran elsewhere"), Outcome.UNDECIDED, "placement", 6),
        (InputRefused("it is damaged"), Outcome.UNDECIDED, "structure", 3),
    ],
)
def test_an_error_becomes_a_proof_without_figures(error: Any, outcome: Outcome, gate: str, code: int) -> None:
    proof = publish.proof_without_figures(error, ON_CPU)
    (reason,) = proof.verdict.reasons
    assert (proof.verdict.outcome, reason.gate, reason.text, proof.exit_code) == (outcome, gate, str(error), code)
    assert proof.placement is ON_CPU and proof.about["torch"] and not proof.verdict.comparisons
