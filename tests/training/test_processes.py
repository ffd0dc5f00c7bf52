"""A training of one process: nothing to sum or wait for. `test_loop.py` starts two."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from benchmarks.checkpoints import LlamaShape, llama
from lora_export import layers
from lora_export.errors import InputRefused, WrongUsage
from lora_export.layers.module_tensors import is_in_shares
from lora_export.models.stored_parameter import StoredParameter
from lora_export.training.loop import accelerator_for
from lora_export.training.processes import (
    SHARDING,
    is_sharded,
    move,
    rank,
    shard_base,
    sum_gradients,
    sum_over_processes,
    take_from_first,
    wait_for_all,
    world_size,
)
from support.small_layers import plan_for
from support.small_models import small_model, words_tokenizer


def test_one_process_is_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    sum_gradients([parameter])
    wait_for_all()
    take_from_first([parameter.data], "cpu")
    assert parameter.tolist() == [1, 1]
    assert (rank(), world_size(), sum_over_processes([1.5, 2], "cpu"), parameter.grad.tolist()) == (
        0,
        1,
        [1.5, 2],
        [3, 3],
    )


@pytest.mark.slow
def test_a_group_is_gone_before_the_process_ends(tmp_path: Path) -> None:
    """Otherwise its threads are still there: PyTorch then aborted 7 of 8 runs of three processes on two cores."""
    script = """if True:
        import atexit, sys, weakref
        import torch.distributed as dist
        from lora_export.training import processes

        group = lambda: None
        atexit.register(lambda: print("at the end:", group()))
        if sys.argv[1:]:
            dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
            group = weakref.ref(dist.group.WORLD)
        processes.leave_at_exit()
        processes.leave_at_exit()
        import torch.distributed.nn.functional  # as accelerate does
        print("before:", type(group()).__name__)
    """
    for words, before in (((str(tmp_path / "group"),), "ProcessGroup"), ((), "NoneType")):
        run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        assert run.stdout == f"before: {before}\nat the end: None\n"


@pytest.mark.parametrize("variable", SHARDING)
def test_a_base_in_parts_is_refused_by_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` and its like set these variables."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(WrongUsage, match=f"accelerate is configured for {SHARDING[variable]}, which this training"):
        accelerator_for("cpu", "no")
    monkeypatch.setenv(variable, "false")
    accelerator_for("cpu", "no")


class Blocks(nn.Module):
    """An inner module with two blocks, and layers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 4)
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in "12"])
        self.single = nn.ModuleList([nn.Linear(4, 4)])  # one entry is no stack
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x) + self.shift
        for block in self.body.blocks:
            x = x + block(x)
        return self.single[0](x)


def adapted() -> Blocks:
    torch.manual_seed(0)
    module = Blocks()
    new = layers.create_adapter(module, targets=["0", "inlet"], rank=2, alpha=4, seed=0, bias="lora_only")
    layers.attach(module, plan_for(module, new, identity_ok=True), trainable=True)
    for name, tensor in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    return module


@pytest.mark.usefixtures("process_group")
def test_frozen_weights_of_blocks_are_shared_and_nothing_else() -> None:
    module, whole = adapted(), adapted()
    read = []

    def values() -> Tensor:
        read.append(1)
        return whole.body.blocks[1][2].weight.detach().clone()

    module.body.blocks[1][2].weight = StoredParameter((4, 6), values)
    x = torch.randn(3, 4)
    assert not is_sharded(module)
    shard_base(module, "cpu")
    assert is_sharded(module) and type(module) is Blocks and read == [1]
    shared = {name for name, tensor in module.named_parameters() if is_in_shares(tensor)}
    assert shared == {
        f"body.blocks.{number}.{name}" for number in (0, 1) for name in ("0.weight", "2.weight", "2.bias")
    }
    move(module, "cpu")
    outputs, expected = module(x), whole(x)
    assert torch.equal(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    own = dict(module.named_parameters())
    for name, tensor in whole.named_parameters():
        found = own[name].grad
        assert (found is None) == (tensor.grad is None)
        assert tensor.grad is None or torch.equal(found, tensor.grad), name


@pytest.mark.usefixtures("process_group")
def test_a_base_without_blocks_and_one_in_4_bits_are_refused() -> None:
    with pytest.raises(InputRefused, match=r"the base has no blocks .* Leave out shard_base=True"):
        shard_base(nn.Sequential(nn.Linear(2, 2)), "cpu")
    packed = Blocks()
    packed.body.blocks[0][0] = bnb.nn.Linear4bit(4, 6).to("cpu")
    with pytest.raises(InputRefused, match="weights of 4 bits are not shared"):
        shard_base(packed, "cpu")
    assert not is_sharded(packed)


RUNS = {
    "llama": ["--keep-best", "--accumulate", "2"],
    "bert": ["--bias", "all", "--dora", "--gradient-checkpointing"],
    "gpt2": ["--base-dtype", "bfloat16", "--precision", "bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_shares_train_as_one_does(name: str, tmp_path: Path) -> None:
    base = words_tokenizer(small_model(name, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())  # dropout is drawn by each process for itself
    (base / "config.json").write_text(json.dumps(config | {name: 0.0 for name in config if "drop" in name}))
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["bad", "good", "very", "film", "a"], 7))} for _ in range(31)]
    rows = [row | {"label": row["text"].split()[0]} for row in rows] if name == "bert" else rows
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, adapters = [], []
    for number in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if number > 1 else []
        command = [sys.executable, *launch, "-m", "lora_export", "train", base, "--data", tmp_path / "data.jsonl"]
        command += ["-o", tmp_path / f"{number}", "--rank", "2", "--batch-size", "5", "--holdout", "0.3"]  # odd counts
        command += [*RUNS[name], *(["--shard-base"] if number > 1 else [])]
        subprocess.run([str(word) for word in command], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
        lines = (tmp_path / f"{number}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
        adapters.append(load_file(tmp_path / f"{number}/adapter_model.safetensors"))
    error = 2e-4 if name == "gpt2" else 1e-6
    assert losses[0] == pytest.approx(losses[1], abs=error) and len(losses[0]) > 10
    for key, array in adapters[0].items():
        assert np.abs(array - adapters[1][key]).max() <= error, key
        assert "lora_B" not in key or np.abs(array).max() > 10 * error


@pytest.mark.slow
def test_a_process_holds_half_of_the_blocks(tmp_path: Path) -> None:
    """Read in shares, too: no process ever holds the whole base."""
    shape = LlamaShape(hidden=1024, inner=2816, layers=16, heads=16)
    base = words_tokenizer(llama(tmp_path / "base", shape))
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"text": "a good film"}) + "\n" + json.dumps({"text": "bad"}) + "\n"
    )
    peaks = {}
    for options in ((), ("--shard-base",)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "lora_export", "train", base, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "ad"]
        command += ["--holdout", "0", "--epochs", "1", "--overwrite", *options]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        run = subprocess.run(
            [str(word) for word in command], check=True, env=environment, capture_output=True, text=True
        )
        found = re.search(r"peak memory ([0-9,]+) MiB", run.stdout + run.stderr)
        assert found
        peaks[options] = int(found[1].replace(",", ""))
    outside = sum(math.prod(sizes) for name, sizes in shape.tensors.items() if ".layers." not in name)
    blocks = sum(map(math.prod, shape.tensors.values())) - outside
    saved = (peaks[()] - peaks[("--shard-base",)]) * 2**20
    print(f"{peaks} MiB; the blocks take {4 * blocks / 2**20:.0f} MiB in fp32")
    assert saved > 0.3 * 4 * blocks  # half of them, less what one block takes while it is read and gathered
