"""An adapter for both layers of the model `wide` of the factories, whose weights tests quantise."""

from __future__ import annotations

import numpy as np

from lora_export.lora import Adapter, LoraPair


def adapter_for_wide(scale: float = 1.0) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = {"up": (96, 64), "down": (64, 96)}
    pairs = {
        name: LoraPair(a=rng.normal(size=(4, inner)) / 8, b=rng.normal(size=(out, 4)) / 8, scale=scale)
        for name, (out, inner) in shapes.items()
    }
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")
