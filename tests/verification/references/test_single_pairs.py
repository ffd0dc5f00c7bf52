"""Outputs of blocks that are recorded: which blocks are computed again, and modules in which all must be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lora_export import layers, plan
from lora_export.layers.attachments import Branch, attached_modules, attachment_of
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner, UseRow
from lora_export.verification import pair_controls
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.parity import Case, EffectShare, Findings, MissingPart, Outputs, judge_missing_part
from lora_export.verification.references import single_pairs
from lora_export.verification.references.single_pairs import RecordedBlocks, control_pairs
from support.small_layers import turned_by_nothing

COUNT = 4


class Block(nn.Module):
    """A layer that counts its runs, and adds what `state` has to its result."""

    def __init__(self, state: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.linear.weight)
        self.runs, self.state = 0, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.linear(x) + sum(self.state)


class Caching(Block):
    """A block that fills a cache, which the next ones read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        self.state.append(float(result.sum()))
        return result


class WithObject(Block):
    """A block that returns more than tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:  # type: ignore[override]
        return super().forward(x), object()


class Stack(nn.Module):
    def __init__(self, kind: type[Block] = Block, order: tuple[int, ...] = tuple(range(COUNT))) -> None:
        super().__init__()
        self.state: list[float] = []
        self.layers = nn.ModuleList(kind(self.state) for _ in range(COUNT))
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.head.weight)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.clear()
        for number in self.order:
            x = self.layers[number](x)
            if isinstance(x, tuple):
                x = x[0]
            x += 1  # in place: what is recorded must not change
        return self.head(x)

    def runs(self) -> list[int]:
        """How often each block ran since the last call."""
        counts = [block.runs for block in self.layers]
        for block in self.layers:
            block.runs = 0
        return counts


def attached(module: Stack) -> list[Branch]:
    """Attach a pair to each block and to the head; return them in this order."""
    names = [*(f"layers.{number}.linear" for number in range(COUNT)), "head"]
    pairs = {name: LoraPair(np.ones((1, 2)), np.ones((2, 1)), 0.5 + 0.25 * i) for i, name in enumerate(names)}
    layers.attach(module, plan.make([Adapter(name="a", format="test", pairs=pairs)], layers.specs(module)))
    return [branch for owner in attached_modules(module) for branch in attachment_of(owner).branches]


ONES = {"x": np.ones((1, 2))}


def run(module: nn.Module) -> Arrays:
    return Fp64Runner(module.double()).run(ONES)


def without(module: nn.Module, off: list[Branch]) -> list[list[float]]:
    with layers.without_branches(module, off):
        return run(module)["output_0"].tolist()


def recorded(module: nn.Module) -> RecordedBlocks:
    return RecordedBlocks(module, Fp64Runner(module.double()), ONES, runs=100)


def recorded_with_pairs(module: Stack) -> tuple[list[Branch], RecordedBlocks]:
    """A pair on each block and on the head, and the blocks that were recorded. No run is counted."""
    branches, blocks = attached(module), recorded(module)
    module.runs()
    return branches, blocks


def test_blocks_before_the_pair_are_not_computed() -> None:
    module = Stack()
    branches, blocks = recorded_with_pairs(module)
    for number, branch in enumerate(branches[:COUNT]):
        found = blocks.run_without([branch])["output_0"].tolist()
        assert module.runs() == [int(block >= number) for block in range(COUNT)]
        assert found == without(module, [branch]) != run(module)["output_0"].tolist()
        module.runs()
    pair = [branches[3], branches[1]]
    assert blocks.run_without(pair)["output_0"].tolist() == without(module, pair)
    assert "forward" not in module.layers[0].__dict__


def test_pair_outside_of_all_blocks_needs_a_whole_run() -> None:
    module = Stack()
    branches, blocks = recorded_with_pairs(module)
    assert blocks.run_without([branches[-1]])["output_0"].tolist() == without(module, [branches[-1]])
    assert module.runs() == [2] * COUNT


def test_block_that_runs_twice_is_computed_from_its_first_run_on() -> None:
    module = Stack(order=(0, 1, 0, 2))
    branches, blocks = recorded_with_pairs(module)
    for number, runs in ((0, [2, 1, 1, 0]), (1, [1, 1, 1, 0]), (2, [0, 0, 1, 0])):
        found = blocks.run_without([branches[number]])["output_0"].tolist()
        assert module.runs() == runs
        assert found == without(module, [branches[number]])
        module.runs()


@pytest.mark.parametrize("kind", [Caching, WithObject])
def test_blocks_that_share_more_than_their_outputs_are_computed(kind: type[Block]) -> None:
    module = Stack(kind)
    branches, blocks = recorded_with_pairs(module)
    assert blocks.run_without([branches[3]])["output_0"].tolist() == without(module, [branches[3]])
    assert module.runs() == [2] * COUNT


def test_large_outputs_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_pairs, "MOST_RECORDED", 3 * 8)
    module = Stack()
    branches, blocks = recorded_with_pairs(module)
    blocks.run_without([branches[3]])
    assert module.runs() == [1] * COUNT


# --- single pairs ---

INPUTS = {"long": {"x": np.ones((4, 2))}, "short": {"x": np.ones((1, 2))}}


@pytest.fixture(autouse=True, params=[1, 100], ids=["recorded", "computed"])
def least_recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with outputs of blocks that are recorded, too: nothing that is found depends on it."""
    monkeypatch.setattr(single_pairs, "LEAST_RECORDED", request.param)


class Chain(nn.Module):
    """Two layers in a row, and one whose result is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layers[2](x)
        return self.layers[1](self.layers[0](x))


def adapter(name: str = "a", **scales: float) -> Adapter:
    pairs = {f"layers.{key[1:]}": LoraPair(np.ones((1, 2)), np.ones((2, 1)), scale) for key, scale in scales.items()}
    return Adapter(name=name, format="test", pairs=pairs)


def chain(*adapters: Adapter) -> nn.Module:
    module = Chain().double()
    layers.attach(module, plan.make(adapters, layers.specs(module)))
    return module.eval()


def cases(module: nn.Module) -> list[Case]:
    made = []
    for name, arrays in INPUTS.items():
        with torch.no_grad():
            y = module(torch.from_numpy(arrays["x"])).numpy()
        made.append(Case(name, "", reference={"output_0": y}, deployed={"output_0": y}, candidate={"output_0": y}))
    return made


class Judge:
    """Detects an output that is off by at least `limit`; each call is recorded as (case, largest difference)."""

    def __init__(self, limit: float, share: EffectShare = EffectShare()):  # noqa: B008 - it is frozen
        self.limit, self.share = limit, share
        self.calls: list[tuple[str, float]] = []

    def __call__(self, case: Case, without: Outputs) -> MissingPart:
        (reference,), (value,) = case.reference.values(), without.values()
        difference = float(np.abs(value - reference).max())
        self.calls.append((case.name, round(difference, 9)))
        return MissingPart(difference > 0, difference >= self.limit, self.share)


def controlled(module: nn.Module, judge: Judge, **options: Sequence[str]) -> PairControls:
    return control_pairs(module, INPUTS, cases(module), judge, **options)


def test_each_pair_is_off_by_itself_in_the_smallest_case() -> None:
    judge = Judge(limit=0.1)
    module = chain(adapter(_0=0.5, _1=1.0))
    found = controlled(module, judge)
    # x = [1, 1]: W + s·BA multiplies it by 1 + 2 s, by 2 in layer 0 and by 3 in layer 1.
    assert judge.calls == [("short", 3.0), ("short", 4.0)]
    assert found == PairControls(("layers.0", "layers.1"))
    assert found.findings == Findings()
    with torch.no_grad():
        assert module(torch.ones(1, 2, dtype=torch.float64)).tolist() == [[6, 6]], "all pairs are on again"


def test_undetected_pair_is_tried_in_all_cases_and_listed() -> None:
    judge = Judge(limit=3.5)
    found = controlled(chain(adapter(_0=0.5, _1=1.0)), judge)
    assert judge.calls == [("short", 3.0), ("short", 4.0), ("long", 3.0)]
    assert found.missed == ("layers.0",) and not found.shares
    assert found.findings.not_judged == (
        "1 of the 2 pairs of the adapters, whose effect is much smaller than rounding: layers.0. A candidate without "
        "one of them would pass",
    )


def test_pair_on_which_no_output_depends_is_a_doubt() -> None:
    found = controlled(chain(adapter(_0=0.5, _2=1.0)), Judge(limit=0.1))
    assert found.without_effect == ("layers.2",) and not found.missed
    assert found.findings.doubts == (
        "no output depends on 1 of the 2 pairs of the adapters: layers.2. A fault in them could not show. Give inputs "
        "on which one does (inputs=)",
    )
    assert not controlled(chain(adapter(_0=0.5, _2=1.0)), Judge(limit=0.1), skip=["layers.2"]).findings.doubts


@pytest.mark.parametrize(
    ("missing", "fault"),
    [
        (1.0, "layers.0: the candidate lacks 100 % of what this pair changes"),
        (0.7, "layers.0: the candidate lacks 70 % of what this pair changes"),
        (-1.0, "layers.0: the candidate has 2 times what this pair changes"),
        (0.2, None),
    ],
)
def test_candidate_that_lacks_a_pair_below_rounding_is_named(missing: float, fault: str | None) -> None:
    share = EffectShare(candidate=50 * missing, peer=0.0, effect=50.0, variance=0.01, rows=50)
    found = controlled(chain(adapter(_0=0.5)), Judge(limit=99, share=share))
    assert found.findings.faults == ((fault,) if fault else ()) and not found.missed


@pytest.mark.parametrize("nothing", [LoraPair(np.ones((1, 2)), np.zeros((2, 1)), 1.0), turned_by_nothing(2)])
def test_pair_that_changes_nothing_is_left_out(nothing: LoraPair) -> None:
    given = Adapter(name="a", format="test", pairs={"layers.0": nothing, **adapter(_1=1.0).pairs})
    assert controlled(chain(given), Judge(limit=0.1)).names == ("layers.1",)
    assert controlled(chain(adapter(_0=0.0, _1=1.0)), Judge(limit=0.1)).names == ("layers.1",)


def test_pairs_of_several_adapters_on_one_weight_are_told_apart() -> None:
    judge = Judge(limit=0.1)
    found = controlled(chain(adapter("en", _0=0.5), adapter("fr", _0=1.0)), judge)
    assert found.names == ("layers.0 of en", "layers.0 of fr") and judge.calls == [("short", 1.0), ("short", 2.0)]


def test_pairs_of_a_layer_are_off_together_where_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    module.forward = lambda x: module.blocks[1](module.blocks[0](x))  # type: ignore[method-assign, operator]
    pair = LoraPair(np.ones((1, 2)), np.ones((2, 1)), 1.0)
    given = Adapter(name="a", format="test", pairs={f"blocks.{i}.{j}": pair for i in range(2) for j in range(2)})
    layers.attach(module.double().eval(), plan.make([given], layers.specs(module)))
    monkeypatch.setattr(pair_controls, "LARGEST_EFFORT", 4)
    found = controlled(module, Judge(limit=1e9))
    assert found.names == ("blocks.0", "blocks.1") and found.by_layer
    assert found.findings.notes == ("the pairs of one layer were switched off together: the model is large",)
    assert found.findings.not_judged[0].startswith(
        "the pairs of 2 of the 2 layers, whose effect is much smaller than rounding"
    )


def test_rounded_reference_without_a_pair_differs_by_the_effect_alone() -> None:
    judge = Judge(limit=0.1)
    module = chain(adapter(_0=0.5))
    rounded = [
        Case(
            case.name,
            "",
            reference={"output_0": case.reference["output_0"] + 7},
            deployed=case.deployed,
            candidate=case.candidate,
            attached=case.reference,
        )
        for case in cases(module)
    ]
    control_pairs(module, INPUTS, rounded, judge)
    assert judge.calls == [("short", 1.0)]


# --- batches ---


class Reading(nn.Module):
    """A stack of layers. Python reads a number of its rows, a weight is read whole, or neither."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.what = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if self.what == "number" and float(x.sum()) > 1e9:
                return x
        return x @ self.layers[0].weight if self.what == "weight" else x


def with_pairs(module: nn.Module, *, names: Sequence[str] = "a", dora: bool = False) -> nn.Module:
    """The module with a pair on every linear layer and convolution, of each adapter."""
    rng, specs, adapters = np.random.default_rng(0), layers.specs(module.double().eval()), []
    kinds = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    owners = {path: owner for path, owner in module.named_modules() if isinstance(owner, kinds) and path != "lm_head"}
    for name in names:
        pairs = {}
        for path, owner in owners.items():
            out, *inner = owner.weight.T.shape if isinstance(owner, kinds[2]) else owner.weight.shape
            a, b = rng.normal(size=(2, *inner)), rng.normal(size=(out, 2, *[1] * (len(inner) - 1)))
            length = np.abs(rng.normal(size=out)) + 0.5 if dora else None
            pairs[path] = LoraPair(a.astype(np.float32), b.astype(np.float32) / 8, 0.5, length)
        adapters.append(Adapter(name=name, format="test", pairs=pairs))
    layers.attach(module, plan.make(adapters, specs))
    return module


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": np.ones((2, 7), np.int64)}
IMAGES = {"pixel_values": np.random.default_rng(1).normal(size=(2, 3, 8, 8))}
NUMBERS = {"x": np.random.default_rng(1).normal(size=(3, 4))}
MADE: dict[str, tuple[Callable[[], nn.Module], Arrays]] = {
    "layers": (lambda: with_pairs(Reading()), NUMBERS),
    "DoRA": (lambda: with_pairs(Reading(), dora=True), NUMBERS),
    "two adapters": (lambda: with_pairs(Reading(), names="ab"), NUMBERS),
    "convolutions": (
        lambda: with_pairs(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)))),
        {"input": IMAGES["pixel_values"]},
    ),
    "Llama": (lambda: with_pairs(LlamaForCausalLM(LlamaConfig(**SIZES))), TOKENS),
    "BERT": (lambda: with_pairs(BertForSequenceClassification(BertConfig(**SIZES))), TOKENS),
    "GPT-2": (lambda: with_pairs(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))), TOKENS),
    "ViT": (lambda: with_pairs(ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))), IMAGES),
}
ALONE: dict[str, tuple[Callable[[], nn.Module], Arrays]] = {
    "a number of a row": (lambda: with_pairs(Reading("number")), NUMBERS),
    "a weight": (lambda: with_pairs(Reading("weight")), NUMBERS),
}


class Counted(Fp64Runner):
    """Counts runs of one group of pairs, and of a batch; these may be wrong in one row, or end for lack of memory."""

    single, together, wrong, failure = 0, 0, "", ""

    def run(self, inputs: Arrays) -> Arrays:
        Counted.single += 1
        return super().run(inputs)

    def run_each(self, inputs: Arrays, rows: torch.Tensor, use: UseRow) -> list[Arrays]:
        Counted.together += 1
        if self.failure:
            raise MemoryError(self.failure)
        found = super().run_each(inputs, rows, use)
        if self.wrong:
            row = {"first": 0, "last": -1}[self.wrong]
            found[row] = {name: value + 1e-3 for name, value in found[row].items()}
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(single_pairs, "Fp64Runner", Counted)
    for name, value in (("single", 0), ("together", 0), ("wrong", ""), ("failure", "")):
        monkeypatch.setattr(Counted, name, value)
    return Counted


def off_by_name(module: nn.Module) -> dict[str, list[Branch]]:
    branches = [branch for owner in attached_modules(module) for branch in attachment_of(owner).branches]
    return {f"{branch.module} of {branch.adapter}": [branch] for branch in branches}


def compared(module: nn.Module, inputs: Arrays) -> int:
    """Compare all that batches give with runs of their own; return how many groups of pairs there are."""
    runner, groups = Fp64Runner(module), off_by_name(module)
    on = runner.run(inputs)
    found = dict(single_pairs.outputs_without(module, inputs, groups, on))
    assert found.keys() == groups.keys()
    for name, off in groups.items():
        with layers.without_branches(module, off):
            expected = runner.run(inputs)
        for output, value in expected.items():
            assert np.abs(value - on[output]).max() > 1e-6, (name, "the pair has an effect")
            np.testing.assert_allclose(found[name][output], value, rtol=0, atol=1e-13 * np.abs(value).max())
    return len(groups)


@pytest.mark.parametrize("name", MADE)
def test_batch_gives_what_single_runs_give(name: str, counted: type[Counted]) -> None:
    make, inputs = MADE[name]
    count = compared(make(), inputs)
    assert counted.together == 1 and count > 2
    assert counted.single <= 6, "one for the test of the batch, the others where blocks are recorded"


@pytest.mark.parametrize("name", ALONE)
def test_module_that_no_batch_can_have_is_run_for_each_pair(name: str, counted: type[Counted]) -> None:
    make, inputs = ALONE[name]
    assert counted.single == 0
    assert compared(make(), inputs) <= counted.single and counted.together == 1


@pytest.mark.parametrize(("wrong", "failure"), [("first", ""), ("last", ""), ("", "no memory")])
def test_batch_that_is_wrong_or_fails_is_not_used(wrong: str, failure: str, counted: type[Counted]) -> None:
    counted.wrong, counted.failure = wrong, failure
    make, inputs = MADE["layers"]
    assert compared(make(), inputs) <= counted.single and counted.together == 1


def test_pair_near_the_rounding_of_fp64_is_run_by_itself(counted: type[Counted]) -> None:
    module = with_pairs(Reading())
    on, groups = Fp64Runner(module).run(NUMBERS), off_by_name(module)
    (faint,) = groups["layers.2 of a"]
    owner = module.get_submodule("layers.2")
    with torch.no_grad():
        owner.lora_B[faint.parameter].mul_(1e-14)  # type: ignore[index, operator, union-attr]
    on = Fp64Runner(module).run(NUMBERS)
    assert list(single_pairs.outputs_without(module, NUMBERS, groups, on))[-1][0] == "layers.2 of a"


def test_results_of_operators_limit_the_batches(counted: type[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = MADE["layers"]
    monkeypatch.setattr(single_pairs, "MOST_BATCHED", 2 * inputs["x"].nbytes)
    assert compared(make(), inputs) == 4 and counted.together == 2
    monkeypatch.setattr(single_pairs, "MOST_BATCHED", inputs["x"].nbytes)
    assert compared(make(), inputs) == 4 and counted.together == 2


# --- faults of candidates, below rounding ---

ROWS = {"x": np.random.default_rng(1).normal(size=(4000, 4))}
NOISE = 2.0  # of PyTorch and the candidate, in effects of the pair that the fault is about


def with_fault(fault: str) -> Arrays:
    """Outputs in fp64 of the layers, with a fault in the pair of layer 1."""
    module = with_pairs(Reading())
    (own,), (other,) = (off_by_name(module)[f"layers.{number} of a"] for number in (1, 2))
    b, b_of_other = (module.get_submodule(f"layers.{n}").lora_B[own.parameter].data for n in (1, 2))  # type: ignore[index, union-attr]
    if fault == "missing":
        b.zero_()
    if fault == "twice":
        b.mul_(2)
    if fault == "in another layer":
        b_of_other.copy_(b_of_other + b)
        b.zero_()
    if fault == "swapped":
        b_of_other.copy_(torch.stack([b.clone(), b.copy_(b_of_other)])[0])
    assert own.parameter == other.parameter
    return Fp64Runner(module).run(ROWS)


@pytest.mark.parametrize(
    ("fault", "found"),
    [("", ""), ("missing", "lacks"), ("twice", "has 2 times"), ("in another layer", "lacks"), ("swapped", "lacks")],
)
def test_batches_find_the_faults_that_single_runs_find(
    fault: str, found: str, counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rng = with_pairs(Reading()), np.random.default_rng(2)
    (right,), (wrong,) = Fp64Runner(module).run(ROWS).values(), with_fault(fault).values()
    (without,) = with_fault("missing").values()
    noise = NOISE * np.sqrt(np.mean(np.square(without - right)))
    deployed, own = ((y + noise * rng.normal(size=y.shape)).astype(np.float16) for y in (right, wrong))
    case = Case("rows", "", {"output_0": right}, {"output_0": deployed}, {"output_0": own})
    judge = functools.partial(judge_missing_part, [case], dtype="float16")
    together = control_pairs(module, {"rows": ROWS}, [case], judge)
    assert counted.together == 1
    monkeypatch.setattr(single_pairs, "LARGEST_BATCH", 1)
    alone = control_pairs(module, {"rows": ROWS}, [case], judge)
    assert counted.together == 1 and alone.findings.faults == together.findings.faults
    assert (alone.names, alone.missed, alone.without_effect) == (together.names, together.missed, ())
    assert together.shares == pytest.approx(alone.shares, rel=1e-9)
    of_layer = [text for text in together.findings.faults if text.startswith("layers.1: ")]
    assert [found in text for text in of_layer] == [True] * bool(found)
