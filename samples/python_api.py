"""The Python API: merge, export and verify, and what each result contains.

    python samples/python_api.py BASE ADAPTER OUT

BASE is a Hugging Face folder. ADAPTER is a folder that PEFT or `lora-export train` wrote. OUT is a new folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lora_export as le
from lora_export.errors import NotTheSame


def main(base: Path, adapter: Path, out: Path) -> int:
    out.mkdir()
    merged = le.merge(base, adapter, out / "merged", on_message=print)
    print(f"{len(merged.report.results)} weights merged, {merged.report.copied:,} bytes copied unchanged")

    try:
        exported = le.export_onnx(base, out / "model.onnx", adapters=adapter, lora="nodes")
    except NotTheSame as error:  # nothing was published
        print(error)
        return error.exit_code
    print(f"{exported.output}: {exported.proof.verdict.outcome}")

    verification = le.verify(out / "merged", base, adapters=adapter, reports=[out / "merged.json"])
    print(verification)
    return verification.exit_code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
