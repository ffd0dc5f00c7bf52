"""One exported UNet, and three LoRA files that are swapped per call: kohya's, ComfyUI's and diffusers'.

    python samples/swap_image_styles.py OUT

OUT is a new folder. The UNet is a small one with random weights, and the adapters are random too, so that nothing is
downloaded. With real ones, load the UNet of a pipeline, and give the files that people share. Needs diffusers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.numpy import save_file

import lora_export as le

RANK = 4
# The same layer in the names of diffusers, and in those of Stable Diffusion's authors.
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
ORIGINAL = "middle_block.1.transformer_blocks.0.attn2.to_v"
# Style -> its file's keys of A and B
STYLES = {
    "ink": f"lora_unet_{LAYER.replace('.', '_')}" + ".lora_{}.weight",
    "oil": f"diffusion_model.{ORIGINAL}" + ".lora_{}.weight",
    "pastel": f"unet.{LAYER}" + ".lora.{}.weight",
}


class Denoiser(torch.nn.Module):
    """A UNet that takes and returns tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        result: torch.Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return result


def export(out: Path) -> tuple[Path, dict[str, NDArray[np.generic]]]:
    """The graph of the base, by torch.onnx.export, and an example of its inputs."""
    torch.manual_seed(0)
    model = Denoiser().eval()
    tensors = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        tuple(tensors.values()),
        out / "unet.onnx",
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=list(tensors),
        output_names=["noise"],
        dynamic_shapes={name: {0: batch} for name in tensors},
    )
    return out / "unet.onnx", {name: tensor.numpy() for name, tensor in tensors.items()}


def style_file(out: Path, name: str, seed: int) -> Path:
    """A file with one random pair, in the format of the style."""
    random = np.random.default_rng(seed)
    factors = {"down": random.standard_normal((RANK, 32)), "up": random.standard_normal((64, RANK))}
    path = out / f"{name}.safetensors"
    save_file({STYLES[name].format(side): value.astype(np.float32) for side, value in factors.items()}, path)
    return path


def main(out: Path) -> dict[str, NDArray[np.float32]]:
    """Export, add the styles as inputs, and run each. Returns the noise by style; "base" is without one."""
    out.mkdir()
    graph, example = export(out)
    np.savez(out / "example.npz", **example)
    files = [style_file(out, name, seed) for seed, name in enumerate(STYLES, 1)]
    served = le.export_onnx(graph, out / "styles.onnx", adapters=files, lora="inputs", inputs=out / "example.npz")
    print(f"{served.output.name}: {served.proof.verdict.outcome}, {len(files)} adapters beside it")
    session = le.Session(served.output, {name: out / f"{name}.onnx_adapter" for name in STYLES})
    noise = {"base": session.run(example)["noise"]}
    for name in STYLES:
        noise[name] = session.run(example, adapter=name)["noise"]
        print(f"{name}: the noise differs from the base's by up to {np.abs(noise[name] - noise['base']).max():.3f}")
    return noise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
