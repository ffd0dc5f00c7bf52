"""Adapters of several ranks in PEFT's format: PEFT and our reader find the same pairs again."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from lora_export import formats
from lora_export.formats.writers.peft import write_any_ranks
from lora_export.lora import Adapter, LoraPair
from lora_export.storage.json_files import read_json

RNG = np.random.default_rng(5)


def pair(out: int, inside: int, rank: int, **kind: Any) -> LoraPair:
    return LoraPair(RNG.normal(size=(rank, inside)), RNG.normal(size=(out, rank)), scale=1.0, **kind)


class Net(nn.Module):
    """Names of which one is the end of another, and one contains a character of patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.inner = nn.Linear(5, 4), nn.ModuleDict({"q": nn.Linear(4, 4), "axq": nn.Linear(4, 4)})
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inner["axq"](self.inner["q"](self.q(x))))
        return self.attention(x, x, x, need_weights=False)[0]


PAIRS = {"q": pair(4, 5, 3), "inner.q": pair(4, 4, 1), "inner.axq": pair(4, 4, 3)}
WHOLE = {"norm.weight": np.full(4, 2, np.float32), "norm.bias": np.full(4, 3, np.float32)}
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def loaded_by_peft(folder: Path) -> tuple[Net, Tensor]:
    """The net without the adapter, and its output with it. Warnings are errors: PEFT warns of keys without a place."""
    torch.manual_seed(0)
    net = Net().eval()
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return plain, peft.PeftModel.from_pretrained(net, folder).eval()(X).detach()


def test_peft_applies_each_pair_and_whole_tensor(tmp_path: Path) -> None:
    biases = {"inner.q.bias": np.full(4, 5, np.float32)}
    write_any_ranks(Adapter("x", "made", PAIRS, replaced=WHOLE | biases), tmp_path)
    plain, found = loaded_by_peft(tmp_path)
    state = plain.state_dict()
    for module, own in PAIRS.items():
        state[f"{module}.weight"] += torch.from_numpy(own.delta())
    state.update({name: torch.from_numpy(value) for name, value in (WHOLE | biases).items()})
    before = plain(X).detach()
    plain.load_state_dict(state)
    torch.testing.assert_close(found, plain(X).detach(), atol=1e-6, rtol=1e-5)
    assert (found - before).abs().max() > 0.1


def test_our_reader_finds_the_same_adapter(tmp_path: Path) -> None:
    made = Adapter("x", "made", PAIRS, replaced=WHOLE, layouts={"q": "out_in"}, metadata={"task_type": "SEQ_CLS"})
    write_any_ranks(made, tmp_path, metadata={"more": "1"})
    read = formats.load(tmp_path)
    assert {m: (p.rank, p.scale) for m, p in read.pairs.items()} == {m: (p.rank, 1.0) for m, p in PAIRS.items()}
    assert all(np.array_equal(read.pairs[m].delta(), p.delta()) for m, p in PAIRS.items())
    assert sorted(read.replaced) == sorted(WHOLE) and dict(read.layouts) == {"q": "out_in"}
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
        model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["attention"]))
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
