"""PEFT's kinds of adapters: the models that they adapt, their configurations, and trained adapters of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from support.peft_models import fill


class Layers(nn.Module):
    """Layers of every class that an adapter changes. No matrix is square: their layout shows in their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 12)
        self.up = nn.Linear(12, 18)
        self.norm = nn.LayerNorm(18)
        self.down = nn.Linear(18, 6, bias=False)
        self.back = Conv1D(12, 6)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.point = nn.Conv2d(4, 6, 1)
        self.line = nn.Conv1d(4, 6, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.back(self.down(self.norm(self.up(self.table(words)))))
        image = x.reshape(-1, 4, 3, 1).expand(-1, 4, 3, 4)
        return (self.conv(image).sum((2, 3)) + self.point(image).sum((2, 3)), self.line(image[..., 0]).sum(2))


@dataclass(frozen=True)
class Case:
    """One configuration of a kind."""

    config: Any  # PEFT's class
    targets: tuple[str, ...]
    options: dict[str, Any]
    saved_as: str = ""  # the name that an older PEFT gave the kind


LAYOUT = {"up": "out_in", "down": "out_in", "back": "in_out"}
LINEAR, CONVS = ("up", "down"), ("conv", "point", "line")


def _cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, config: Any, targets: tuple[str, ...] = LINEAR, **options: Any) -> tuple[str, Case]:
        return f"{config.__name__.removesuffix('Config')}: {name}", Case(config, targets, options)

    patterns = {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": -5}}
    for config in (peft.LoHaConfig, peft.LoKrConfig):
        yield case("linear", config, r=2, alpha=3)
        yield case("patterns", config, r=3, alpha=4, **patterns)
        yield case("convolutions", config, CONVS, r=3, alpha=4)
        yield case("effective convolutions", config, CONVS, r=3, alpha=4, use_effective_conv2d=True)
    yield case("both factors", peft.LoKrConfig, r=1, alpha=2, decompose_both=True, decompose_factor=3)
    yield case("whole factors", peft.LoKrConfig, r=32, alpha=2)
    yield case("a factor of 2", peft.LoKrConfig, (*LINEAR, "conv"), r=1, alpha=2, decompose_factor=2)
    layers = (*LINEAR, "back", "conv", "point")
    yield case("outputs", peft.IA3Config, layers, feedforward_modules=[])
    yield case("inputs", peft.IA3Config, layers, feedforward_modules=list(layers))
    yield case("both", peft.IA3Config, layers, feedforward_modules=["down", "conv"])
    for feedforward in ([], ["down", "back"]):
        name = f"{'inputs' if feedforward else 'outputs'} without biases"
        yield case(name, peft.IA3Config, ("down", "back"), feedforward_modules=feedforward)
    for name, exact in (
        ("series", {}),
        ("exact", {"use_cayley_neumann": False}),
        ("two terms", {"num_cayley_neumann_terms": 2}),
    ):
        yield case(name, peft.OFTConfig, (*LINEAR, "table", "point"), oft_block_size=2, **exact)
        yield case(f"{name}, larger blocks", peft.OFTConfig, LINEAR, oft_block_size=6, **exact)
    yield case("seven terms", peft.OFTConfig, oft_block_size=3, num_cayley_neumann_terms=7)
    yield case("number of blocks", peft.OFTConfig, r=3, oft_block_size=0)
    yield case("shared block", peft.OFTConfig, oft_block_size=3, block_share=True)
    yield case("constrained", peft.OFTConfig, oft_block_size=3, coft=True, eps=0.5)
    yield case("linear", peft.HRAConfig, (*LINEAR, "point"), r=4)
    yield case("odd", peft.HRAConfig, r=3, init_weights=False)
    yield case("orthogonal", peft.HRAConfig, r=3, apply_GS=True)
    yield case("layers", peft.HiraConfig, (*LINEAR, "back", "table", *CONVS), r=3)
    yield case("patterns", peft.HiraConfig, r=3, rank_pattern={"down": 2})
    yield case("blocks", peft.BOFTConfig, (*LINEAR, "point"), boft_block_size=2)
    yield case("number of blocks", peft.BOFTConfig, boft_block_num=3, boft_block_size=0)
    yield case("bat", peft.MissConfig, r=6, init_weights="bat")
    for variant in ("road_1", "road_2", "road_4"):
        yield case(variant, peft.RoadConfig, variant=variant, group_size=6)
    yield case("without biases", peft.RoadConfig, ("down",), variant="road_4", group_size=2)
    yield case("linear", peft.DeloraConfig, r=3, delora_lambda=7)
    yield case("patterns", peft.DeloraConfig, r=3, rank_pattern={"down": 2})
    for method in ("relu", "qr"):
        yield case(method, peft.DeftConfig, (*LINEAR, "back"), r=3, decomposition_method=method, alpha=5)
        yield case(f"{method}, removal", peft.DeftConfig, r=3, decomposition_method=method, para=True)
    for paths in ("lora", "vector", "constant", "none"):
        targets = LINEAR if paths != "none" else LINEAR[:1]
        yield case(f"{paths}", peft.GloraConfig, targets, r=3, config_A_B=paths, config_C="none", config_D_E="vector")
    yield case(
        "one number for a bias", peft.GloraConfig, r=3, config_A_B="lora", config_C="none", config_D_E="constant"
    )
    yield case("without biases", peft.GloraConfig, ("down",), r=3)
    yield case("entries", peft.SupertuningConfig, sparsity=0.9)
    yield case("entries and LoRA", peft.SupertuningConfig, sparsity=0.9, r=2, lora_alpha=3)
    yield case("norms", peft.LNTuningConfig, ("norm",))
    steps = {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10}
    yield case("linear", peft.AdaLoraConfig, (*LINEAR, "back"), **steps)
    yield case("convolutions", peft.AdaLoraConfig, ("conv",), use_rslora=True, **steps)
    for config in (peft.VeraConfig, peft.PveraConfig):
        yield case("saved matrices", config, (*LINEAR, "back"), r=3)
        yield case("drawn matrices", config, (*LINEAR, "back"), r=3, save_projection=False, projection_prng_key=-5)
    yield case("logits", peft.VBLoRAConfig, (*LINEAR, "back"), r=3, num_vectors=9, vector_length=2, topk=2)
    options = {"num_vectors": 9, "vector_length": 2, "topk": 3, "save_only_topk_weights": True}
    yield case("largest weights", peft.VBLoRAConfig, LINEAR, r=2, **options)
    yield case("the largest weight", peft.VBLoRAConfig, LINEAR, r=2, **options | {"topk": 1})
    for config in (peft.FourierFTConfig, peft.WaveFTConfig):
        yield case("few", config, LINEAR, n_frequency=7)
        yield case("most", config, (*LINEAR, "back"), n_frequency=65, random_loc_seed=4, scaling=3.0)
        yield case("patterns", config, LINEAR, n_frequency=7, n_frequency_pattern={"down": 9})
    for wavelet in ("db2", "db7", "sym5", "coif3"):
        yield case(wavelet, peft.WaveFTConfig, LINEAR, n_frequency=20, wavelet_family=wavelet)
    yield case("entries", peft.WaveFTConfig, (*LINEAR, "back"), n_frequency=9, use_idwt=False)
    yield case("proportional", peft.WaveFTConfig, LINEAR, n_frequency=9, proportional_parameters=True)
    for name, options in {"dense": {}, "sparse": {"sparse": True}, "very sparse": {"very_sparse": True}}.items():
        yield case(name, peft.RandLoraConfig, (*LINEAR, "back"), r=4, randlora_alpha=6, **options)
        if options:
            drawn = {"save_projection": False, "projection_prng_key": 7, **options}
            yield case(f"{name}, drawn", peft.RandLoraConfig, (*LINEAR, "back"), r=5, randlora_alpha=6, **drawn)
    yield case("blocks", peft.GraloraConfig, (*LINEAR, "back"), r=6, gralora_k=2, alpha=5)
    yield case("hybrid", peft.GraloraConfig, (*LINEAR, "back"), r=6, gralora_k=3, alpha=5, hybrid_r=2)
    yield case("blocks", peft.C3AConfig, LINEAR, block_size=6)
    yield case("patterns", peft.C3AConfig, LINEAR, block_size=6, block_size_pattern={"down": 3})
    yield case("linear", peft.ShiraConfig, LINEAR, r=2)
    for mode in (True, "bat"):
        yield f"Bone: {mode}", Case(peft.MissConfig, LINEAR, {"r": 6, "init_weights": mode}, saved_as="BONE")
    for name, options in {"no layers": {}, "layers": {"depth": 2, "act_fn": "gelu", "scaling": 0.5}}.items():
        yield case(name, peft.PeanutConfig, r=3, **options)
    for activation in ("tanh", "silu"):
        yield case(activation, peft.PeanutConfig, r=3, depth=1, act_fn=activation)
    yield case("half", peft.OSFConfig)
    yield case("patterns", peft.OSFConfig, effective_rank=0.25, rank_pattern={"down": 5})
    yield case("linear", peft.FrodConfig, (*LINEAR, "back"), sparse_rate=0.1)
    yield case("linear", peft.MissConfig, LINEAR, r=4)
    yield case("a rest", peft.MissConfig, LINEAR, r=5, init_weights=False)
    yield case("mini", peft.MissConfig, LINEAR, r=3, mini_r=3, init_weights="mini")
    yield case("one vector a layer", peft.TinyLoraConfig, (*LINEAR, "back"), r=2, u=5)
    yield case("tied vectors", peft.TinyLoraConfig, (*LINEAR, "back"), r=3, u=4, weight_tying=0.5)
    yield case("few numbers", peft.TinyLoraConfig, (*LINEAR, "back"), r=2, u=1)
    yield case("a table", peft.TinyLoraConfig, ("table",), r=2, u=5)
    yield case("saved indices", peft.UniLoraConfig, (*LINEAR, "back"), r=2, theta_d_length=20, save_indices=True)
    yield case("biases", peft.BeftConfig, ("up",))
    yield case("rows", peft.TrainableTokensConfig, ("table",), token_indices=[1, 7])


CASES = dict(_cases())


@dataclass(frozen=True)
class Trained:
    """A base, an adapter on it, and PEFT's merge of the two."""

    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]

    @property
    def changed(self) -> list[str]:
        return [name for name, value in self.merged.items() if not torch.equal(value, self.before[name])]

    def merged_in_out(self, name: str) -> NDArray[Any]:
        """The merged weight of a linear layer, (in, out)."""
        return _in_out(name, self.merged)


def trained(case: Case, folder: Path, **more: Any) -> Trained:
    """PEFT's adapter of a case, saved, with random values."""
    torch.manual_seed(0)
    base = Layers()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    save_file(before, folder / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = case.config(target_modules=list(case.targets), **case.options, **more)
        model = peft.get_peft_model(base, config)
        fill(model)
        model.save_pretrained(folder / "adapter")
        if case.saved_as:
            _rename(folder / "adapter", config.peft_type.value, case.saved_as)
        merged = model.eval().merge_and_unload().state_dict()
    return Trained(folder / "base.safetensors", folder / "adapter", merged, before)


def _rename(adapter: Path, new: str, old: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace(new.lower(), old.lower()): value for name, value in load_file(file).items()}
    save_file(tensors, file)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"peft_type": old}
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "mini_r"}))


def graph_of(path: Path, one: Trained, names: list[str]) -> Path:
    """A graph with a MatMul for each of these linear layers, by an input of its own."""
    weights = {name: _in_out(name, one.before) for name in names}
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"x_{name}", name], [f"y_{name}"], name=f"node_{name}") for name in names],
        "g",
        [helper.make_tensor_value_info(f"x_{name}", floats, ["batch", len(each)]) for name, each in weights.items()],
        [
            helper.make_tensor_value_info(f"y_{name}", floats, ["batch", each.shape[1]])
            for name, each in weights.items()
        ],
        [numpy_helper.from_array(each, name) for name, each in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def _in_out(name: str, tensors: dict[str, torch.Tensor]) -> NDArray[Any]:
    value = tensors[name].numpy()
    return np.ascontiguousarray(value if LAYOUT[name.removesuffix(".weight")] == "in_out" else value.T)


def differences(trained: Trained, merged: Path) -> dict[str, float]:
    """The largest difference from PEFT's merge of each tensor that PEFT changed, relative to its change."""
    ours = load_file(merged)
    assert ours.keys() == trained.merged.keys()
    found = {}
    for name, theirs in trained.merged.items():
        change = (theirs - trained.before[name]).abs().max().item()
        if change == 0:
            assert torch.equal(ours[name], theirs), name
        else:
            found[name] = (ours[name] - theirs).abs().max().item() / change
    return found
