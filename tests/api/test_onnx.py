"""`lora_export.export_onnx`: what `lora-export onnx` does, as one call with a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

import lora_export as le
from lora_export.api import onnx_insert
from lora_export.errors import Different, InputRefused, WrongUsage
from lora_export.lora import Adapter
from lora_export.runtime.onnx_runner import OnnxRunner
from support import factories
from support.api import MODEL, A, B, Recorder, an_adapter

INPUTS = {
    "rows": np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 8),
    "weights": np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(2, 3),
}


def hidden(path: Path, runner: OnnxRunner | None = None) -> np.ndarray:
    return next(iter((runner or OnnxRunner(path, "cpu")).run(INPUTS).values()))


def expected(module: nn.Module, scale: float = 1.0) -> np.ndarray:
    """tanh((W + s·BA) x + b) times the weights, by NumPy in fp64."""
    weight, bias = (value.detach().numpy().astype(np.float64) for value in (module.dense.weight, module.dense.bias))
    return np.tanh(INPUTS["rows"] @ (weight + scale * B @ A).T + bias) * INPUTS["weights"][..., None]


@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_a_proven_graph_computes_the_adapted_layer(
    tmp_path: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Recorder()
    adapter = an_adapter(tmp_path / "adapter")
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=adapter, lora=lora, **seen.callbacks)
    assert result.files == (tmp_path / "m.onnx",)
    assert result.proof is not None and result.proof.verdict.same
    np.testing.assert_allclose(hidden(result.output), expected(le.load_model(MODEL).module), atol=1e-5)
    assert seen.stages[0] == "loading the model" and any(stage.startswith("verifying") for stage in seen.stages)
    assert capsys.readouterr().out == ""


def test_swapped_adapters_are_files_with_a_proof_each(tmp_path: Path) -> None:
    sources = [f"fr={an_adapter(tmp_path / 'a')}", f"de={an_adapter(tmp_path / 'b', scale=-2.0)}"]
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=sources, lora="inputs")
    assert [path.name for path in result.files] == ["m.onnx", "fr.onnx_adapter", "de.onnx_adapter"]
    assert result.proofs is not None and list(result.proofs.adapters) == ["fr", "de"]
    assert all(proof.verdict.same for proof in result.proofs.adapters.values())
    module, runner = le.load_model(MODEL).module, OnnxRunner(result.output, "cpu")
    np.testing.assert_allclose(hidden(result.output, runner), expected(module, 0.0), atol=1e-5)
    with_de = runner.with_adapter(tmp_path / "de.onnx_adapter")
    np.testing.assert_allclose(hidden(result.output, with_de), expected(module, -2.0), atol=1e-5)


def test_rows_are_proven_mixed_too(tmp_path: Path) -> None:
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"), lora="rows")
    assert result.proofs is not None and result.proofs.mixed is not None and result.proofs.mixed.verdict.same


def test_a_module_in_memory_is_exported(tmp_path: Path) -> None:
    module, examples = factories.scaled()
    adapter = le.load_adapter(an_adapter(tmp_path / "adapter"))
    result = le.export_onnx((module, examples), tmp_path / "m.onnx", adapters=adapter)
    np.testing.assert_allclose(hidden(result.output), expected(module), atol=1e-5)


def test_an_existing_graph_takes_an_adapter(tmp_path: Path) -> None:
    le.export_onnx(MODEL, tmp_path / "base.onnx")
    adapter = an_adapter(tmp_path / "adapter")
    result = le.export_onnx(tmp_path / "base.onnx", tmp_path / "m.onnx", adapters=adapter, lora="nodes")
    assert result.proof is not None and result.proof.about["against"] == "the base graph"
    np.testing.assert_allclose(hidden(result.output), expected(le.load_model(MODEL).module), atol=1e-5)


def test_without_verification_there_is_no_proof(tmp_path: Path) -> None:
    result = le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"), verify=False)
    assert result.proofs is None and result.proof is None and result.output.is_file()


def test_a_wrong_graph_raises_with_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_insert.insert_nodes
    monkeypatch.setattr(onnx_insert, "insert_nodes", lambda program, sites, plan: right(program, sites, doubled(plan)))
    with pytest.raises(Different, match="different") as refused:
        le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=an_adapter(tmp_path / "adapter"), lora="nodes")
    assert refused.value.proof.verdict.outcome == "different"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def doubled(plan: le.Plan) -> le.Plan:
    """The plan with every adapter twice as strong."""
    from dataclasses import replace

    steps = [
        replace(step, terms=tuple(replace(term, strength=2 * term.strength) for term in step.terms))
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "rows"}, "--lora rows needs the adapters"),
        ({"lora": "inputs"}, "--lora inputs needs an adapter"),
        ({"target": "all-linear"}, "--target is for --lora inputs"),
        ({"dora": True}, "--dora is for --lora inputs"),
        ({"checkpoint": "x"}, "--base and --model are for an .onnx MODEL"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.export_onnx(MODEL, tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    adapter: Adapter = le.load_adapter(an_adapter(tmp_path / "adapter"), name=".hidden")
    with pytest.raises(InputRefused, match="cannot be the name of a file"):
        le.export_onnx(MODEL, tmp_path / "m.onnx", adapters=adapter, lora="inputs")
