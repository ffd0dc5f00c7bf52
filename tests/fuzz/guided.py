"""Coverage-guided fuzzing of one target, in a process of its own: `guided.py TARGET [libFuzzer's options]`.

libFuzzer never returns: it ends the process, with 0 after `-max_total_time` or `-runs`, and writes the
input that broke the target where `-artifact_prefix` says.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What is imported later, as commands import what they need, would not be seen.
READERS = (
    *("api.merge", "api.inspect", "api.convert", "cli.merge", "cli.adapters", "cli.verbosity", "formats.peft"),
    *("formats.peft_config", "formats.peft_keys", "formats.megatron", "formats.onnx_adapter"),
    *("formats.task_adapters", "storage.safetensors_file", "weights.task_head", "weights.merge", "report"),
    *("runtime.session", "graph.merge.merge_graph", "graph.insert.adapter_inputs", "models.pt2.program"),
    *("models.processors", "api.unmerge", "api.generation_settings"),
)
with atheris.instrument_imports(include=["lora_export", "onnx_ir.serde", "onnx.external_data_helper"]):
    for reader in READERS:
        importlib.import_module(f"lora_export.{reader}")
    from fuzz.every_target import TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]

    def once(data: bytes) -> None:  # atheris wants None
        target(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
