"""Training on tiny modules: which parameters change, what a seed repeats, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_export import layers, plan
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.layers import products
from lora_export.layers.torch_internals import has_onednn_linear
from lora_export.options.train import TrainingSettings
from lora_export.training import loop
from lora_export.training.batches import ArrayData, Batch, Data, OwnLoss, ReadyBatches
from lora_export.training.checkpoint import Checkpoints, StepRecord, TrainingHistory
from lora_export.training.evaluation import evaluate
from support.small_layers import count_calls


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
    return ArrayData({"x": torch.from_numpy(x)}, torch.from_numpy((x[:, 0] > x[:, 1]).astype(np.int64)))


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    module = Net()
    adapter = layers.create_adapter(module, targets=["0", "4"], rank=4, alpha=8, seed=seed, modules_to_save=["head"])
    layers.attach(module, plan.make([adapter], layers.specs(module), identity_ok=True), trainable=True)
    return module


OF_FIT = {"device", "held_out", "checkpoints", "resume", "on_step", "log"}


def fitted(module: nn.Module, data: Data | None = None, **options: Any) -> TrainingHistory:
    settings = {"epochs": 20, "learning_rate": 0.05, "batch_size": 16, "seed": 0, **options}
    more = {name: settings.pop(name) for name in OF_FIT & set(settings)}
    return loop.fit(module, data or some_data(), TrainingSettings(**settings), **more)


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
    assert history.memory.peak > 2**20 and history.memory.gradients == 4 * (4 * (4 + 16) + 4 * (16 + 8) + 18)
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


def test_statistics_stay_where_only_the_bias_of_a_norm_is_trained() -> None:
    """An adapter with biases (`--bias all`) has no statistics: they must stay those of the base."""
    module = Net().requires_grad_(False)
    module.body[1].bias.requires_grad_(True)
    before = copy.deepcopy(dict(module.body[1].state_dict()))
    fitted(module, epochs=1)
    after = module.body[1].state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"bias"}


def test_equal_seeds_give_equal_bits() -> None:
    first, second, other = adapted(), adapted(), adapted()
    history = fitted(first, epochs=3)
    torch.rand(5)
    again = fitted(second, epochs=3)
    assert history.losses == again.losses
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert fitted(other, epochs=3, seed=1).losses != history.losses


@pytest.mark.skipif(not has_onednn_linear(), reason="this PyTorch has no oneDNN")
def test_products_by_onednn_train_to_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, products, "onednn_linear")
    torch.manual_seed(0)
    data = ArrayData({"input": torch.randn(192, 64)}, torch.arange(192) % 4)
    losses = {}
    for is_faster in (True, False):
        monkeypatch.setattr(products, "IS_ONEDNN_FASTER", is_faster)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 4))
        adapter = layers.create_adapter(module, targets=["0"], rank=4, alpha=8, seed=0)
        layers.attach(module, plan.make([adapter], layers.specs(module), identity_ok=True), trainable=True)
        calls.clear()
        losses[is_faster] = fitted(module, data, epochs=4, batch_size=96).losses
        assert len(calls) == is_faster * 4 * 2  # W x: the pair is small, and x has no gradient
        module(data.inputs["input"])
        assert len(calls) == is_faster * 4 * 2  # none after the training
    assert losses[True] == pytest.approx(losses[False], rel=1e-5) and losses[True][0] != losses[True][-1]


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


def test_the_learning_rate_warms_up_and_decays() -> None:
    module = nn.Linear(1, 1, bias=False)
    weights = [module.weight.item()]
    falling = ReadyBatches([Batch({"input": torch.ones(1, 1)}, None)], OwnLoss(lambda scores, _: -scores.sum()))
    fitted(
        module,
        falling,
        epochs=4,
        batch_size=1,
        warmup=0.25,
        weight_decay=0.0,
        learning_rate=0.5,
        on_step=lambda *_: weights.append(module.weight.item()),
    )
    # While the gradient is the same, a step of AdamW moves a number by the learning rate.
    assert np.diff(weights) == pytest.approx([0.25, 0.5, 2 / 3 * 0.5, 1 / 3 * 0.5], rel=1e-4)


def test_gradients_are_clipped() -> None:
    norms: list[float] = []
    module = nn.Linear(1, 1)

    def huge(scores: Tensor, labels: Tensor) -> Tensor:
        return 1e6 * (scores.flatten() - labels).square().mean()

    data = ReadyBatches([Batch({"input": torch.ones(1, 1)}, torch.zeros(1))], OwnLoss(huge))
    real = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        fitted(module, data, epochs=2, learning_rate=0.1, batch_size=1)
    assert norms == pytest.approx([1.0, 1.0], rel=1e-3)


def test_progress_is_reported_at_every_step() -> None:
    reported: list[tuple[StepRecord, int, int]] = []
    history = fitted(adapted(), epochs=2, on_step=lambda *step: reported.append(step))
    assert [record for record, *_ in reported] == history.steps and {steps for _, steps, _ in reported} == {8}
    peaks = [peak for *_, peak in reported]
    assert peaks == sorted(peaks) and peaks[0] > 2**20 and peaks[-1] == history.memory.peak
    assert [record.step for record in history.steps] == list(range(1, 9))
    assert [record.epoch for record in history.steps] == [1] * 4 + [2] * 4
    assert {record.tokens for record in history.steps} == {16}  # examples, since they are no tokens
    x, labels = some_data(2).batch(range(2))
    for scale in (1.0, torch.tensor(1.0)):
        data = ReadyBatches([Batch({"scale": scale, **x}, labels)], OwnLoss(nn.functional.cross_entropy))
        assert [record.tokens for record in fitted(adapted(), data, epochs=1, batch_size=1).steps] == [1]


def test_values_are_predicted_with_squared_error() -> None:
    module = nn.Linear(2, 1)
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    data = ArrayData({"input": torch.from_numpy(x)}, torch.from_numpy(x @ np.array([2, -1], np.float32)))
    fitted(module, data, learning_rate=0.2, weight_decay=0.0)
    score = evaluate(module, data)
    assert (score.accuracy, score.count) == (None, 64)
    assert score.loss < 1e-3
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[2.0, -1]]), atol=0.03, rtol=0)


# --- Parts, processes, evaluation, checkpoints ---


def plain() -> nn.Module:
    """Without dropout, which is drawn for each part by itself."""
    module = adapted()
    module.body[3].p = 0.0
    return module


@pytest.mark.slow
def test_parts_of_a_step_add_up_to_it() -> None:
    ignored = some_data()
    ignored.labels[::3] = -100  # so that the parts have different counts
    whole, parts = plain(), plain()
    first, second = fitted(whole, ignored, epochs=2), fitted(parts, ignored, epochs=2, accumulate=5)
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert second.memory.activations < first.memory.activations


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\nsys.path.insert(0, sys.argv[1])\n"
        "import importlib.util as u\nspec = u.spec_from_file_location('t', sys.argv[2])\n"
        "t = u.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "data = t.some_data(50)\ndata.labels[::3] = -100\nmodule = t.plain()\n"
        "history = t.fitted(module, data, epochs=3, held_out=t.some_data(31), evaluate_every=5)\n"
        "from lora_export.training.processes import rank, take_from_first\n"
        "import torch\nvalue = torch.full((2,), 7.0 + rank())\ntake_from_first([value], 'cpu')\n"
        "assert value.tolist() == [7, 7]\n"
        "rank() or torch.save((history, module.state_dict()), sys.argv[3])\n"
    )
    results = []
    for number in (1, 2):
        saved = tmp_path / f"{number}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] if number > 1 else []
        command = [sys.executable, *launch, script, Path(__file__).parents[1], __file__, saved]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        subprocess.run([str(word) for word in command], check=True, env=environment)
        results.append(torch.load(saved, weights_only=False))
    (one, alone), (two, shared) = results
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    for first, second in zip(one.evaluations, two.evaluations, strict=True):
        assert first.held_out_loss == pytest.approx(second.held_out_loss, rel=1e-5)
        assert first.held_out_accuracy == second.held_out_accuracy
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, shared[name], rtol=1e-4, atol=1e-5)


def noise(count: int = 32) -> ArrayData:
    """Labels that nothing explains: the more a module learns, the worse it is on them."""
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(count, 4)).astype(np.float32))
    return ArrayData({"x": x}, (x[:, 0] <= x[:, 1]).long())


@pytest.mark.slow
def test_training_stops_early_and_ends_with_the_best() -> None:
    module = adapted()
    history = fitted(module, held_out=noise(), patience=2, epochs=20)
    assert [record.step for record in history.evaluations] == [4, 8, 12]  # an epoch has four steps
    assert history.best is history.evaluations[0] and len(history.losses) == 12
    assert evaluate(module, noise()).loss == pytest.approx(history.evaluations[0].held_out_loss)
    last = adapted()
    assert len(fitted(last, held_out=noise(), evaluate_every=3, epochs=2).evaluations) == 3  # and after the last
    assert evaluate(last, noise()).loss > history.evaluations[0].held_out_loss


def test_the_end_of_a_training_is_a_checkpoint(tmp_path: Path) -> None:
    """The output may fail to be written."""
    module, again = adapted(), adapted()
    checkpoints = Checkpoints(tmp_path / "a.training", {"any": 1})
    options = {"held_out": noise(), "keep_best": True, "epochs": 2, "save_every": 100}
    history = fitted(module, **options, checkpoints=checkpoints)
    first, last = (record.held_out_loss for record in history.evaluations)
    assert evaluate(module, noise()).loss == pytest.approx(first) and first < last  # the end of the training is worse
    steps: list[int] = []
    continued = fitted(
        again, **options, checkpoints=checkpoints, resume=True, on_step=lambda record, *_: steps.append(record.step)
    )
    assert not steps and continued.losses == history.losses
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_best_of_another_training_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    def killed(record: StepRecord, *_: int) -> None:
        if record.step == 6:
            raise MemoryError("as after a kill: nothing is saved")

    checkpoints, held_out = Checkpoints(tmp_path / "a.training", {}), some_data(31)
    options = {"epochs": 2, "held_out": held_out, "evaluate_every": 1, "keep_best": True, "save_every": 4}
    with pytest.raises(EnvironmentLacking):
        fitted(adapted(), **options, checkpoints=checkpoints, on_step=killed)
    module = adapted()
    history = fitted(module, **options, checkpoints=checkpoints, resume=True, learning_rate=1e-30)
    assert history.best is not None and history.best.step == 4
    assert evaluate(module, held_out).loss == pytest.approx(history.best.held_out_loss)


@pytest.mark.slow
def test_a_continued_training_has_the_same_bits(tmp_path: Path) -> None:
    options = {"held_out": noise(), "keep_best": True, "epochs": 4, "save_every": 3, "evaluate_every": 2}
    whole, continued = adapted(), adapted()
    expected = fitted(whole, **options)

    def interrupt(record: StepRecord, *_: int) -> None:
        if record.step == 7:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "a.training", {"any": 1})
    with pytest.raises(KeyboardInterrupt):
        fitted(continued, **options, checkpoints=checkpoints, on_step=interrupt)
    continued = adapted()  # of another process
    steps: list[int] = []
    history = fitted(
        continued, **options, checkpoints=checkpoints, resume=True, on_step=lambda step, *_: steps.append(step.step)
    )
    assert steps[0] == 8
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, continued.state_dict()[name]), name


@pytest.mark.slow
def test_an_interruption_within_a_step_loses_that_step_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a.training", {})
    expected = fitted(adapted(), epochs=2)
    interrupted = adapted()
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    interrupted.body[4].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted, epochs=2, checkpoints=checkpoints)
    history = fitted(adapted(), epochs=2, checkpoints=checkpoints, resume=True)
    assert history.losses == expected.losses


def test_an_interrupted_evaluation_is_made_and_recorded_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, options = Checkpoints(tmp_path / "a.training", {}), {"held_out": noise(), "evaluate_every": 2}
    expected = fitted(adapted(), **options, epochs=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate_as_trained", interrupted)
        fitted(adapted(), **options, epochs=1, checkpoints=checkpoints)
    log: Any = Log()
    history = fitted(adapted(), **options, epochs=1, checkpoints=checkpoints, resume=True, log=log)
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    history.write(tmp_path / "all.jsonl")
    assert (checkpoints.folder / "metrics.jsonl").read_text() == (tmp_path / "all.jsonl").read_text()
    assert log.written == [*history.steps[1:2], history.evaluations[0], *history.steps[2:], history.evaluations[1]]


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


class Log:
    def __init__(self) -> None:
        self.written: list[Any] = []

    def write(self, records: list[Any]) -> None:
        self.written += records

    def close(self) -> None:
        pass


def test_b_learns_faster_by_its_ratio() -> None:
    module, faster = adapted(), adapted()
    rates: list[dict[str, float]] = []
    real = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append({"groups": len(self.param_groups), "last": self.param_groups[-1]["lr"]})
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        fitted(module, epochs=1, warmup=0.0)
        fitted(faster, epochs=1, warmup=0.0, b_ratio=16.0)
    assert [rate["groups"] for rate in rates] == [1] * 4 + [2] * 4
    assert [rate["last"] for rate in rates[4:]] == pytest.approx([16 * rate["last"] for rate in rates[:4]])


# --- What training refuses ---


def diverging(data: ArrayData, at: int) -> ReadyBatches:
    """The data in batches of 16, whose loss is infinite at this call."""
    calls: list[int] = []

    def own(scores: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(scores, labels) * (float("inf") if len(calls) == at else 1)

    return ReadyBatches([data.batch(range(start, start + 16)) for start in range(0, 64, 16)], OwnLoss(own))


def test_a_loss_that_is_not_finite_stops_with_its_step() -> None:
    module = adapted()
    with pytest.raises(
        InputRefused, match=r"the loss is inf at step 3 of 4: training has diverged\. Try a lower learning rate$"
    ):
        fitted(module, diverging(some_data(), at=3), epochs=1, batch_size=1)
    assert not module.training


@pytest.mark.slow
def test_the_checkpoint_before_a_divergence_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a.training", {})
    with pytest.raises(InputRefused, match=r"step 3 of 4: .*a\.training: resume=True continues from it"):
        fitted(adapted(), diverging(some_data(), at=3), epochs=1, batch_size=1, save_every=2, checkpoints=checkpoints)
    module = adapted()
    history = fitted(module, diverging(some_data(), at=0), epochs=1, batch_size=1, checkpoints=checkpoints, resume=True)
    assert len(history.losses) == 4 and history.steps[1].step == 2


def test_a_last_gradient_that_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    def own(scores: Tensor, labels: Tensor) -> Tensor:
        return scores.mean() + torch.sqrt(0 * scores).sum()  # finite, and its gradient is not

    data = ReadyBatches(diverging(some_data(), at=0).batches[:1], OwnLoss(own))
    with pytest.raises(InputRefused, match=r"^weights are not finite after step 1 of 1: .* lower learning rate$"):
        fitted(adapted(), data, epochs=1, batch_size=1, checkpoints=Checkpoints(tmp_path / "a.training", {}))
    assert not (tmp_path / "a.training").exists()


def test_a_held_out_loss_that_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    held_out = ArrayData({"x": torch.full((4, 4), torch.inf)}, torch.zeros(4, dtype=torch.int64))
    checkpoints = Checkpoints(tmp_path / "a.training", {})
    with pytest.raises(InputRefused, match=r"^the held-out loss is nan after step 2 of 4: training has diverged"):
        fitted(adapted(), epochs=1, held_out=held_out, evaluate_every=2, checkpoints=checkpoints)


def test_a_base_parameter_that_would_get_a_gradient_is_refused() -> None:
    class Unfreezing(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.body[0].weight.requires_grad_(True)
            return super().forward(x, scale)

    module = Unfreezing().requires_grad_(False)
    module.head.requires_grad_(True)
    before = module.body[0].weight.detach().clone()
    with pytest.raises(
        InputRefused, match=r"the base is frozen, but its forward gives gradients to:\n  body\.0\.weight"
    ):
        fitted(module, epochs=1)
    assert torch.equal(module.body[0].weight, before)


@pytest.mark.parametrize(
    ("is_trained", "options", "message"),
    [
        (False, {}, "nothing to train"),
        (True, {"patience": 1}, "need held-out examples"),
        (True, {"gradient_checkpointing": True}, "needs a model of transformers"),
    ],
)
def test_a_training_that_cannot_begin_is_refused(is_trained: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        fitted(adapted() if is_trained else Net().requires_grad_(False), **options)


def test_a_model_without_blocks_to_checkpoint_is_refused() -> None:
    module: Any = adapted()
    module.activation_checkpointing_enable, module.supports_gradient_checkpointing = None, False  # ResNet's, say
    with pytest.raises(InputRefused, match=f"{type(module).__name__} does not support gradient checkpointing"):
        fitted(module, gradient_checkpointing=True)


@pytest.mark.parametrize("on_the_cpu", [False, True])
def test_short_memory_names_what_helps(on_the_cpu: bool) -> None:
    class Hungry(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            if on_the_cpu:
                torch.empty(2**60, dtype=torch.uint8)
            raise torch.OutOfMemoryError

    with pytest.raises(EnvironmentLacking, match=r"not enough memory to train\. What helps: a smaller batch_size="):
        fitted(Hungry())


def test_without_accelerate_the_environment_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'accelerate>="):
        fitted(adapted())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_environment_is_lacking() -> None:
    with pytest.raises(EnvironmentLacking, match="no CUDA device"):
        fitted(adapted(), device="cuda")


def test_accelerate_in_another_precision_is_explained() -> None:
    fitted(adapted(), epochs=1)
    with pytest.raises(EnvironmentLacking, match="accelerate cannot train on cpu in precision fp16"):
        fitted(adapted(), epochs=1, precision="fp16")


@pytest.mark.slow
def test_mixed_precision_trains_in_fp32_parameters() -> None:
    fitted(adapted(), epochs=1)  # a process may train in several precisions
    module, seen = adapted(), set()
    hook = module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    history = fitted(module, precision="bf16", held_out=noise(), evaluate_every=100)
    hook.remove()
    assert seen == {torch.bfloat16}  # the evaluation's, too
    assert np.mean(history.losses[-8:]) < 0.6 * np.mean(history.losses[:8])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert "forward" not in vars(module)
