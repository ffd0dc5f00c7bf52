"""Options from a table of TOML: the same declarations, with the place of each mistake."""

from __future__ import annotations

import tomllib

import pytest

from lora_export.errors import WrongUsage
from lora_export.options.commands import RECORDS
from lora_export.options.declaring import Positional
from lora_export.options.fleet import keys_of, options_from_table
from lora_export.options.merge import MergeOptions
from lora_export.options.verify import VerifyOptions

FIXED = {"base": "b", "adapters": ["a"], "output": "o"}


def read(text: str) -> MergeOptions:
    return options_from_table(MergeOptions, tomllib.loads(text), "f.toml: step 1", **FIXED)


def test_every_kind_of_value_is_read() -> None:
    table = """
min-retention = 1
dry_run = true
dtype = "float16"
weight = [0.5, 1]
hash = "sha256"
combine = "ties"
density = 0.5
lora-rank = 4
layout = ["*=in_out"]
prefix = {"a." = "b."}
"""
    options = read(table)
    assert (options.min_retention, options.dry_run, options.dtype, options.weights) == (1, True, "float16", [0.5, 1])
    assert options.hashing == "sha256" and options.combined.method == "ties" and options.reading.lora_rank == 4
    assert options.layout == {"*": "in_out"} and options.prefixes == {"a.": "b."}
    verify = options_from_table(VerifyOptions, {"candidate": "c", "expect-rank": 4, "strict": True}, "x")
    assert verify.expected.rank == 4 and verify.strict and verify.candidate == "c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min-retension = 1", "there is no key `min-retension`; the nearest is `min-retention`"),
        ("min-retention = '1'", "`min-retention` is '1'; it must be a number"),
        ("dry-run = 1", "`dry-run` is 1; it must be true or false"),
        ("svd-rank = 1.5", "`svd-rank` is 1.5; it must be an integer"),
        ("dtype = 16", "`dtype` is 16; it must be one of keep, float32, bfloat16, float16"),
        ("weight = ['a']", "`weight` is ['a']; it must be a number"),
        ("layout = ['x']", "`layout` is ['x']; x is not NAME=out_in or NAME=in_out"),
        ("dtype = ['float16']", "`dtype` is ['float16']; it must be one of"),
        ("combine = 'ties'", '`combine = "ties"` needs `density`'),
        ("min-retention = 2.0", "`min-retention` is 2; it must be at least 0 and at most 1"),
    ],
)
def test_a_mistake_has_its_place(text: str, message: str) -> None:
    with pytest.raises(WrongUsage) as refused:
        read(text)
    assert str(refused.value).startswith("f.toml: step 1: ") and message in str(refused.value)


@pytest.mark.parametrize("name", ["merge", "onnx", "torchscript", "convert", "verify"])
def test_keys_are_those_of_the_command_line(name: str) -> None:
    from lora_export.cli import command_named
    from lora_export.cli.arguments import options_by_name

    keys = {key for key, (_, one) in keys_of(RECORDS[name]).items() if not isinstance(one.option, Positional)}
    own = {"json", "quiet", "verbose", *(["adapter"] if name == "merge" else [])}  # those of the command line alone
    assert keys == set(options_by_name(command_named(name))) - own
