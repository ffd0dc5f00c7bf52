"""Names of what graphs with a key/value cache take and return, as exporters and runtimes use them; image tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage.json_files import parse_json

IDS, MASK = "input_ids", "attention_mask"
POSITION_IDS, CACHE_POSITION = "position_ids", "cache_position"  # [batch, tokens] and [tokens]
BRANCH = "use_cache_branch"  # of optimum's graphs that contain one graph for a prompt and one for a step
EMBEDS, FEATURES = "inputs_embeds", "image_features"  # of a decoder that reads images, and of its vision encoder
IMAGE_FEATURES = "image_outputs.pooler_output"  # of the model in PyTorch
GRIDS, TOKEN_TYPES = "image_grid_thw", "token_type_ids"  # of images, and of tokens
TOKEN_TYPE_INPUTS = ("mm_token_type_ids", TOKEN_TYPES)
PIXEL_MASK = "pixel_attention_mask"  # of images: 0 where there is none
IMAGE_SIZES = "image_sizes"  # heights and widths
IMAGE_INPUTS = ("pixel_values", GRIDS, PIXEL_MASK, IMAGE_SIZES)  # of a vision encoder
TOKEN_COUNTS = "image_token_counts"  # its output where only it knows how many tokens each image has
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"  # of the cache's inputs and outputs: `past_key_values.0.key`
KEY_VALUE = ("key", "value")
# Of states that do not grow with the text: `past_conv.0`, as in transformers.js
PAST_CONV, PRESENT_CONV = "past_conv", "present_conv"
PAST_RECURRENT, PRESENT_RECURRENT = "past_recurrent", "present_recurrent"
DECODER_IDS = "decoder_input_ids"  # of a model with an encoder; its decoder's graphs take them as `input_ids`
# Of an encoder-decoder: what the encoder returns, and the names by which the decoder takes it and its mask.
LAST_HIDDEN, HIDDEN, ENCODER_MASK = "last_hidden_state", "encoder_hidden_states", "encoder_attention_mask"


def present_by_past(inputs: Iterable[str], outputs: Iterable[str]) -> dict[str, str]:
    """The output that each input's next value is read from: `present_conv.0` for `past_conv.0`.

    Otherwise that of the same name but for its first part, such as `present.0.key` for `past_key_values.0.key`. Inputs
    without one are left out.
    """
    exact = list(outputs)
    by_rest = {_without_first_part(name): name for name in exact}
    found = {}
    for name in inputs:
        same = re.sub("^past", "present", name)
        if (output := same if same in exact else by_rest.get(_without_first_part(name))) is not None:
            found[name] = output
    return found


def past_of(present: str) -> str:
    """The input of the next call that an output is: `past_key_values.0.key` for `present.0.key`."""
    return f"{PAST}.{present.removeprefix(f'{PRESENT}.')}"


def _without_first_part(name: str) -> str:
    """A name without its first part; the whole name where it has one part."""
    return re.sub(r"^\w+[./]", "", name)


# --- How the images of a model are placed among its tokens, recorded in the graph of its vision encoder ---

IMAGE_TOKENS_KEY = "lora_export.image_tokens"


@dataclass(frozen=True)
class ImageTokens:
    """The token in whose places the features of images are put, how grids become positions, and who attends to whom."""

    token: int
    merge: int = 0  # patches of a grid that become one token, along each side; 0: positions count the tokens
    two_way: int | None = None  # the type of the tokens that attend to each other in both directions; None: no token
    pixels: int = 0  # of a token along each side, where images are rows of tokens

    @property
    def properties(self) -> dict[str, str]:
        """The metadata of a graph."""
        return {IMAGE_TOKENS_KEY: json.dumps(asdict(self))}


def image_tokens_of(metadata: Mapping[str, str], graph: Path) -> ImageTokens:
    """What a graph's metadata record. Raises InputRefused where they record nothing, or nonsense."""
    if IMAGE_TOKENS_KEY not in metadata:
        raise InputRefused(f"{graph} does not record the token of its images: it was not made by lora-export")
    content = parse_json(metadata[IMAGE_TOKENS_KEY].encode(errors="surrogatepass"), f"the image token in {graph}")
    numbers: list[Any] = [content.get("token"), content.get("merge", 0), content.get("pixels", 0)]
    two_way = content.get("two_way")
    is_type = two_way is None or (type(two_way) is int and two_way in (0, 1))
    if not is_type or not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers):
        raise InputRefused(f"{graph} records no token of its images: {content!r}")
    return ImageTokens(numbers[0], numbers[1], two_way, numbers[2])
