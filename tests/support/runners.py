"""Runners for `verify --runner file.py:function`: right ones, and one for each way to be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Run = Callable[[dict[str, Any]], Any]


def by_name(path: str) -> Run:
    session = ort.InferenceSession(path)
    names = [value.name for value in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def by_order(path: str) -> Run:
    run = by_name(path)
    return lambda inputs: tuple(run(inputs).values())


def fills_cache_and_returns_it(path: str) -> Run:
    """A decoder whose key/value cache is always empty before a run."""
    run, session = by_name(path), ort.InferenceSession(path)
    pasts = [value for value in session.get_inputs() if value.name.startswith("past")]

    def call(inputs: dict[str, Any]) -> Any:
        rows = len(inputs["input_ids"])
        shapes = {value.name: [rows, value.shape[1], 0, value.shape[3]] for value in pasts}
        return run(inputs | {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})

    return call


def fills_cache(path: str) -> Run:
    run = fills_cache_and_returns_it(path)
    return lambda inputs: {"logits": run(inputs)["logits"]}


class StatesNoCache:
    """A decoder that states what it takes: no key/value cache."""

    axes = {"input_ids": (None, None), "attention_mask": (None, None)}  # noqa: RUF012

    def __init__(self, path: str):
        self._run = fills_cache_and_returns_it(path)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return self._run(inputs)


def one_array(path: str) -> Run:
    run = by_name(path)
    return lambda inputs: next(iter(run(inputs).values()))


def writes_into_inputs(path: str) -> Run:
    run = by_name(path)

    def call(inputs: dict[str, Any]) -> Any:
        outputs = run(inputs)
        for value in inputs.values():
            value[...] = 0
        return outputs

    return call


class Stating:
    """A runner that states what it takes, how it runs and what it lacks."""

    axes = {"rows": (None, None, 8), "weights": (None, None)}  # noqa: RUF012 - as an author of a runner writes it
    notes = ("run on a toaster",)
    cannot_give = ("scores of all tokens",)

    def __init__(self, path: str):
        self._run = by_name(path)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return self._run(inputs)


def cache_by_shape(path: str) -> Run:
    run, seen = by_name(path), dict[Any, Any]()

    def call(inputs: dict[str, Any]) -> Any:
        shapes = tuple(value.shape for value in inputs.values())
        return seen.setdefault(shapes, run(inputs))

    return call


def not_a_number(path: str) -> Run:
    run = by_name(path)
    return lambda inputs: {name: value * np.nan for name, value in run(inputs).items()}


def rounds(path: str) -> Run:
    run = by_name(path)
    return lambda inputs: {name: value.round(3) for name, value in run(inputs).items()}


def fails(path: str) -> Run:
    return lambda inputs: inputs["nothing"]


def says_words(path: str) -> Run:
    return lambda inputs: "words"


def crashes(path: str) -> Run:
    return lambda inputs: os.abort()


def sleeps(path: str) -> Run:
    return lambda inputs: time.sleep(60)


def opens_nothing(path: str) -> int:
    return 5


def prints(path: str) -> Run:
    run = by_name(path)

    def call(inputs: dict[str, Any]) -> Any:
        os.write(1, b"what a library prints")
        print("and Python")
        return run(inputs)

    return call


def gguf_by_transformers(path: str) -> Run:
    """The logits of a GGUF file, as transformers reads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(path).parent, gguf_file=Path(path).name).eval()

    def call(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return {"logits": model(**{name: torch.from_numpy(one) for name, one in inputs.items()}).logits.numpy()}

    return call


def base_of_gguf(path: str) -> Run:
    """Those of `base.gguf` in its folder."""
    return gguf_by_transformers(str(Path(path).with_name("base.gguf")))


def half_of_gguf(path: str) -> Run:
    """Half of the logits of a GGUF file, and half of those of its base."""
    merged, base = gguf_by_transformers(path), base_of_gguf(path)
    return lambda inputs: {"logits": (merged(inputs)["logits"] + base(inputs)["logits"]) / 2}


def zeros(path: str) -> Run:
    """Logits of as many words as the small GGUF files have, all of them 0."""
    return lambda inputs: {"logits": np.zeros((*inputs["input_ids"].shape, 64), np.float32)}


class GgufByLlamaCpp:
    """The logits of a GGUF file in llama.cpp, in an environment of its own. It runs one text, and nothing behind it."""

    limits = {"input_ids": [(1, 1), (1, 64)], "attention_mask": [(1, 1), (1, 64)]}  # noqa: RUF012
    plans_memory = True  # the limits are those of the batch, too

    def __init__(self, path: str):
        script = Path(__file__).with_name("llama_cpp_logits.py")
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen([os.environ["LLAMA_CPP_PYTHON"], script, "f32", path], **pipes)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        tokens, count = inputs["input_ids"][0].tolist(), int(inputs["attention_mask"].sum())
        self._process.stdin.write(f"{tokens[:count]}\n")
        self._process.stdin.flush()
        found = np.array(json.loads(self._process.stdout.readline()), np.float32)
        return {"logits": np.pad(found, [(0, len(tokens) - count), (0, 0)])[None]}
