"""How long the texts of a model may be, and how long one of a proof has to be to reach past its sliding window."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from lora_export.models.model import CHECKED_SIZES, Limits, Sizes
from lora_export.options.spelling import named

LONG = 96  # tokens: more than a mask or a table of 64, the usual length of an example
PAST_WINDOW = 32  # tokens beyond a sliding window
LONGEST_TEXT = 4096 + PAST_WINDOW  # tokens: a mask holds their square, which is 136 MB in fp64
MOST_WORK = 1.5e11  # parameters times tokens of the long text: a model of 1.5 B takes 96 tokens, one of 0.2 B 750
WINDOWS = ("sliding_window", "local_attention", "window_size", "attention_window")  # fields of a config
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
    window = _window(config.get_text_config())
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
        rest = f"what its sliding window of {window:,} tokens leaves out. Generated texts have up to {reached:,} tokens"
    elif not chosen and reached < found.most("sequence"):
        rest = f"texts of more than {reached} tokens, which would take long with a model of this size"
    return TextLengths(found.limits, long, f"{rest}. Give a longer one by {named('inputs')}" if rest else "")


def _window(text: Any) -> int:
    """The longest window of the config; 0 where it has none."""
    found: list[int] = []
    for name in WINDOWS:
        value = getattr(text, name, None)
        found += [each for each in (value if isinstance(value, list | tuple) else [value]) if type(each) is int]
    return max(found, default=0)


def _most(module: nn.Module, config: Any, symbol: str, symbols: set[str]) -> int | None:
    """The most tokens that the model has positions for; None where it has no limit."""
    text = config.get_text_config()
    named = getattr(text, "max_position_embeddings", None)
    found = [named] if type(named) is int and named > 0 else []
    for name, table in module.named_modules():
        parts = name.split(".")
        if not isinstance(table, nn.Embedding) or parts[-1] not in POSITION_TABLES:
            continue
        if any(tower in name for tower in OTHER_TOWERS):
            continue
        if "target" in symbols and ("decoder" in parts) != (symbol == "target"):
            continue
        # RoBERTa's positions begin after the padding's, OPT's and BART's two rows later.
        before = (table.padding_idx or 0) + 1 if table.padding_idx is not None else 0
        offset = getattr(table, "offset", 0)
        found.append(table.num_embeddings - max(before, offset if type(offset) is int else 0))
    return min(found, default=None)
