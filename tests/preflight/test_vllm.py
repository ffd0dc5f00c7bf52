"""What vLLM really does with each adapter is what `check` says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import lora_export
from lora_export.errors import LoraExportError
from support import ROOT
from support.gguf_files import llama
from support.llama_cpp_runs import TOKENS
from support.preflight_adapters import ATTENTION, CASES, MLP, Case, with_config, with_keys

VLLM = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not VLLM, reason="vLLM is in an environment of its own: make test-vllm")
RIGHT = 1e-3  # the largest error of a log-probability, relative to the adapter's effect
READING = lora_export.ReadOptions(allow_pickle=True)


def of_kind(kind: Any, **fields: Any) -> Case:
    return Case(kind=lambda **_: kind(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields))


MORE = {
    "rank 1": Case({"r": 1}),
    "rank 16": Case({"r": 16, "lora_alpha": 8}),
    "rank 17": Case({"r": 17}),
    "rank 16 beside 4": Case({"rank_pattern": {"o_proj": 16}}),
    "rank 24 beside 4": Case({"rank_pattern": {"o_proj": 24}}),
    "rank 2 beside 32": Case({"r": 32, "rank_pattern": dict.fromkeys(ATTENTION, 2)}),
    "rslora of rank 16": Case({"r": 16, "use_rslora": True, "lora_alpha": 4}),
    "rslora and alphas": Case({"use_rslora": True, "alpha_pattern": {"v_proj": 12}}),
    "q alone": Case({"target_modules": ["q_proj"]}),
    "o and down": Case({"target_modules": ["o_proj", "down_proj"], "lora_alpha": 12}),
    "gate alone": Case({"target_modules": ["gate_proj"]}),
    "attention and mlp": Case({"target_modules": [*ATTENTION, *MLP], "lora_alpha": 1}),
    "head alone": Case({"target_modules": ["lm_head"]}),
    "table alone": Case({"target_modules": ["embed_tokens"]}),
    "table of rank 16": Case({"target_modules": ["embed_tokens", "o_proj"], "r": 16}),
    "dora of the mlp": Case({"use_dora": True, "target_modules": MLP}),
    "biases of B": Case({"lora_bias": True}),
    "all biases declared": Case({"bias": "all"}),
    "head and table saved whole": Case({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "names of an adapter": Case(edit=with_keys(".weight", ".default.weight")),
    "no prefix": Case(edit=with_keys("base_model.model.", "")),
    "more targets declared": Case(edit=with_config(target_modules=[*ATTENTION, "out_proj"])),
    "hra": of_kind(peft.HRAConfig, r=4),
    "oft": of_kind(peft.OFTConfig, oft_block_size=4, r=0),
}
ALL = CASES | MORE


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[bool, bool]]:
    """For each case, whether `check` predicts that it runs as it was trained, and whether it does."""
    return {
        case: found for tied in (False, True) for case, found in runs_of(tmp_path_factory.mktemp("vllm"), tied).items()
    }


def runs_of(folder: Path, tied: bool) -> dict[str, tuple[bool, bool]]:
    cases = {str(number): name for number, name in enumerate(ALL) if ALL[name].tied is tied}
    llama(tied=tied).save_pretrained(folder / "base")
    wanted = {number: log_probabilities(ALL[name].write(folder / number)) for number, name in cases.items()}
    script = [VLLM, ROOT / "tests" / "support" / "vllm_logits.py", folder / "out.npz", folder / "base"]
    done = subprocess.run(
        [*script, *(folder / number for number in cases)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "out.npz") as results:
        found = {name: results[name] for name in results.files}
    refused = json.loads(str(found["refused"]))
    outcomes = {}
    for number, name in cases.items():
        right = number in found and is_right(found[number], wanted[number], found["base"])
        print(f"{name}: {'right' if right else refused.get(number, 'other numbers')}")
        outcomes[name] = predicted(folder / number, folder / "base"), right
    return outcomes


def log_probabilities(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1).numpy()


def is_right(found: Any, wanted: Any, base: Any) -> bool:
    return bool(np.abs(found - wanted).max() <= RIGHT * np.abs(base - wanted).max())


def predicted(adapter: Path, base: Path) -> bool:
    try:
        return bool(lora_export.check(adapter, runtimes=["vllm"], base=base, reading=READING))
    except LoraExportError:
        return False


@pytest.mark.parametrize("case", ALL)
def test_an_adapter_of_peft(case: str, runs: Mapping[str, tuple[bool, bool]]) -> None:
    foretold, right = runs[case]
    assert foretold is right
