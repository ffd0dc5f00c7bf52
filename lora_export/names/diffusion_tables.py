"""What diffusers calls the modules of the models' original code. The rows are data: `diffusion.json`.

Each row has a module of the original model and the modules of diffusers that have its weights; `{}` is a number.
Modules that no row names have one name in both. The tests compare the results with diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lora_export.names.families import read_rows


class RowLayout(StrEnum):
    """How the rows of an original weight relate to those of the modules of diffusers."""

    EQUAL = "equal"  # one after another, all of one size
    SQUARE_THEN_REST = "square, then the rest"  # all but the last are square matrices
    SWAPPED = "swapped"  # the two halves (shift, scale) in the other order
    SWAPPED_PAIR = "swapped pair"  # as SWAPPED where the weight has just these two; else unchanged


@dataclass(frozen=True)
class TableRow:
    """One module of the original model, and what diffusers calls it."""

    original: str
    parts: tuple[str, ...]
    rows: RowLayout = RowLayout.EQUAL


@dataclass(frozen=True)
class NameTable:
    """The names of one family of models. Rows with a number recognise it."""

    model: str
    diffusers_class: str  # the class of such a model in diffusers; empty where it has none
    rows: tuple[TableRow, ...]


def _rows(model: Mapping[str, Any]) -> Iterator[TableRow]:
    for group in model["modules"]:
        for one, many in group["modules"].items():
            parts = (many,) if isinstance(many, str) else many
            yield TableRow(
                group["original"] + one,
                tuple(group["diffusers"] + part for part in parts),
                RowLayout(group.get("rows", RowLayout.EQUAL)),
            )


TABLES = tuple(
    NameTable(model["model"], model["diffusers_class"], tuple(_rows(model)))
    for model in read_rows("diffusion.json")["models"]
)


# --- A UNet ---
#
# Its authors (Stable Diffusion's `sgm`) number the blocks of the whole UNet, diffusers those of each resolution.

DOWN = re.compile(r"(?:.*\.)?down_blocks\.(?P<block>\d+)\.resnets\.(?P<layer>\d+)\..*")
UP = re.compile(r"(?:.*\.)?up_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\..*")
INPUT = re.compile(r"(?:.*\.)?input_blocks\.(?P<number>\d+)\.(?P<inner>\d+)\.(?P<rest>.*)")
OUTPUT = re.compile(r"(?:.*\.)?output_blocks\.(?P<number>\d+)\.(?P<inner>\d+)\.(?P<rest>.*)")
MOST_BLOCKS = 64
OF_A_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OF_AN_ATTENTION = ("norm", "proj_in", "proj_out")
OF_A_TRANSFORMER_BLOCK = (
    *(f"attn{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def unet_table(names: Iterable[str]) -> NameTable | None:
    """The table for the UNet whose tensors have these names, in either layout; None where they are no UNet's."""
    names = list(names)
    found = _blocks_of_diffusers(names) or _blocks_of_the_original(names)
    if found is None:
        return None
    rows = [
        TableRow(original, (diffusers,), RowLayout.EQUAL) for original, diffusers in {**OUTSIDE, **dict(found)}.items()
    ]
    return NameTable("UNet", "UNet2DConditionModel", tuple(rows))


def _blocks_of_diffusers(names: Iterable[str]) -> list[tuple[str, str]] | None:
    down = [(int(m["block"]), int(m["layer"])) for m in map(DOWN.fullmatch, names) if m]
    up = [(int(m["block"]), m["kind"]) for m in map(UP.fullmatch, names) if m]
    depth = 1 + max((layer for block, layer in down if block == 0), default=-1)
    blocks = 1 + max((block for block, _ in down), default=-1)
    if not _is_plausible(depth, blocks):
        return None
    return list(_blocks(depth, blocks, {block for block, kind in up if kind != "resnets"}))


def _blocks_of_the_original(names: Iterable[str]) -> list[tuple[str, str]] | None:
    inputs = [(int(m["number"]), m["rest"]) for m in map(INPUT.fullmatch, names) if m]
    outputs = [(int(m["number"]), int(m["inner"]), m["rest"]) for m in map(OUTPUT.fullmatch, names) if m]
    if not inputs:
        return None
    halving = sorted({number for number, rest in inputs if rest.startswith("op.")})
    depth = halving[0] - 1 if halving else max(number for number, _ in inputs)
    blocks = len(halving) + 1
    if not _is_plausible(depth, blocks):
        return None
    with_attention = {number // (depth + 1) for number, inner, rest in outputs if inner == 1 and "conv" not in rest}
    return list(_blocks(depth, blocks, with_attention))


def _is_plausible(depth: int, blocks: int) -> bool:
    """Whether a UNet has such blocks. The numbers are those of names, which a hostile file chooses."""
    return 0 < depth <= MOST_BLOCKS and 0 < blocks <= MOST_BLOCKS


def _blocks(depth: int, blocks: int, with_attention: set[int]) -> Iterator[tuple[str, str]]:
    """The names of all modules inside of blocks. `with_attention` are the blocks on the way up that have some."""
    for block in range(blocks):
        for layer in range(depth):
            number = 1 + block * (depth + 1) + layer
            yield from _resnet(f"input_blocks.{number}.0", f"down_blocks.{block}.resnets.{layer}")
            yield from _attention(f"input_blocks.{number}.1", f"down_blocks.{block}.attentions.{layer}")
        yield f"input_blocks.{(block + 1) * (depth + 1)}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
        for layer in range(depth + 1):
            number = block * (depth + 1) + layer
            yield from _resnet(f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{layer}")
            yield from _attention(f"output_blocks.{number}.1", f"up_blocks.{block}.attentions.{layer}")
        after = 2 if block in with_attention else 1
        yield f"output_blocks.{block * (depth + 1) + depth}.{after}.conv", f"up_blocks.{block}.upsamplers.0.conv"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _resnet(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for inner, name in OF_A_RESNET.items():
        yield f"{original}.{inner}", f"{diffusers}.{name}"


def _attention(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for name in OF_AN_ATTENTION:
        yield f"{original}.{name}", f"{diffusers}.{name}"
    for name in OF_A_TRANSFORMER_BLOCK:  # these blocks have the same names in both
        yield f"{original}.transformer_blocks.{{}}.{name}", f"{diffusers}.transformer_blocks.{{}}.{name}"
