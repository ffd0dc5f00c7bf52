"""The three graphs of a model that reads images, run step by step: images and prompt first, then token after token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import MERGED_FILE
from lora_export.graph.cache_names import EMBEDS, GRIDS, IDS, MASK
from lora_export.runtime.generation.decoder import Decoder, DecoderRun
from lora_export.runtime.image_text import ImageTextRunner
from lora_export.runtime.runner import Arrays


class ImageText:
    """The folder of a model with images that `export_onnx` made with `with_cache`.

    `provider` is `cpu` or `cuda`; on `cuda` the cache stays on the GPU. Raises InputRefused for graphs that do not
    belong together, EnvironmentLacking where the provider does not run, and RuntimeRefused where onnxruntime refuses a
    graph.
    """

    rows = ()  # no row of a batch chooses its adapter

    def __init__(self, folder: Path, provider: str = "cpu"):
        self.graphs = ImageTextRunner.open(folder, provider)
        self.decoder = Decoder(folder / MERGED_FILE, provider, EMBEDS, self.graphs.decoder)
        self.longest = self.graphs.longest
        self.token = self.graphs.tokens.token  # of an image
        self.image_inputs = {name: self.graphs.vision.axes[name] for name in self.graphs.image_inputs}

    def load(self, name: str) -> None:
        """Load an adapter's files in the folder. Raises InputRefused where they are missing or do not fit."""
        file = self.graphs.adapter_file(name, self.graphs.decoder) if self.graphs.decoder.lacks_adapter else None
        self.graphs = self.graphs.with_adapter(name)
        if file is not None and self.decoder.adapters is not None:
            self.decoder.adapters.load(name, file)

    def start(self, images: Arrays, adapter: str | None = None) -> ImageTextRun:
        """Run the vision encoder on images, its inputs, with a loaded adapter. Without images there are none."""
        return ImageTextRun(self, images, adapter)


class ImageTextRun:
    """The state of one batch: its images, until the prompt has run, and the cache and the positions of the decoder."""

    def __init__(self, model: ImageText, images: Arrays, adapter: str | None):
        self.model, self.images, self.adapter = model, images, adapter
        self.features = model.graphs.features(images) if images else None
        self.run: DecoderRun | None = None
        self.following: NDArray[np.int64] | None = None  # the next position of each row, where images have grids

    @property
    def counts(self) -> list[int]:
        """How many tokens each image takes."""
        if self.features is None:
            return []
        merge = self.model.graphs.tokens.merge
        if merge:
            return [int(patches) // merge**2 for patches in self.images[GRIDS].prod(1)]
        images = len(next(iter(self.images.values())))
        return [len(self.features) // images] * images

    def step(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """Run the next tokens [batch, tokens]; return the logits of the last one, [batch, vocabulary].

        The first tokens have the places of the images. Raises RuntimeRefused where these are not as many as the images
        need.
        """
        graphs = self.model.graphs
        features = None
        if self.run is None:
            adapter = self.adapter if self.model.decoder.adapters is not None else None
            self.run = self.model.decoder.start(len(ids), adapter)
            features = self.features
            if found := graphs.positions({IDS: ids, MASK: mask, **self.images}):
                positions, self.following = found
        elif self.following is not None:
            positions = np.broadcast_to(self.following[None, :, None], (3, len(ids), 1))
            self.following = self.following + 1
        return self.run.step(graphs.embeds(ids, features), mask, positions)
