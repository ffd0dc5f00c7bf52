"""Run by vLLM's Python: what vLLM computes with each adapter, in one engine on the CPU.

    python vllm_logits.py OUT.npz BASE ADAPTER...

OUT gets the log-probabilities (tokens - 1, words) of the base as "base", and of each adapter that is loaded by the name
of its folder. `refused` has the messages of the others, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_runs import TOKENS

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an error ends no engine


def main(out: str, base: str, *adapters: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        base, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, max_logprobs=-1,
        enable_lora=True, max_lora_rank=16, max_loras=1, max_cpu_loras=1, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)

    def run(adapter: Any = None) -> Any:
        prompt: Any = {"prompt_token_ids": TOKENS}
        (found,) = engine.generate([prompt], sampling, lora_request=adapter, use_tqdm=False)
        rows = [row for row in found.prompt_logprobs or [] if row]
        return np.array([[row[word].logprob for word in range(len(row))] for row in rows])

    results, refused = {"base": run()}, {}
    for number, folder in enumerate(adapters, 1):
        request = LoRARequest(folder, number, folder)
        try:
            engine.llm_engine.add_lora(request)
            results[Path(folder).name] = run(request)
        except Exception as error:  # noqa: BLE001  whatever it refuses an adapter with
            refused[Path(folder).name] = f"{type(error).__name__}: {error}"[:300]
    np.savez(out, refused=np.array(json.dumps(refused)), **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
