"""Inputs of texts: token ids, a mask, token types, the boxes of a page's tokens, images among them; their lengths."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.graph.cache_names import TOKEN_TYPES
from lora_export.models.images import ImagesInText, is_token
from lora_export.models.model import CHECKED_SIZES, Axes, Limits, MakeInputs, ModelInputs, Sizes
from lora_export.options.spelling import named
from lora_export.storage import json_files

# Fields of a config with the token that stands for an image, a video or a sound among the tokens of a text
PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
# Inputs of each kind
MEDIA = {"images": {"pixel_values"}, "videos": {"pixel_values_videos"}, "sounds": {"input_features", "input_values"}}
CODE_POINTS = 0x110000  # of Unicode: the tokens of Canine, which hashes them into its tables
FINE_POSITIONS = 1000  # of a page whose boxes are fractions of it (Bros)
XLNET_TYPES = 3  # the first text, the second, and the token of a classifier
SPECIAL_EVERY = 8  # places, of which one holds a special token
ONE_TOKEN: Sizes = {"batch": 2, "sequence": 1, "target": 1}  # in each row
SHORT = CHECKED_SIZES[-1]["sequence"]  # tokens of a text that is not the long one, at most
PADDING_OF_LONG = 3  # tokens of padding of the long text


@dataclass(frozen=True)
class Part:
    """Some of a model's inputs, which belong together."""

    axes: Axes
    make: MakeInputs
    sizes: Sizes = field(default_factory=dict)  # of symbols that TRACED_SIZES lacks
    steps: Sizes = field(default_factory=dict)  # by how much such a size has to change to make a difference
    note: str = ""
    not_judged: str = ""  # what these inputs leave out


def config_of_texts(config: Any) -> Any:
    """The part of a config that describes the texts of `input_ids`."""
    try:
        return config.get_text_config()
    except ValueError:  # MusicGen's has two, of its encoder of texts and of its decoder of sounds
        return config.get_text_config(encoder=True)


def text_part(
    module: Any, takes: list[str], folder: Path, images: ImagesInText | None = None, why: str = ""
) -> Part | None:
    """Token ids, a mask with padding, token types and, on a page, the boxes of the tokens; and `images` among them.

    `why` is the reason why there are none where the model takes some.
    """
    text = config_of_texts(module.config)
    words = _vocabulary(text)
    if "input_ids" not in takes or not words:
        return None
    token_types = _token_types(text)
    positions = getattr(text, "max_2d_position_embeddings", 0) or 0
    has_fractions = not positions and bool(getattr(text, "dim_bbox", 0)) and "bbox" in takes
    avoided = sorted(placeholders(module.config))
    specials = [token for token in _special_tokens(text, folder) if token not in avoided]
    padding = _token(text, "pad_token_id")
    ends = _summary_token(module, text)

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        shape = (sizes["batch"], images.text_length(sizes) if images else sizes["sequence"])
        ids = torch.randint(0, words, shape, generator=generator)
        mask = padding_mask(shape, generator)
        for token in avoided:  # from the least on: the next one may be one, too
            ids = torch.where(ids == token, (token + 1) % words, ids)
        ids = _with_special_tokens(ids, specials, generator)
        if padding is not None:
            ids = torch.where(mask == 0, padding, ids)
        if ends is not None:
            ids = _with_end(ids, mask, ends)
        made = {"input_ids": ids, "attention_mask": mask}
        if token_types:
            drawn = [torch.randint(0, most, shape, generator=generator) for most in token_types]
            types = drawn[0] if len(drawn) == 1 else torch.stack(drawn, -1)
            made[TOKEN_TYPES] = torch.zeros_like(types) if _is_alone(shape) else types
        if positions:
            made["bbox"] = _boxes(shape, positions, generator)
        if has_fractions:
            made["bbox"] = _boxes(shape, FINE_POSITIONS, generator) / FINE_POSITIONS
        return images.put_into(made, sizes, padding or 0, generator) if images else made

    names = ["input_ids", "attention_mask"]
    names += ([TOKEN_TYPES] if token_types else []) + (["bbox"] if positions or has_fractions else [])
    axes: Axes = {name: {0: "batch", 1: "sequence"} for name in names if name in takes}
    left_out = _left_out(module, takes, has_images=images is not None, why=why) if avoided else ""
    if images is None:
        return Part(axes, make, not_judged=left_out)
    first = images.form.sizes(1)  # until the number of images determines them
    return Part(axes | images.axes, make, first, note=images.form.note, not_judged=left_out)


def _left_out(module: Any, takes: list[str], *, has_images: bool, why: str) -> str:
    """What a model takes among its tokens and the generated texts do not have; empty where they have all of it."""
    taken = [kind for kind, names in MEDIA.items() if not names.isdisjoint(takes)]
    missing = [kind for kind in taken if kind != "images" or not has_images]
    if not missing:
        return ""
    reason = f" ({why})" if why else ""
    return (
        f"{type(module).__name__} with {' and '.join(missing)} among its tokens{reason}. They are no part of the "
        f"generated inputs: give them by {named('inputs')}"
    )


def _vocabulary(text: Any) -> int:
    """The number of tokens; 0 where the config names none."""
    return getattr(text, "vocab_size", None) or (CODE_POINTS if getattr(text, "num_hash_buckets", None) else 0)


def _token_types(text: Any) -> list[int]:
    """How many token types there are, of each kind; empty where the model knows one type alone."""
    if getattr(text, "model_type", "") == "xlnet":
        return [XLNET_TYPES]  # it compares them, and has no table
    several = getattr(text, "type_vocab_sizes", None)  # Tapas': the column, the row and the rank of a cell, and others
    if (
        isinstance(several, list | tuple)
        and len(several) > 1
        and all(type(each) is int and each > 0 for each in several)
    ):
        return list(several)
    types = getattr(text, "type_vocab_size", 0) or 0
    return [types] if types > 1 else []


def _token(text: Any, name: str) -> int | None:
    token = getattr(text, name, None)
    return token if isinstance(token, int) and 0 <= token < _vocabulary(text) else None


def _special_tokens(text: Any, folder: Path) -> list[int]:
    """The ids of the tokens that a tokenizer adds: those in the config, and those of a tokenizer.json in the folder."""
    known = {_token(text, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk")}
    if (path := folder / "tokenizer.json").is_file():
        added = json_files.read_json(path).get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids = [token.get("id") for token in tokens if token.get("special") is True]
        known |= {number for number in ids if isinstance(number, int) and 0 <= number < _vocabulary(text)}
    return sorted(token for token in known if token is not None)


def _with_special_tokens(ids: torch.Tensor, specials: list[int], generator: torch.Generator) -> torch.Tensor:
    """The ids with a special token in about every eighth place. At random, one of 50,000 would hardly be drawn.

    A fault in the row of such a token, or in its adapter, could not show without it.
    """
    if not specials:
        return ids
    chosen = torch.tensor(specials)[torch.randint(0, len(specials), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 1 / SPECIAL_EVERY, chosen, ids)


def placeholders(config: Any) -> list[int]:
    found = [getattr(config, name, None) for name in PLACEHOLDERS]
    return [token for token in found if is_token(token)]


def _summary_token(module: Any, text: Any) -> int | None:
    """The end token, where a model reads its summary of a text at it: CLIP's family, and classifiers such as BART's."""
    end = getattr(text, "eos_token_id", None)
    of_clip = "clip" in str(getattr(text, "model_type", "")) and hasattr(text, "projection_dim")
    is_word = isinstance(end, int) and 0 < end < _vocabulary(text)
    return end if is_word and (of_clip or _classifies_both(module)) else None


def _classifies_both(module: Any) -> bool:
    """Whether an encoder-decoder classifies a text, which is the input of both."""
    is_classifier = type(module).__name__.endswith("ForSequenceClassification")
    return is_classifier and bool(getattr(module.config, "is_encoder_decoder", False))


def _with_end(ids: torch.Tensor, mask: torch.Tensor, end: int) -> torch.Tensor:
    """The ids with the end token at the last token of each row, and nowhere else."""
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    ids = torch.where(ids == end, end - 1, ids)
    return ids.scatter(1, last[:, None], end)


def _boxes(shape: tuple[int, int], positions: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes (left, top, right, bottom) on a page, (batch, sequence, 4)."""
    corners = torch.randint(0, positions, (2, *shape, 2), generator=generator)
    return torch.cat([corners.amin(0), corners.amax(0)], dim=-1)


def decoder_part(module: Any, takes: list[str], _: Path) -> Part | None:
    """Token ids of the decoder of an encoder-decoder."""
    text = module.config.get_text_config(decoder=True)
    if "decoder_input_ids" not in takes or not getattr(text, "vocab_size", None) or _classifies_both(module):
        return None
    if placeholders(module.config) and not getattr(text, "is_encoder_decoder", False):
        return None  # BLIP-2 takes them for the language models that are no decoders alone

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        shape = (sizes["batch"], sizes["target"])
        return {"decoder_input_ids": torch.randint(0, text.vocab_size, shape, generator=generator)}

    return Part({"decoder_input_ids": {0: "batch", 1: "target"}}, make)


def padding_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A mask (batch, sequence): 1 for tokens, 0 for padding.

    A short text alone has no padding. A long one alone ends with some, and so do the rows of a batch, but every second
    one from the third on, which begins with it. Every row but the first has padding. Every fourth has a hole, too, as
    where a text is continued after its padding.
    """
    # A mask of ones alone would never test whether the model reads it.
    lengths = torch.randint(max(1, shape[1] // 2), shape[1] + 1, (shape[0], 1), generator=generator)
    lengths[1:] = torch.clamp(lengths[1:], max=max(1, shape[1] - 2))
    if shape[0] == 1:
        lengths[:] = shape[1] if _is_alone(shape) else shape[1] - PADDING_OF_LONG
    mask = (torch.arange(shape[1]) < lengths).long()
    mask[2::2] = mask[2::2].flip(1)  # padding at the beginning: a candidate that only reads the lengths must fail
    mask[3::4, shape[1] // 4 : 3 * shape[1] // 8] = 0
    return mask


def _is_alone(shape: tuple[int, int]) -> bool:
    """Whether these are the inputs of one short text, which people send without padding and with token types of 0."""
    return shape[0] == 1 and shape[1] <= SHORT


# --- Lengths ---

LONG = 96  # tokens: more than a mask or a table of 64, the usual length of an example
PAST_WINDOW = 32  # tokens beyond a sliding window
LONGEST_TEXT = 4096 + PAST_WINDOW  # tokens: a mask holds their square, which is 136 MB in fp64
MOST_WORK = 1.5e11  # parameters times tokens of the long text: a model of 1.5 B takes 96 tokens, one of 0.2 B 750
# Fields of a config: the tokens to which each attends, at most
WINDOWS = ("sliding_window", "local_attention", "window_size", "attention_window", "attention_chunk_size")
CHANGING_ROPE = ("longrope", "dynamic")  # beyond `original_max_position_embeddings` of the rope parameters
POSITION_TABLES = frozenset(
    {"position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe", "position_embed"}
)
OTHER_TOWERS = ("vision", "visual", "image", "audio", "patch")  # their tables count no tokens


class TextLengths(NamedTuple):
    """The lengths of a model's texts, by the symbols `sequence` and `target`."""

    limits: Limits  # up to the end of the position tables
    long: Sizes  # of one long text; empty where the model takes none, or would take too long for it
    not_judged: str = ""  # what no generated text reaches

    def most(self, symbol: str) -> int:
        """The greatest size of a symbol."""
        limit = self.limits.get(symbol, (0, None))[1]
        return sys.maxsize if limit is None else limit


def text_lengths(module: Any, symbols: set[str]) -> TextLengths:
    """The lengths of the texts of a Hugging Face model, for those of its symbols that are lengths of texts."""
    config, lengths = module.config, CHECKED_SIZES[-1]
    own = sorted(symbols & {"sequence", "target"})
    found = TextLengths({symbol: (0, _most(module, config, symbol, symbols)) for symbol in own}, {})
    if "sequence" not in own:
        return found
    window = _window(config_of_texts(config))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    wanted = max(LONG, window + PAST_WINDOW if window else 0)
    chosen = next(
        (length for length in (wanted, LONG) if length * parameters <= MOST_WORK and length <= LONGEST_TEXT), 0
    )
    long = {symbol: min(chosen, found.most(symbol)) for symbol in own}
    long = {symbol: length for symbol, length in long.items() if length > lengths[symbol]}
    reached = long.get("sequence", min(lengths["sequence"], found.most("sequence")))
    rest = ""
    if window and reached <= window < found.most("sequence"):
        rest = (
            f"what the model leaves out, or computes in another way, beyond {window:,} tokens. Generated texts have up "
            f"to {reached:,} tokens"
        )
    elif not chosen and reached < found.most("sequence"):
        rest = f"texts of more than {reached} tokens, which would take long with a model of this size"
    return TextLengths(found.limits, long, f"{rest}. Give a longer one by {named('inputs')}" if rest else "")


def _window(text: Any) -> int:
    """The longest window of the config, or the length beyond which it turns tokens otherwise; 0 where it has none."""
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer = [each for each in (rope, *rope.values()) if isinstance(each, dict)] if isinstance(rope, dict) else []
    changing = [each for each in by_layer if each.get("rope_type") in CHANGING_ROPE]
    found = [length for each in changing if type(length := each.get("original_max_position_embeddings")) is int]
    # A config whose layers differ refuses to return what is not the same in all of them (NeoMME).
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    for layer, name in itertools.product(layers, WINDOWS):
        value = getattr(layer, name, None)
        found += [each for each in (value if isinstance(value, list | tuple) else [value]) if type(each) is int]
    return max(found, default=0)


def _most(module: nn.Module, config: Any, symbol: str, symbols: set[str]) -> int | None:
    """The most tokens that the model has positions for; None where it has no limit."""
    text = config_of_texts(config)
    named = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # the second is MPT's
    found = [length for length in named if type(length) is int and length > 0]
    for name, table in module.named_modules():
        parts = name.split(".")
        if not isinstance(table, nn.Embedding) or parts[-1] not in POSITION_TABLES:
            continue
        if any(tower in name for tower in OTHER_TOWERS):
            continue
        if "target" in symbols and ("decoder" in parts) != (symbol == "target"):
            continue
        # RoBERTa's positions begin after the padding's, OPT's and BART's two rows later.
        before = 0 if table.padding_idx is None else table.padding_idx + 1
        offset = getattr(table, "offset", 0)
        ahead = 1 if "decoder" in parts and hasattr(text, "ngram") else 0  # ProphetNet's positions of the next tokens
        found.append(table.num_embeddings - max(before, offset if type(offset) is int else 0) - ahead)
    return min(found, default=None)
