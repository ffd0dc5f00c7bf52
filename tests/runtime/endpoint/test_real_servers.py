"""Real servers on the loopback: vLLM, MLServer, transformers, and mlx-lm's, which serves the base by a listed name."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_export as le
from support import ROOT
from support.endpoints import save_adapter, save_base, started
from support.small_models import small_adapter, small_model

VLLM, MLSERVER, SERVE = (os.environ.get(f"{name}_PYTHON", "") for name in ("VLLM", "MLSERVER", "SERVE"))
HAS_MLX = importlib.util.find_spec("mlx_lm") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    base = save_base(folder / "base", hidden=64)  # vLLM computes attention of 32 and more features on the CPU
    for name, seed in {"a": 1, "b": 5}.items():
        save_adapter(base, folder / name, seed=seed, alpha=20)
    return folder


@pytest.fixture(scope="module")
def mlx(folder: Path) -> Iterator[str]:
    le.convert(folder / "a", folder / "mlx", to="mlx", base=folder / "base")
    (folder / "home" / "hub").mkdir(parents=True)
    # It ends itself at a prompt that it has in its cache (0.32): this one has none.
    command = [sys.executable, "-m", "mlx_lm", "server", "--prompt-cache-size", "0", "--host", "127.0.0.1"]
    command += ["--model", folder / "base", "--adapter-path", folder / "mlx", "--port"]
    with started(command, folder / "log", HF_HUB_OFFLINE="1", HF_HOME=str(folder / "home")) as address:
        yield address


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MLX, reason="needs mlx-lm")
@pytest.mark.parametrize(
    ("name", "outcome", "sentence"),
    [
        ("default_model", "same", "by `next tokens`"),
        (None, "different", "the server answers as the base model: the adapter's name is accepted"),
    ],
)
def test_the_server_of_mlx_lm(name: str | None, outcome: str, sentence: str, mlx: str, folder: Path) -> None:
    result = le.verify(mlx, folder / "base", adapters=folder / "a", served_name=name)
    assert result.verdict.outcome == outcome, str(result)
    assert sentence in str(result) and result.about["endpoint"]["requests"] <= 200


@pytest.mark.skipif(not VLLM, reason="vLLM is in an environment of its own: make test-vllm")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm(dtype: str, folder: Path) -> None:
    command: list[str | Path] = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "base"]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", "64"]
    # `c` is a name beside which its weights are those of `b`: another tenant's.
    command += ["--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    command += [f"a={folder / 'a'}", f"c={folder / 'b'}", "--port"]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with started(command, folder / "log", **offline, VLLM_CPU_KVCACHE_SPACE="1", VLLM_HOST_IP="127.0.0.1") as address:

        def verified(name: str) -> le.Verification:
            found = le.verify(
                address, folder / "base", adapters=folder / "a", other=folder / "b", served_name=name, dtype=dtype
            )
            print(f"{dtype}, {name}: {found.verdict.headline}; {found.about['endpoint']}")
            return found

        right = verified("a")
        assert right.verdict.same, str(right)
        assert right.about["endpoint"]["listed"]["parent"] == "base"
        assert right.about["endpoint"]["by"] == "prompt_logprobs"
        assert "answers as the base model" in str(verified("base"))
        assert "answers as the other tenant b" in str(verified("c"))
        base = le.verify(address, folder / "base", served_name="base", dtype=dtype)
        assert base.verdict.same, str(base)


@pytest.mark.skipif(not SERVE, reason="transformers serve has an environment of its own: make test-transformers-serve")
def test_transformers_serve_gives_nothing_to_compare(folder: Path) -> None:
    merged = le.merge(folder / "base", folder / "a", folder / "merged").output
    program = "from transformers.cli.transformers import main; main()"
    command = [SERVE, "-c", program, "serve", merged, "--host", "127.0.0.1", "--device", "cpu", "--port"]
    with started(command, folder / "log", HF_HUB_OFFLINE="1") as address:
        verdict = le.verify(address, folder / "base", adapters=folder / "a", served_name=str(merged)).verdict
    assert verdict.outcome == "undecided"
    assert "gives no log-probabilities for `logprobs`, `echo` or `prompt_logprobs`" in str(verdict)


@pytest.mark.skipif(not MLSERVER, reason="MLServer is in an environment of its own: make test-mlserver")
def test_mlserver(tmp_path: Path) -> None:
    base = small_model("bert", tmp_path / "base")
    right, other = (small_adapter("bert", base, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1))
    graph = le.export_onnx(base, tmp_path / "m.onnx", adapters=right, verify=False).output
    (tmp_path / "models").mkdir()
    command = [MLSERVER, ROOT / "tests" / "support" / "mlserver_graph.py", tmp_path / "models", graph]
    with started(command, tmp_path / "log", ready="v2/health/ready") as address:
        verdicts = [le.verify(f"{address}/models/m", base, adapters=each).verdict for each in (right, other)]
    assert [verdict.outcome for verdict in verdicts] == ["same", "different"], str(verdicts[0])
