"""Whatever strikes - a kill, a full disk, Ctrl-C, a second run - the output is the old or the new one, and whole."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lora_export import cli
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import atomic_output, safetensors_file
from lora_export.storage.hashes import file_sha256
from lora_export.storage.manifest import MANIFEST, damage, read_manifest
from lora_export.weights import merge
from support import FACTORIES, ROOT, fault_injector
from support.fault_injector import Ended
from support.folder_contents import folder_contents
from support.handmade import base_file, graph_file, peft_adapter
from support.slow import slow, slow_but

W = np.arange(6).reshape(2, 3)
A, B = [[1, 2, 3]], [[1], [10]]
Contents = dict[str, bytes]
PROGRAM = [sys.executable, "-m", "lora_export"]
run_captured = functools.partial(subprocess.run, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base in two shards, and two adapters for it."""
    base = tmp_path / "base"
    base.mkdir()
    names = {f"model-0000{number}-of-00002.safetensors": f"fc{number}.weight" for number in (1, 2)}
    for file, weight in names.items():
        base_file(base / file, {weight: W, f"{weight}.rest": np.ones(300)})
    table = {tensor: file for file, weight in names.items() for tensor in (weight, f"{weight}.rest")}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (base / "config.json").write_text('{"model_type": "llama"}')
    for name, alpha in (("first", 1), ("second", 2)):
        peft_adapter(tmp_path / name, {"fc1": (A, B), "fc2": (A, B)}, lora_alpha=alpha)
    base_file(tmp_path / "bare.safetensors", {"fc1.weight": W, "fc2.weight": W, "rest": np.ones(300)})
    matrices = {"fc1.weight": W.T, "fc2.weight": 2 * W.T, "rest": np.ones((W.shape[1], 300))}
    weights = {name: np.float32(matrix) for name, matrix in matrices.items()}
    graph_file(tmp_path / "base.onnx", weights, data="base.data")
    return tmp_path


@dataclass(frozen=True)
class Output:
    """Something that the program writes in two versions: `write(version)` says what to run in a child."""

    target: Path
    write: Callable[[int], tuple[Any, ...]]

    def child(self, version: int, **faults: Any) -> Ended:
        return fault_injector.run(*self.write(version), log=self.target.parent / "log", **faults)

    def written(self) -> Contents:
        """The output as its readers find it; a folder must be what its manifest says, to the byte."""
        if self.target.is_dir():
            assert_whole(self.target)
            return folder_contents(self.target)
        parts = {self.target.name: self.target.read_bytes()}
        if self.target.suffix == ".onnx":
            graph = onnx.load_from_string(parts[self.target.name])
            assert len(load_graph(self.target).graph.initializers) == len(graph.graph.initializer) > 0
            places = [entry for tensor in graph.graph.initializer for entry in tensor.external_data]
            named = {entry.value for entry in places if entry.key == "location"}
            parts |= {name: (self.target.parent / name).read_bytes() for name in named}
        return parts

    def leftovers(self) -> set[str]:
        return {path.name for path in self.target.parent.iterdir() if path.name.startswith(".")}

    def neighbours(self) -> set[str]:
        return {path.name for path in self.target.parent.iterdir()} - {"log"}

    def versions(self) -> tuple[Contents, Contents]:
        """What it holds once each version was written without trouble, the first one last."""
        found = []
        for version in (1, 0):
            ended = self.child(version)
            assert ended.code == 0, ended.told
            found.append(self.written())
        assert found[0] != found[1]
        return found[1], found[0]


def assert_whole(folder: Path) -> None:
    assert set(folder_contents(folder)) == {*read_manifest(folder)["files"], MANIFEST}
    assert damage(folder) == []


def merge_line(place: Path, base: str, out: str, version: int) -> list[str]:
    return [
        "merge",
        str(place / base),
        str(place / ("first", "second")[version]),
        "-o",
        str(place / out),
        "--overwrite",
    ]


def export_line(place: Path, version: int) -> list[str]:
    adapter, out = place / ("first", "second")[version], place / "exported.onnx"
    return ["onnx", str(place / "base.onnx"), "-a", str(adapter), "-o", str(out), "--overwrite", "--no-verify"]


# The commands beside `merge`, in a folder that `others` fills
OTHERS = {
    "convert": ["convert", "first", "--to", "mlx", "-o", "new"],
    "convert to a file": ["convert", "first", "--to", "kohya", "-o", "new.safetensors"],
    "combine": ["combine", "first", "second", "-o", "new"],
    "extract": ["extract", "base", "merged", "--rank", "1", "-o", "new"],
    "resize": ["resize", "double", "--rank", "1", "-o", "new"],
    "unmerge": ["unmerge", "merged", "first", "--base-from", "residual", "-o", "new"],
    "onnx": ["onnx", "base.onnx", "-a", "first", "--lora", "nodes", "--no-verify", "-o", "new.onnx"],
    "merge into a graph": ["merge", "base.onnx", "first", "-o", "new.onnx"],
}
EVERY_OTHER = pytest.mark.parametrize("command", OTHERS)


@pytest.fixture
def others(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder with a merge and its residual, and an adapter of rank 2; it is the current one."""
    monkeypatch.chdir(place)
    peft_adapter(place / "double", {"fc1": ([[1, 2, 3], [0, 1, 0]], [[1, 1], [10, 2]])})
    assert cli.run(["merge", "base", "first", "-o", "merged", "--keep-residual", "residual"]) == 0
    capsys.readouterr()
    return place


def outputs(place: Path) -> dict[str, Output]:
    def merged(base: str, out: str, work: Callable[..., None] = fault_injector.command) -> Output:
        return Output(place / out, lambda version: (work, *merge_line(place, base, out, version)))

    graph = place / "m.onnx"
    return {
        "folder": merged("base", "out"),
        "file": merged("bare.safetensors", "out.safetensors"),
        "folder without exchange": merged("base", "out", fault_injector.command_without_exchange),
        "merged graph": merged("base.onnx", "merged.onnx"),
        "exported graph": Output(
            place / "exported.onnx", lambda version: (fault_injector.command, *export_line(place, version))
        ),
        "graph": Output(graph, lambda version: (fault_injector.publish_graph, str(graph), float(version + 1))),
    }


OUTPUTS = ["folder", "file", "folder without exchange", "graph", "merged graph"]


# --- SIGKILL ---


def is_cleaned_by_the_next_run(output: Output, version: int, known: tuple[Contents, Contents]) -> None:
    left = output.leftovers()
    after = output.child(version)
    assert (after.code, output.written()) == (0, known[version]), after.told
    assert output.leftovers() == set()
    if not output.target.is_dir():
        assert {path.name for path in output.target.parent.glob(f"{output.target.name}*")} == set(known[version])
    back = "put out back, which a run that was killed had set aside"
    for name in left - {path for path in left if path.endswith(".lock")}:
        removed = f"removed {Path(name).with_suffix('.partial')}, which a run that was killed had left behind"
        assert removed in after.told or (name.endswith(".old") and back in after.told)


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", slow_but(["file", "graph"], OUTPUTS))
def test_a_kill_at_any_moment_leaves_old_or_new_output(place, kind):
    output = outputs(place)[kind]
    known = output.versions()
    neighbours = output.neighbours()
    for moment in itertools.count(1):
        version = moment % 2
        ended = output.child(version, signal=signal.SIGKILL, at=moment)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL
        if not output.target.exists():  # between two renames, where names cannot be exchanged
            assert kind == "folder without exchange"
            (aside,) = output.target.parent.glob(".out.*.old")
            assert folder_contents(aside) in known
        else:
            assert output.written() in known
        is_cleaned_by_the_next_run(output, version, known)
        assert len(output.neighbours()) == len(neighbours)  # a graph's data has another name each time
    assert moment > 8, "hardly anything was struck"


@pytest.mark.fault(28)
def test_a_run_after_a_kill_between_two_files_completes(place):
    output = outputs(place)["graph"]
    for moment in itertools.count(1):
        ended = output.child(0, signal=signal.SIGKILL, at=moment)
        if ended.code == 0:
            break
        if any(output.target.parent.glob("m.onnx.*.data")) and not output.target.exists():
            data = next(output.target.parent.glob("m.onnx.*.data"))
            with atomic_output.stage_file(output.target, inputs=()) as stage:  # not told to overwrite anything
                for name in (output.target.name, data.name):
                    (stage / name).write_bytes(b"again")
            assert data.read_bytes() == b"again"
            return
    pytest.fail("it was never killed between its two files")


def killed_and_run_again(place: Path, rounds: int, *, seed: int, kind: str = "folder") -> int:
    """A real command over an old output, killed by the clock; how many of the rounds met it at work on its output."""
    rng = random.Random(seed)
    base_file(place / "base/model-00001-of-00002.safetensors", {"fc1.weight": W, "fc1.weight.rest": np.ones(1 << 20)})
    matrices = {"fc1.weight": W.T, "fc2.weight": 2 * W.T, "rest": np.ones((W.shape[1], 1 << 18))}
    for path in place.glob("base.data"):
        path.unlink()
    graph_file(place / "base.onnx", {name: np.float32(matrix) for name, matrix in matrices.items()}, data="base.data")
    output = outputs(place)[kind]
    known = output.versions()

    def start(version: int) -> subprocess.Popen[str]:
        line = [*PROGRAM, *output.write(version)[1:]]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def timed(version: int) -> tuple[float, float]:
        """Seconds of an undisturbed run, and of its work on the output."""
        begun, process, at_work = time.monotonic(), start(version), []
        while process.poll() is None:
            if output.leftovers():
                at_work.append(time.monotonic())
            time.sleep(0.0005)
        assert process.wait() == 0
        return time.monotonic() - begun, at_work[-1] - at_work[0]

    duration, work = map(min, zip(*map(timed, (1, 0, 1)), strict=True))
    hit = 0
    for number in range(rounds):
        version = number % 2
        process = start(version)
        if number % 4:  # three of four strike the work itself, whatever Python's start takes today
            until = time.monotonic() + duration * 3
            while not output.leftovers() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.0005)
        time.sleep(rng.uniform(0, duration if number % 4 == 0 else work))
        process.kill()
        process.communicate()
        assert output.written() in known
        left = output.leftovers()
        hit += bool(left)
        if number % 5 == 0:  # the real program cleans up like the children do
            process = start(version)
            told = process.communicate()[1]
            assert process.returncode == 0 and all(name in told for name in left if name.endswith(".partial")), told
            assert (output.leftovers(), output.written()) == (set(), known[version])
        else:
            is_cleaned_by_the_next_run(output, version, known)
    told = f"{rounds} runs ({kind}) were killed, {hit} of them at work on the output"
    print(f"\n{told}; a whole run takes {duration:.2f} s")
    return hit


@pytest.mark.slow
@pytest.mark.fault(28)
def test_a_merge_killed_at_random_leaves_old_or_new_output(place):
    assert killed_and_run_again(place, 10, seed=1) > 0


@pytest.mark.soak
@pytest.mark.fault(28)
def test_300_merges_killed_at_random_leave_old_or_new_output(place):
    assert killed_and_run_again(place, 300, seed=2) > 100


@pytest.mark.soak
@pytest.mark.fault(28)
@pytest.mark.parametrize(("kind", "rounds", "seed"), [("merged graph", 150, 5), ("exported graph", 150, 6)])
def test_300_exports_killed_at_random_leave_old_or_new_graph(place, kind, rounds, seed):
    assert killed_and_run_again(place, rounds, seed=seed, kind=kind) > rounds // 5


@pytest.mark.soak
@pytest.mark.fault(28)
def test_300_publications_killed_at_random_leave_old_or_new_graph(place):
    rng = random.Random(3)
    output = outputs(place)["graph"]
    known = output.versions()
    begun = time.monotonic()
    output.child(1)
    duration, hit = time.monotonic() - begun, 0
    for number in range(300):
        output.child(number % 2, killed_after=rng.uniform(duration / 4, duration))
        assert output.written() in known
        hit += bool(output.leftovers())
        is_cleaned_by_the_next_run(output, number % 2, known)
    print(f"\n300 publications were killed, {hit} of them at work on the output")
    assert hit > 50


@pytest.mark.soak
@pytest.mark.fault(28)
def test_exports_killed_at_random_leave_old_or_new_graph(tmp_path):
    rounds, rng = 30, random.Random(4)
    target = tmp_path / "out.onnx"
    for name, alpha in (("first", 1), ("second", 2)):
        peft_adapter(tmp_path / name, {"dense": (np.ones((1, 8)), np.ones((8, 1)))}, lora_alpha=alpha)

    def start(version: int) -> subprocess.Popen[str]:
        model, adapter = f"{FACTORIES}:scaled", str(tmp_path / ("first", "second")[version])
        line = [sys.executable, "-m", "lora_export", "onnx", model, "-a", adapter, "-o", str(target), "--overwrite"]
        return subprocess.Popen(
            [*line, "--no-verify"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    known, duration = [], 0.0
    for version in (0, 1):
        begun = time.monotonic()
        assert start(version).wait() == 0
        known.append(target.read_bytes())
        duration = time.monotonic() - begun
    for number in range(rounds):
        process = start(number % 2)
        time.sleep(rng.uniform(0, duration))
        process.kill()
        process.wait()
        assert target.read_bytes() in known
        left = {path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")}
        if left or number == rounds - 1:
            process = start(number % 2)
            told = process.communicate()[1]
            assert process.returncode == 0 and all(name in told for name in left)
            assert target.read_bytes() == known[number % 2]
            assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "out.onnx"}
    print(f"\n{rounds} exports were killed")


# --- Ctrl-C and SIGTERM ---


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("kind", "sent", "times"),
    [
        ("folder", signal.SIGINT, 1),
        ("file", signal.SIGINT, 1),
        slow("folder without exchange", signal.SIGINT, 1),
        ("graph", signal.SIGINT, 1),
        slow("folder", signal.SIGINT, 2),
        ("graph", signal.SIGINT, 2),
        slow("folder", signal.SIGTERM, 1),
    ],
)
def test_a_signal_that_asks_leaves_nothing_at_whatever_moment_it_comes(place, kind, sent, times):
    output = outputs(place)[kind]
    known, there = output.versions(), 0
    neighbours = len(output.neighbours())
    word = {signal.SIGINT: "Stopped", signal.SIGTERM: "Terminated"}[sent]
    seen = set()
    for moment in itertools.count(1):
        ended = output.child(1 - there, signal=sent, at=moment, times=times)
        if ended.code == 0:
            break
        assert ended.code == 128 + sent, ended.told
        written = output.written() != known[there]
        there = 1 - there if written else there
        assert output.written() == known[there]
        left = f"{output.target} had been written" if written else "nothing was left behind"
        assert ended.told.splitlines()[-1] == f"{word}; {left}."
        assert output.leftovers() == set() and len(output.neighbours()) == neighbours
        assert "Traceback" not in ended.told
        seen.add(written)
    assert seen == {False, True}, "before and after the output was exchanged"


def large_merge(place: Path, *, rows: int = 16384) -> list[str]:
    """A merge that takes a while: every weight of a base of zeros, which costs no disk; 512 MB unless told."""
    shape = (rows, 8192)
    header = {"fc.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}}
    text = json.dumps(header).encode()
    with (place / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * shape[0] * shape[1])
    peft_adapter(place / "wide", {"fc": (np.ones((1, shape[1])), np.ones((shape[0], 1)))})
    line = ["merge", str(place / "large.safetensors"), str(place / "wide"), "-o", str(place / "out.safetensors")]
    return [*PROGRAM, *line]


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("sent", "times", "delay", "told"),
    [
        (signal.SIGINT, 1, 0.1, "Stopped; nothing was left behind."),
        (signal.SIGINT, 2, 0.05, "Stopped; nothing was left behind."),
        (signal.SIGTERM, 1, 0.05, "Terminated; nothing was left behind."),
    ],
)
def test_ctrl_c_ends_a_large_merge_within_a_second(place, sent, times, delay, told):
    line = large_merge(place)
    before = {path.name for path in place.iterdir()}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(place.glob(".out.safetensors.*.partial/*")):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, "it was over too soon to be stopped"
        begun = time.monotonic()
        for _ in range(times):
            process.send_signal(sent)
            time.sleep(0.005)
        out, err = process.communicate()
        seconds = time.monotonic() - begun
    assert (process.returncode, out, err.strip()) == (128 + sent, "", told)
    assert {path.name for path in place.iterdir()} == before
    assert seconds < 1


@pytest.mark.fault(28)
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_when_all_is_said_changes_nothing(sent):
    # While Python ends, it would be a traceback, or another exit code than the one that was told.
    late = f"import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.{sent}))\n"
    line = [sys.executable, "-c", late + "from lora_export.cli import main; main()", "merge", "--help"]
    done = run_captured(line)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.fault(28)
def test_ctrl_c_that_a_library_swallows_can_be_pressed_again(monkeypatch, capsys):
    monkeypatch.setattr(cli, "PATIENCE", 0.05)

    def deaf(*_: object, **__: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a second one at once changes nothing: the first is at work
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C does nothing any more")

    monkeypatch.setattr(cli.cli, "main", deaf)
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge"])
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def too_large(*_: object, **__: object) -> None:
    np.empty(1 << 60, np.uint8)


def crowded(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("where", "fault", "told"),
    [
        ("lora_export.weights.merge.CheckpointMerge.into", too_large, ": Unable to allocate"),
        ("threading._start_new_thread", crowded, " for one more thread"),
    ],
)
def test_too_little_memory_is_told_and_leaves_the_old_output(place, where, fault, told, monkeypatch, capsys):
    line = merge_line(place, "base", "out", 0)
    assert cli.run(line) == 0
    before = folder_contents(place)
    monkeypatch.setattr(where, fault)
    assert cli.run(line) == 6
    assert capsys.readouterr().err.startswith(f"Error: there is not enough memory{told}")
    assert folder_contents(place) == before


@pytest.mark.slow
@pytest.mark.fault(28)
def test_at_any_memory_limit_a_merge_completes_or_is_refused(place):
    line = large_merge(place, rows=2048)
    before = {path.name for path in place.iterdir()}
    codes = []
    for limit in range(160 << 20, 1 << 30, 60 << 20):  # bytes of address space; a Python with NumPy takes 150 MB
        done = run_captured(line, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        codes.append(done.returncode)
        assert done.returncode in (0, 6), done.stderr
        if done.returncode:
            assert done.stderr.startswith("Error: there is not enough memory")
            assert "Traceback" not in done.stderr
            assert {path.name for path in place.iterdir()} == before
        else:
            (place / "out.safetensors").unlink()
    assert codes[0] == 6
    assert codes[-1] == 0


# --- A full disk ---


def positions(sizes: list[int]) -> list[int]:
    """Lengths at which a file stops: in and around every part of every file, and a few steps between."""
    around = {0, 1, 7, 8, 9, *(size + off for size in sizes for off in (-1, 0)), *(size // 2 for size in sizes)}
    return sorted(size for size in {*around, *range(0, max(sizes), max(sizes) // 12)} if 0 <= size < max(sizes))


@pytest.mark.fault(27)
@pytest.mark.parametrize("kind", [slow("folder"), "file", "graph", slow("merged graph")])
def test_a_disk_full_at_any_byte_keeps_the_old_output(place, kind):
    output = outputs(place)[kind]
    new, old = output.versions()[::-1]
    before = folder_contents(place)
    before.pop("log")
    for limit in positions([len(content) for content in new.values()]):
        ended = output.child(1, limit=limit)
        assert ended.code == 7, (limit, ended.told)
        assert re.fullmatch(
            r"Error: .* could not be written: (File too large|.*requested and \d+ written).*\n", ended.told
        )
        now = folder_contents(place)
        now.pop("log")
        assert now == before, limit
    assert output.written() == old
    assert output.child(1, limit=max(map(len, new.values()))).code == 0
    assert output.written() == new


@pytest.mark.fault(27)
@EVERY_OTHER
def test_a_full_disk_and_an_existing_output_end_other_commands_with_7(others, command, capsys):
    before = folder_contents(others)
    ended = fault_injector.run(fault_injector.command, *OTHERS[command], log=others / "log", limit=64)
    (others / "log").unlink()
    assert ended.code == 7 and re.fullmatch("Error: .* could not be written: .*\n", ended.told), ended.told
    assert folder_contents(others) == before
    assert cli.run(OTHERS[command]) == 0
    written = folder_contents(others)
    capsys.readouterr()
    assert cli.run(OTHERS[command]) == 7 and "exists already; add --overwrite" in capsys.readouterr().err
    assert folder_contents(others) == written
    # Nothing in a base that came back says who wrote it.
    assert cli.run([*OTHERS[command], "--overwrite"]) == (7 if command == "unmerge" else 0)


FULL = """
    import json, os, shutil, sys
    from pathlib import Path
    from lora_export import cli

    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(0, 0, 1 << 40)  # so that the disk itself is what says no
    place, size = Path("."), int(sys.argv[1])
    line = ["merge", sys.argv[2], sys.argv[3], "-o", "full/out", "--overwrite"]
    def everything():
        return {str(path): path.read_bytes().hex() for path in Path("full").rglob("*") if path.is_file()}
    codes = []
    for ballast in range(size, -1, -4096):
        Path("full/ballast").write_bytes(bytes(ballast))
        before = everything()
        code = cli.run(line)
        assert code == 0 or everything() == before, (ballast, code)
        codes.append(code)
        if code == 0:
            break
    print(json.dumps(codes))
"""


@pytest.mark.fault(27)
def test_a_small_disk_that_is_really_full_leaves_the_old_output(place):
    (place / "full").mkdir()
    assert cli.run(["merge", str(place / "base"), str(place / "first"), "-o", str(place / "old")]) == 0
    size = sum(-len(content) // 4096 * -4096 for content in folder_contents(place / "old").values())
    script = [sys.executable, "-c", textwrap.dedent(FULL), str(size), "base", "second"]
    mounting = f"mount -t tmpfs -o size={2 * size + 8192} none full && cp -r old full/out"
    done = alone(place, mounting, *script)
    assert done.returncode == 0, done.stderr
    *failed, last = json.loads(done.stdout.splitlines()[-1])
    assert set(failed) == {7} and last == 0
    assert done.stderr.count("No space left on device") == len(failed) > 2


@pytest.mark.slow
@pytest.mark.fault(27)
@pytest.mark.parametrize("command", [pytest.param("onnx", marks=pytest.mark.slow), "torchscript"])
def test_a_full_disk_during_an_export_ends_with_7(tmp_path, command):
    (tmp_path / "out").write_text("old")
    line = [*PROGRAM, command, f"{FACTORIES}:scaled", "-o", "out", "--overwrite", "--no-verify"]
    # Python would cut its cache of a module at the same size, and each later import of the module would fail.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    done = run_captured(line, cwd=tmp_path, env=environment, preexec_fn=full)
    assert (done.returncode, done.stderr) == (7, "Error: out could not be written: File too large\n")
    assert folder_contents(tmp_path) == {"out": b"old"}


@pytest.mark.fault(27)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_unwritable_stdout_ends_with_7_without_a_traceback(place):
    line = [*PROGRAM, *merge_line(place, "base", "out", 0)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (
            7,
            "Error: the output could not be written: No space left on device\n",
        )
        assert_whole(place / "out")
        line[line.index(str(place / "base"))] = "nowhere"
        assert subprocess.run(line, stdout=full, stderr=full, check=False).returncode == 3


def test_a_reader_who_has_seen_enough_is_no_failure_of_ours(place):
    line = [*PROGRAM, *merge_line(place, "base", "out", 0)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert_whole(place / "out")


# --- Power loss ---


def calls(place: Path, *line: str) -> list[tuple[str, list[str]]]:
    """The system calls of a command that make files last or give them names, with the paths they are about."""
    log = place / "strace.log"
    traced = ["strace", "-f", "-y", "-qq", "-s", "9999", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    done = run_captured([*traced, "-o", log, *line])
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not look here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = (re.search(r"(fsync|fdatasync|rename\w*)\((.*)\)\s+= 0", text) for text in log.read_text().splitlines())
    log.unlink()
    return [(match[1], re.findall(r'(?:"|\d<)(/[^">]*)', match[2])) for match in found if match]


GRAPH = (
    "import sys; sys.path.append(sys.argv[2]); from support.fault_injector import publish_graph; "
    "publish_graph(sys.argv[1], 1.0)"
)


@pytest.mark.fault(29)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed; test_files looks from inside")
@pytest.mark.parametrize("kind", ["folder", "file", "graph", "merged graph"])
def test_data_is_synced_before_the_rename_and_the_rename_after(place, kind):
    output = outputs(place)[kind]
    output.versions()
    line = [sys.executable, "-c", GRAPH, str(output.target), str(ROOT / "tests")]
    if kind != "graph":
        line = [*PROGRAM, *output.write(1)[1:]]
    made = calls(place, *line)
    flushes = [number for number, (call, _) in enumerate(made) if call in ("fsync", "fdatasync")]
    names = [
        number for number, (call, (*_, to)) in enumerate(made) if call.startswith("rename") and Path(to).parent == place
    ]
    flushed = [made[number][1][0] for number in flushes if number < names[0]]
    (stage,) = {path for path in flushed if path.endswith(".partial")}
    contents = output.written()
    expected = {name for name in contents if kind != "folder"} or set(contents)
    assert {os.path.relpath(path, stage) for path in flushed} == {".", *expected}
    last = max(names)
    assert [made[number][1] for number in flushes if number > last] == [[str(place)]]
    if "graph" in kind:  # first the data and its name, then the graph that knows the name
        assert [Path(made[number][1][-1]).suffix for number in names] == [".data", ".onnx"]
        assert [made[number][1] for number in flushes if names[0] < number < last] == [[str(place)]]


# --- Places ---


def alone(place: Path, mounting: str, *line: object) -> subprocess.CompletedProcess[str]:
    """A command in a file system of its own, where something is mounted first; skips where that is not allowed."""
    done = run_captured(
        ["unshare", "--mount", "sh", "-c", f'{mounting} && exec "$@"', "sh", *map(str, line)], cwd=place
    )
    if re.search("^(unshare|mount): ", done.stderr):
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    return done


LOCKED = r"could not be written: (Permission denied|Read-only file system)"


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("command", "spot", "message"),
    [
        ("merge", "locked/out", LOCKED),
        ("factory", "locked/out", LOCKED),
        *(slow(command, "locked/out", LOCKED) for command in OTHERS),
        ("merge", "loop/out", "loop is not a folder, so nothing can be written into it"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_before_any_work(others, command, spot, message):
    place = others
    (place / "locked").mkdir(0o500)
    (place / "loop").symlink_to("loop")
    # Only the work itself would find out that there is no factory, and that this value is not finite.
    base_file(place / "bad.safetensors", {"fc1.weight": W + np.inf, "fc2.weight": W})
    bad = {"merge": ["merge", "bad.safetensors", "first"], "factory": ["onnx", "factory.py:make"]}
    what = bad[command] if command in bad else OTHERS[command][:-2]
    line = [*PROGRAM, *what, "-o", spot]
    before = folder_contents(place)
    if os.geteuid() == 0:  # root ignores mode bits
        done = alone(place, "mount --bind locked locked && mount -o remount,bind,ro locked", *line)
    else:
        done = run_captured(line, cwd=place)
    (place / "locked").chmod(0o700)
    assert (done.returncode, done.stdout) == (7, "")
    assert re.fullmatch(f"Error: .*{message}\n", done.stderr), done.stderr
    assert folder_contents(place) == before


@pytest.mark.fault(31)
def test_an_output_inside_an_input_is_detected_under_any_name(place):
    # As on a file system that takes BASE for base: the same folder under another name, without any link.
    (place / "BASE").mkdir()
    before = folder_contents(place)
    for out, message in [
        ("BASE/out", f"Error: the output {place}/BASE/out is inside the input {place}/base\n"),
        ("BASE", f"Error: the output {place}/BASE is the input {place}/base\n"),
    ]:
        line = ["merge", "base", "first", "-o", out, "--overwrite"]
        done = alone(place, "mount --bind base BASE", *PROGRAM, *line)
        assert (done.returncode, done.stderr) == (7, message)
    done = alone(
        place, "cp -r base out && mount --bind out BASE", *PROGRAM, "merge", "BASE", "first", "-o", "out", "--overwrite"
    )
    assert (done.returncode, done.stderr) == (7, f"Error: the output {place}/out is the input {place}/BASE\n")
    shutil.rmtree(place / "out")
    assert folder_contents(place) == before


@pytest.mark.fault(31)
def test_an_output_that_holds_what_an_input_links_to_is_not_replaced(place, capsys):
    assert cli.run(merge_line(place, "base", "out", 0)) == 0
    linked = place / "linked"
    linked.mkdir()
    for path in (place / "out").iterdir():
        if path.suffix == ".safetensors":
            (linked / path.name).symlink_to(f"../out/{path.name}")
        elif path.name != MANIFEST:
            shutil.copy(path, linked)
    before = folder_contents(place)
    assert cli.run(["merge", str(linked), str(place / "second"), "-o", str(place / "out"), "--overwrite"]) == 7
    assert re.search(r"the input .*/out/.* is inside the output .*/out, which would be", capsys.readouterr().err)
    assert folder_contents(place) == before


@pytest.mark.fault(30, 31)
@pytest.mark.parametrize(
    ("base", "out", "told"),
    [
        ("base", "base", "base is the input {place}/base"),
        ("base", "alias", "alias is the input {place}/base"),
        ("alias", "base", "base is the input {place}/base"),
        ("base", "first/../base", "base is the input {place}/base"),
        ("base", "first", "first is the input {place}/first"),
        ("base", "base/merged", "base/merged is inside the input {place}/base"),
        ("base", "base/no/such", "base/no/such is inside the input {place}/base"),
        ("base", "alias/merged", "base/merged is inside the input {place}/base"),
        ("base", "first/merged", "first/merged is inside the input {place}/first"),
        ("bare.safetensors", "first/out.safetensors", "first/out.safetensors is inside the input {place}/first"),
        *(("bare.safetensors", out, f"{out} is the input {{place}}/bare.safetensors") for out in ("hard", "link")),
        ("bare.safetensors", "bare.safetensors", "bare.safetensors is the input {place}/bare.safetensors"),
    ],
)
def test_an_output_that_is_an_input_by_whatever_name_is_refused(place, capsys, base, out, told):
    (place / "link").symlink_to("bare.safetensors")
    (place / "alias").symlink_to("base")
    (place / "hard").hardlink_to(place / "bare.safetensors")
    before = folder_contents(place)
    assert cli.run(merge_line(place, base, out, 0)) == 7
    assert capsys.readouterr().err == f"Error: the output {place}/{told.format(place=place)}\n"
    assert folder_contents(place) == before and (place / "link").is_symlink() and (place / "alias").is_symlink()


@pytest.mark.fault(32)
@pytest.mark.parametrize("goal", ["elsewhere", "nowhere"])
@pytest.mark.parametrize("base", ["base", "bare.safetensors"])
def test_a_link_swapped_in_for_the_output_is_not_followed(place, monkeypatch, capsys, base, goal):
    (place / "elsewhere").mkdir()
    working = merge.CheckpointMerge.into

    target = place / f"out{Path(base).suffix}"

    def slow(*arguments: Any, **options: Any) -> Any:
        target.symlink_to(place / goal)
        return working(*arguments, **options)

    monkeypatch.setattr(merge.CheckpointMerge, "into", slow)
    assert cli.run(merge_line(place, base, target.name, 0)) == 7
    assert f"{target} is a symbolic link; name the file or folder that it refers to" in capsys.readouterr().err
    assert target.is_symlink() and not any((place / "elsewhere").iterdir())
    assert not (place / "nowhere").exists() and not outputs(place)["folder"].leftovers()


@pytest.mark.fault(33)
@pytest.mark.parametrize("command", [*OTHERS, "merge"])
def test_a_second_run_on_one_output_ends_at_once(others, command, capsys):
    line = OTHERS.get(command, ["merge", "base", "first", "-o", "new"])
    *_, name = line
    stage = atomic_output.stage_file if "." in name else atomic_output.stage_folder
    with stage(others / name, inputs=()) as work:
        before = folder_contents(others)
        assert cli.run(line) == 7
        assert capsys.readouterr().err == f"Error: another run (process {os.getpid()}) is writing {others / name}\n"
        assert folder_contents(others) == before
        (work / (name if "." in name else "whole")).touch()


@pytest.mark.fault(42)
@pytest.mark.parametrize("command", [*OTHERS, "inspect"])
def test_sources_that_change_while_they_are_read_are_refused(others, command, monkeypatch, capsys):
    opened = safetensors_file.open_file

    def then_changed(path: Path) -> safetensors_file.TensorFile:
        file = opened(path)
        os.utime(path)
        return file

    monkeypatch.setattr(safetensors_file, "open_file", then_changed)
    before = folder_contents(others)
    words = OTHERS.get(command, ["inspect", "first"])
    assert cli.run(words) == 3
    nothing = r"Nothing was written\.\n" if "-o" in words else ""
    assert re.fullmatch(rf"Error: .* changed while it was being \w+\n{nothing}", capsys.readouterr().err)
    assert folder_contents(others) == before


@pytest.mark.fault(34)
def test_shards_of_an_old_count_go_and_foreign_files_stay(place, capsys):
    output = outputs(place)["folder"]
    assert output.child(0).code == 0
    assert cli.run(["merge", str(place / "bare.safetensors"), str(place / "first"), "-o", str(place / "out")]) == 7
    (place / "single").mkdir()
    (place / "single/model.safetensors").write_bytes((place / "bare.safetensors").read_bytes())
    (place / "out/link").symlink_to(place / "first")
    assert cli.run(merge_line(place, "single", "out", 1)) == 7
    assert "does not delete them. Remove them, or choose another output: link" in capsys.readouterr().err
    (place / "out/link").unlink()
    assert cli.run(merge_line(place, "single", "out", 1)) == 0
    assert set(folder_contents(place / "out")) == {"model.safetensors", MANIFEST}


@pytest.mark.fault(35)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_a_merge_has_the_modes_that_the_umask_says(place, umask):
    out = place / "out.safetensors"
    out.touch(0o644)
    before = os.umask(umask)
    try:
        assert cli.run(merge_line(place, "base", "out", 0)) == 0
        assert cli.run(merge_line(place, "bare.safetensors", "out.safetensors", 0)) == 0
    finally:
        os.umask(before)
    for path in (place / "out", *(place / "out").iterdir(), out):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.fault(47)
@pytest.mark.parametrize("scratch", ["nowhere", "full"])
def test_a_merge_needs_no_scratch_folder_and_no_right_clock(place, scratch):
    (place / "full").mkdir()
    for path in place.rglob("*"):
        os.utime(path, (2**33, 2**33))  # the year 2242
    line = ["env", f"TMPDIR={place / scratch}", *PROGRAM, *merge_line(place, "base", "out", 0)]
    done = alone(place, "mount -t tmpfs -o size=4096,ro none full", *line) if scratch == "full" else run_captured(line)
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(place / "out")


@pytest.mark.fault(47)
def test_the_stage_lies_beside_its_target_whatever_else_is_mounted(place):
    # The target's folder is a file system of its own: a stage anywhere else could not be renamed into it (EXDEV).
    (place / "disk").mkdir()
    mounting = "mount -t tmpfs -o size=1m none disk"
    check = 'for i in 1 2; do "$@" || exit; done; cat disk/out/lora_export.json; ls -A disk'
    line = [*PROGRAM, "merge", "base", "first", "-o", "disk/out", "--overwrite"]
    done = alone(place, mounting, "sh", "-c", check, "sh", *line)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"sha256"' in done.stdout and done.stdout.splitlines()[-1] == "out"


# --- Inputs of strange kinds ---


def in_a_cache(folder: Path, cache: Path) -> Path:
    """A folder's files as a Hugging Face cache keeps them; returns the snapshot."""
    snapshot = cache / "models--a--b/snapshots" / ("0" * 40)
    (cache / "models--a--b/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = file_sha256(path)
        shutil.copyfile(path, cache / "models--a--b/blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.mark.fault(41)
def test_a_hugging_face_snapshot_is_a_base_and_an_adapter(place):
    assert cli.run(merge_line(place, "base", "out", 0)) == 0
    base, adapter = in_a_cache(place / "base", place / "hub"), in_a_cache(place / "first", place / "hub2")
    before = folder_contents(place)
    assert cli.run(["merge", str(base), str(adapter), "-o", str(place / "again")]) == 0
    after = folder_contents(place)
    weights = {name for name in folder_contents(place / "out") if name.endswith((".safetensors", "index.json"))}
    assert all(after[f"again/{name}"] == after[f"out/{name}"] for name in weights)
    assert not any(path.is_symlink() for path in (place / "again").rglob("*"))
    assert {name: content for name, content in after.items() if not name.startswith("again/")} == before


@pytest.mark.fault(41)
def test_a_base_that_cannot_be_written_to_is_read(place):
    mounting = "mount --bind base base && mount -o remount,bind,ro base"
    done = alone(place, mounting, *PROGRAM, "merge", "base", "first", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(place / "out")


# --- Names ---

NAMES = {
    "spaces": "with two  spaces",
    "composed": "gr\u00f6\u00dfe",
    "decomposed": "gro\u0308\u00dfe",
    "newline": "new\nline",
    "escape": "\x1b[2Jred\x07",
    "reversed": "\u202egnp.exe",
    "dash": "-v",
    "long": "n" * 240,
    "longest": "n" * 255,
    "two bytes": "é" * 127,
    "three bytes": "模型",
    "no text": os.fsdecode(b"not-utf8-\xff\x9b"),
    "equals": "a=b",
    "markup": "[bold]%s{}$(true)",
}
EVERY_NAME = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())


def is_harmless(told: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in told)


@pytest.mark.fault(40)
@EVERY_NAME
def test_any_name_is_a_name_for_base_adapter_and_output(place, name):
    for word in ("base", "first"):
        (place / word).rename(place / "moved")
        (place / word).mkdir()
        (place / "moved").rename(place / word / name)
    (place / "into").mkdir()
    line = ["merge", str(place / "base" / name), str(place / "first" / name), "-o", str(place / "into" / name)]
    for more, lines in (([], 1), (["--overwrite", "-v"], 4)):
        ended = fault_injector.run(fault_injector.command, *line, *more, log=place / "log")
        assert ended.code == 0, ended.told
        assert ended.told.count("\n") == lines and is_harmless(ended.told), ended.told
    assert_whole(place / "into" / name)
    assert [path.name for path in (place / "into").iterdir()] == [name]


@pytest.mark.fault(40)
@EVERY_NAME
@pytest.mark.parametrize("role", ["base", "adapter", "output"])
def test_any_name_in_an_error_is_one_harmless_line(place, name, role):
    words = {"base": "base", "adapter": "first", "output": "out"} | {role: f"{name}/x"}
    if role == "output":
        (place / name).touch()  # a file, where the output needs a folder
    base, adapter, output = (str(place / word) for word in words.values())
    ended = fault_injector.run(fault_injector.command, "merge", base, adapter, "-o", output, log=place / "log")
    assert ended.code == (7 if role == "output" else 3)
    lines = 1 if role == "output" else 2  # the second: nothing was written
    assert ended.told.startswith("Error: ") and ended.told.count("\n") == lines and is_harmless(ended.told)
    assert not (place / "out").exists()


@pytest.mark.fault(40)
def test_a_leading_dash_without_a_path_is_an_option_that_nobody_knows(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli.run(["merge", "-\x1b[2J", "first", "-o", "out"]) == 2
    told = capsys.readouterr().err
    assert "No such option" in told and is_harmless(told)
    (place / "base").rename(place / "-base")
    assert cli.run(["merge", "-o", "out", "--", "-base", "first"]) == 0


@pytest.mark.fault(40)
def test_what_the_terminal_has_no_letters_for_is_told_all_the_same(place):
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    line = [*PROGRAM, "merge", "base", "first", "-o", "\u6a21\udcff"]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u6a21\udcff" in done.stdout


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", ["n" * 256, "é" * 128, "n/" * 3000])
@pytest.mark.parametrize("command", ["merge base", "merge adapter", "merge output", "inspect", "verify", "onnx output"])
def test_names_that_are_too_long_are_one_clear_error(place, monkeypatch, capsys, name, command):
    monkeypatch.chdir(place)
    line = {
        "merge base": ["merge", name, "first", "-o", "out"],
        "merge adapter": ["merge", "base", name, "-o", "out"],
        "merge output": ["merge", "base", "first", "-o", name],
        "inspect": ["inspect", name],
        "verify": ["verify", name, "--model", "x:y"],
        "onnx output": ["onnx", "x:y", "-o", name],
    }[command]
    before = folder_contents(place)
    assert cli.run(line) in (3, 7)
    told = capsys.readouterr().err
    assert re.search("too long|longer than 255 bytes", told) and told.count("\n") == 1
    assert command != "merge output" or "/" in name or "the output's name is longer than 255 bytes" in told
    assert folder_contents(place) == before


@pytest.mark.fault(40)
def test_a_path_near_the_longest_works(place, monkeypatch):
    deep = place
    while len(os.fsencode(deep)) < 3500:
        deep = deep / ("d" * 200)
    deep.mkdir(parents=True)
    assert cli.run(["merge", str(place / "base"), str(place / "first"), "-o", str(deep / "out")]) == 0
    assert_whole(deep / "out")


@pytest.mark.fault(39)
def test_exporting_over_an_export_takes_no_more_room_each_time(place):
    output = outputs(place)["graph"]
    rooms = set()
    for version in (0, 1, 0, 0):
        assert output.child(version).code == 0
        rooms.add(sum(map(len, output.written().values())))
        assert {path.name for path in place.glob("m.onnx*")} == set(output.written())
    assert len(rooms) == 1


@pytest.mark.fault(40)
def test_a_graph_with_the_longest_name_has_its_data_beside_it(place):
    target = place / ("n" * 250 + ".onnx")
    ended = fault_injector.run(fault_injector.publish_graph, str(target), 1.0, log=place / "log")
    assert ended.code == 0, ended.told
    again = fault_injector.run(fault_injector.publish_graph, str(target), 2.0, log=place / "log")
    assert again.code == 0 and again.told.startswith("removed ")
    (data,) = (path for path in place.iterdir() if path.name.endswith(".data") and path.name != "base.data")
    weight = load_graph(target).graph.initializers["w"].const_value
    assert weight is not None and np.all(weight.numpy() == 2) and data.stat().st_size == 64 * 64 * 4
