"""The table of faults and bad inputs, and the tests that hold the program to each row of it.

A test is tied to rows by `@pytest.mark.fault(row, ...)`, wherever it stands. Here stand the table itself, and
what bad adapters and bases do to the commands `merge` and `onnx`: a refusal with the right exit code that says
what, where and what next, and leaves every file as it was.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import cli
from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.formats import peft_config as reader
from lora_export.plan import TensorSpec
from lora_export.storage import safetensors_file
from lora_export.storage.hashes import file_hash
from lora_export.storage.manifest import read_manifest
from lora_export.weights import checkpoint
from lora_export.weights.checkpoint import Checkpoint
from support import FACTORIES, TESTS
from support.handmade import Payload, base_file, peft_adapter, raw_tensor_file

FAULTS = {
    1: "a shard that was cut short",
    2: "an index that names a shard which is not there",
    3: "an index and shards that disagree about a tensor",
    4: "an index that points out of its folder",
    5: "two sets of weights in one folder",
    6: "an adapter for a base of other shapes",
    7: "an adapter for other weights of the same shapes",
    8: "A, B and the config name different ranks",
    9: "an alpha that is missing, no number, zero, or too large",
    10: "a rank or a dimension of zero",
    11: "an adapter that changes nothing",
    12: "NaN, infinity or minus infinity among the values",
    13: "a result that the stored type cannot hold",
    14: "a change that rounding takes away",
    15: "tensors of the adapter that fit nothing in the base",
    16: "one half of a pair",
    17: "a targeted layer that the adapter's file forgets",
    18: "every feature of PEFT's config: understood, or refused by its name",
    19: "embeddings that are one tensor under two names",
    20: "a base that is quantised",
    21: "an adapter given twice, or merged twice",
    22: "a key that stands twice in a JSON object",
    23: "a header of absurd length, depth or content",
    24: "tensors that overlap, leave holes, or have a type nobody knows",
    25: "a pickle that would run code",
    26: "a config that names code to be loaded",
    27: "a full disk",
    28: "a run that is killed, at whatever moment",
    29: "a power failure",
    30: "a place that cannot be written to",
    31: "an output that is an input under whatever name",
    32: "an output that is a symbolic link",
    33: "two runs on one output",
    34: "an output that exists, with other shards or foreign files in it",
    35: "a umask that is wider or narrower than usual",
    36: "a graph beyond what protobuf holds",
    37: "external data that is not what the graph says",
    38: "external data that lies elsewhere",
    39: "an export over an older one",
    40: "names with blanks, line breaks, leading dashes, foreign bytes, and long ones",
    41: "inputs that are links, FIFOs, folders or devices",
    42: "an input that changes during the run",
    43: "a provider that is missing, or does not do the work",
    44: "an environment that changes the arithmetic",
    45: "a candidate that is not what it should be in any other way",
    46: "an export for one batch size only",
    47: "clocks that disagree, folders on other devices",
    48: "a config of another kind, or from the future",
}

# NumPy would print them on stderr, between our lines.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def rows_tied_to_tests() -> set[int]:
    """Every number in a `mark.fault(...)` in the tests' sources: nothing is imported or collected for it."""
    sources = (path.read_text(encoding="utf-8") for path in TESTS.glob("**/*.py"))
    calls = [
        node
        for source in sources
        for node in ast.walk(ast.parse(source) if "mark.fault" in source else ast.Module([]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault"
    ]
    return {ast.literal_eval(argument) for call in calls for argument in call.args}


def test_every_fault_has_a_test_and_no_other_is_named():
    tied = rows_tied_to_tests() | {row for row, *_ in (*ADAPTERS, *INDICES)}
    untied = [f"{row}: {fault}" for row, fault in FAULTS.items() if row not in tied]
    assert not untied, "no test is tied to\n  " + "\n  ".join(untied)
    assert tied <= FAULTS.keys()
    assert list(FAULTS) == list(range(1, 49))


# --- The scene: one base, one adapter, two commands ---

WEIGHT = np.arange(64).reshape(8, 8)
A = np.eye(8)[:2]  # (rank 2, in 8)
B = np.arange(1, 17).reshape(8, 2)  # (out 8, rank 2)
MODEL = f"{FACTORIES}:scaled"  # a module with this one linear layer, `dense`
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WRAPPER, INDEX = "base_model.model.", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@dataclass
class Place:
    """A folder with a base, an adapter for it, and an output of an earlier run for either command."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def run(self, *words: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        self.capsys.readouterr()
        code = cli.run([str(word) for word in words])
        told = self.capsys.readouterr()
        return code, told.out, told.err

    def state(self) -> dict[str, tuple[bytes, int]]:
        """Everything that lies here: names, contents and times of files; names of folders."""
        return {
            str(path.relative_to(self.folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            if path.is_file()
            else (b"", 0)
            for path in self.folder.rglob("*")
        }

    def refuses(self, words: tuple[object, ...], *expected: str, old: str) -> str:
        """Run a command to a new place and over an old output: both are refused, and nothing has moved.

        The error has each of the expected texts. One that begins with `Error: ` is the whole of it.
        """
        before = self.state()
        is_folder = words[0] == "merge" and Path(str(words[1])).is_dir()
        for output in (self.folder / ("new" if is_folder else "new.onnx"), self.folder / old):
            code, out, told = self.run(*words, "-o", output, "--overwrite")
            assert (code, out) == (3, "")
            assert told.startswith("Error: ") and "Traceback" not in told
            assert told.endswith("\nNothing was written.\n") and told.count("Nothing was written.") == 1
            told = self.shown(told).removesuffix("Nothing was written.\n")
            assert [words for words in map(self.shown, expected) if words not in told] == [], told
            assert told in map(self.shown, expected) or not any(words.startswith("Error: ") for words in expected)
            assert self.state() == before
        return told

    def shown(self, text: str) -> str:
        return text.replace(str(self.adapter), "ADAPTER").replace(str(self.base), "BASE")

    def merge_refuses(self, *expected: str, base: Path | None = None, options: tuple[object, ...] = ()) -> str:
        return self.refuses(("merge", base or self.base, self.adapter, *options), *expected, old="old")

    def onnx_refuses(self, *expected: str, model: str = MODEL, options: tuple[object, ...] = ()) -> str:
        return self.refuses(("onnx", model, "-a", self.adapter, *options), *expected, old="old.onnx")

    def both_refuse(self, *expected: str) -> None:
        """A bad adapter, whichever command it is given to."""
        self.merge_refuses(*expected)
        self.onnx_refuses(*expected)

    def neither_takes_the_base(self, *expected: str) -> None:
        """A bad base, for `merge` and as the MODEL of `onnx`."""
        self.merge_refuses(*expected)
        self.onnx_refuses(*expected, model=str(self.base))

    def set_config(self, **fields: Any) -> None:
        """Change the adapter's config; None takes a field away."""
        path = self.adapter / CONFIG
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def set_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Change the adapter's tensors, by their names without the wrapper; None takes one away."""
        stored = load_file(self.adapter / WEIGHTS) | {WRAPPER + name: value for name, value in tensors.items()}
        kept = {name: np.asarray(value, np.float32) for name, value in stored.items() if value is not None}
        save_file(kept, self.adapter / WEIGHTS)


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"dense.weight": WEIGHT, "dense.bias": np.ones(8)})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaModel"]}')
    peft_adapter(tmp_path / "adapter", {"dense": (A, B)}, target_modules=["dense"])
    assert cli.run(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "old")]) == 0
    (tmp_path / "old.onnx").write_bytes(b"an older export")
    return Place(tmp_path, capsys)


def make_sharded(base: Path) -> Path:
    """The base's tensors in two files and an index; returns the index."""
    (base / "model.safetensors").unlink()
    base_file(base / "one.safetensors", {"dense.weight": WEIGHT})
    base_file(base / "two.safetensors", {"dense.bias": np.ones(8)})
    index = base / INDEX
    write_index(index, {"dense.weight": "one.safetensors", "dense.bias": "two.safetensors"})
    return index


def write_index(index: Path, weight_map: Mapping[str, str]) -> None:
    index.write_text(json.dumps({"weight_map": weight_map}))


# --- Without a fault ---


def test_without_a_fault_both_commands_do_their_work(place):
    # Or every refusal below would prove nothing.
    code, out, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new", "--json")
    assert (code, told, json.loads(out)["results"][0]["weight"]) == (0, "", "dense.weight")
    merged = load_file(place.folder / "new/model.safetensors")["dense.weight"]
    assert merged.tolist() == (WEIGHT + B @ A).tolist()
    code, out, told = place.run("onnx", MODEL, "-a", place.adapter, "-o", place.folder / "new.onnx")
    assert (code, told) == (0, "") and out.startswith("same: ")


# --- Bases ---


@pytest.mark.fault(1)
@pytest.mark.parametrize("cut", [1, 16, 24, 180])
def test_a_shard_cut_short(place, cut):
    make_sharded(place.base)
    shard = place.base / "one.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - cut)
    place.neither_takes_the_base(
        f"Error: {shard} is cut short: its header describes {size} bytes, the file has {size - cut}\n"
    )


# Row of the table above, what the index names beside or instead of its shards, and what is told.
INDICES: list[tuple[int, dict[str, Any], str]] = [
    (2, {"dense.bias": "gone.safetensors", "x": "too.safetensors"}, (
        "Error: BASE lacks shards that its index names: gone.safetensors, too.safetensors\n"
    )),
    (3, {"dense.bias": "one.safetensors", "gone": "two.safetensors"}, (
        f"Error: BASE/{INDEX} disagrees with the shards:\n"
        "  dense.bias: not in one.safetensors, where the index expects it\n"
        "  gone: not in two.safetensors, where the index expects it\n"
        "  dense.bias: in two.safetensors, the index expects it in one.safetensors\n"
        "  dense.weight: in two.safetensors, the index expects it in one.safetensors\n"
        "  unlisted: in two.safetensors, the index does not list it\n"
    )),
    *(
        (4, {"dense.bias": name}, f"Error: BASE/{INDEX} may only name files of its own folder, and names {name!r}\n")
        for name in ("../two.safetensors", "/etc/two.safetensors", "sub/x.safetensors", "..", "", 3, ["x"])
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "named", "expected"), INDICES)
def test_a_wrong_index_is_refused_by_both_commands(place, row, named, expected):
    index = make_sharded(place.base)
    if row == 3:
        two = {"dense.bias": np.ones(8), "dense.weight": WEIGHT, "unlisted": [1]}
        base_file(place.base / "two.safetensors", two)
    write_index(index, {"dense.weight": "one.safetensors", "dense.bias": "two.safetensors", **named})
    place.neither_takes_the_base(expected)


@pytest.mark.fault(5)
def test_two_sets_of_weights(place):
    make_sharded(place.base)
    base_file(place.base / "model.safetensors", {"dense.weight": -WEIGHT, "dense.bias": np.ones(8)})
    place.neither_takes_the_base(
        "Error: BASE has an index and, besides its shards, model.safetensors. Remove what is not the model, or name "
        "the file that you mean\n"
    )


@pytest.mark.fault(20)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("stated", "method", "known"),
    [
        *(({"quant_method": one}, one, True) for one in ("bitsandbytes", "fp8", "mxfp4", "gptq", "awq", "modelopt")),
        *(({"quant_method": one}, one, False) for one in ("aqlm", "hqq")),
        *(("mxfp4", "mxfp4", True), ("hqq", "hqq", False), ({"bits": 4}, "unknown", False)),
    ],
)
def test_a_base_whose_config_says_that_it_is_quantised(place, stated, method, known, nested):
    quantised = {"quantization_config": stated}
    config = {"model_type": "llama", **({"text_config": quantised} if nested else quantised)}
    (place.base / "config.json").write_text(json.dumps(config))
    here = "make this one a float model: lora-export merge --dequantize. "
    place.neither_takes_the_base(
        f"BASE is quantised ({method}): its weights are never merged or quantised again silently. Merge into the "
        f"original float model, or {here if known else 'dequantise this one first, with its own library'}",
        "--keep-quantised merges and keeps it quantised" if known else "",
    )


@pytest.mark.fault(20)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_base_whose_weights_are_quantised_without_a_word(place, dtype):
    safetensors_file.write(place.base / "model.safetensors", {"dense.weight": np.ones((8, 8), dtype)})
    is_float = np.dtype(dtype).name.startswith("float8")
    message = f"dense.weight is {np.dtype(dtype)}: a quantised weight is never merged silently. Use the"
    place.merge_refuses("BASE is quantised (in a form for ComfyUI): its weights are never" if is_float else message)


@pytest.mark.fault(12)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_base_with_values_that_are_not_finite(place, poison):
    weight = WEIGHT.astype(np.float32)
    weight[3, 4] = weight[5, 6] = poison
    base_file(place.base / "model.safetensors", {"dense.weight": weight})
    place.merge_refuses("dense.weight: the base holds 2 values that are not finite\n")


@pytest.mark.slow
@pytest.mark.fault(12)
def test_a_module_with_values_that_are_not_finite(place, tmp_path_factory):
    factory = a_factory(tmp_path_factory, "module.dense.weight[3, 4] = module.dense.weight[5, 6] = -torch.inf")
    place.onnx_refuses("dense.weight: 2 values would not be finite: the graph's own tensor has such", model=factory)


def a_factory(tmp_path_factory: pytest.TempPathFactory, change: str) -> str:
    """A MODEL like `scaled`, with something done to it. Not among the inputs: Python caches its bytecode beside it."""
    path = tmp_path_factory.mktemp("factory") / "changed.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS / 'support')!r})\nimport torch\nimport factories\n\n\ndef make():\n"
        f"    module, examples = factories.scaled()\n    with torch.no_grad():\n        {change}\n"
        "    return module, examples\n"
    )
    return f"{path}:make"


@pytest.mark.fault(13)
def test_a_sum_beyond_the_stored_type(place):
    base_file(place.base / "model.safetensors", {"dense.weight": WEIGHT}, np.float16)
    place.set_config(lora_alpha=1e6)
    place.merge_refuses("dense.weight: ", " values would exceed 65504, the largest float16", "use --dtype float32")


@pytest.mark.fault(14)
def test_a_change_that_rounding_takes_away(place):
    base_file(place.base / "model.safetensors", {"dense.weight": WEIGHT + 256}, ml_dtypes.bfloat16)
    place.set_config(lora_alpha=2e-4)
    place.merge_refuses(
        "1 of 1 weights would lose most of their change to rounding (--min-retention 0.5)",
        "dense.weight: 0.0% of the change kept",
        "Store the result with --dtype float32, or keep the adapter beside the weights",
    )


@pytest.mark.fault(11, 14)
def test_a_merge_that_changes_nothing_is_refused_at_any_limit(place):
    base_file(place.base / "model.safetensors", {"dense.weight": WEIGHT + 256}, ml_dtypes.bfloat16)
    place.set_config(lora_alpha=2e-4)
    place.merge_refuses("the merge would change no entry of any weight", options=("--min-retention", 0))


@pytest.mark.fault(19)
def test_embeddings_under_two_names(place):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
    (place.base / "config.json").write_text(json.dumps(config))
    base_file(place.base / "model.safetensors", {"dense.weight": np.ones((3, 8)), "model.embed_tokens.weight": WEIGHT})
    peft_adapter(place.adapter, {}, {"model.embed_tokens.weight": WEIGHT.astype(np.float32) + 1})
    place.merge_refuses(
        "model.embed_tokens.weight is the output embeddings too (tie_word_embeddings)",
        "--tied untie gives each a tensor of its own",
    )
    peft_adapter(place.adapter, {"lm_head": (A, B)})
    place.merge_refuses("lm_head.lora_A.weight: the base has no weight for lm_head")


@pytest.mark.fault(19)
def test_a_module_with_one_weight_under_two_names(place, tmp_path_factory):
    factory = a_factory(
        tmp_path_factory, "module.other = torch.nn.Linear(8, 8); module.other.weight = module.dense.weight"
    )
    place.onnx_refuses("dense.weight and other.weight", model=factory)


# --- Adapters that do not fit ---


@pytest.mark.fault(7)
def test_an_adapter_that_names_another_base_is_doubted(place):
    (place.base / "config.json").write_text('{"_name_or_path": "org/small"}')
    for told, doubted in (("org/other", True), ("mirror/Small", False), (None, False)):
        place.set_config(base_model_name_or_path=told)
        code, _, err = place.run("merge", place.base, place.adapter, "-o", place.folder / "new", "--overwrite")
        assert code == 0
        doubt = f"note: adapter was made for {told}, the base is org/small: shapes that agree prove nothing\n"
        assert err == (doubt if doubted else "")
    manifest = read_manifest(place.folder / "new")
    digest = file_hash(place.base / "model.safetensors", "xxh3_128")
    assert manifest["base"] == {"model.safetensors": {"xxh3_128": digest}}


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "told", ["/home/me/models/other", "./other", "../org/other", "~/other", "org/other/checkpoint-5", "other", "here/x"]
)
def test_an_adapter_that_names_a_path_raises_no_doubt(place, monkeypatch, told):
    (place.base / "config.json").write_text('{"_name_or_path": "org/small"}')
    (place.folder / "here/x").mkdir(parents=True)
    monkeypatch.chdir(place.folder)
    place.set_config(base_model_name_or_path=told)
    code, _, err = place.run("merge", place.base, place.adapter, "-o", place.folder / "new")
    assert (code, err) == (0, "")


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("folder", "config", "is_doubted"),
    [
        ("models--org--small/snapshots/1", {}, "org/small"),
        ("models--org--small/snapshots/1", {"_name_or_path": "org/other"}, ""),  # a copy of it, by another name
        ("models--org--other/snapshots/1", {"_name_or_path": "org/small"}, ""),
        ("org/other", {"_name_or_path": "org/small"}, ""),  # the folder is called as the adapter has it
        ("small", {}, ""),  # what somebody calls a folder says nothing
        ("small", {"_name_or_path": "/scratch/small"}, ""),
        ("small", {"_name_or_path": ["org/small"]}, ""),
    ],
)
def test_what_a_base_can_tell_of_its_name(place, folder, config, is_doubted):
    base = place.folder / folder
    base.parent.mkdir(parents=True, exist_ok=True)
    place.base.rename(base)
    (base / "config.json").write_text(json.dumps(config))
    place.set_config(base_model_name_or_path="org/other")
    code, _, err = place.run("merge", base, place.adapter, "-o", place.folder / "new")
    assert code == 0
    assert err == (
        f"note: adapter was made for org/other, the base is {is_doubted}: shapes that agree prove nothing\n"
        if is_doubted
        else ""
    )


@pytest.mark.fault(17)
def test_a_target_that_the_file_forgets(place, tmp_path_factory):
    base_file(place.base / "model.safetensors", {"dense.weight": WEIGHT, "second.weight": WEIGHT})
    place.set_config(target_modules=["dense", "second"])
    forgotten = "second: targeted by the adapter's config, but its file has no tensors for it"
    place.merge_refuses("1 of 2 targets do not fit", forgotten)
    factory = a_factory(tmp_path_factory, "module.second = torch.nn.Linear(8, 8)")
    place.onnx_refuses("1 of 2 targets do not fit", forgotten, model=factory)


@pytest.mark.fault(21)
def test_one_adapter_given_twice(place):
    shutil.copytree(place.adapter, place.folder / "again")
    again = ("merge", place.base, place.adapter, place.folder / "again")
    place.refuses(again, "again is the same adapter as adapter (sha256 ", old="old")
    place.refuses(("merge", place.base, place.adapter, place.adapter), "2 adapters are called adapter", old="old")
    place.onnx_refuses("again is the same adapter as adapter", options=("-a", place.folder / "again"))


@pytest.mark.fault(21)
def test_an_adapter_that_is_in_the_base_already(place):
    shutil.copytree(place.folder / "old", place.folder / "once")
    place.merge_refuses(
        "already contains the adapter adapter (merged as adapter",
        "Merge into the original base",
        base=place.folder / "once",
    )


# --- Adapters that are wrong in themselves ---

CONFIG_ERROR, FILE_ERROR = f"Error: ADAPTER/{CONFIG}: ", f"Error: ADAPTER/{WEIGHTS} is refused:\n"
MISFITS = "targets do not fit the base."
NO_EFFECT = "the adapter adapter has no effect: every B (or A, or scale) is zero, as before training"
TOO_WIDE = "which float32 cannot hold"
A_KEY, B_KEY = "dense.lora_A.weight", "dense.lora_B.weight"


def wrong(row: int, *expected: str, tensors: dict[str, Any] | None = None, **config: Any) -> tuple[Any, ...]:
    """A row of the table above, tensors and fields of the config that are changed, and what both commands tell."""
    return row, tensors or {}, config, expected


def with_poison(poison: float) -> list[tuple[Any, ...]]:
    """Adapters with values that are not finite, in A and beside it, and in B."""
    a, b = A.astype(np.float32), B.astype(np.float32)
    a[1, 1] = b[1, 1] = b[0, 1] = poison
    one, two = (f"that {verb} not finite (NaN or infinity)" for verb in ("is", "are"))
    told = f"{FILE_ERROR}  dense: A holds 1 value {one}\n  head.weight: holds 2 values {two}\n"
    return [
        wrong(12, told, tensors={A_KEY: a, "head.weight": [poison, 1, poison]}, modules_to_save=["head"]),
        wrong(12, f"dense: B holds 2 values {two}", tensors={B_KEY: b}),
    ]


DANSE = f"{WRAPPER}danse.lora_A.weight: the base has no weight for danse; the nearest name is dense.weight"
DEEP = f"{WRAPPER}deep.ense.lora_A.weight: the base has no weight for deep.ense"
OTHER_SHAPE = f"{WRAPPER}{A_KEY}: dense.weight is (8, 8) (out, in), the adapter was trained on (8, 5)"
ALONE = {"other.lora_B.weight": [[1]], "third.lora_B.bias": [1], "fourth.lora_magnitude_vector": [1], B_KEY: None}
GROUPED = {"conv.lora_A.weight": np.ones((2, 8, 3)), "conv.lora_B.weight": np.ones((8, 1, 1))}
ADAPTERS = [
    wrong(6, f"1 of 1 {MISFITS}", OTHER_SHAPE, tensors={A_KEY: np.eye(2, 5)}),
    wrong(8, f"{FILE_ERROR}  dense: A (2, 8) and B (8, 2) disagree with the config's rank 3\n", r=3),
    wrong(8, "dense: A (2, 8) and B (8, 3) disagree with the config's rank 2", tensors={B_KEY: np.ones((8, 3))}),
    wrong(
        8,
        "disagree with the config's rank 4. Patterns of rank_pattern with the ranks 4, 2 match it. PEFT takes",
        rank_pattern={"[d]ense": 4, "dense": 2},
    ),
    *(
        wrong(9, f"{CONFIG_ERROR}{field} is {value!r}; it must be a {what}\n", **{field: value})
        for field, what, more in (("r", "positive number", [-16]), ("lora_alpha", "number other than 0", []))
        for value in (None, "16", 0, True, [16], float("nan"), float("inf"), 10**400, *more)
    ),
    *(
        wrong(9, f"dense: lora_alpha {alpha:g} and rank 2 make a scale of {scale}, {TOO_WIDE}", lora_alpha=alpha)
        for alpha, scale in ((1e300, "5e+299"), (1e-60, "5e-61"))
    ),
    wrong(10, "dense: A (2, 0), B (8, 2): it has no values", tensors={A_KEY: np.ones((2, 0))}),
    wrong(10, "dense: A (0, 8), B (8, 0): it has no values", tensors={A_KEY: np.ones((0, 8)), B_KEY: np.ones((8, 0))}),
    wrong(11, NO_EFFECT, tensors={A_KEY: np.zeros((2, 8))}),
    wrong(11, NO_EFFECT, tensors={B_KEY: np.zeros((8, 2))}),
    *(row for poison in (np.nan, np.inf, -np.inf) for row in with_poison(poison)),
    wrong(15, f"1 of 2 {MISFITS}", DEEP, tensors={"deep.ense.lora_A.weight": A, "deep.ense.lora_B.weight": B}),
    wrong(
        *(15, f"1 of 1 {MISFITS}", DANSE),
        tensors={A_KEY: None, B_KEY: None, "danse.lora_A.weight": A, "danse.lora_B.weight": B},
        target_modules=None,
    ),
    wrong(
        16,
        f"{FILE_ERROR}  dense: lora_A without lora_B\n  fourth: a magnitude without lora_A\n"
        "  other: lora_B without lora_A\n  third: a bias of lora_B without lora_B\n",
        tensors=ALONE,
    ),
    *(wrong(18, f"ADAPTER/{CONFIG}: {field}: {why}", **{field: [1]}) for field, why in reader.REFUSED_FIELDS.items()),
    # Whatever the config says: a converter may have forgotten it there.
    wrong(18, "dense: ", "the config does not set use_dora", tensors={"dense.lora_magnitude_vector": np.ones(8)}),
    wrong(18, "wte", "does not record which rows these are", tensors={"wte.token_adapter.trainable_tokens_delta": A}),
    wrong(18, "unknown kinds of tensors", "dense.lora_E.weight", tensors={"dense.lora_E.weight": A}),
    wrong(18, "conv: ", "has 2 groups", tensors=GROUPED),
    *(
        wrong(18, f"ADAPTER/{CONFIG}: {field} is {value!r}", **{field: value})
        for field, value in (
            *(("use_rslora", "false"), ("task_type", ["SEQ_CLS"]), ("target_modules", 7)),
            *(("modules_to_save", {}), ("bias", "some")),
        )
    ),
    *(
        wrong(18, f"{CONFIG}: {field}: the pattern '(d)ens\\\\1' contains more than names", **{field: {r"(d)ens\1": 2}})
        for field in ("rank_pattern", "alpha_pattern")
    ),
    wrong(48, f"ADAPTER/{CONFIG}: peft_type is 'NEXT_YEARS', which is not supported", peft_type="NEXT_YEARS"),
    wrong(48, f"ADAPTER/{CONFIG}: peft_type is ['LORA'], which is not supported", peft_type=["LORA"]),
    wrong(48, f"ADAPTER/{CONFIG}: unknown fields: another, scaling_of_2031", scaling_of_2031=0.5, another=True),
    wrong(48, "is 'pissa_niter_4', which changes the base weights", init_lora_weights="pissa_niter_4"),
]


@pytest.mark.parametrize(("row", "tensors", "config", "expected"), ADAPTERS)
def test_a_wrong_adapter_is_refused_by_both_commands(place, row, tensors, config, expected):
    place.set_tensors(tensors)
    place.set_config(**config)
    place.both_refuse(*expected)


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("weight", "why"), [("0", "its weight is 0"), ("1e-60", "its weight 1e-60 makes every scale zero in float32")]
)
def test_an_adapter_at_no_strength(place, weight, why):
    place.merge_refuses(f"the adapter adapter has no effect: {why}", options=("--weight", weight))
    place.onnx_refuses(f"the adapter adapter has no effect: {why}", options=("--weight", weight))


# --- What PEFT's config can say ---


@pytest.mark.fault(18)
def test_every_field_that_peft_writes_is_understood_or_refused():
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(target_modules=["dense"]).to_dict()
    assert set(written) - reader.SUPPORTED == set(reader.REFUSED_FIELDS)


# --- Files that are not what they say ---

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def twice(text: str) -> bytes:
    return f'{{"x": {text}, "x": {text}}}'.encode()


@pytest.mark.fault(22)
def test_a_key_that_stands_twice(place):
    kept = (place.adapter / WEIGHTS).read_bytes()
    raw_tensor_file(place.adapter / WEIGHTS, twice(json.dumps(ENTRY)), b"\0" * 4)
    place.both_refuse(f"the header of {place.adapter / WEIGHTS} names x more than once")
    (place.adapter / WEIGHTS).write_bytes(kept)
    config = (place.adapter / CONFIG).read_text()
    (place.adapter / CONFIG).write_text(config.replace("{", '{"r": 2, ', 1))
    place.both_refuse(f"{place.adapter / CONFIG} names r more than once")
    (place.adapter / CONFIG).write_text(config)
    raw_tensor_file(place.base / "model.safetensors", twice(json.dumps(ENTRY)), b"\0" * 4)
    place.neither_takes_the_base(f"the header of {place.base / 'model.safetensors'} names x more than once")
    (place.base / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    place.neither_takes_the_base(f"{place.base / 'config.json'} names model_type more than once")


@pytest.mark.fault(23, 24)
@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        *(({}, size, f"its header should have {size} bytes") for size in (2**63, 2**64 - 1, 100_000_001, 1000)),
        ({}, 0, "is not JSON"),
        (b"pickled", None, "is not JSON"),
        (b'{"a":' * 100_000, None, "is not JSON"),
        ({"x": ENTRY, "y": ENTRY}, None, "y overlaps the tensor before it"),
        ({"x": {**ENTRY, "data_offsets": [4, 8]}}, None, "x leaves a hole before it"),
        ({}, None, "is too long"),
        ({"x": {**ENTRY, "dtype": "F3"}}, None, "x has the unknown dtype 'F3'"),
        ({"x": {**ENTRY, "shape": [2**62, 4]}}, None, "its range has 4"),
    ],
)
def test_a_header_that_makes_no_sense(place, header, length, message):
    begun = time.process_time()
    for path, refuse in (
        (place.adapter / WEIGHTS, place.both_refuse),
        (place.base / "model.safetensors", place.neither_takes_the_base),
    ):
        whole = path.read_bytes()
        raw_tensor_file(path, header, b"\0" * 4, length=length)
        refuse(str(path), message)
        path.write_bytes(whole)
    assert time.process_time() - begun < 5


# --- Files that would run code ---


@pytest.fixture
def payload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What must not exist after the test."""
    return tmp_path_factory.mktemp("payload") / "ran"


@pytest.mark.fault(25)
def test_the_payload_of_these_tests_works(payload):
    pickle.loads(pickle.dumps(Payload(payload)))  # noqa: S301 - our own
    assert payload.exists()


@pytest.mark.fault(25)
def test_pickles_are_refused_and_not_opened(place, payload):
    whole = (place.adapter / WEIGHTS).read_bytes()
    (place.adapter / WEIGHTS).unlink()
    (place.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(payload)))
    place.both_refuse(
        f"{place.adapter / 'adapter_model.bin'} is a pickle, which can run code when it is opened. --allow-pickle"
    )
    (place.adapter / WEIGHTS).write_bytes(whole)
    (place.base / "model.safetensors").unlink()
    (place.base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(payload)))
    place.neither_takes_the_base(
        f"{place.base} has its weights in pickle files (pytorch_model.bin), which can run code",
        "and save it as safetensors",
    )
    assert not payload.exists()


@pytest.mark.fault(25)
def test_pickles_beside_the_weights_are_neither_opened_nor_copied(place, payload):
    names = sorted(["training_args.bin", *(f"model{suffix}" for suffix in checkpoint.OTHER_WEIGHTS)])
    for path in (place.adapter / "adapter_model.bin", *(place.base / name for name in names)):
        path.write_bytes(pickle.dumps(Payload(payload)))
    code, _, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new", "-v")
    assert code == 0
    assert sorted(told.splitlines()) == [
        f"note: {name} contains weights too, unmerged ones; it is left out" for name in names
    ]
    assert not {*names} & {path.name for path in (place.folder / "new").iterdir()} and not payload.exists()


@pytest.fixture
def evil(payload: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that lies beside base and adapter, and even where Python would find it."""
    code = f"open({str(payload)!r}, 'w')\nclass Evil: pass\n"
    for folder in (place.base, place.adapter):
        (folder / "evil_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(place.base))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return "evil_module"


TINY = {
    "model_type": "bert",
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1),
}
KERNELS = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")
CODE = {
    "auto_map": {"AutoModel": "evil_module.Evil"},
    **dict.fromkeys((*KERNELS, "_experts_implementation_internal"), "evil/kernel:f"),
}


@pytest.fixture(params=["", "text_config", "vision_config"])
def naming_code(request, place, evil, payload) -> Iterator[Callable[[str], None]]:
    """Names code in the base's config, or in a part of it. None of it runs."""

    def write(field: str) -> None:
        fields = {field: CODE[field]}
        (place.base / "config.json").write_text(
            json.dumps(TINY | ({request.param: fields} if request.param else fields))
        )

    yield write
    assert evil not in sys.modules and not payload.exists()


@pytest.mark.fault(26)
@pytest.mark.parametrize("field", CODE)
def test_a_model_that_names_code_is_not_built(place, naming_code, field):
    naming_code(field)
    told = "BASE/config.json names code of its own ("
    place.onnx_refuses(told, field, "which lora-export never runs", model=str(place.base))


@pytest.mark.fault(26)
@pytest.mark.parametrize("field", CODE)
def test_a_merge_says_that_code_came_along_and_runs_none(place, naming_code, field):
    naming_code(field)
    code, _, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new")
    assert code == 0
    assert told.startswith("note: the base's config names code of its own (") and told.count("\n") == 1


@pytest.mark.fault(26)
def test_the_class_that_an_adapter_names_is_not_imported(place, evil, payload):
    # PEFT writes auto_mapping wherever it knows no task: refusing it would refuse good adapters.
    place.set_config(auto_mapping={"base_model_class": "Evil", "parent_library": evil}, task_type=None)
    assert place.run("merge", place.base, place.adapter, "-o", place.folder / "new")[0] == 0
    assert place.run("onnx", MODEL, "-a", place.adapter, "--no-verify", "-o", place.folder / "new.onnx")[0] == 0
    assert evil not in sys.modules and not payload.exists()


# --- Inputs that change ---


@pytest.mark.fault(42)
@pytest.mark.parametrize("change", [os.utime, lambda path: path.write_bytes(path.read_bytes() + b" ")])
def test_a_base_that_changes_after_it_was_looked_at(place, monkeypatch, change):
    opened = checkpoint.open_checkpoint

    def then_changed(path: Path, **options: bool) -> Checkpoint:
        base = opened(path, **options)
        change(place.base / "model.safetensors")
        return base

    monkeypatch.setattr("lora_export.api.merge_base.open_checkpoint", then_changed)
    before = place.state()
    code, out, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "old", "--overwrite")
    assert (code, out) == (3, "")
    assert (
        told == f"Error: {place.base / 'model.safetensors'} changed while it was being merged\nNothing was written.\n"
    )
    changed = {name for name, state in place.state().items() if before[name] != state}
    assert changed == {"base/model.safetensors"} and place.state().keys() == before.keys()


@pytest.mark.fault(42)
def test_an_adapter_that_changes_while_it_is_read(place, monkeypatch):
    opened = safetensors_file.open_file

    def then_changed(path: Path) -> safetensors_file.TensorFile:
        file = opened(path)
        if path.name == WEIGHTS:
            os.utime(path)
        return file

    monkeypatch.setattr(safetensors_file, "open_file", then_changed)
    for command, name in ((("merge", place.base), "new"), (("onnx", MODEL, "-a"), "new.onnx")):
        code, _, told = place.run(*command, place.adapter, "-o", place.folder / name)
        assert (code, told) == (
            3,
            f"Error: {place.adapter / WEIGHTS} changed while it was being read\nNothing was written.\n",
        )
        assert not (place.folder / name).exists()


# --- Names that would steer a terminal, or pass for lines of ours ---

STEERING = "\x1b[2J\nnote: all is well\r"
ESCAPED = r"\x1b[2J\nnote: all is well\r"


def test_names_in_messages_and_notes_reach_the_terminal_escaped(place):
    for path, refuse in (
        (place.adapter / WEIGHTS, place.both_refuse),
        (place.base / "model.safetensors", place.neither_takes_the_base),
    ):
        whole = path.read_bytes()
        raw_tensor_file(path, {STEERING: ENTRY}, b"\0" * 4)
        refuse(f"the header of {path} has names with control characters: '{ESCAPED}'")
        path.write_bytes(whole)
    place.set_config(peft_type=STEERING)
    place.both_refuse(f"peft_type is '{ESCAPED}'")
    place.set_config(peft_type="LORA", r=STEERING)
    assert "\x1b" not in place.merge_refuses(ESCAPED)
    place.set_config(r=2)
    (place.base / f"{STEERING}.bin").touch()
    code, out, told = place.run("merge", place.base, f"{place.adapter}", "-o", place.folder / "new")
    assert (code, told) == (0, f"note: {ESCAPED}.bin contains weights too, unmerged ones; it is left out\n")
    assert "\x1b" not in out


def test_a_misfits_names_are_one_line():
    misfit = Misfit("mine\x1b", f"key{STEERING}", "has no\nplace")
    assert str(MatchError([misfit], targets=1)).splitlines()[1:] == [
        r"  in mine\x1b:",
        rf"    key{ESCAPED}: has no\nplace",
    ]


def test_an_error_keeps_its_lines_and_no_other_control_characters(place, monkeypatch):
    def fail(_: object, **__: bool) -> None:
        raise InputRefused("first", "  second\x1b[A\x07\x9b\u202e\nx")

    monkeypatch.setattr("lora_export.api.merge_base.open_checkpoint", fail)
    code, _, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new")
    assert (code, told) == (3, "Error: first\n  second\\x1b[A\\x07\\x9b\\u202e\\nx\nNothing was written.\n")


def test_inspect_shows_names_escaped(place, monkeypatch):
    spec = TensorSpec(STEERING, (1,), "float32")
    opened = Checkpoint(place.base, {}, (spec,))
    monkeypatch.setattr("lora_export.artifacts.artifact.open_checkpoint", lambda *_, **__: opened)
    code, out, _ = place.run("inspect", place.base)
    assert (code, out) == (0, f"1 tensor, 0 bytes\n  {ESCAPED}  1 float32\n")


# --- Candidates that are wrong in other ways ---

# What becomes of the right answer `hidden, total` of inputs `rows, weights`.
CANDIDATES = {
    "right": ("hidden, total", 0),
    "a constant": ("torch.zeros_like(hidden), torch.zeros_like(total)", 4),
    "not finite": ("hidden / 0 * 0, total", 4),
    "an output is missing": ("hidden", 4),
    "an output too many": ("hidden, total, total", 4),
    "outputs that changed places": ("total, hidden", 4),
    "another dtype": ("hidden.double(), total", 4),
    "another shape": ("hidden, total[None]", 4),
    "active dropout": ("torch.dropout(hidden, 0.5, True), total", 4),
    "an input that is ignored": ("hidden / weights[..., None], total", 4),
}


@pytest.mark.fault(45)
@pytest.mark.parametrize(("answer", "code"), CANDIDATES.values(), ids=CANDIDATES)
def test_a_candidate_that_is_wrong_in_some_other_way(place, answer, code):
    import torch

    from support import factories

    class Candidate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, _ = factories.scaled()
            with torch.no_grad():
                self.right.dense.weight += torch.from_numpy(B @ A).float()

        def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> Any:
            hidden, total = self.right(rows, weights)
            return eval(answer, {"torch": torch}, {"hidden": hidden, "total": total, "weights": weights})  # noqa: S307

    _, examples = factories.scaled()
    script = torch.jit.trace(Candidate().eval(), example_kwarg_inputs=examples, check_trace=False)
    script.save(place.folder / "candidate.pt")
    ended, out, told = place.run("verify", place.folder / "candidate.pt", "--model", MODEL, "-a", place.adapter)
    assert (ended, told) == (code, "")
    assert out.startswith("same: " if code == 0 else "different: ")


@pytest.mark.fault(46)
def test_a_graph_for_one_batch_size_only(place):
    import onnx

    path = place.folder / "fixed.onnx"
    assert place.run("onnx", MODEL, "-a", place.adapter, "-o", path, "--no-verify")[0] == 0
    graph = onnx.load(path)
    for value in graph.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(graph, path)
    code, out, told = place.run("verify", path, "--model", MODEL, "-a", place.adapter)
    assert (code, told) == (4, "") and out.startswith("different: ")
    assert "case batch 1 " in out and "which the candidate refused: " in out and "Expected: 3" in out
