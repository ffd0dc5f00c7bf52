"""All fuzz targets, and an input of each that is read to its end."""

from __future__ import annotations

from fuzz import comfyui_targets, gguf_targets, library_targets, targets

TARGETS = targets.TARGETS | library_targets.TARGETS | gguf_targets.TARGETS | comfyui_targets.TARGETS
GOOD = targets.GOOD | library_targets.GOOD | gguf_targets.GOOD | comfyui_targets.GOOD
