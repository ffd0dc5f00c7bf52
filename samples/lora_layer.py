"""LoRA in one class, and the same numbers from `lora_export.attach` and `fold_module`.

    python samples/lora_layer.py

LoRALayer is the layer of every lesson on LoRA. `attach` adds the same branch beside a layer that stays what it was,
so it also works where a wrapper does not: see all_linear_layers.py.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import lora_export as le


class LoRALayer(nn.Module):
    """y = W x + bias + (alpha / rank) · B A x. W and its bias are frozen; A and B are trained."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))  # zero: a new layer computes W x + bias
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)


def main() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 8), torch.randn(4, 16)
    layer = LoRALayer(linear, rank=4, alpha=8)
    nn.init.normal_(layer.lora_b)  # as if it had been trained

    pair = le.LoraPair(a=layer.lora_a.detach().numpy(), b=layer.lora_b.detach().numpy(), scale=layer.scale)
    attached, merged = (nn.ModuleDict({"dense": copy.deepcopy(linear)}) for _ in range(2))
    plan = le.make_plan([le.Adapter(name="lesson", format="lesson", pairs={"dense": pair})], le.module_specs(attached))
    le.attach(attached, plan)  # A and B beside the weight
    le.fold_module(merged, plan)  # W + (alpha / rank) · B A instead of the weight

    with torch.no_grad():
        outputs = layer(x), attached["dense"](x), merged["dense"](x)
    print(f"LoRALayer, attach: they differ by {(outputs[1] - outputs[0]).abs().max():.1e} at most")
    print(f"LoRALayer, merged: they differ by {(outputs[2] - outputs[0]).abs().max():.1e} at most")
    print(f"the adapter effect is {(outputs[0] - linear(x)).abs().max():.1f} at most")
    return outputs


if __name__ == "__main__":
    main()
