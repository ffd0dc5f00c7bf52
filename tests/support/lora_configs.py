"""Adapters of every field of PEFT's `LoraConfig`, on every kind of layer, in every holder of weights.

PEFT makes each adapter and computes what its merge is. Where PEFT itself is wrong, W + s·BA is computed here.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import torch
import transformers
from peft.tuners.lora import config as variants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_export as le
from lora_export.errors import LoraExportError

SIZE = 6  # of every matrix: a transposed sum is wrong, not refused
IDS = torch.randint(0, SIZE, (5, 4), generator=torch.Generator().manual_seed(5))

# --- Kinds of layers ----------------------------------------------------------------------------


class Bare(nn.Module):
    """A layer of one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(SIZE, SIZE) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class Block(nn.Module):
    """One layer of the kind, called `layer`."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return x + self.layer(x, x, x, need_weights=False)[0]
        return x + torch.tanh(self.layer(x.reshape(x.shape[0], *self.shape))).reshape(x.shape)


class KindNet(nn.Module):
    """Ids (batch, 4) -> an embedding -> two layers of the kind -> a norm and a head."""

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SIZE, SIZE)
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(Block(make(), shape) for _ in range(2))})
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.body["blocks"]:
            x = block(x)
        result: Tensor = self.head(self.norm(x))
        return result


class TableNet(nn.Module):
    """Ids -> the sum of two tables -> a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SIZE, SIZE)
        layers = (nn.ModuleDict({"layer": nn.Embedding(SIZE, SIZE)}) for _ in range(2))
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(layers)})
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + sum(block["layer"](ids) for block in self.body["blocks"])
        result: Tensor = self.head(self.norm(x))
        return result


def _llama() -> nn.Module:
    sizes = {"vocab_size": SIZE, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False, "attention_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


@dataclass(frozen=True)
class Kind:
    """A kind of layer, and the names in a net that has it."""

    make: Callable[[], nn.Module]
    layer: str = "layer"  # what `target_modules` names
    head: str = "head"
    tokens: str = "tokens"
    pattern: str = "blocks"
    inputs: str = "ids"
    layout: str = "out_in"  # of its matrices in a bare file
    parameter: str = ""  # what `target_parameters` names in the place of `target_modules`

    @property
    def targets(self) -> dict[str, Any]:
        if self.parameter:
            return {"target_modules": [], "target_parameters": [f"{self.layer}.{self.parameter}"]}
        return {"target_modules": [self.layer]}


def _net(make: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    return lambda: KindNet(make, shape or (4, SIZE))


KINDS: dict[str, Kind] = {
    "Linear": Kind(_net(lambda: nn.Linear(SIZE, SIZE))),
    "Conv1D": Kind(_net(lambda: Conv1D(SIZE, SIZE)), layout="in_out"),
    "Embedding": Kind(TableNet),
    "Conv1d": Kind(_net(lambda: nn.Conv1d(4, 4, 3, padding=1))),
    "Conv2d": Kind(_net(lambda: nn.Conv2d(4, 4, 3, padding=1), 4, 3, 2)),
    "Conv3d": Kind(_net(lambda: nn.Conv3d(4, 4, 3, padding=1), 4, 3, 2, 1)),
    "MultiheadAttention": Kind(_net(lambda: nn.MultiheadAttention(SIZE, 2, batch_first=True))),
    "parameter": Kind(_net(Bare), parameter="kernel"),
    "Llama": Kind(_llama, layer="q_proj", head="lm_head", tokens="embed_tokens", pattern="layers", inputs="input_ids"),
}

# --- Fields of LoraConfig -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One value of a field. `config` and `saved` are made for a kind of layer."""

    field: str
    label: str
    config: Callable[[Kind], Mapping[str, Any]] = lambda kind: {}
    saved: Mapping[str, Any] = field(default_factory=dict)  # written over the config that PEFT saves
    refused: bool = False  # by the name of the field, for every kind and holder

    def __str__(self) -> str:
        return f"{self.field}={self.label}"


def _cases(field: str, *values: Any, refused: bool = False) -> Iterator[Case]:
    for value in values:
        yield Case(field, _label(value), functools.partial(_fixed, field, value), refused=refused)


def _fixed(field: str, value: Any, kind: Kind) -> dict[str, Any]:
    return {field: value}


def _label(value: Any) -> str:
    text = type(value).__name__ if hasattr(value, "__dict__") else str(value)
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def _named(field: str, **cases: Callable[[Kind], Mapping[str, Any]]) -> Iterator[Case]:
    for label, config in cases.items():
        yield Case(field, label, config)


def _by_init(field: str, init: str, config: Any) -> Iterator[Case]:
    """The config of an initialisation: beside a plain one, as PEFT leaves it after a conversion, and in use."""
    yield Case(field, "converted", saved={field: config})
    yield Case(field, "in_use", saved={field: config, "init_lora_weights": init}, refused=True)


def _as_table(config: Any) -> dict[str, Any]:
    return dict(vars(config))


CASES: list[Case] = [
    *_cases("task_type", "FEATURE_EXTRACTION"),
    *_cases("peft_type", "LORA"),
    *_cases("auto_mapping", {"base_model_class": "Net", "parent_library": "net"}),
    *_cases("peft_version", "0.10.0"),
    *_cases("base_model_name_or_path", "owner/model"),
    *_cases("revision", "main"),
    *_cases("inference_mode", True),
    *_cases("r", 1, 3),
    *_cases("lora_alpha", 1, 5),
    *_named(
        "target_modules",
        names=lambda kind: {},
        pattern=lambda kind: {"target_modules": kind.head if kind.parameter else rf".*\.1\..*{kind.layer}"},
        all_linear=lambda kind: {"target_modules": "all-linear"},
        head=lambda kind: {"target_modules": [*kind.targets["target_modules"], kind.head]},
        tables=lambda kind: {"target_modules": [*kind.targets["target_modules"], kind.tokens]},
    ),
    *_named("exclude_modules", one_layer=lambda kind: {"exclude_modules": rf".*\.0\..*{kind.layer}"}),
    *_cases("lora_dropout", 0.5),
    *_cases("fan_in_fan_out", True),
    *_cases("bias", "all", "lora_only"),
    *_cases("use_rslora", True),
    *_named(
        "modules_to_save",
        head=lambda kind: {"modules_to_save": [kind.head]},
        head_and_biases=lambda kind: {"modules_to_save": [kind.head], "bias": "all"},
        norm=lambda kind: {"modules_to_save": ["norm"]},
    ),
    *_cases("init_lora_weights", True, False, "gaussian", "orthogonal", "eva"),
    *(
        Case("init_lora_weights", init, saved={"init_lora_weights": init}, refused=True)
        for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")
    ),
    *_cases("layers_to_transform", 1, [0]),
    *_named("layers_pattern", own=lambda kind: {"layers_pattern": kind.pattern, "layers_to_transform": [1]}),
    *_named(
        "rank_pattern",
        one_layer=lambda kind: {"rank_pattern": {_second_layer(kind): 4}},
        every_layer=lambda kind: {"rank_pattern": {_suffix(kind): 1}, "use_rslora": True},
    ),
    *_named(
        "alpha_pattern",
        one_layer=lambda kind: {"alpha_pattern": {_second_layer(kind): 11}},
        both=lambda kind: {"alpha_pattern": {_suffix(kind): 3}, "rank_pattern": {_suffix(kind): 3}},
    ),
    Case("megatron_config", "set", saved={"megatron_config": {"hidden_size": SIZE}}, refused=True),
    *_cases("megatron_core", "megatron.core"),
    *_named(
        "trainable_token_indices",
        table=lambda kind: {"trainable_token_indices": {kind.tokens: [1, 4]}},
        of_a_layer=lambda kind: {"trainable_token_indices": {kind.tokens: [0]}, "target_modules": [kind.head]},
    ),
    *_by_init("loftq_config", "loftq", {"loftq_bits": 4, "loftq_iter": 1}),
    *_by_init("corda_config", "corda", _as_table(variants.CordaConfig())),
    *_by_init("lora_ga_config", "lora_ga", _as_table(variants.LoraGAConfig())),
    *_cases("eva_config", variants.EvaConfig(), refused=False),
    *_cases("use_dora", True),
    *_named("use_dora", rslora=lambda kind: {"use_dora": True, "use_rslora": True, "bias": "lora_only"}),
    *_cases("velora_config", variants.VeloraConfig(num_groups=2)),
    Case("alora_invocation_tokens", "tokens", saved={"alora_invocation_tokens": [1]}, refused=True),
    Case("use_qalora", "True", saved={"use_qalora": True}, refused=True),
    *_cases("qalora_group_size", 4),
    *_cases("monteclora_config", variants.MontecloraConfig(num_samples=2, buffer_size=1)),
    Case("layer_replication", "ranges", saved={"layer_replication": [[0, 2], [0, 2]]}, refused=True),
    *_cases("runtime_config", variants.LoraRuntimeConfig(ephemeral_gpu_offload=False)),
    *_cases("lora_bias", True),
    *_named("lora_bias", beside_saved_ones=lambda kind: {"lora_bias": True, "bias": "all"}),
    *_named(
        "target_parameters",
        weight=lambda kind: {"target_modules": [], "target_parameters": [f"{kind.layer}.{kind.parameter or 'weight'}"]},
        of_the_head=lambda kind: {"target_modules": [], "target_parameters": [f"{kind.head}.weight"]},
        of_a_table=lambda kind: {"target_modules": [], "target_parameters": [f"{kind.tokens}.weight"]},
    ),
    Case("use_bdlora", "set", saved={"use_bdlora": _as_table(variants.BdLoraConfig())}, refused=True),
    Case("arrow_config", "set", saved={"arrow_config": _as_table(variants.ArrowConfig())}, refused=True),
    Case("kasa_config", "set", saved={"kasa_config": _as_table(variants.KasaConfig())}, refused=True),
    *_cases("ensure_weight_tying", True),
]


def _suffix(kind: Kind) -> str:
    """The name that PEFT matches patterns with."""
    return f"{kind.layer}.{kind.parameter}" if kind.parameter else kind.layer


def _second_layer(kind: Kind) -> str:
    return rf".*\.1\..*{_suffix(kind)}"


# --- Adapters -----------------------------------------------------------------------------------

NO_ADAPTER = "no adapter"  # PEFT refuses to make or to merge it


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, and the tensors of the model that it makes of its base."""

    folder: Path
    expected: Mapping[str, Tensor]
    outputs: Tensor | None = None  # of a model that no weights make


@functools.cache
def base_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = KINDS[name].make().eval()
    with torch.no_grad():
        for parameter in module.parameters():  # no norm or bias that is all ones or zeros
            parameter.add_(torch.randn_like(parameter) / 5)
    return module


def train(case: Case, name: str, folder: Path) -> Trained | str:
    """PEFT's adapter of a case on a kind of layer, or why there is none."""
    kind, torch_seed = KINDS[name], 7
    config = {"r": 2, "lora_alpha": 3, **kind.targets, **case.config(kind)}
    with warnings.catch_warnings(action="ignore"):
        try:
            torch.manual_seed(torch_seed)
            model = peft.get_peft_model(copy.deepcopy(base_of(name)), peft.LoraConfig(**config)).eval()
            _jiggle(model)
            model.save_pretrained(folder)
            merged = copy.deepcopy(model).merge_and_unload().state_dict()
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
            return f"{NO_ADAPTER}: {type(error).__name__}: {error}".partition("\n")[0]
    if case.saved:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(case.saved)))
    expected = {name: tensor.detach().clone() for name, tensor in merged.items()}
    if case.field == "alora_invocation_tokens" and kind.inputs == "input_ids":
        activated = peft.PeftModelForCausalLM.from_pretrained(copy.deepcopy(base_of(name)), folder).eval()
        return Trained(folder, expected, activated(input_ids=IDS).logits.detach())
    return Trained(folder, expected | dict(_output_projections(model, name)))


def _jiggle(model: nn.Module) -> None:
    """No parameter that PEFT trains keeps its first value: with B = 0 a merge that does nothing would be right."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise.tanh())
            elif parameter.requires_grad or "lora_" in name:
                parameter.add_(0.4 * noise)


def _output_projections(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """W + s·BA of the output projections of attentions: PEFT up to 0.21 adds the change twice."""
    before = base_of(name).state_dict()
    for path, layer in model.named_modules():
        if path.endswith("base_layer.out_proj") and hasattr(layer, "lora_A"):
            tensor = f"{path.removeprefix('base_model.model.').replace('.base_layer.', '.')}.weight"
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            yield tensor, (before[tensor] + layer.scaling["default"] * product).detach()


# --- Holders of weights -------------------------------------------------------------------------

Holder = Callable[[Trained, str, Path], bool]  # whether the result is right


def bare_file(adapter: Trained, name: str, folder: Path) -> bool:
    """A .safetensors file: the layout of its square matrices is stated."""
    base = folder / "base.safetensors"
    save_file(_own_tensors(base_of(name)), base)
    layout = {"*": "out_in", **({f"*.{KINDS[name].layer}": "in_out"} if KINDS[name].layout == "in_out" else {})}
    le.merge(base, adapter.folder, folder / "merged.safetensors", layout=layout)
    return _agree(load_file(folder / "merged.safetensors"), adapter.expected)


def hugging_face_folder(adapter: Trained, name: str, folder: Path) -> bool:
    """A folder whose model type tells the layout: a Llama's own, GPT-2's for Conv1D, BERT's for the others."""
    module, base = base_of(name), folder / "base"
    if isinstance(module, transformers.PreTrainedModel):
        module.save_pretrained(base)
    else:
        base.mkdir()
        tensors = {_in_folder(key, name): value for key, value in _own_tensors(module).items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text(json.dumps({"model_type": "gpt2" if name == "Conv1D" else "bert"}))
    le.merge(base, _renamed_adapter(adapter.folder, name, folder), folder / "merged")
    merged = load_file(folder / "merged/model.safetensors")
    return _agree(merged, {_in_folder(key, name): value for key, value in adapter.expected.items()})


def attached(adapter: Trained, name: str, folder: Path) -> bool:
    """Branches in a module: what it computes."""
    module = copy.deepcopy(base_of(name))
    le.attach(module, le.make_plan([le.load_adapter(adapter.folder)], le.module_specs(module)))
    return _same(_outputs(module), _expected_outputs(adapter, name), _outputs(base_of(name)))


def folded(adapter: Trained, name: str, folder: Path) -> bool:
    """The weights of a module."""
    module = copy.deepcopy(base_of(name))
    le.fold_module(module, le.make_plan([le.load_adapter(adapter.folder)], le.module_specs(module)))
    return _agree(module.state_dict(), adapter.expected)


def graph(mode: str) -> Holder:
    """A graph that exists: what onnxruntime computes with the adapter in it."""

    def holds(adapter: Trained, name: str, folder: Path) -> bool:
        exported = le.export_onnx(base_graph(name), folder / "m.onnx", adapters=adapter.folder, lora=mode, verify=False)
        options, feeds = ort.RunOptions(), {KINDS[name].inputs: IDS.numpy()}
        if mode == "inputs":
            (file,) = folder.glob("*.onnx_adapter")
            loaded = ort.LoraAdapter()
            loaded.Load(str(file))
            options.add_active_adapter(loaded)
        if mode == "rows":
            feeds["adapter_ids"] = np.ones(len(IDS), np.int64)
        session = ort.InferenceSession(exported.output, providers=["CPUExecutionProvider"])
        outputs = session.run(None, feeds, options)[0]
        return _same(torch.from_numpy(outputs), _expected_outputs(adapter, name), _outputs(base_of(name)))

    return holds


HOLDERS: dict[str, Holder] = {
    "bare file": bare_file,
    "folder": hugging_face_folder,
    "attached": attached,
    "folded": folded,
    **{f"graph, {mode}": graph(mode) for mode in ("merged", "nodes", "inputs", "rows")},
}
_graphs: dict[str, Path] = {}


@contextmanager
def graphs_in(folder: Path) -> Iterator[None]:
    """The folder of the exported bases."""
    _graphs["folder"] = folder
    yield
    _graphs.clear()


def base_graph(name: str) -> Path:
    if name not in _graphs:
        path = _graphs["folder"] / f"{name}.onnx"
        le.export_onnx((base_of(name), {KINDS[name].inputs: IDS}), path, verify=False)
        _graphs[name] = path
    return _graphs[name]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def _in_folder(name: str, kind: str) -> str:
    """The name in a folder of GPT-2's type: the layer is one of its Conv1D."""
    return re.sub(r"\blayer\b", "c_fc", name) if kind == "Conv1D" else name


def _renamed_adapter(adapter: Path, kind: str, folder: Path) -> Path:
    if kind != "Conv1D":
        return adapter
    renamed = folder / "adapter"
    renamed.mkdir()
    (renamed / "adapter_config.json").write_text(_in_folder((adapter / "adapter_config.json").read_text(), kind))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({_in_folder(key, kind): value for key, value in tensors.items()}, renamed / "adapter_model.safetensors")
    return renamed


def _outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        outputs = module(IDS)
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits


def _expected_outputs(adapter: Trained, name: str) -> Tensor:
    if adapter.outputs is not None:
        return adapter.outputs
    module = copy.deepcopy(base_of(name))
    module.load_state_dict(dict(adapter.expected), strict=True)
    return _outputs(module)


def _same(ours: Tensor, theirs: Tensor, before: Tensor) -> bool:
    effect = float((theirs - before).abs().max())
    assert effect > 1e-2, "the adapter has no effect: nothing is tested"
    return bool((ours - theirs).abs().max() <= 1e-4 * effect + 2e-6)


def _agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the same names and, but for rounding, the same values."""
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], tensor, rtol=2e-5, atol=2e-6) for name, tensor in theirs.items()
    )


# --- The outcome of a combination ---------------------------------------------------------------

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"

# Why a combination that no field refuses may be refused, by holder.
REASONS = {
    "inputs|rows": r"only low-rank pairs can be swapped while a graph runs",
    "rows": r"only linear layers can be chosen by row; these whole tensors cannot|a layer that has a pair, too",
    "attached|folded": r"kernel \(6, 6\) is not the weight of a linear layer|is a part of a layer's weight",
    "nodes|inputs|rows": r"with the weights of all experts, beside which no branch can be inserted",
    "": r"does not use the bias of B at the packed projection",
}


def outcome(case: Case, adapter: Trained, name: str, holder: str, folder: Path) -> tuple[str, str]:
    """`right`, `refused` or `wrong`, and the message."""
    folder.mkdir(parents=True)
    try:
        is_right = HOLDERS[holder](adapter, name, folder)
    except LoraExportError as error:
        return (REFUSED if _is_known(case, holder, str(error)) else WRONG), str(error)
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome: a failure
        return WRONG, f"{type(error).__name__}: {error}"
    if case.refused and (adapter.outputs is None or holder != "graph, nodes"):
        return WRONG, "merged, although the field changes what the adapter means"
    return (RIGHT, "") if is_right else (WRONG, "other values than PEFT's")


def _is_known(case: Case, holder: str, message: str) -> bool:
    if case.refused:
        return case.field in message or "init_lora_weights" in message
    return any(re.search(where, holder) and re.search(why, message) for where, why in REASONS.items())
