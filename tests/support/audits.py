"""A base, adapters of many kinds, and the verdict of a merged checkpoint. For the tests of audits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lora_export import cli
from support.handmade import peft_adapter

RNG = np.random.default_rng(0)
Tensors = dict[str, NDArray[Any]]


def normal(*shape: int, std: float = 0.02) -> NDArray[np.float32]:
    return np.asarray(RNG.normal(size=shape) * std, np.float32)


SHAPES = {
    "a.weight": (40, 40), "b.weight": (64, 24), "kept.weight": (16, 24), "kept.bias": (16,), "a.bias": (40,),
    "conv.weight": (8, 4, 3, 3), "embed.weight": (50, 16), "head.weight": (5, 24), "scalar": (),
}  # fmt: skip
WEIGHTS = {name: normal(*shape) for name, shape in SHAPES.items()}
RANK = 4
PAIRS = {"a": (normal(RANK, 40, std=1), normal(40, RANK)), "b": (normal(RANK, 24, std=1), normal(64, RANK))}


def the_base(path: Path, dtype: Any = np.float32) -> Path:
    tensors = WEIGHTS | {"steps": np.arange(7)}
    save_file(
        {name: array if array.dtype.kind == "i" else array.astype(dtype) for name, array in tensors.items()}, path
    )
    return path


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def verified(
    capsys: pytest.CaptureFixture[str], merged: Path, base: Path, *adapters: Path, more: tuple[object, ...] = ()
) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    options = [part for adapter in adapters for part in ("-a", adapter)]
    code = run("verify", merged, "--base", base, *options, "--json", *more)
    return code, json.loads(capsys.readouterr().out)


def plain(folder: Path, **config: Any) -> Path:
    return peft_adapter(folder, PAIRS, **config)
