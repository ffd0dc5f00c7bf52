"""Graphs of diffusion models by torch.onnx.export: adapters of every format, in every mode, against diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from lora_export import export_onnx, verify
from lora_export.errors import InputRefused
from lora_export.names.diffusion_layouts import other_layouts
from lora_export.options.reading import ReadOptions
from lora_export.runtime.session import Session
from support.diffusion import adapter_file, linear_shapes, random_pairs, transformer, unet

UNET = ReadOptions(component="unet")


class Denoiser(nn.Module):
    """A UNet that returns a tensor."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def exported(model: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> Path:
    """One graph of the base, with any batch size."""
    names, batch = list(inputs), torch.export.Dim("batch")
    torch.onnx.export(
        model.eval(),
        tuple(inputs.values()),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=names,
        output_names=["noise"],
        dynamic_shapes={name: {0: batch} for name in names},
    )
    np.savez(path.with_suffix(".npz"), **arrays(inputs))
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(3, 4, 8, 8, generator=random),
        "timestep": torch.tensor([10, 500, 90]),
        "encoder_hidden_states": torch.randn(3, 7, 32, generator=random),
    }


@pytest.fixture(scope="module")
def graph(tmp_path_factory, inputs) -> Path:
    return exported(Denoiser(unet()), inputs, tmp_path_factory.mktemp("graph") / "unet.onnx")


def original_names(model: nn.Module) -> dict[str, str]:
    """Module of diffusers -> module of the model's authors."""
    (layout,) = other_layouts(model.state_dict())
    tensors = {tensor.sources[0]: name for name, tensor in layout.tensors.items()}
    return {source.removesuffix(".weight"): name.removesuffix(".weight") for source, name in tensors.items()}


def adapters_in_three_formats(folder: Path) -> dict[str, Path]:
    """One change of the UNet as kohya, ComfyUI and diffusers write it, each with other numbers."""
    layers = ("attn", "ff.net", "proj_in", "conv1", "time_emb_proj")
    shapes = {
        name: shape
        for name, shape in linear_shapes(unet(), convolutions=True).items()
        if any(layer in name for layer in layers)
    }
    original = original_names(unet())
    one, two, three = (random_pairs(shapes, rank=2, seed=seed) for seed in (1, 2, 3))
    small = {
        seed: {name: (a * 0.05, b) for name, (a, b) in pairs.items()}
        for seed, pairs in ((1, one), (2, two), (3, three))
    }
    comfyui = {original[name]: pair for name, pair in small[2].items()}
    return {
        "kohya": adapter_file(folder / "kohya.safetensors", small[1], prefix="lora_unet_", flattened=True, alpha=4),
        "comfyui": adapter_file(folder / "comfyui.safetensors", comfyui, prefix="diffusion_model."),
        "diffusers": adapter_file(
            folder / "diffusers.safetensors", small[3], prefix="unet.", spelling=("lora_A.weight", "lora_B.weight")
        ),
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    return adapters_in_three_formats(tmp_path_factory.mktemp("adapters"))


def loaded_by_diffusers(adapter: Path) -> nn.Module:
    """The UNet with an adapter beside its weights, as diffusers' `load_lora_weights` attaches it."""
    from diffusers import StableDiffusionPipeline

    model = type(unet()).from_config(unet().config).eval()
    model.load_state_dict(unet().state_dict())
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(adapter), unet_config=model.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
    return model


def noise(model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(**inputs, return_dict=False)[0].numpy()
    return result


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


def export(graph: Path, output: Path, sources: list[str], lora: str) -> None:
    export_onnx(graph, output, adapters=sources, lora=lora, inputs=graph.with_suffix(".npz"), reading=UNET)


@pytest.mark.slow
def test_a_merged_graph_is_the_same_as_diffusers(graph, adapters, inputs, tmp_path):
    export(graph, tmp_path / "merged.onnx", [str(adapters["kohya"])], "merged")
    model = Denoiser(loaded_by_diffusers(adapters["kohya"])).eval()
    result = verify(
        tmp_path / "merged.onnx",
        (model, tuple(inputs.values())),
        inputs=graph.with_suffix(".npz"),
        fixed={"sample_axis2": 8, "encoder_hidden_states_axis1": 7},
    )
    assert result.verdict.outcome == "same"


def expected(adapters: dict[str, Path], inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What PyTorch computes with each adapter, and without one. diffusers does not read ComfyUI's names of a UNet."""
    read = {name: noise(loaded_by_diffusers(path), inputs) for name, path in adapters.items() if name != "comfyui"}
    return {**read, "": noise(unet(), inputs)}


@pytest.mark.slow
def test_nodes_beside_the_weights_compute_what_diffusers_computes(graph, adapters, inputs, tmp_path):
    export(graph, tmp_path / "nodes.onnx", [str(adapters["diffusers"])], "nodes")
    (found,) = ort.InferenceSession(tmp_path / "nodes.onnx").run(None, arrays(inputs))
    own = expected(adapters, inputs)
    assert found == pytest.approx(own["diffusers"], abs=2e-5)
    assert np.abs(own["diffusers"] - own[""]).max() > 1e-3


@pytest.mark.slow
def test_three_files_are_swapped_per_call(graph, adapters, inputs, tmp_path):
    export(graph, tmp_path / "inputs.onnx", [f"{name}={path}" for name, path in adapters.items()], "inputs")
    session = Session(tmp_path / "inputs.onnx", {name: tmp_path / f"{name}.onnx_adapter" for name in adapters})
    found = {name: session.run(arrays(inputs), adapter=name or None)["noise"] for name in ("", *adapters)}
    for name, value in expected(adapters, inputs).items():
        assert found[name] == pytest.approx(value, abs=2e-5)
    export(graph, tmp_path / "comfyui.onnx", [str(adapters["comfyui"])], "merged")
    (merged,) = ort.InferenceSession(tmp_path / "comfyui.onnx").run(None, arrays(inputs))
    assert found["comfyui"] == pytest.approx(merged, abs=2e-5)
    assert min(np.abs(found[name] - found[""]).max() for name in adapters) > 1e-3


@pytest.mark.slow
def test_the_rows_of_a_batch_use_different_files(graph, adapters, inputs, tmp_path):
    export(graph, tmp_path / "rows.onnx", [f"{name}={path}" for name, path in adapters.items()], "rows")
    feeds = {**arrays(inputs), "adapter_ids": np.array([1, 0, 3])}
    (found,) = ort.InferenceSession(tmp_path / "rows.onnx").run(None, feeds)
    own = expected(adapters, inputs)
    for row, name in enumerate(("kohya", "", "diffusers")):
        assert found[row] == pytest.approx(own[name][row], abs=2e-5)


@pytest.mark.slow
def test_a_lokr_is_merged_or_nodes_and_refused_as_inputs(graph, inputs, tmp_path):
    rng = np.random.default_rng(0)
    name = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lokr_w1": rng.standard_normal((8, 8)), "lokr_w2": rng.standard_normal((8, 8)), "alpha": np.ones(1)}
    tensors = {
        f"lora_unet_{name}.{part}": np.asarray(value, np.float32) * np.float32(0.3) for part, value in factors.items()
    }
    save_file(tensors, tmp_path / "lokr.safetensors")
    with pytest.raises(InputRefused, match=r"has the rank 64 as A and B: beside the weight it would cost more"):
        export(graph, tmp_path / "inputs.onnx", [str(tmp_path / "lokr.safetensors")], "inputs")
    assert not (tmp_path / "inputs.onnx").exists()
    found = {"": ort.InferenceSession(graph).run(None, arrays(inputs))[0]}
    for mode in ("merged", "nodes"):
        export(graph, tmp_path / f"{mode}.onnx", [str(tmp_path / "lokr.safetensors")], mode)
        (found[mode],) = ort.InferenceSession(tmp_path / f"{mode}.onnx").run(None, arrays(inputs))
    assert found["nodes"] == pytest.approx(found["merged"], abs=2e-5)
    assert np.abs(found["merged"] - found[""]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "nodes", "inputs", "rows"])
def test_a_transformer_with_fused_projections_is_the_same_as_pytorch(lora, tmp_path):
    """ComfyUI's adapter of Flux has one pair for q, k and v; diffusers' graph has three layers."""
    model = transformer("Flux")
    random = torch.Generator().manual_seed(1)
    flux_inputs = {
        "hidden_states": torch.randn(2, 16, 4, generator=random),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=random),
        "pooled_projections": torch.randn(2, 20, generator=random),
        "timestep": torch.tensor([0.1, 0.9]),
        "guidance": torch.tensor([3.5, 1.0]),
    }
    pairs = random_pairs({"double_blocks.0.img_attn.qkv": (96, 32), "single_blocks.0.linear1": (224, 32)})
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="diffusion_model.")

    class Flux(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.register_buffer("ids", torch.zeros(16, 3))
            self.register_buffer("text_ids", torch.zeros(5, 3))

        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance):
            return self.model(
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                self.ids,
                self.text_ids,
                guidance,
                return_dict=False,
            )[0]

    whole = Flux().eval()
    exported(whole, flux_inputs, tmp_path / "flux.onnx")
    export_onnx(tmp_path / "flux.onnx", tmp_path / "out.onnx", adapters=path, lora=lora, inputs=tmp_path / "flux.npz")
    result = verify(
        tmp_path / "out.onnx",
        (whole, tuple(flux_inputs.values())),
        adapters=path,
        inputs=tmp_path / "flux.npz",
        onnx_adapter=tmp_path / "a.onnx_adapter" if lora == "inputs" else None,
        adapter_id=1 if lora == "rows" else None,
    )
    assert result.verdict.outcome == "same"
