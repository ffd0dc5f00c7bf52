"""What several tests share: merges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lora_export import formats, plan
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.merge import merge_checkpoint
from lora_export.weights.merge_report import MergeReport


def merged(
    base: Path,
    adapters: Path | list[Path],
    out: Path,
    *,
    strengths: tuple[float, ...] = (),
    layout: dict[str, str] | None = None,
    **options: Any,
) -> MergeReport:
    """Merge into `out`: a folder, or the folder that a bare file is put into."""
    loaded = [formats.load(path) for path in ([adapters] if isinstance(adapters, Path) else adapters)]
    checkpoint = open_checkpoint(base)
    laid = plan.make(loaded, checkpoint.specs, strengths=strengths, may_add=True, layout=layout)
    out.mkdir()
    return merge_checkpoint(laid, checkpoint, out, **options)


class BothMerges(NamedTuple):
    """An adapter in a base, merged by us and by PEFT."""

    report: MergeReport
    ours: dict[str, Any]  # the state of what a user loads
    theirs: dict[str, Any]


def merged_by_both(folder: Path, base: nn.Module, model: peft.PeftModel, **options: Any) -> BothMerges:
    """Save a base and PEFT's adapter of it as `base` and `adapter`, and merge them into `out`, and in PEFT.

    `options` are those of `merged`. A model of transformers is a folder, and is loaded by its class.
    """
    is_folder = isinstance(base, PreTrainedModel)
    source, out = folder / ("base" if is_folder else "base.safetensors"), folder / "out"
    if is_folder:
        base.save_pretrained(source)
    else:
        save_file(base.state_dict(), source)
    model.save_pretrained(folder / "adapter")
    report = merged(source, folder / "adapter", out, **options)
    if is_folder:
        ours = type(base).from_pretrained(out, dtype=base.dtype).state_dict()
    else:
        ours = load_file(out / "model.safetensors")
    return BothMerges(report, ours, model.merge_and_unload().state_dict())


def same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.square, self.down = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 24, bias=False)


def sixty_fourths(tensor: torch.Tensor) -> None:
    """Fill with multiples of 1/64 below 1: products of two of them, and sums of a few, are exact in any order.

    BLAS libraries add up in different orders; what is left to compare is the one rounding of W + ΔW.
    """
    tensor.copy_(torch.randint(-63, 64, tensor.shape) / 64)


def trained(base: nn.Module, fill: Callable[[torch.Tensor], Any], **config: Any) -> peft.PeftModel:
    """PEFT's model with fp32 adapters of the given values, in a copy of the base."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                fill(parameter)
                assert parameter.dtype == torch.float32 or "lora_" not in name
    return model


def trained_lengths(model: peft.PeftModel) -> peft.PeftModel:
    """The model with DoRA's lengths between half and twice of what they were at first."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.5 + 1.5 * torch.rand(parameter.shape, generator=generator))
    return model


def dora(base: nn.Module, **config: Any) -> peft.PeftModel:
    """PEFT's model with DoRA adapters in a copy of the base, none of whose values is what it began with."""

    def fill(tensor: torch.Tensor) -> None:
        if tensor.ndim > 1 and tensor.shape[0] > 1:  # A or B; a convolution's lengths begin with a 1
            sixty_fourths(tensor)

    return trained_lengths(trained(base, fill, use_dora=True, **config))


def nearly_the_same_bits(ours: dict[str, Any], theirs: dict[str, Any], base: dict[str, Any]) -> set[str]:
    """The names of the tensors that changed; each is the other's, but for the last bit of some entries.

    PEFT sums the squares of a length in fp32, and we in fp64.
    """
    assert ours.keys() == theirs.keys()
    changed = set()
    for name, one in ours.items():
        other = theirs[name]
        step = torch.finfo(other.dtype).eps if other.is_floating_point() else 0
        steps = 4 if other.dtype == torch.float32 else 1
        assert one.dtype == other.dtype
        assert ((one.double() - other.double()).abs() <= steps * step * other.double().abs()).all(), name
        assert other.dtype == torch.float32 or (one == other).double().mean() > 0.98, name
        if not torch.equal(one, base[name]):
            assert (one.double() - base[name].double()).norm() > 0.1 * base[name].double().norm()
            changed.add(name)
    return changed


class Convolutions(nn.Module):
    """A convolution of each kind, and a square one by one; its stride, padding and dilation do not matter to W'."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(6, 4, (3, 2), stride=2, dilation=2)
        self.three, self.point = nn.Conv3d(4, 6, 2), nn.Conv2d(4, 4, 1, bias=False)
