"""Parameters whose values are read when something computes with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_export.errors import InputRefused
from lora_export.models import stored_parameter
from lora_export.models.load import load_model, module_with_weights
from lora_export.models.stored_parameter import StoredParameter, StreamedFolder, packed, read_stored, state_of
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.weights.checkpoint import open_checkpoint

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
X = torch.tensor([[1.0, 0.0, 2.0]])


def stored(values: Tensor = VALUES, dtype: torch.dtype = torch.float32) -> StoredParameter:
    made = packed(values, dtype)
    assert isinstance(made, StoredParameter)
    return made


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: F.linear(X, w),
        lambda w: X @ w.T,
        lambda w: w.t().contiguous(),
        lambda w: w[1],
        lambda w: torch.cat([w, w]),
        lambda w: w.data * 2,
        lambda w: w.detach().clone(),
        lambda w: F.embedding(torch.tensor([1, 1]), w),
        lambda w: w.double(),
        lambda w: w.to(torch.float64),
        lambda w: w + 1,
        lambda w: torch.from_numpy(w.numpy()),
    ],
)
def test_functions_get_the_values_in_the_dtype_of_the_parameter(compute: object) -> None:
    found, expected = compute(stored(VALUES.bfloat16())), compute(VALUES)  # type: ignore[operator]
    assert type(found) is Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_facts_are_those_of_the_tensor_and_nothing_is_read() -> None:
    def refuse() -> Tensor:
        raise AssertionError("read")

    made = StoredParameter((2, 3), refuse, torch.float32)
    assert (made.shape, made.dtype, made.ndim, made.numel(), made.nbytes) == ((2, 3), torch.float32, 2, 6, 24)
    assert (made.stride(), made.is_contiguous(), len(made), made.requires_grad) == ((3, 1), True, 2, False)
    assert isinstance(made, nn.Parameter)
    assert repr(made) == "StoredParameter((2, 3), torch.float32)"


def test_two_parameters_are_not_taken_for_one_tied_tensor() -> None:
    assert stored().data_ptr() != stored().data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.copy_(VALUES),
        lambda w: w.mul_(2),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: setattr(w, "data", VALUES),
    ],
)
def test_no_change_is_lost_in_silence(change: object) -> None:
    with pytest.raises(RuntimeError, match="cannot be changed"):
        change(stored())  # type: ignore[operator]


def test_the_values_of_the_placeholder_itself_are_nan() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert F.linear(X, stored()).isnan().all()


def test_copies_and_state_do_not_read() -> None:
    module = nn.Linear(3, 2, bias=False)
    module.weight = stored()
    own = copy.deepcopy(module)
    assert isinstance(own.weight, StoredParameter)
    assert isinstance(state_of(own)["weight"], StoredParameter)
    assert torch.equal(own.weight.detach(), VALUES)


class Reads(nn.Module):
    """Computes with a weight in several ways, and asks for its dtype."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight) if type(weight) is Tensor else weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.weight.dtype)
        return {
            "linear": F.linear(x, self.weight),
            "turned": x @ self.weight.T,
            "split": torch.cat([x @ part.t() for part in self.weight.split(1)], -1),
            "rows": F.embedding(torch.tensor([1]), self.weight),
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp64_and_fp32_runs_are_those_of_a_module_in_memory(dtype: torch.dtype) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, read = Reads(values.float()), Reads(stored(values))
    inputs = {"x": torch.randn(4, 3).numpy()}
    for run in (lambda module: ModuleRunner(module).run(inputs), lambda module: Fp64Runner(module).run(inputs)):
        expected, found = run(whole), run(read)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert (found[name] == value).all()
    narrow: set[str] = set()
    Fp64Runner(read, narrow).run(inputs)
    assert not narrow


def test_stored_parameters_are_read_into_memory_once() -> None:
    made = []

    def values() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0).reshape(2, 3).bfloat16()

    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2))
    module[0].weight = module[1].weight = StoredParameter((2, 3), values)
    bias = module[1].bias
    read_stored(module)
    assert made == [1] and module[0].weight is module[1].weight and module[1].bias is bias
    assert type(module[0].weight) is nn.Parameter and not module[0].weight.requires_grad
    assert torch.equal(module[0].weight, torch.arange(6.0).reshape(2, 3))


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"input_ids": np.array([[1, 2, 3, 4], [5, 6, 7, 8]])}


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one."""
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)
    monkeypatch.setattr(stored_parameter, "SMALLEST_STREAMED", 0)


def a_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))


def a_folder(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    a_model(kind).to(dtype).save_pretrained(folder)
    if kind == "no class":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mixtral", "no class"])
def test_streamed_model_is_the_whole_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "m", kind, dtype)
    whole, read = load_model(str(folder)), load_model(str(folder), streamed=True)
    is_streamed = any(isinstance(tensor, StoredParameter) for tensor in read.module.parameters())
    assert is_streamed == (kind != "mixtral")  # whose experts transformers stacks
    assert read.fingerprint() == whole.fingerprint()
    assert len(list(read.module.parameters())) == len(list(whole.module.parameters()))  # tied tensors stay tied
    for name, tensor in whole.module.named_buffers():
        assert torch.equal(read.module.get_buffer(name), tensor)
    expected, found = ModuleRunner(whole.module).run(IDS), ModuleRunner(read.module).run(IDS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert (found[name] == value).all()


def test_weights_behind_a_missing_one_are_filled(tmp_path: Path) -> None:
    """Beside the missing one are weights that a layer does not use, which are None."""
    weights = nn.MultiheadAttention(4, 1).state_dict()
    del weights["in_proj_weight"]
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    folder, module = StreamedFolder(open_checkpoint(tmp_path)), nn.MultiheadAttention(4, 1)
    module.load_state_dict(folder.empty, strict=False, assign=True)
    assert folder.fill(module, frozenset({"in_proj_weight"}))
    assert all(torch.equal(module.get_parameter(name).detach(), tensor + 1) for name, tensor in weights.items())


def test_small_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 1 << 30)
    assert not any(
        isinstance(each, StoredParameter) for each in load_model(str(folder), streamed=True).module.parameters()
    )


def test_turned_weight_is_not_taken_for_the_stored_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square matrix that the loading transposes has the same shape: the model is loaded whole."""
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    load = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def turning(cls: type, *args: object, **kwargs: object) -> object:
        module, loading = load(cls, *args, **kwargs)
        weight = module.model.layers[0].self_attn.q_proj
        weight.weight = nn.Parameter(weight.weight.detach().T, requires_grad=False)
        return module, loading

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(turning))
    read = load_model(str(folder), streamed=True).module
    assert not any(isinstance(tensor, StoredParameter) for tensor in read.parameters())
    own = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(read.get_parameter("model.layers.0.self_attn.q_proj.weight"), own.T)


def test_file_that_changes_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    module = load_model(str(folder), streamed=True).module
    path = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputRefused, match="changed while the model was in use"):
        ModuleRunner(module).run(IDS)


def test_weights_of_a_file_are_streamed_beside_a_streamed_model(tmp_path: Path) -> None:
    base = load_model(str(a_folder(tmp_path / "m", "llama", torch.float32)), streamed=True)
    weights = {name: (tensor * 2).bfloat16() for name, tensor in load_file(tmp_path / "m/model.safetensors").items()}
    save_file(weights, tmp_path / "w.safetensors")
    made = state_of(module_with_weights(base, tmp_path / "w.safetensors"))
    assert made.keys() == weights.keys()
    assert all(isinstance(tensor, StoredParameter) for tensor in made.values())
    assert all(torch.equal(made[name].detach(), tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_file_has_tied_tensors_under_one_name_or_each(name: str, streamed: bool, tmp_path: Path) -> None:
    base = load_model(str(a_folder(tmp_path / "m", "tied", torch.float32)), streamed=streamed)
    weights = load_file(tmp_path / "m/model.safetensors")
    table = weights.pop("model.embed_tokens.weight")
    save_file({**weights, name: 2 * table}, tmp_path / "one.safetensors")
    made = module_with_weights(base, tmp_path / "one.safetensors")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made.lm_head.weight.detach(), 2 * table)
    both = {"model.embed_tokens.weight": table, "lm_head.weight": 3 * table}
    save_file(weights | both, tmp_path / "two.safetensors")
    made = module_with_weights(base, tmp_path / "two.safetensors")
    assert torch.equal(made.lm_head.weight.detach(), 3 * table)
    assert torch.equal(made.model.embed_tokens.weight.detach(), table)
    assert torch.equal(base.module.lm_head.weight.detach(), table)


@pytest.mark.parametrize("fault", ["lacks", "more", "shape"])
def test_file_that_does_not_fit_a_streamed_model_is_refused(fault: str, tmp_path: Path) -> None:
    base = load_model(str(a_folder(tmp_path / "m", "llama", torch.float32)), streamed=True)
    weights = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "lacks":
        del weights[name]
    elif fault == "more":
        weights["model.more"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 4)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputRefused, match="model.more" if fault == "more" else name):
        module_with_weights(base, tmp_path / "w.safetensors")
