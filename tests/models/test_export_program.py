"""Programs of torch.export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.exporters import utils

import lora_export as le
from lora_export.errors import RuntimeRefused, WrongUsage
from lora_export.models.export_program import load_own_program, save_program, to_program, with_inputs
from lora_export.models.load import from_module
from support.tiny_models import tiny_llama

# Run by a Python that knows neither this package nor transformers, and turns every warning into an error.
LOADS_ALONE = """
import sys, warnings
sys.modules["lora_export"] = sys.modules["transformers"] = None
import numpy, torch
arrays = dict(numpy.load(sys.argv[2]))
with warnings.catch_warnings(action="error"):
    program = torch.export.load(sys.argv[1], extra_files={"lora_export.json": ""}).module()
    outputs = program(**{name: torch.from_numpy(array) for name, array in arrays.items()})
assert type(outputs) is dict
numpy.savez(sys.argv[3], **{name: value.detach().numpy() for name, value in outputs.items()})
"""


class Net(nn.Module):
    """Returns nested outputs; the batch and the sequence may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        hidden = self.up(x).tanh()
        return self.out(hidden) * scale, [hidden.sum(1)]


def net() -> Any:
    torch.manual_seed(0)
    return from_module(Net(), {"x": torch.randn(3, 5, 4), "scale": torch.tensor(2.0)})


def test_a_program_takes_other_sizes_than_it_was_exported_with(tmp_path: Path) -> None:
    model = net()
    save_program(to_program(model.module, model.example_inputs(), axes=model.axes), tmp_path / "m.pt2", extra={})
    x, scale = torch.randn(7, 9, 4), torch.tensor(3.0)
    found, wanted = load_own_program(tmp_path / "m.pt2")[0](x=x, scale=scale), model.module(x, scale)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1][0], wanted[1][0])


def test_the_same_module_gives_the_same_bytes_without_paths(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = net()
        program = to_program(model.module, model.example_inputs(), axes=model.axes)
        save_program(program, tmp_path / f"{name}.pt2", extra={"lora_export.json": "{}"})
    content = (tmp_path / "a.pt2").read_bytes()
    assert content == (tmp_path / "b.pt2").read_bytes()
    for own in (b".py", b"site-packages", str(Path(__file__).parent).encode(), b"self.up("):
        assert own not in content


def test_a_trace_records_no_code_and_imports_no_other_models() -> None:
    found, seen = utils.import_dotted_path, []
    config = hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    module = hf.BertModel(config).eval()
    records = not hasattr(torch.fx.config, "do_not_emit_stack_traces")  # PyTorch 2.11 and older

    def look(*_: Any) -> None:
        is_silent = records or torch.fx.config.do_not_emit_stack_traces
        seen.append(is_silent and utils.import_dotted_path is not found)

    module.embeddings.register_forward_pre_hook(look)
    to_program(module, {"input_ids": torch.ones(2, 3, dtype=torch.long)}, axes={})
    assert seen[-1]
    assert utils.import_dotted_path is found


def test_the_module_itself_is_not_changed() -> None:
    model = net()
    cls, before = type(model.module), {name: value.clone() for name, value in model.module.state_dict().items()}
    to_program(model.module, model.example_inputs(), axes=model.axes)
    assert type(model.module) is cls and all(value.requires_grad for value in model.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


class Fixed(nn.Module):
    """Its code needs a batch of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, -1)


def test_an_axis_that_the_code_fixes_is_refused() -> None:
    with pytest.raises(RuntimeRefused, match="the exporter refused Fixed"):
        to_program(Fixed(), {"x": torch.randn(3, 4)}, axes={"x": {0: "batch"}})


@torch.library.custom_op("lora_export_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    """It calls an operator of a package, as the experts of transformers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x)


def test_an_operator_of_another_package_is_refused_by_name() -> None:
    with pytest.raises(RuntimeRefused, match="Foreign calls lora_export_tests::twice, which is no operator"):
        to_program(Foreign(), {"x": torch.randn(3, 4)}, axes={"x": {0: "batch"}})


# --- Whole exports ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(vocab_size=40, hidden_size=16).save_pretrained(folder / "base")
    model = hf.LlamaForCausalLM.from_pretrained(folder / "base")
    options = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(model, options).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
def test_a_fresh_process_computes_what_peft_does(llama: Path, tmp_path: Path) -> None:
    result = le.export_torchscript(llama / "base", tmp_path / "m.pt2", adapters=llama / "adapter", lora="nodes")
    assert result.proof is not None and result.proof.verdict.same
    ids = np.array([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 0, 0]])
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=np.array([[1] * 6, [1] * 4 + [0] * 2]))
    command = [sys.executable, "-I", "-c", LOADS_ALONE, "m.pt2", "in.npz", "out.npz"]
    ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    adapted = peft.PeftModel.from_pretrained(hf.LlamaForCausalLM.from_pretrained(llama / "base"), llama / "adapter")
    arrays = {name: torch.from_numpy(value) for name, value in np.load(tmp_path / "in.npz").items()}
    with torch.no_grad():
        wanted = adapted.eval()(**arrays).logits.numpy()
        with adapted.disable_adapter():
            without = adapted(**arrays).logits.numpy()
    found = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert abs(wanted - without).max() > 0.01
    assert le.verify(result.output, llama / "base", adapters=llama / "adapter")
    assert le.verify(result.output, llama / "base").exit_code == 4


@pytest.mark.slow
def test_a_merged_program_is_proven(llama: Path, tmp_path: Path) -> None:
    result = le.export_torchscript(llama / "base", tmp_path / "m", adapters=llama / "adapter", format="pt2")
    assert result.output == tmp_path / "m.pt2" and result.proof is not None and result.proof.verdict.same


def test_formats_and_suffixes_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="format= is 'onnx'; it must be torchscript, pt2 or pte"):
        le.export_torchscript(llama / "base", tmp_path / "m", format="onnx")
    with pytest.raises(WrongUsage, match=r"the output is a \.pt2 file"):
        le.export_torchscript(llama / "base", tmp_path / "m.pt", format="pt2")
    with pytest.raises(WrongUsage, match=r"the output is a \.pt file"):
        le.export_torchscript(llama / "base", tmp_path / "m.pt2", format="torchscript")
    for output, format_ in (("m.pt", None), ("m.pte", "pt2")):
        with pytest.raises(WrongUsage, match=r"max_size= is for an output that ends in \.pte: other files take any"):
            le.export_torchscript(llama / "base", tmp_path / output, format=format_, max_size={"batch": 1})
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_a_program_become_its_last_inputs() -> None:
    model = net()
    program = to_program(model.module, model.example_inputs(), axes=model.axes)
    moved = with_inputs(program, ["out.weight", "up.weight"])
    other = net().module
    for layer in (other.up, other.out):
        torch.nn.init.normal_(layer.weight)
    x, scale = torch.randn(7, 9, 4), torch.tensor(3.0)
    names = moved.graph_signature.user_inputs
    assert names[:2] == ("x", "scale") and set(moved.state_dict) == {"up.bias", "out.bias"}
    weights = dict(zip(names[2:], (other.out.weight, other.up.weight), strict=True))
    torch.testing.assert_close(moved.module()(x=x, scale=scale, **weights), other(x, scale))
    with pytest.raises(RuntimeRefused, match=r"left down\.weight out of the program"):
        with_inputs(program, ["up.bias", "down.weight"])
