"""Options on what a deployment gate expects of adapters and base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--expect-adapter-sha256",
        "expect_adapter_sha256",
        multiple=True,
        metavar="HEX",
        help="End with exit code 4 unless this is the SHA-256 of the adapter. Once for each of several adapters.",
    ),
    click.option("--expect-rank", type=click.IntRange(min=1), metavar="R", help="The same for the rank of every pair."),
    click.option(
        "--expect-alpha", type=float, metavar="ALPHA", help="The same for alpha: scale x rank, with rsLoRA x its root."
    ),
    click.option(
        "--expect-base-sha256",
        "expect_base_sha256",
        multiple=True,
        metavar="HEX",
        help="The same for the SHA-256 of the base's weights. Once for each of its files.",
    ),
)
_FIELDS = ("adapter_sha256", "rank", "alpha", "base_sha256")


def expectation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets them as `expected`: the fields of an `Expectations`."""

    @functools.wraps(command)
    def with_expectations(*arguments: Any, **values: Any) -> Any:
        expected = {name: values.pop(f"expect_{name}") for name in _FIELDS}
        return command(*arguments, expected=expected, **values)

    for option in reversed(_OPTIONS):
        with_expectations = option(with_expectations)
    return with_expectations
