"""All fuzz targets, and an input of each that is read to its end."""

from __future__ import annotations

from fuzz import comfyui_targets, gguf_targets, library_targets, megatron_targets, targets

_ALL = (targets, library_targets, gguf_targets, comfyui_targets, megatron_targets)
TARGETS = {name: target for module in _ALL for name, target in module.TARGETS.items()}
GOOD = {name: good for module in _ALL for name, good in module.GOOD.items()}
