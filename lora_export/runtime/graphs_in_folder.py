"""The runner of a folder's three graphs, by their files."""

from __future__ import annotations

from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
from lora_export.runtime.image_text import ImageTextRunner
from lora_export.runtime.several_graphs import SeveralGraphs

SEVERAL_RUNNERS: tuple[type[SeveralGraphs], ...] = (EncoderDecoderRunner, ImageTextRunner)


def runner_of(files: tuple[str, ...]) -> type[SeveralGraphs]:
    """The class of the runner of graphs in these files."""
    return next(runner for runner in SEVERAL_RUNNERS if files == runner.FILES)
