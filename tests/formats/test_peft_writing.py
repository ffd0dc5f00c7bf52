"""PEFT's folders of adapters in any format and of several ranks: PEFT and our reader find the same pairs again."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import lora_export
from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.formats.peft_lost_layers import notes_on_lost_layers
from lora_export.formats.peft_writing import write_any_ranks
from lora_export.lora import Adapter, ExpertAxes, LoraPair, TokenRows, expert_name
from lora_export.storage.json_files import read_json
from support.written import adapter_of, assert_same_pairs, converted, low_rank

E = "model.layers.0.mlp.experts"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.embed(x)))  # type: ignore[no-any-return]


def test_peft_loads_what_was_written(tmp_path: Path) -> None:
    pairs = {"embed": low_rank(3, 5, 2, embedding=True, scale=0.5), "fc": low_rank(4, 3, 3, scale=7 / 3)}
    replaced = {"head.weight": np.ones((2, 4), np.float32), "head.bias": np.ones(2, np.float32)}
    lora_export.convert(adapter_of(pairs, replaced=replaced), tmp_path / "out", to="peft")
    net = Net()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    merged = peft.PeftModel.from_pretrained(net, tmp_path / "out").merge_and_unload()
    after = {name: value.detach() for name, value in merged.named_parameters()}
    for name, change in (("embed", pairs["embed"].delta().T), ("fc", pairs["fc"].delta())):
        np.testing.assert_allclose(after[f"{name}.weight"] - before[f"{name}.weight"], change, rtol=1e-5, atol=1e-6)
    assert after["head.weight"].eq(1).all() and after["head.bias"].eq(1).all()


def test_rows_of_tokens_and_biases_come_back(tmp_path: Path) -> None:
    rows = TokenRows(np.array([4, 1]), np.array([[1, 2], [3, 4]], np.float32), ("lm_head",))
    adapter = adapter_of(
        {"fc": low_rank(3, 2, 1)},
        replaced={"fc.bias": np.ones(3, np.float32)},
        token_rows={"embed_tokens.weight": rows},
    )
    back = converted(adapter, tmp_path, "peft")
    assert back.replaced["fc.bias"].tolist() == [1, 1, 1]
    own = back.token_rows["embed_tokens.weight"]
    assert (own.indices.tolist(), own.values.tolist(), own.tied) == ([4, 1], [[1, 2], [3, 4]], ("lm_head",))


def stacks(*names: str, axes: ExpertAxes = ExpertAxes.BY_CLASS) -> Adapter:
    pairs = {
        expert_name(f"{E}.{name}", number): low_rank(4, 3, 2, seed=number, as_stored=True)
        for name in names
        for number in range(3)
    }
    return adapter_of(pairs, experts=dict.fromkeys((f"{E}.{name}" for name in names), axes))


def test_stacked_parameters_come_back_in_pefts_order(tmp_path: Path) -> None:
    adapter = stacks("down_proj", "gate_up_proj")
    back = converted(adapter, tmp_path, "peft")
    assert_same_pairs(back, adapter)
    assert back.experts == adapter.experts
    keys = set(load_file(tmp_path / "peft/adapter_model.safetensors"))
    # The module registers gate_up_proj first, so that it is inside.
    assert keys == {f"base_model.model.{E}.{inner}lora_{side}.weight" for inner in ("", "base_layer.") for side in "AB"}


def test_projections_of_experts_become_modules(tmp_path: Path) -> None:
    adapter = stacks("w1", "w2", axes=ExpertAxes.OUT_IN)
    back = converted(adapter, tmp_path, "peft")
    assert sorted(back.pairs) == [f"{E}.{number}.{name}" for number in range(3) for name in ("w1", "w2")]
    for name, pair in adapter.pairs.items():
        parameter, _, number = name.removesuffix("]").partition("[")
        own = back.pairs[f"{E}.{number}.{parameter.rpartition('.')[2]}"]
        assert np.array_equal(own.delta(), pair.delta())


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (adapter_of({"fc": low_rank(2, 2, 1)}, biases={"fc": np.ones(2, np.float32)}), "fc: a change of a bias"),
        (
            adapter_of({"a": low_rank(2, 2, 1, magnitude=np.ones(2)), "b": low_rank(2, 2, 1)}),
            "DoRA on some layers; PEFT has it on all or none",
        ),
        (adapter_of({"bare": low_rank(2, 2, 1, as_stored=True)}), "bare: the pair of a bare parameter"),
        (adapter_of({"qkv.weight[0:2]": low_rank(2, 2, 1)}), "qkv.weight[0:2]: the pair of a part of a tensor"),
        (stacks("gate_up_proj", axes=ExpertAxes.OUT_IN), "how the base stores its experts is not known. State it"),
        (stacks("new_proj", "down_proj"), f"{E}.new_proj: the order of the parameters of its module is not known"),
        (
            adapter_of(
                {"attn": low_rank(6, 2, 1), "attn.out_proj": low_rank(2, 2, 2)},
                spelling={"attn.out_proj": "base_model.model.attn.base_layer.out_proj.lora_A.weight"},
            ),
            "attn: pairs of different ranks or scales",
        ),
        (adapter_of({"a_b": low_rank(2, 2, 1)}, flattened=True), "the names of its modules, in which `_` stands for"),
    ],
)
def test_what_peft_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, problem: str) -> None:
    with pytest.raises(InputRefused) as refused:
        lora_export.convert(adapter, tmp_path / "out", to="peft")
    assert problem in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_halves_stay_halves(tmp_path: Path) -> None:
    adapter = adapter_of({"fc": low_rank(3, 2, 1, dtype=ml_dtypes.bfloat16)})
    lora_export.convert(adapter, tmp_path / "out", to="peft")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 2, ["fc"])
    assert_same_pairs(formats.load(tmp_path / "out"), adapter)


RNG = np.random.default_rng(5)


def pair(out: int, inside: int, rank: int, **kind: Any) -> LoraPair:
    return LoraPair(RNG.normal(size=(rank, inside)), RNG.normal(size=(out, rank)), scale=1.0, **kind)


class Nested(nn.Module):
    """Names of which one is the end of another, and one contains a character of patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.inner = nn.Linear(5, 4), nn.ModuleDict({"q": nn.Linear(4, 4), "axq": nn.Linear(4, 4)})
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.position_bias = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.position_bias(self.inner["axq"](self.inner["q"](self.q(x)))))
        return self.attention(x, x, x, need_weights=False)[0]


PAIRS = {"q": pair(4, 5, 3), "inner.q": pair(4, 4, 1), "inner.axq": pair(4, 4, 3)}
WHOLE = {"norm.weight": np.full(4, 2, np.float32), "norm.bias": np.full(4, 3, np.float32)}
NORM_BIAS = {"norm.bias": WHOLE["norm.bias"]}
CLASSIFIER = {"classifier.dense.weight": np.ones((4, 4), np.float32), "classifier.out.bias": np.ones(2, np.float32)}
BIAS = {"inner.q.bias": np.full(4, 5, np.float32)}
OF_BIAS = {"position_bias.weight": RNG.normal(size=(4, 4)).astype(np.float32)}  # a weight, by its last word
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def loaded_by_peft(folder: Path) -> tuple[Nested, Tensor]:
    """The net without the adapter, and its output with it. Warnings are errors: PEFT warns of keys without a place."""
    torch.manual_seed(0)
    net = Nested().eval()
    plain = Nested().eval()
    plain.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return plain, peft.PeftModel.from_pretrained(net, folder).eval()(X).detach()


@pytest.mark.parametrize(
    ("pairs", "replaced", "saved", "bias"),
    [
        (PAIRS, WHOLE | BIAS, ["norm"], "lora_only"),
        (PAIRS, NORM_BIAS, None, "all"),
        (PAIRS, BIAS | NORM_BIAS, None, "all"),
        (PAIRS, OF_BIAS, ["position_bias"], "none"),
        (PAIRS, OF_BIAS | NORM_BIAS, None, "all"),
        ({}, WHOLE, ["norm"], "none"),
        ({}, NORM_BIAS, None, "all"),
    ],
)
def test_peft_applies_each_pair_and_whole_tensor(
    tmp_path: Path, pairs: dict[str, LoraPair], replaced: dict[str, np.ndarray], saved: list[str] | None, bias: str
) -> None:
    write_any_ranks(Adapter("x", "made", pairs, replaced=replaced), tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert (config["modules_to_save"], config["bias"]) == (saved, bias)
    plain, found = loaded_by_peft(tmp_path)
    state = plain.state_dict()
    for module, own in pairs.items():
        state[f"{module}.weight"] += torch.from_numpy(own.delta())
    state.update({name: torch.from_numpy(value) for name, value in replaced.items()})
    before = plain(X).detach()
    plain.load_state_dict(state)
    torch.testing.assert_close(found, plain(X).detach(), atol=1e-6, rtol=1e-5)
    assert (found - before).abs().max() > 0.1


def test_our_reader_finds_the_same_adapter(tmp_path: Path) -> None:
    whole = WHOLE | CLASSIFIER
    made = Adapter("x", "made", PAIRS, replaced=whole, layouts={"q": "out_in"}, metadata={"task_type": "SEQ_CLS"})
    write_any_ranks(made, tmp_path, metadata={"more": "1"})
    read = formats.load(tmp_path)
    assert {m: (p.rank, p.scale) for m, p in read.pairs.items()} == {m: (p.rank, 1.0) for m, p in PAIRS.items()}
    assert all(np.array_equal(read.pairs[m].delta(), p.delta()) for m, p in PAIRS.items())
    assert sorted(read.replaced) == sorted(whole) and dict(read.layouts) == {"q": "out_in"}
    assert read.metadata["task_type"] == "SEQ_CLS" and read.notes == ()


def test_a_pattern_matches_its_module_alone(tmp_path: Path) -> None:
    write_any_ranks(Adapter("x", "made", PAIRS | {"a.inner.q": pair(4, 4, 3)}), tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {r"^inner\.q": 1}, {r"^inner\.q": 1})


def test_endings_are_targets_where_they_name_every_module(tmp_path: Path) -> None:
    made = Adapter("x", "made", PAIRS, targets=("q", "axq"))
    write_any_ranks(made, tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["target_modules"] == ["axq", "q"]
    write_any_ranks(replace(made, targets=("inner.q", "axq")), tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["target_modules"] == sorted(PAIRS)


def test_the_projection_of_an_attention_has_pefts_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules=["attention"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value)
    model.save_pretrained(tmp_path / "peft")
    read = formats.load(tmp_path / "peft")
    (tmp_path / "ours").mkdir()
    scaled = {m: LoraPair(p.a * np.float32(p.scale), p.b, 1.0) for m, p in read.pairs.items()}
    write_any_ranks(replace(read, pairs=scaled), tmp_path / "ours")
    stored = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "ours")]
    assert sorted(stored[0]) == sorted(stored[1])
    assert read_json(tmp_path / "ours/adapter_config.json")["target_modules"] == ["attention"]


@pytest.mark.parametrize(
    "fields",
    [
        {"pairs": {"q": LoraPair(np.ones((1, 2)), np.ones((2, 1)), scale=2.0)}},
        {"pairs": {"q": LoraPair(np.ones((1, 2)), np.ones((2, 1)), 1.0, magnitude=np.ones(2, np.float32))}},
        {"pairs": {"q": pair(2, 2, 1, as_stored=True)}},
        {"biases": {"q": np.ones(4, np.float32)}},
    ],
)
def test_what_such_a_file_cannot_hold_is_an_error(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot hold everything in x"):
        write_any_ranks(replace(Adapter("x", "made", PAIRS), **fields), tmp_path)


def test_names_without_dots_are_refused_by_name(tmp_path: Path) -> None:
    flat = Adapter("x", "kohya", {"blocks_0_q": pair(4, 4, 1)}, flattened=True)
    with pytest.raises(InputRefused, match="`_` stands for the dots in the adapter's names, such as blocks_0_q"):
        write_any_ranks(flat, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pairs", "replaced", "saved", "task"),
    [
        (("encoder.q",), CLASSIFIER, ["classifier"], "SEQ_CLS"),  # PEFT looks for a whole `classifier`
        (("encoder.q",), {}, None, None),  # and for its tensors in the file
        (("encoder.q",), {"norm.weight": np.ones(4, np.float32)}, ["norm"], None),
        (("classifier.dense",), {"norm.weight": np.ones(4, np.float32)}, ["norm"], None),
    ],
)
def test_a_task_is_written_where_the_head_is_whole(
    pairs: tuple[str, ...], replaced: dict[str, np.ndarray], saved: list[str] | None, task: str | None, tmp_path: Path
) -> None:
    own = {name: pair(4, 4, 1) for name in pairs}
    adapter = Adapter("x", "made", own, metadata={"task_type": "SEQ_CLS"}, replaced=replaced)
    write_any_ranks(adapter, tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert (config["modules_to_save"], config.get("task_type")) == (saved, task)


@pytest.mark.parametrize(
    ("layer", "model_type", "is_noted"),
    [
        ("model.layers.0.mlp.gate_proj", "deepseek_v3", True),
        ("model.layers.1.mlp.experts.0.gate_proj", "deepseek_v3", False),  # one of which PEFT makes a stack
        ("model.layers.0.mlp.gate_proj", "llama", False),
    ],
)
def test_layers_that_peft_takes_for_experts_are_noted(layer: str, model_type: str, is_noted: bool) -> None:
    notes = notes_on_lost_layers([layer, "model.layers.0.self_attn.q_proj"], {"model_type": model_type})
    assert [f"1 layer, such as {layer}," in note for note in notes] == [True] * is_noted
