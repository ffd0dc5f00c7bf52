"""llama.cpp loads a merged file, and computes what it computes with the adapter at run time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_export
from support import ROOT, RUNNERS
from support.endpoints import Served, serving
from support.gguf_files import Kind, calibration_of, llama, runnable, write_llama
from support.llama_cpp_runs import PYTHON
from support.peft_models import trained

pytestmark = pytest.mark.skipif(not PYTHON, reason="llama.cpp is in an environment of its own: make test-llama-cpp")


def divergence(one: Any, other: Any) -> float:
    """The mean KL divergence of the words after each token."""
    wide = [each.astype(np.float64) - each.max(axis=-1, keepdims=True) for each in (one, other)]
    p, q = (each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in wide)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize(
    ("kind", "types", "how", "most"),
    [
        (Kind.F32, {}, "nearest", 1e-8),
        (Kind.F16, {}, "nearest", 1e-3),
        (Kind.Q8_0, {}, "nearest", 0.1),
        (Kind.Q8_0, {}, "calibrated", 0.1),
        (Kind.Q4_0, {"*": "keep"}, "nearest", 0.3),
        (Kind.Q4_0, {"*": "keep"}, "calibrated", 0.1),
        (Kind.Q4_0, {"*": "keep"}, "rescaled", 0.2),
        (Kind.Q4_0, {"*": "Q8_0"}, "nearest", 0.1),
        (Kind.Q4_K, {"*": "keep"}, "nearest", 0.4),  # random codes, of which some have no room for the change
        (Kind.Q4_K, {"*": "keep"}, "calibrated", 0.3),
        (Kind.Q4_K, {"*": "keep"}, "rescaled", 0.2),
        (Kind.Q4_K, {"*": "Q8_0"}, "nearest", 0.1),
        (Kind.Q6_K, {"*": "F16"}, "nearest", 0.1),
        (Kind.MXFP4, {"*": "BF16"}, "nearest", 0.1),
    ],
)
def test_a_merged_file_is_the_base_with_its_adapter(
    tmp_path: Path, kind: Kind, types: dict[str, str], how: str, most: float
) -> None:
    base = write_llama(tmp_path / "base.gguf", kind, fields=runnable)
    model = trained(llama(), r=4, lora_alpha=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    model.save_pretrained(tmp_path / "a")
    llama().save_pretrained(tmp_path / "hf")
    adapter = lora_export.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=tmp_path / "hf").output
    options: dict[str, Any] = {
        "nearest": {},
        "calibrated": {"calibration": calibration_of(tmp_path / "inputs.npz")},
        "rescaled": {"keep_quantised": True, "rescale": True},
    }[how]
    out = lora_export.merge(base, [tmp_path / "a"], tmp_path / "out.gguf", dtype_of=types, **options).output
    runs = (base, f"{base}+{adapter}", out)
    script = ROOT / "tests/support/llama_cpp_logits.py"
    subprocess.run([PYTHON, script, tmp_path / "logits.npz", *runs], check=True, capture_output=True)
    with np.load(tmp_path / "logits.npz") as found:
        without, beside, merged = (found[str(number)] for number in range(3))
    own, left = divergence(beside, without), divergence(beside, merged)
    print(f"{kind.name} {types}, {how}: KL of the merge {left:.3g}, of the adapter {own:.3g}: {left / own:.2g}")
    assert own > 1e-3 and left <= most * own


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_0], ids=str)
def test_verify_runs_a_merged_file_in_llama_cpp(tmp_path: Path, kind: Kind) -> None:
    base = write_llama(tmp_path / "base.gguf", kind, fields=runnable)
    model = trained(llama(), r=4, lora_alpha=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    model.save_pretrained(tmp_path / "a")
    out = lora_export.merge(base, [tmp_path / "a"], tmp_path / "out.gguf").output
    result = lora_export.verify(out, base, adapters=tmp_path / "a", runner=f"{RUNNERS}:GgufByLlamaCpp")
    print(f"{kind.name}: {result.about['quantisation_error']}")
    assert result, str(result)
    assert result.about["quantisation_error"]["of_library"] < (1e-4 if kind == Kind.F32 else 0.1)


@pytest.mark.parametrize(
    ("cache", "has_adapter", "outcome", "sentence"),
    [
        ("f32", True, "same", "token ids were sent"),
        ("f16", True, "same", "keys and values rounded to float16"),
        ("f16", False, "different", "the server answers as the base model"),
    ],
)
def test_what_llama_cpp_serves_is_judged(
    cache: str, has_adapter: bool, outcome: str, sentence: str, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base.gguf", Kind.F32, fields=runnable)
    model = trained(llama(), r=4, lora_alpha=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    model.save_pretrained(tmp_path / "a")
    llama().save_pretrained(tmp_path / "hf")
    adapter = lora_export.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=tmp_path / "hf").output
    script, run = ROOT / "tests/support/llama_cpp_logits.py", f"{base}+{adapter}" if has_adapter else base
    streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([PYTHON, script, cache, run], **streams) as process:

        def logits(ids: torch.Tensor) -> torch.Tensor:
            assert process.stdin and process.stdout
            process.stdin.write(f"{ids[0].tolist()}\n")
            process.stdin.flush()
            return torch.tensor(json.loads(process.stdout.readline()))

        with serving(Served(logits, None)) as address:
            result = lora_export.verify(address, tmp_path / "hf", adapters=tmp_path / "a", served_name="a")
        assert process.stdin
        process.stdin.close()
    print(f"cache in {cache}: {result.verdict.headline}")
    assert result.verdict.outcome == outcome, str(result)
    assert sentence in str(result)
