"""Logits of GGUF models in llama.cpp, by llama-cpp-py-sync: run by a Python that has it (`make test-llama-cpp`).

Arguments: the output (.npz), then for each run the model, or MODEL+ADAPTER. The keys are the numbers of the runs. An
adapter that llama.cpp refuses has no logits. In place of the output, the type of a cache (f16, f32): each line of
tokens on stdin is answered with its logits, as JSON.
"""

import json
import sys

import numpy as np
from llama_cpp_py_sync import Llama
from llama_cpp_runs import TOKENS


def logits(model: str, adapter: str, tokens: list[int], cache: str = "f32") -> np.ndarray:
    """(tokens, words), with a cache of this type."""
    llama = Llama(model, n_ctx=256, n_threads=1, type_k=cache, type_v=cache, flash_attn_type=0)
    library, ffi = llama._lib, llama._ffi
    if adapter:
        loaded = library.llama_adapter_lora_init(llama._model, adapter.encode())
        if loaded == ffi.NULL:
            return np.empty(0, np.float32)
        both = ffi.new("struct llama_adapter_lora*[1]", [loaded]), ffi.new("float[1]", [1.0])
        assert library.llama_set_adapters_lora(llama._ctx, both[0], 1, both[1]) == 0
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    assert library.llama_decode(llama._ctx, batch) == 0
    size = 4 * llama.n_vocab
    rows = [ffi.buffer(library.llama_get_logits_ith(llama._ctx, place), size) for place in range(len(tokens))]
    return np.stack([np.frombuffer(row, np.float32).copy() for row in rows])


if __name__ == "__main__":
    output, *runs = sys.argv[1:]
    if output in ("f16", "f32"):
        for line in sys.stdin:
            print(json.dumps(logits(*runs[0].partition("+")[::2], json.loads(line), output).tolist()), flush=True)
    else:
        np.savez(output, **{str(number): logits(*run.partition("+")[::2], TOKENS) for number, run in enumerate(runs)})
