"""Options on how adapters are applied: how several are combined, and what happens to tied tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

# PEFT's names (`adapters.combination.METHODS`), which are imported only where they are used.
COMBINATIONS = (
    *("cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
    *("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"),
)
SEED = ("--combine-seed", "--seed")
# Fields of a `Combination` -> the names of the options here
COMBINATION_FIELDS = {name: name for name in ("method", "density", "majority_sign", "svd_rank")} | {
    "seed": "combine_seed"
}

tied_option = click.option(
    "--tied",
    type=click.Choice(["error", "untie", "both"]),
    default="error",
    show_default=True,
    help="Tied embeddings of which an adapter changes one. error: refuse the adapter; untie: give each a tensor of its "
    "own, as the adapter was trained; both: change both.",
)


def combination_options(
    *names: str, seed: tuple[str, ...] = SEED
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How several adapters are combined. `names` and `seed` are the spellings of two options.

    The command gets all of it as `combination`: the fields of a `Combination`. It is none yet, so that a command
    imports NumPy when it chooses to.
    """
    options = [
        click.option(
            *names,
            "method",
            type=click.Choice(COMBINATIONS),
            default="cat",
            show_default=True,
            help="How the pairs of several adapters on one weight are combined, by PEFT's names. cat is the exact sum.",
        ),
        click.option(
            "--density",
            type=float,
            metavar="D",
            help="Share of entries that ties, dare_* and magnitude_prune keep: above 0, at most 1.",
        ),
        click.option(
            "--majority-sign",
            type=click.Choice(["total", "frequency"]),
            help="Sign that ties and dare_ties elect: that of the sum, or of most values (default: total).",
        ),
        click.option(
            "--svd-rank", type=int, metavar="R", help="Rank after an SVD (default: the largest of the adapters)."
        ),
        click.option(
            *seed,
            "combine_seed",
            type=int,
            metavar="N",
            help="Random seed for the entries that dare_* keeps (default: 0).",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_combination(**values: Any) -> Any:
            combination = {field: values.pop(name) for field, name in COMBINATION_FIELDS.items()}
            return command(combination=combination, **values)

        decorated: Callable[..., Any] = with_combination
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
