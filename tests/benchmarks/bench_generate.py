"""Tokens per second of `generate`, beside onnxruntime-genai and transformers, and what a key/value cache is worth.

A Llama of 138 million parameters in fp32 with its adapter merged; a prompt of 64 tokens and 64 new ones, the most
probable token each time; 2 threads. Graphs: ours with ONNX's operators and with `--fuse cpu`, and the one that
onnxruntime-genai's builder makes. All in one process, in turn, in every round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
from transformers import AutoModelForCausalLM

import lora_export as le
from benchmarks.goals import MEASURED, Goal
from benchmarks.llama_graph import MAKE
from benchmarks.measure import keep, machine, run
from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.loop import Sampling, TextLimits, generate_tokens
from support.exporters import save_tokenizer
from support.genai import build_genai_graph

ROUNDS, PROMPT, NEW = 3, 64, 64
BATCHES = (1, 4)
OURS, FUSED, BUILT = "generate, ONNX's operators", "generate, --fuse cpu", "generate, the builder's graph"
GENAI, GENAI_BUILT, TORCH = "genai, our fused graph", "genai, the builder's graph", "transformers.generate"

Rival = Callable[[np.ndarray], list[list[int]]]  # prompts [batch, tokens] -> the new tokens


def ours(graph: Path) -> Rival:
    decoder = Decoder(graph)

    def generate(prompts: np.ndarray) -> list[list[int]]:
        return generate_tokens(decoder, prompts.tolist(), TextLimits((), NEW), Sampling(), lambda _, __: None)

    return generate


def genai(folder: Path) -> Rival:
    model = og.Model(str(folder))

    def generate(prompts: np.ndarray) -> list[list[int]]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(batch_size=len(prompts), max_length=PROMPT + NEW, min_length=PROMPT + NEW)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompts.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(row)[PROMPT:].tolist() for row in range(len(prompts))]

    return generate


def pytorch(folder: Path) -> Rival:
    module: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    module.generation_config.eos_token_id = None

    def generate(prompts: np.ndarray) -> list[list[int]]:
        ids = torch.tensor(prompts)
        made = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return [row.tolist() for row in made[:, PROMPT:]]

    return generate


def timed(rivals: Mapping[str, Rival]) -> dict[tuple[str, int], list[float]]:
    """Seconds of each rival and batch, one a round. The first round fetches memory and does not count."""
    times: dict[tuple[str, int], list[float]] = {}
    random = np.random.default_rng(0)
    for number in range(ROUNDS + 1):
        for batch in BATCHES:
            prompts = random.integers(3, 32000, (batch, PROMPT))
            answers = {}
            for name, rival in rivals.items():
                begun = time.perf_counter()
                answers[name] = rival(prompts)
                if number:
                    times.setdefault((name, batch), []).append(time.perf_counter() - begun)
            # Ties of a model with random weights may go either way after some tokens, and rarely do.
            first = {name: [row[0] for row in rows] for name, rows in answers.items()}
            assert all(tokens == first[TORCH] for tokens in first.values()), first
    return times


def table(times: Mapping[tuple[str, int], list[float]]) -> str:
    names = list(dict.fromkeys(name for name, _ in times))
    lines = [f"| tokens per second (times {GENAI_BUILT}) | {' | '.join(f'batch {batch}' for batch in BATCHES)} |"]
    lines.append("|---|" + "---|" * len(BATCHES))
    for name in names:
        cells = []
        for batch in BATCHES:
            own, other = times[name, batch], times[GENAI_BUILT, batch]
            share = median(b / a for a, b in zip(own, other, strict=True))
            cells.append(f"{batch * NEW / median(own):.0f} ({share:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_tokens_per_second(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    run([sys.executable, "-c", MAKE, tmp_path])
    save_tokenizer(tmp_path / "model")
    le.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    for name, fuse in (("plain", None), ("fused", "cpu")):
        le.export_onnx(tmp_path / "merged", tmp_path / name, with_cache=True, fuse=fuse, verify=False)
    build_genai_graph(tmp_path / "merged", tmp_path / "built", "fp32")
    rivals = {
        OURS: ours(tmp_path / "plain" / "model.onnx"),
        FUSED: ours(tmp_path / "fused" / "model.onnx"),
        BUILT: ours(tmp_path / "built" / "model.onnx"),
        GENAI: genai(tmp_path / "fused"),
        GENAI_BUILT: genai(tmp_path / "built"),
        TORCH: pytorch(tmp_path / "merged"),
    }
    times = timed(rivals)
    for batch in BATCHES:
        own, other = times[BUILT, batch], times[GENAI_BUILT, batch]
        share = median(a / b for a, b in zip(own, other, strict=True))
        MEASURED.append(Goal(f"{BUILT}, batch {batch}", median(own), GENAI_BUILT, median(other), share, 1 / 1.5))
    keep("generate", f"{table(times)}\n\nA prompt of {PROMPT} tokens and {NEW} new ones; {ROUNDS} rounds. {machine()}")
