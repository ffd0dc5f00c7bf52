"""Every variant that PEFT trains, trained beside PEFT: the same losses, and files that each reads from the other.

Both start from one folder. `PeftModel.from_pretrained` reads what we wrote, and we read what PEFT wrote.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lora_export import formats, layers, plan
from lora_export.formats import WriteOptions
from lora_export.formats import peft as peft_writer
from lora_export.formats.peft_records import as_peft_computes
from lora_export.layers.new_adapter import STARTING_POINT, Init, as_plain_lora, frozen_start, started_from_weights
from lora_export.lora import Adapter
from support import experts
from support.slow import slow
from support.small_layers import Everything, an_encoder_layer, base_of
from support.tiny_models import tiny_bert, tiny_llama

STEPS, RATE = 3, 0.02
IDS = torch.tensor([[1, 5, 0, 3, 3, 10, 2], [4, 1, 7, 8, 9, 1, 4]])
KINDS = ["words", "fc", "fan", "one", "two", "three"]


def a_llama(*, tied: bool) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=11, num_hidden_layers=2, attention_bias=True, tie_word_embeddings=tied)


def in_4_bits(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as transformers quantises it when it loads a folder: nf4, with double quantisation."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        made = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    for part in made.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # with it, bitsandbytes rounds to bf16 in eval mode
    return made.eval()


def a_bert() -> nn.Module:
    return tiny_bert(vocab_size=11, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(11, 8), nn.TransformerEncoder(an_encoder_layer(), 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.words(ids))


def an_encoder() -> nn.Module:
    return base_of(Encoder)


PEFTS_NAMES = {  # of our options; the others have the same in PEFT's config
    "targets": "target_modules",
    "target_pattern": "target_modules",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "dropout": "lora_dropout",
    "token_indices": "trainable_token_indices",
}
TASK = {"task_type": "CAUSAL_LM"}


def of_pefts_config(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {PEFTS_NAMES.get(name, name): value for name, value in options.items() if value} | more


@dataclass(frozen=True)
class Variant:
    """One way to adapt a model: our options, and further fields of PEFT's config."""

    make: Callable[[], nn.Module]
    ours: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()  # what PEFT would train besides


def a_net() -> nn.Module:
    return base_of(Everything)


def untied() -> LlamaForCausalLM:
    return a_llama(tied=False)


PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"mlp.*": 3}}
OTHER_PATTERNS = {"rank_pattern": {r"0\..*\.q_proj": 4, "q_proj": 1}, "alpha_pattern": {"layers.1.mlp.*": 3}}
TOKENS = {"targets": ["q_proj"], "token_indices": [3, 1, 10]}
EXPERTS = {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
VARIANTS = {
    "kinds": Variant(a_net, {"targets": KINDS}),
    "dora": Variant(a_net, {"targets": KINDS, "dora": True}),
    "dropout": Variant(a_net, {"targets": KINDS, "dropout": 0.3}),
    "dora with dropout": Variant(a_net, {"targets": KINDS, "dropout": 0.3, "dora": True}),
    "patterns": Variant(untied, {"targets": "all-linear", **OTHER_PATTERNS}, TASK),
    "regex": Variant(untied, {"targets": [], "target_pattern": r".*\.1\..*(q|v)_proj", "rslora": True}),
    "all biases": Variant(a_bert, {"targets": ["query", "value"], "bias": "all"}),
    "biases of layers and a head": Variant(
        a_bert, {"targets": ["query", "dense"], "bias": "lora_only", "modules_to_save": ["classifier"]}
    ),
    "tokens": Variant(untied, TOKENS),
    "tied tokens": Variant(lambda: a_llama(tied=True), TOKENS),
    "tied tokens beside a pair": Variant(lambda: a_llama(tied=True), {**TOKENS, "targets": ["q_proj", "lm_head"]}),
    "a tied table": Variant(lambda: a_llama(tied=True), {"targets": ["embed_tokens", "q_proj"]}),
    "4 bits": Variant(
        lambda: in_4_bits(untied()), {"targets": ["q_proj", "v_proj", "down_proj"], "bias": "lora_only"}, TASK
    ),
    "dora and dropout in 4 bits": Variant(
        lambda: in_4_bits(untied()), {"targets": "all-linear", "dora": True, "dropout": 0.3}, TASK
    ),
    "attention": Variant(
        an_encoder,
        {"targets": ["self_attn", "linear1", "linear2"]},
        frozen=("out_proj",),  # PEFT 0.21 adds its change twice
    ),
    **{
        f"experts of {name}": Variant(lambda name=name: experts.tiny_model(name), EXPERTS)
        for name in ("mixtral", "gpt_oss", "llama4_text")
    },
}


def outputs_of(model: nn.Module) -> Tensor:
    outputs = model(IDS)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def losses(model: nn.Module) -> list[float]:
    """The losses of some steps, with the same random numbers in each run."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    model.train()
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)
        outputs = outputs_of(model)
        loss = (outputs - torch.cos(torch.arange(outputs.numel()).reshape(outputs.shape))).square().mean()
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return found


def attached(base: nn.Module, adapter: Adapter) -> nn.Module:
    module = copy.deepcopy(base)
    changes = plan.make([adapter], layers.specs(module), identity_ok=True)
    layers.attach(module, changes, trainable=True, dropout=adapter.metadata.get("lora_dropout", 0.0))
    layers.refuse_trainable_base(module)
    return module


def write(adapter: Adapter, folder: Path, base: nn.Module) -> Path:
    folder.mkdir()
    reading = WriteOptions().reading
    if hasattr(base, "config"):
        base.config.save_pretrained(folder.parent / "base")
        reading = reading.for_base(folder.parent / "base")
    peft_writer.write(adapter, folder, WriteOptions(reading))
    return folder


def without(frozen: tuple[str, ...], model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(f"{part}.lora_" in name for part in frozen):
            parameter.requires_grad_(False)
    return model


def of_peft(base: nn.Module, folder: Path, variant: Variant) -> nn.Module:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    return without(variant.frozen, model)


def assert_same_losses(ours: nn.Module, theirs: nn.Module, least: float = 1e-4) -> None:
    """Both learn the same, and something."""
    own = losses(ours)
    assert own == pytest.approx(losses(theirs), abs=1e-5)
    assert abs(own[-1] - own[0]) > least


def assert_loaded_by_peft(ours: nn.Module, adapter: Adapter, base: nn.Module, folder: Path) -> None:
    """PEFT computes with what we write what the trained module computes."""
    written = write(layers.read_back(ours, adapter), folder, base)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), written).eval()
    if isinstance(base, Encoder):  # PEFT 0.21 is wrong in the fast path of eval mode: it leaves adapters out
        again.train(), ours.train()
    torch.testing.assert_close(outputs_of(ours), outputs_of(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_adapter_has_pefts_losses_and_loads_there(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    base = variant.make()
    new = layers.create_adapter(base, rank=2, alpha=4, seed=0, **variant.ours)
    ours, theirs = attached(base, new), of_peft(base, write(new, tmp_path / "new", base), variant)
    assert_same_losses(ours, theirs)
    assert (outputs_of(ours) - outputs_of(base.eval())).abs().max() > 1e-3
    assert_loaded_by_peft(ours, new, base, tmp_path / "trained")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_peft_trained_is_continued_as_peft_does(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    base = variant.make()
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, lora_alpha=4, **of_pefts_config(variant.ours, **variant.more))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.requires_grad and not any(f"{frozen}.lora_" in part for frozen in variant.frozen):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    (adapter,) = layers.respelled_for(base, [formats.load(tmp_path / "theirs")])
    ours, theirs = without(variant.frozen, attached(base, adapter)), of_peft(base, tmp_path / "theirs", variant)
    assert_same_losses(ours, theirs)
    assert_loaded_by_peft(ours, adapter, base, tmp_path / "again")


def test_an_attention_that_peft_trained_is_continued_as_peft_does(tmp_path: Path) -> None:
    """With its output projection, whose change PEFT up to 0.21 adds twice."""
    base = an_encoder()
    torch.manual_seed(2)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["self_attn"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    adapter = as_peft_computes(formats.load(tmp_path / "theirs"))
    ours = attached(base, adapter)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    assert_same_losses(ours, theirs, least=1e-3)
    (saved,) = layers.respelled_for(base, [formats.load(write(layers.read_back(ours, adapter), tmp_path / "ad", base))])
    again = attached(base, saved)
    torch.testing.assert_close(outputs_of(again.train()), outputs_of(theirs.train()), rtol=1e-4, atol=1e-4)


# --- Starts from the weights ---

STARTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "linear": (untied, {}, TASK),
    "rslora": (untied, {"rslora": True}, TASK),
    "patterns": (untied, PATTERNS, TASK),
    "rslora and patterns": (untied, {"rslora": True, **PATTERNS}, TASK),
    "dropout": (untied, {"dropout": 0.3}, TASK),
    "conv1d": (a_net, {"targets": ["fan"]}, {"fan_in_fan_out": True}),
}


def trained_from_weights(base: nn.Module, new: Adapter, init: Init) -> tuple[nn.Module, Adapter]:
    """A module with an adapter that starts from the weights of its base, and that start."""
    start = started_from_weights(base, new, init)
    module = copy.deepcopy(base)
    changes = plan.make([start, frozen_start(start)], layers.specs(module), identity_ok=True)
    dropout = new.metadata.get("lora_dropout", 0.0)
    layers.attach(module, changes, trainable=True, dropout=dropout, frozen={STARTING_POINT})
    return module, start


# PEFT 0.21 decomposes the stored (in, out) matrix of a Conv1D for OLoRA: test_new_adapter.py has that sum.
@pytest.mark.parametrize(
    ("name", "init"),
    [
        *((name, "pissa") for name in STARTS),
        *((name, "olora") for name in ("linear", "rslora and patterns")),
        *(slow(name, "olora") for name in ("rslora", "patterns", "dropout")),
    ],
)
def test_a_start_from_the_weights_has_pefts_losses(name: str, init: Init, tmp_path: Path) -> None:
    make, options, more = STARTS[name]
    base, options = make(), {"targets": "all-linear", **options}
    new = layers.create_adapter(base, rank=2, alpha=4, seed=0, **options)
    ours, start = trained_from_weights(base, new, init)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=init, **of_pefts_config(options, **more))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "start")
    torch.testing.assert_close(outputs_of(ours), outputs_of(base), rtol=1e-5, atol=1e-5)
    assert_same_losses(ours, theirs)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in base.state_dict().items())

    saved = as_plain_lora(layers.read_back(ours, start), start)
    assert {key: pair.rank for key, pair in saved.pairs.items()} == {k: 2 * p.rank for k, p in new.pairs.items()}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), write(saved, tmp_path / "saved", base)).eval()
    for trained in (ours, theirs):
        torch.testing.assert_close(outputs_of(again), outputs_of(trained), rtol=1e-5, atol=1e-5)
    if name != "rslora and patterns":  # PEFT refuses to convert these together
        theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        converted = formats.load(tmp_path / "theirs")
        for key, pair in converted.pairs.items():
            np.testing.assert_allclose(saved.pairs[key].delta(), pair.delta(), rtol=1e-4, atol=1e-5)


# --- What PEFT cannot train: a sum by hand ---


@pytest.mark.parametrize("dora", [False, True])
def test_a_transformer_encoder_is_trained_as_w_plus_change(dora: bool) -> None:
    base = an_encoder()
    targets = ["self_attn", "out_proj", "linear1", "linear2"]
    new = layers.create_adapter(base, targets=targets, rank=2, alpha=4, seed=0, dora=dora)
    ours, by_hand = attached(base, new), ByHand(base, new)
    own = losses(ours)
    assert own == pytest.approx(losses(by_hand), abs=1e-5)
    assert own[-1] < own[0] - 1e-3
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(ours(IDS), by_hand(IDS), rtol=1e-5, atol=1e-5)
    trained = layers.read_back(ours, new)
    assert len(trained.pairs) == 8 and all(pair.b.any() for pair in trained.pairs.values())


class ByHand(nn.Module):
    """W + scale * B A in place of every adapted weight; with DoRA, rescaled to the lengths."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.pairs = adapter.pairs
        self.factors = nn.ParameterDict()
        for name, pair in adapter.pairs.items():
            for part, value in (("a", pair.a), ("b", pair.b), ("m", pair.magnitude)):
                if value is not None:
                    self.factors[f"{name}/{part}".replace(".", "|")] = nn.Parameter(torch.from_numpy(np.array(value)))

    def forward(self, ids: Tensor) -> Tensor:
        changed = {}
        for name, pair in self.pairs.items():
            key = name.replace(".", "|")
            weight = f"{name}.in_proj_weight" if name.endswith("self_attn") else f"{name}.weight"
            total = self.base.get_parameter(weight) + pair.scale * self.factors[f"{key}/b"] @ self.factors[f"{key}/a"]
            if pair.magnitude is not None:
                total = total * (self.factors[f"{key}/m"] / total.detach().norm(dim=1))[:, None]
            changed[weight] = total
        return torch.func.functional_call(self.base, changed, ids)
