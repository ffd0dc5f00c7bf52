"""What repairs a finding runs as it is given. Afterwards the same check finds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_export
from lora_export.options.adapters import RUNTIMES
from lora_export.options.spelling import FUNCTIONS
from lora_export.preflight.rules import SETTING, Repair, repairs, runtimes
from support import diffusion, experts
from support.api import MODEL, an_adapter
from support.gguf_files import llama
from support.peft_models import trained
from support.preflight_adapters import CASES, with_config
from support.slow import slow_but

Made = tuple[Path, Any]  # an adapter, and its base


def of_case(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        CASES[name].write(folder / "adapter")
        llama(tied=CASES[name].tied).save_pretrained(folder / "base")
        return folder / "adapter", folder / "base"

    return make


def of_head(folder: Path) -> Made:
    """PEFT saves the table of a head beside its pair."""
    replace(CASES["head"], edit=with_config(lora_alpha=10)).write(folder / "adapter")
    llama().save_pretrained(folder / "base")
    return folder / "adapter", folder / "base"


def of_experts(folder: Path) -> Made:
    paths = experts.save(folder, "deepseek_v3")
    return paths["adapter"], paths["old"]


def of_unet(folder: Path) -> Made:
    model = diffusion.unet()
    trained(model, r=2, lora_alpha=2, target_modules=["to_q", "to_v"]).save_pretrained(folder / "adapter")
    return folder / "adapter", diffusion.folder_of(model, folder / "base")


def of_graph(folder: Path) -> Made:
    lora_export.export_onnx(MODEL, folder / "MODEL.onnx", lora="inputs", target="dense", verify=False)
    return an_adapter(folder / "adapter"), None


# Runtime and repairs -> an adapter that needs these, in this order
NEEDED: Mapping[tuple[str, ...], Callable[[Path], Made]] = {
    ("vllm", "merge"): of_case("dora"),
    ("vllm", "names-vllm"): of_case("other prefix"),
    ("vllm", "resize-512", "setting max-lora-rank"): of_case("rank 520"),
    ("vllm", "setting max-lora-rank"): of_case("rank 32"),
    ("sglang", "fold"): of_case("rslora"),
    ("sglang", "names-sglang"): of_experts,
    ("llama.cpp", "gguf"): of_case("rank pattern"),
    ("llama.cpp", "fold", "gguf"): of_case("alpha pattern"),
    ("llama.cpp", "merge-untied"): of_case("tied head"),
    ("mlx", "mlx"): of_case("dora"),
    ("openvino", "peft"): of_case("pickle"),
    ("openvino", "openvino"): of_head,
    ("openvino", "merge"): of_case("tied embedding"),
    ("tensorrt-llm", "setting max-lora-rank"): of_case("rank 520"),
    ("genai", "graph"): of_graph,
    ("genai", "export"): of_case("norm saved whole"),
    ("diffusers", "diffusers"): of_unet,
    ("comfyui", "comfyui"): of_unet,
}
EXPORTS = (("genai", "graph"), ("genai", "export"), ("diffusers", "diffusers"))  # of several seconds


def run(repair: Repair, folder: Path, number: int) -> Path:
    """The output of the command, in a folder. A graph that is named MODEL.onnx is there."""
    options = dict(repair.options)
    options["output"] = folder / f"{number}-{options['output']}"
    if "graph" in options:
        options["graph"] = folder / options["graph"]
    extra = {"verify": False} if repair.command == "onnx" else {}
    if repair.command in ("convert", "combine", "resize"):
        reading: Any = {"reading": lora_export.ReadOptions(allow_pickle=True)}
        extra |= {} if repair.command == "combine" else reading
    result = getattr(lora_export, FUNCTIONS.get(repair.command, repair.command))(*repair.arguments, **options, **extra)
    return Path(getattr(result, "output", options["output"]))


@pytest.mark.parametrize("needed", slow_but([one for one in NEEDED if one not in EXPORTS], NEEDED), ids=" ".join)
def test_a_repair_is_enough(needed: tuple[str, ...], tmp_path: Path) -> None:
    runtime, *names = needed
    adapter, base = NEEDED[needed](tmp_path)
    settings: dict[str, float] = {}
    options: dict[str, Any] = {"runtimes": [runtime], "reading": lora_export.ReadOptions(allow_pickle=True)}
    for number, name in enumerate(names):
        found = lora_export.check(adapter, base=base, settings=settings, **options)
        assert not found
        repair = found.outcomes[0].repairs[0]
        assert repair.name == name
        if repair.settings:
            settings |= repair.settings
        else:
            adapter = run(repair, tmp_path, number)
    if names[-1].startswith(("merge", "export")):
        assert adapter.exists()  # a model, and no adapter that could be checked
    else:
        assert lora_export.check(adapter, base=base, settings=settings, **options)


def test_each_repair_is_needed_by_an_adapter() -> None:
    named = {name for needed in NEEDED for name in needed[1:]}
    settings = {rule.repair for one in runtimes().values() for rule in one.rules if rule.repair.startswith(SETTING)}
    assert named == repairs().keys() | settings
    assert {needed[0] for needed in NEEDED} | {"ollama"} == set(RUNTIMES)
