"""Ways of training one model: what each of them trains, and that none changes the base."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_export import layers, plan
from lora_export.api.training_strategies import Trainer, losses_of
from lora_export.callbacks import Progress
from lora_export.errors import InputRefused
from lora_export.options.train import Init, TrainingSettings, TrainOptions
from lora_export.training.batches import ArrayData
from lora_export.training.evaluation import evaluate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.body(x)))
        return scores


def some_data(seed: int) -> ArrayData:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(32, 4)).astype(np.float32))
    return ArrayData({"x": x}, (x[:, 0] > x[:, 1]).long())


def trainer(events: list[Progress], heads: tuple[str, ...] = ("head",)) -> Trainer:
    torch.manual_seed(0)
    settings = TrainingSettings(epochs=2, learning_rate=0.05, batch_size=8, seed=0)
    options = TrainOptions("net", "data", "out", on_progress=events.append)
    return Trainer(Net().eval(), some_data(0), some_data(1), settings, heads, options)


def test_each_way_trains_what_its_name_says() -> None:
    events: list[Progress] = []
    work = trainer(events)
    before = copy.deepcopy(work.module.state_dict())
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0, modules_to_save=["head"])
    runs = [work.adapter(new, 2), *work.compared(["full", "frozen"])]
    assert [run.label for run in runs] == ["LoRA, rank 2", "all weights", "head alone"]
    assert [run.parameters.trained for run in runs] == [2 * 12 + 18, 40 + 18, 18]
    assert [run.settings.learning_rate for run in runs] == pytest.approx([0.05, 0.005, 0.05])
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.module.state_dict().items())
    assert len({run.history.losses[0] for run in runs}) == 1  # the same start, and the same examples
    assert len({run.history.losses[-1] for run in runs}) == 3
    assert runs[0].adapter is not None and runs[0].adapter.pairs["body"].b.any()
    assert runs[0].score_without is not None and runs[0].score != runs[0].score_without
    assert set(losses_of(runs)) == {run.label for run in runs}
    assert {event.stage for event in events} == {
        *("training, rank 2", "training all weights", "training the head alone")
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_becomes_a_plain_adapter(init: Init) -> None:
    events: list[Progress] = []
    work = trainer(events)
    before = copy.deepcopy(work.module.state_dict())
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0, modules_to_save=["head"])
    started = replace(work, options=replace(work.options, init=init))
    run, plain = started.adapter(new, 2), work.adapter(new, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.module.state_dict().items())
    assert run.parameters.trained == plain.parameters.trained == 2 * 12 + 18
    assert run.history.losses[0] == pytest.approx(plain.history.losses[0], abs=1e-6)
    assert run.history.losses[1:] != pytest.approx(plain.history.losses[1:], abs=1e-4)
    assert run.score_without is not None and run.adapter is not None and run.score is not None
    pair = run.adapter.pairs["body"]
    assert (pair.rank, pair.scale) == (4, 2.0) and run.rank == 2
    changes = plan.make([run.adapter], layers.specs(work.module))
    deployed = copy.deepcopy(work.module)
    layers.attach(deployed, changes)
    assert evaluate(deployed, some_data(1)).loss == pytest.approx(run.score.loss, abs=1e-6)
    assert Progress(f"factors of the weights ({init})", 1, 1, "layers") in events
    assert re.search(r" tokens/s, [1-9][0-9,]* MiB, 0 s left$", events[-1].detail)


def test_without_a_head_the_base_is_measured_as_it_is() -> None:
    (run,) = trainer([], heads=()).compared(["frozen"])
    assert (run.label, run.parameters.trained, run.history.losses) == ("base as it is", 0, ())
    assert run.document["final_loss"] is None and run.document["held_out"]["count"] == 32


def test_a_base_that_would_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = trainer([], heads=())
    real = layers.attach

    def forgetful(module: nn.Module, plan: object, **options: Any) -> None:
        real(module, plan, **options)  # type: ignore[arg-type]
        module.get_parameter("head.bias").requires_grad_(True)

    monkeypatch.setattr(layers, "attach", forgetful)
    new = layers.create_adapter(work.module, targets=["body"], rank=2, alpha=4, seed=0)
    with pytest.raises(InputRefused, match=r"must be frozen, .*:\n  head\.bias"):
        work.adapter(new, 2)
