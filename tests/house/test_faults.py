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
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
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
from support.handmade import base_file, peft_adapter, raw_tensor_file

FAULTS = {
    1: "a shard that was cut short",
    2: "an index that names a shard which is not there",
    3: "an index and shards that disagree about a tensor",
    4: "an index that points out of its folder",
    5: "two sets of weights in one folder",
    6: "an adapter for a base of other shapes",
    7: "an adapter for other weights of the same shapes",
    8: "A, B and the config name different ranks",
    9: "an alpha that is missing, no number, not positive, or too large",
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
    tied = rows_tied_to_tests()
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
WRAPPER = "base_model.model."


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
        """Run a command to a new place and over an old output: both are refused, and nothing has moved."""
        before = self.state()
        is_folder = words[0] == "merge" and Path(str(words[1])).is_dir()
        for output in (self.folder / ("new" if is_folder else "new.onnx"), self.folder / old):
            code, out, told = self.run(*words, "-o", output, "--overwrite")
            assert (code, out) == (3, "")
            assert told.startswith("Error: ") and "Traceback" not in told
            assert [words for words in expected if words not in told] == [], told
            assert self.state() == before
        return told

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
    index = base / "model.safetensors.index.json"
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
@pytest.mark.parametrize("share", [0.5, 1])
def test_a_shard_cut_short(place, share):
    make_sharded(place.base)
    shard = place.base / "one.safetensors"
    size = shard.stat().st_size
    cut = int(size * share) - (share == 1)
    os.truncate(shard, cut)
    place.neither_takes_the_base(f"{shard} is cut short: its header describes {size} bytes, the file has {cut}")


@pytest.mark.fault(2)
def test_missing_shards(place):
    index = make_sharded(place.base)
    named = {"dense.weight": "one.safetensors", "dense.bias": "gone.safetensors", "x": "too.safetensors"}
    write_index(index, named)
    (place.base / "two.safetensors").unlink()
    place.neither_takes_the_base(f"{place.base} lacks shards that its index names: gone.safetensors, too.safetensors")


@pytest.mark.fault(3)
def test_an_index_that_disagrees_with_its_shards(place):
    index = make_sharded(place.base)
    base_file(place.base / "two.safetensors", {"dense.bias": np.ones(8), "dense.weight": WEIGHT})
    write_index(index, {"dense.weight": "one.safetensors", "dense.bias": "two.safetensors", "lost": "one.safetensors"})
    place.neither_takes_the_base(
        f"{index} disagrees with the shards:\n",
        "  lost: not in one.safetensors, where the index expects it\n",
        "  dense.weight: in two.safetensors, the index expects it in one.safetensors\n",
    )


@pytest.mark.fault(4)
@pytest.mark.parametrize("place_of_shard", ["../two.safetensors", "{folder}/two.safetensors"])
def test_an_index_that_points_out_of_its_folder(place, place_of_shard):
    index = make_sharded(place.base)
    (place.base / "two.safetensors").rename(place.folder / "two.safetensors")
    pointing = place_of_shard.format(folder=place.folder)
    write_index(index, {"dense.weight": "one.safetensors", "dense.bias": pointing})
    place.neither_takes_the_base(f"{index} may only name files of its own folder, and names {pointing!r}")


@pytest.mark.fault(5)
def test_two_sets_of_weights(place):
    make_sharded(place.base)
    base_file(place.base / "model.safetensors", {"dense.weight": -WEIGHT, "dense.bias": np.ones(8)})
    place.neither_takes_the_base("model.safetensors. Remove what is not the model, or name the file")


@pytest.mark.fault(20)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bitsandbytes", "make this one a float model: lora-export merge --dequantize"),
        ("fp8", "make this one a float model: lora-export merge --dequantize"),
        *(
            (one, "make this one a float model: lora-export merge --dequantize")
            for one in ("mxfp4", "gptq", "awq", "modelopt")
        ),
        ("aqlm", "dequantise this one first, with its own library"),
        ("hqq", "dequantise this one first, with its own library"),
    ],
)
def test_a_base_whose_config_says_that_it_is_quantised(place, method, remedy, nested):
    quantised = {"quantization_config": {"quant_method": method}}
    config = {"model_type": "llama", **({"text_config": quantised} if nested else quantised)}
    (place.base / "config.json").write_text(json.dumps(config))
    place.neither_takes_the_base(
        f"{place.base} is quantised ({method})", f"Merge into the original float model, or {remedy}"
    )


@pytest.mark.fault(20)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_base_whose_weights_are_quantised_without_a_word(place, dtype):
    safetensors_file.write(place.base / "model.safetensors", {"dense.weight": np.ones((8, 8), dtype)})
    is_float = np.dtype(dtype).name.startswith("float8")
    message = f"dense.weight is {np.dtype(dtype)}: a quantised weight is never merged silently. Use the"
    place.merge_refuses("base is quantised (in a form for ComfyUI): its weights are never" if is_float else message)


@pytest.mark.fault(12)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_base_with_values_that_are_not_finite(place, poison):
    weight = WEIGHT.astype(np.float32)
    weight[3, 4] = weight[5, 6] = poison
    base_file(place.base / "model.safetensors", {"dense.weight": weight})
    place.merge_refuses("dense.weight: the base holds 2 values that are not finite. Nothing was written.")


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


@pytest.mark.fault(6)
def test_an_adapter_for_other_shapes(place):
    peft_adapter(place.adapter, {"dense": (np.eye(2, 5), B)})
    place.both_refuse(
        "1 of 1 targets do not fit the base. Nothing was written.",
        f"{WRAPPER}dense.lora_A.weight: dense.weight is (8, 8) (out, in), the adapter was trained on (8, 5)",
    )


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


@pytest.mark.fault(15)
@pytest.mark.parametrize(("right", "count"), [("dense", "1 of 2"), ("danse", "2 of 2")])
def test_tensors_that_fit_nothing(place, right, count):
    peft_adapter(place.adapter, {right: (A, B), "deep.ense": (A, B)})
    place.both_refuse(
        f"{count} targets do not fit the base. Nothing was written.",
        f"{WRAPPER}deep.ense.lora_A.weight: the base has no weight for deep.ense",
        *(
            [f"{WRAPPER}danse.lora_A.weight: the base has no weight for danse; the nearest name is dense.weight"]
            * (right != "dense")
        ),
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


@pytest.mark.fault(8)
def test_ranks_that_disagree(place):
    place.set_config(r=3)
    place.both_refuse("dense: A (2, 8) and B (8, 2) disagree with the config's rank 3")
    place.set_config(r=2)
    place.set_tensors({"dense.lora_B.weight": np.ones((8, 3))})
    place.both_refuse("dense: A (2, 8) and B (8, 3) disagree with the config's rank 2")


@pytest.mark.fault(9)
@pytest.mark.parametrize("alpha", [None, "16", -16, 0, True, [16], float("inf"), 10**400])
def test_an_alpha_that_is_none(place, alpha):
    place.set_config(lora_alpha=alpha)
    place.both_refuse(f"{place.adapter / CONFIG}: lora_alpha is ", "it must be a positive number")


@pytest.mark.fault(9)
@pytest.mark.parametrize("alpha", [1e300, 1e-60])
def test_an_alpha_whose_scale_float32_cannot_hold(place, alpha):
    place.set_config(lora_alpha=alpha)
    place.both_refuse(
        f"dense: lora_alpha {alpha:g} and rank 2 make a scale of {alpha / 2:g}, which float32 cannot hold"
    )


@pytest.mark.fault(10)
def test_a_rank_of_zero(place):
    place.set_config(r=0)
    place.both_refuse(f"{place.adapter / CONFIG}: r is 0; it must be a positive number")


@pytest.mark.fault(10)
def test_a_dimension_of_zero(place):
    place.set_tensors({"dense.lora_A.weight": np.ones((2, 0))})
    place.both_refuse("dense: A (2, 0), B (8, 2): it has no values")
    place.set_tensors({"dense.lora_A.weight": np.ones((0, 8)), "dense.lora_B.weight": np.ones((8, 0))})
    place.both_refuse("dense: A (0, 8), B (8, 0): it has no values")


@pytest.mark.fault(11)
@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_of_zeros(place, side):
    place.set_tensors({f"dense.lora_{side}.weight": np.zeros((2, 8) if side == "A" else (8, 2))})
    place.both_refuse("the adapter adapter has no effect: every B (or A, or scale) is zero, as before training")


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("weight", "why"), [("0", "its weight is 0"), ("1e-60", "its weight 1e-60 makes every scale zero in float32")]
)
def test_an_adapter_at_no_strength(place, weight, why):
    place.merge_refuses(f"the adapter adapter has no effect: {why}", options=("--weight", weight))
    place.onnx_refuses(f"the adapter adapter has no effect: {why}", options=("--weight", weight))


@pytest.mark.fault(12)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_with_values_that_are_not_finite(place, side, poison):
    values = (A if side == "A" else B).astype(np.float32)
    values[1, 1] = values[0, 1] = poison
    place.set_tensors({f"dense.lora_{side}.weight": values})
    place.both_refuse(f"dense: {side} holds 2 values that are not finite (NaN or infinity)")


@pytest.mark.fault(16)
def test_halves_of_pairs(place):
    place.set_tensors({"dense.lora_B.weight": None, "other.lora_B.weight": B})
    place.both_refuse("dense: lora_A without lora_B", "other: lora_B without lora_A")


# --- What PEFT's config can say ---


@pytest.mark.fault(18)
def test_every_field_that_peft_writes_is_understood_or_refused():
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(target_modules=["dense"]).to_dict()
    assert set(written) - reader.SUPPORTED == set(reader.REFUSED_FIELDS)


@pytest.mark.fault(18)
@pytest.mark.parametrize("field", reader.REFUSED_FIELDS)
def test_what_is_not_supported_is_refused_by_its_name(place, field):
    place.set_config(**{field: [1]})
    place.both_refuse(f"{place.adapter / CONFIG}: {field}: {reader.REFUSED_FIELDS[field]}")


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"dense.lora_magnitude_vector": np.ones(8)}, "the config does not set use_dora"),
        ({"wte.token_adapter.trainable_tokens_delta": A}, "the config does not record which rows these are"),
        ({"dense.lora_E.weight": A}, "unknown kinds of tensors"),
        ({"conv.lora_A.weight": np.ones((2, 8, 3)), "conv.lora_B.weight": np.ones((8, 1, 1))}, "has 2 groups"),
    ],
)
def test_what_only_the_tensors_tell_is_refused_by_its_name_too(place, tensors, message):
    # Whatever the config says: a converter may have forgotten it there.
    place.set_tensors(tensors)
    place.both_refuse(
        message,
        *(re.sub(r"\.(lora_[AB]\.weight|lora_magnitude_vector|token_adapter\..*)$", "", name) for name in tensors),
    )


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "false"),
        ("task_type", ["SEQ_CLS"]),
        ("target_modules", 7),
        ("modules_to_save", {}),
        ("bias", "some"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_its_name(place, field, value):
    place.set_config(**{field: value})
    place.both_refuse(f"{place.adapter / CONFIG}: {field} is {value!r}")


@pytest.mark.fault(18)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_keep_pythons_matcher_busy_for_years(place, field):
    name = "a" * 64
    peft_adapter(place.adapter, {name: (A, B)}, **{field: {"(a+)+b": 2}})
    begun = time.process_time()
    place.merge_refuses(f"the base has no weight for {name}")
    assert time.process_time() - begun < 5
    place.set_config(**{field: {r"(d)ens\1": 2}})
    place.both_refuse(f"{place.adapter / CONFIG}: {field}: the pattern '(d)ens\\\\1' contains more than names")


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "NEXT_YEARS"}, "peft_type is 'NEXT_YEARS', which is not supported"),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA'], which is not supported"),
        ({"scaling_of_2031": 0.5, "another": True}, "unknown fields: another, scaling_of_2031"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base weights",
        ),
    ],
)
def test_a_config_of_another_kind_or_from_the_future(place, fields, message):
    place.set_config(**fields)
    place.both_refuse(f"{place.adapter / CONFIG}: {message}")


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
        ({}, 2**63, "its header should have 9223372036854775808 bytes"),
        ({}, 100_000_001, "its header should have 100000001 bytes"),
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


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


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
    for path in (
        place.adapter / "adapter_model.bin",
        place.base / "pytorch_model.bin",
        place.base / "training_args.bin",
    ):
        path.write_bytes(pickle.dumps(Payload(payload)))
    code, _, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new")
    assert code == 0
    assert told.splitlines() == [
        "note: pytorch_model.bin contains weights too, unmerged ones; it is left out",
        "note: training_args.bin contains weights too, unmerged ones; it is left out",
    ]
    assert not list((place.folder / "new").glob("*.bin")) and not payload.exists()


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
CODE = [
    {"auto_map": {"AutoModel": "evil_module.Evil"}},
    {"text_config": {"auto_map": {"AutoModel": "evil_module.Evil"}}},
    {"_attn_implementation_internal": "evil/kernel"},
    {"attn_implementation": "evil/kernel"},
    {"vision_config": {"_experts_implementation_internal": "evil/kernel"}},
]


@pytest.mark.fault(26)
@pytest.mark.parametrize("fields", CODE)
def test_a_model_that_names_code_is_not_built(place, evil, payload, fields):
    (place.base / "config.json").write_text(json.dumps(TINY | fields))
    place.onnx_refuses(
        f"{place.base / 'config.json'} names code of its own (", "which lora-export never runs", model=str(place.base)
    )
    assert evil not in sys.modules and not payload.exists()


@pytest.mark.fault(26)
@pytest.mark.parametrize("fields", CODE)
def test_a_merge_says_that_code_came_along_and_runs_none(place, evil, payload, fields):
    (place.base / "config.json").write_text(json.dumps(TINY | fields))
    code, _, told = place.run("merge", place.base, place.adapter, "-o", place.folder / "new")
    assert code == 0
    assert told.startswith("note: the base's config names code of its own (") and told.count("\n") == 1
    assert evil not in sys.modules and not payload.exists()


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
        told == f"Error: {place.base / 'model.safetensors'} changed while it was being merged. Nothing was written.\n"
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
        assert (code, told) == (3, f"Error: {place.adapter / WEIGHTS} changed while it was being read\n")
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
    assert (code, told) == (3, "Error: first\n  second\\x1b[A\\x07\\x9b\\u202e\\nx\n")


def test_inspect_shows_names_escaped(place, monkeypatch):
    spec = TensorSpec(STEERING, (1,), "float32")
    monkeypatch.setattr("lora_export.artifacts.artifact.open_checkpoint", lambda path: Checkpoint(path, {}, (spec,)))
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
