"""Training on tiny modules: which parameters change, what a seed repeats, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_export import layers, plan
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.training import loop
from lora_export.training.batches import ArrayData, Data, array_data, token_data
from lora_export.training.data import Examples
from lora_export.training.evaluation import evaluate
from lora_export.training.losses import cross_entropy
from support.letters import LettersTokenizer


class Net(nn.Module):
    """A frozen body with dropout and a batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        scores: Tensor = self.head(self.body(scale * x))
        return scores


def some_data(count: int = 64) -> ArrayData:
    """Rows of four numbers, labelled by whether the first exceeds the second."""
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return array_data(Examples((x[:, 0] > x[:, 1]).astype(np.int64), classes=("no", "yes"), inputs={"x": x}))


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    module = Net()
    adapter = layers.create_adapter(module, targets=["0", "4"], rank=4, alpha=8, seed=seed, modules_to_save=["head"])
    layers.attach(module, plan.make([adapter], layers.specs(module), identity_ok=True), trainable=True)
    return module


def fitted(module: nn.Module, data: Data | None = None, **options: Any) -> loop.TrainingHistory:
    settings = {"epochs": 20, "learning_rate": 0.05, "batch_size": 16, "seed": 0, **options}
    return loop.fit(module, data or some_data(), **settings)


def test_the_loss_falls_and_the_module_learns() -> None:
    module, data = adapted(), some_data()
    before = evaluate(module, data)
    history = fitted(module, data)
    after = evaluate(module, data)
    assert len(history.losses) == len(history.seconds) == 20 * 4
    assert np.mean(history.losses[-8:]) < 0.5 * np.mean(history.losses[:8])
    assert after.accuracy is not None and before.accuracy is not None
    assert after.accuracy > 0.95 > before.accuracy
    assert after.loss < 0.5 * before.loss
    assert history.peak_bytes > 2**20
    assert min(history.seconds) > 0
    assert str(history).startswith("80 steps on cpu in ")


def test_only_a_b_and_the_head_change() -> None:
    module = adapted()
    before = copy.deepcopy(module.state_dict())
    fitted(module, epochs=2)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        *(f"body.{layer}.lora_{side}.default" for layer in (0, 4) for side in "AB"),
        "head.weight",
        "head.bias",
    }


def test_a_trainable_batch_norm_updates_its_statistics() -> None:
    module = Net().requires_grad_(False)
    module.body[1].requires_grad_(True)
    before = module.body[1].running_mean.clone()
    fitted(module, epochs=1)
    assert not torch.equal(module.body[1].running_mean, before)


def test_equal_seeds_give_equal_bits() -> None:
    first, second, other = adapted(), adapted(), adapted()
    history = fitted(first, epochs=3)
    torch.rand(5)
    again = fitted(second, epochs=3)
    assert history.losses == again.losses
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert fitted(other, epochs=3, seed=1).losses != history.losses


def test_training_leaves_the_callers_random_state_alone() -> None:
    module = adapted()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(module, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_is_active_while_training_and_off_afterwards() -> None:
    module = adapted()
    modes: list[bool] = []
    module.body[3].register_forward_hook(lambda part, *_: modes.append(part.training))
    fitted(module.eval(), epochs=1)
    assert modes == [True] * 4
    assert not any(part.training for part in module.modules())
    module.train()
    evaluate(module, some_data())
    assert modes[4:] == [False]
    assert module.training


def test_accelerate_leaves_no_attribute_on_the_module() -> None:
    module = adapted()
    before = set(vars(module))
    fitted(module, epochs=1, precision="no")
    assert set(vars(module)) == before


class Recorder(nn.Module):
    """Records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.flatten().int().tolist())
        scores: Tensor = self.layer(x)
        return scores


def test_every_example_is_seen_once_an_epoch_in_seeded_order() -> None:
    data = ArrayData({"x": torch.arange(10.0)[:, None]}, torch.arange(10) % 2)
    orders = []
    for seed in (0, 1):
        module = Recorder()
        loop.fit(module, data, epochs=2, learning_rate=0.01, batch_size=4, seed=seed)
        assert [len(batch) for batch in module.seen] == [4, 4, 2, 4, 4, 2]
        orders += [tuple(number for batch in half for number in batch) for half in (module.seen[:3], module.seen[3:])]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({*orders, tuple(range(10))}) == 5


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [loop._warm_up_and_decay(10, 0.2)(step) for step in range(11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert [loop._warm_up_and_decay(1, 0.9)(step) for step in range(2)] == [1.0, 0.0]
    module = nn.Linear(1, 1, bias=False)
    weights = [module.weight.item()]
    fitted(
        module,
        ArrayData({"input": torch.ones(1, 1)}, torch.ones(1)),
        epochs=4,
        warmup=0.25,
        weight_decay=0.0,
        learning_rate=0.5,
        loss=lambda scores, _: -scores.sum(),
        on_step=lambda *_: weights.append(module.weight.item()),
    )
    # While the gradient is the same, a step of AdamW moves a number by the learning rate.
    assert np.diff(weights) == pytest.approx([0.25, 0.5, 2 / 3 * 0.5, 1 / 3 * 0.5], rel=1e-4)


def test_gradients_are_clipped() -> None:
    norms: list[float] = []
    module = nn.Linear(1, 1)

    def huge(scores: Tensor, labels: Tensor) -> Tensor:
        return 1e6 * (scores.flatten() - labels).square().mean()

    data = ArrayData({"input": torch.ones(1, 1)}, torch.zeros(1))
    real = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        loop.fit(module, data, epochs=2, learning_rate=0.1, batch_size=1, seed=0, loss=huge)
    assert norms == pytest.approx([1.0, 1.0], rel=1e-3)


def test_progress_is_reported_at_every_step() -> None:
    reported: list[tuple[int, int, float]] = []
    history = fitted(adapted(), epochs=2, on_step=lambda *step: reported.append(step))
    assert [(step, steps) for step, steps, _ in reported] == [(number, 8) for number in range(1, 9)]
    assert tuple(loss for _, _, loss in reported) == history.losses


def test_values_are_predicted_with_squared_error() -> None:
    module = nn.Linear(2, 1)
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    data = array_data(Examples(x @ np.array([2, -1], np.float32), inputs={"input": x}))
    fitted(module, data, learning_rate=0.2, weight_decay=0.0)
    score = evaluate(module, data)
    assert (score.accuracy, score.count) == (None, 64)
    assert score.loss < 1e-3
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[2.0, -1]]), atol=0.03, rtol=0)


def test_texts_train_a_model_through_its_tokenizer() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(27, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            mask = attention_mask[..., None]
            return {"logits": self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))}

    torch.manual_seed(0)
    texts = ("aa", "ab", "a", "b", "bbb", "bb") * 4
    examples = Examples(np.array([0, 0, 0, 1, 1, 1] * 4), classes=("0", "1"), texts=texts)
    data = token_data(examples, LettersTokenizer())
    module = Bag()
    loop.fit(module, data, epochs=20, learning_rate=0.1, batch_size=5, seed=0)
    assert evaluate(module, data).accuracy == 1.0


# --- What training refuses ---


def test_a_loss_that_is_not_finite_stops_with_its_step() -> None:
    module = adapted()
    calls: list[int] = []

    def diverging(scores: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(scores, labels) * (float("inf") if len(calls) == 3 else 1)

    with pytest.raises(InputRefused, match="the loss is inf at step 3 of 4: training has diverged"):
        fitted(module, epochs=1, loss=diverging)
    assert not module.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda options: options.update(epochs=0), "epochs 0"),
        (lambda options: options.update(batch_size=0), "batch size 0"),
        (lambda options: options.update(learning_rate=float("nan")), "learning rate nan"),
        (lambda options: options.update(warmup=1.0), r"warm-up 1\.0"),
    ],
)
def test_impossible_settings_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    options: dict[str, Any] = {}
    change(options)
    with pytest.raises(InputRefused, match=message):
        fitted(adapted(), **options)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(InputRefused, match="nothing to train"):
        fitted(Net().requires_grad_(False))


@pytest.mark.parametrize("names", [["y"], ["x", "y"], []])
def test_inputs_that_forward_does_not_take_are_refused(names: list[str]) -> None:
    data = ArrayData({name: torch.ones(4, 4) for name in names}, torch.tensor([0, 1, 0, 1]))
    message = rf"the examples contain {', '.join(names)}; the model's forward takes scale, x"
    with pytest.raises(InputRefused, match=message):
        fitted(adapted(), data)
    with pytest.raises(InputRefused, match=message):
        evaluate(adapted(), data)


def test_without_accelerate_the_environment_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'lora-export\[train\]'"):
        fitted(adapted())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_environment_is_lacking() -> None:
    with pytest.raises(EnvironmentLacking, match="no CUDA device"):
        fitted(adapted(), device="cuda")


def test_accelerate_in_another_precision_is_explained() -> None:
    fitted(adapted(), epochs=1)
    with pytest.raises(EnvironmentLacking, match="accelerate cannot train on cpu in precision bf16"):
        fitted(adapted(), epochs=1, precision="bf16")


def test_mixed_precision_trains_in_fp32_parameters() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        module = adapted()
        history = fitted(module, precision="bf16")
        assert np.mean(history.losses[-8:]) < 0.6 * np.mean(history.losses[:8])
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        assert "forward" not in vars(module)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
