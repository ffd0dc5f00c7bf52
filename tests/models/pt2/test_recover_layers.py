"""The layers of a program, recovered from the operators that read its weights."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.models.load import from_module, load_model
from lora_export.models.pt2 import program
from lora_export.plan import Layout
from lora_export.runtime.torch_runners import Fp64Runner
from support.factories import Pictures, Spotter
from support.hostile_programs import refused
from support.programs import ProgramFiles, export, graph_of, noise, rewritten
from support.proofs import attached_copy


def test_layers_are_recovered_from_the_operators_that_read_them(programs: ProgramFiles) -> None:
    module = program.load_program(programs.base("cnn"))
    first = module.get_submodule("first")
    assert isinstance(first, nn.Conv2d) and (first.stride, first.padding) == ((1, 1), (1, 1))
    second = module.get_submodule("second")
    assert isinstance(second, nn.Conv2d) and (second.stride, second.padding) == ((2, 2), (1, 1))
    assert type(module.get_submodule("norm")) is nn.Module
    specs = {spec.name: spec.layout for spec in layers.specs(module)}
    assert specs == {spec.name: spec.layout for spec in layers.specs(Pictures())} | {
        "norm.num_batches_tracked": specs["norm.num_batches_tracked"]
    }
    words = program.load_program(programs.base("words")).get_submodule("words")
    assert isinstance(words, nn.Embedding) and words.padding_idx is None


@pytest.mark.slow
def test_an_in_out_weight_is_recognised_by_its_product(programs: ProgramFiles) -> None:
    module = program.load_program(programs.base("gpt2"))
    layouts = {spec.name: spec.layout for spec in layers.specs(module)}
    assert {layout.name for name, layout in layouts.items() if "c_attn.weight" in name} == {"IN_OUT"}
    assert "transformer.h.0.attn.c_attn.weight" in module.unobserved_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.turned, self.padded = Conv1D(4, 4), nn.Embedding(7, 4, padding_idx=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.turned(self.words(ids) + self.padded(ids)))


def test_an_embedding_tied_to_the_head_takes_no_adapter(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    eager = Tied()
    module = program.load_program(export(eager, {"ids": ids}, tmp_path / "tied.pt2"))
    with torch.no_grad():
        assert torch.equal(module(ids=ids), eager(ids))
    assert {spec.name: spec.layout for spec in layers.specs(module)}["turned.weight"] is Layout.IN_OUT
    assert module.get_submodule("padded").padding_idx == 1
    pairs = {
        "head": LoraPair(a=np.ones((1, 4)), b=np.ones((7, 1)), scale=1.0),
        "words": LoraPair(a=np.ones((1, 7)), b=np.ones((4, 1)), scale=1.0, embedding=True),
    }
    for name, pair in pairs.items():
        adapter = Adapter(name="a", format="test", pairs={name: pair})
        with pytest.raises(InputRefused, match=rf"{name}"):
            layers.attach(module, plan.make([adapter], layers.specs(module)))


def test_packed_attention_takes_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Spotter().eval()
    fresh = layers.create_adapter(eager, targets="all-linear", rank=2, alpha=4, seed=0)
    assert "encoder.layers.0.self_attn" in fresh.pairs
    rng = np.random.default_rng(0)
    pairs = {
        name: LoraPair(a=pair.a, b=rng.standard_normal(pair.b.shape) * 0.3, scale=pair.scale)
        for name, pair in fresh.pairs.items()
    }
    adapter = Adapter(name="a", format="test", pairs=pairs)
    base = load_model(str(export(eager, {"signal": noise(2, 4, 9)}, tmp_path / "base.pt2")))
    own = Fp64Runner(attached_copy(base, [adapter]).double()).run({"signal": noise(3, 4, 9).numpy()})
    of_eager = from_module(eager, noise(2, 4, 9))
    theirs = Fp64Runner(attached_copy(of_eager, [adapter]).double()).run({"signal": noise(3, 4, 9).numpy()})
    np.testing.assert_allclose(own["output_0"], theirs["output_0"], rtol=1e-10, atol=1e-12)
    without = Fp64Runner(copy.deepcopy(eager).double()).run({"signal": noise(3, 4, 9).numpy()})
    assert np.abs(without["output_0"] - own["output_0"]).max() > 1e-2


def renamed(name: str) -> Callable[[Path, Path], Path]:
    def change(good: Path, to: Path) -> Path:
        member, graph = graph_of(good)
        config = "data/weights/model_weights_config.json"
        with zipfile.ZipFile(good) as archive:
            root = archive.namelist()[0].partition("/")[0]
            config_json = json.loads(archive.read(f"{root}/{config}"))
        spec = graph["graph_module"]["signature"]["input_specs"][0]["parameter"]
        config_json["config"][name] = config_json["config"].pop(spec["parameter_name"])
        spec["parameter_name"] = name
        members = {member: json.dumps(graph).encode(), config: json.dumps(config_json).encode()}
        return rewritten(good, to / "evil.pt2", members)

    return change


@pytest.mark.parametrize(
    "name",
    [
        *(
            *("forward.weight", "__class__.weight", "_modules.x", "a..b", "training", "dense", ".", ""),
            *("unobserved_weights", "description"),
        ),
        "a." * 200 + "weight",
    ],
)
def test_names_of_module_attributes_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    message = refused(renamed(name)(good, tmp_path))
    assert "cannot be a" in message


def test_tensor_names_with_control_characters_are_refused(good: Path, tmp_path: Path) -> None:
    assert "control characters" in refused(renamed("\x1b[2J.weight")(good, tmp_path))
