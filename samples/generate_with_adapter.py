"""onnxruntime-genai: one graph that generates with the base and with a LoRA adapter.

    python samples/generate_with_adapter.py BASE ADAPTER OUT PROMPT

BASE is the Hugging Face folder of a decoder. ADAPTER is a folder that PEFT wrote. OUT is a new folder. Needs
onnxruntime-genai, and the extra `hf`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import transformers

import lora_export as le

NEW_TOKENS = 32


def build(base: Path, out: Path) -> Path:
    """The graph of the base, by onnxruntime-genai's model builder."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", base, "-o", out / "base", "-e", "cpu", "-p", "fp32", "-c", out / "cache"]
    subprocess.run([*builder, *map(str, options)], check=True, capture_output=True)
    return out / "base" / "model.onnx"


def generate(folder: Path, prompt: list[int], adapter: Path | None = None) -> list[int]:
    """The tokens that follow the prompt, chosen greedily."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)  # must live as long as the generator
        adapters.load(str(adapter), adapter.stem)
        generator.set_active_adapter(adapters, adapter.stem)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def main(base: Path, adapter: Path, out: Path, text: str) -> dict[str, list[int]]:
    """Build, export and generate. Returns the new tokens of the base and of the adapter."""
    out.mkdir()
    graph = build(base, out)
    (out / "served").mkdir()
    served = le.export_onnx(
        graph, out / "served" / "model.onnx", adapters=adapter, lora="inputs", names="genai", checkpoint=base
    )
    print(f"{served.output}: {served.proof.verdict.outcome}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    prompt = tokenizer.encode(text)
    (file,) = [path for path in served.files if path.suffix == ".onnx_adapter"]
    tokens = {"base": generate(served.output.parent, prompt), file.stem: generate(served.output.parent, prompt, file)}
    for name, ids in tokens.items():
        print(f"{name}: {tokenizer.decode(ids)}")
    return tokens


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
