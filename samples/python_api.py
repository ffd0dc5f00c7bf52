"""The Python API in a dozen lines: load, plan, merge, prove.

    python samples/python_api.py BASE ADAPTER OUT

BASE is a Hugging Face folder, ADAPTER one that PEFT or `lora-export train` wrote. OUT becomes the
merged model, or stays absent: nothing is published until it is proven.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lora_export as le


def main(base: Path, adapter: Path, out: Path) -> None:
    adapters = [le.load_adapter(adapter)]
    checkpoint = le.open_checkpoint(base)  # reads headers only
    plan = le.make_plan(adapters, checkpoint.specs, may_add=True)
    print(plan)
    with le.stage_folder(out, inputs=[base, adapter]) as stage:
        le.merge_checkpoint(plan, checkpoint, stage)
        merged = le.ModuleRunner(le.load_model(str(stage)).module)
        proof = le.prove(merged, le.PyTorchReferences(le.load_model(str(base), adapters), adapters))
        print(proof.verdict)
        if not proof.verdict:
            sys.exit(proof.exit_code)  # and the stage vanishes


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
