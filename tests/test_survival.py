"""Whatever strikes - a kill, a full disk, Ctrl-C, a second run - the output is the old or the new one, and whole."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
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
import saboteur
from handmade import base_file, peft_adapter
from saboteur import Ended

from lora_export import cli, files, merge
from lora_export.graph import files as graphs

ROOT = Path(__file__).parents[1]
W = np.arange(6).reshape(2, 3)
A, B = [[1, 2, 3]], [[1], [10]]
Contents = dict[str, bytes]


def everything(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    return tmp_path


@dataclass(frozen=True)
class Output:
    """Something that the program writes in two versions: `write(version)` says what to run in a child."""

    target: Path
    write: Callable[[int], tuple[Any, ...]]

    def child(self, version: int, **sabotage: Any) -> Ended:
        return saboteur.run(*self.write(version), log=self.target.parent / "log", **sabotage)

    def written(self) -> Contents:
        """The output as its readers find it; a folder must be what its manifest says, to the byte."""
        if self.target.is_dir():
            assert_whole(self.target)
            return everything(self.target)
        parts = {self.target.name: self.target.read_bytes()}
        if self.target.suffix == ".onnx":
            graph = onnx.load_from_string(parts[self.target.name])
            assert graphs.load(self.target).graph.initializers["w"].const_value is not None
            named = {entry.value for entry in graph.graph.initializer[0].external_data if entry.key == "location"}
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
    recorded = files.read_manifest(folder)["files"]
    contents = everything(folder)
    assert set(contents) == {*recorded, files.MANIFEST}
    for name, facts in recorded.items():
        assert (len(contents[name]), files.sha256(folder / name)) == (facts["bytes"], facts["sha256"]), name


def merge_line(place: Path, base: str, out: str, version: int) -> list[str]:
    return [
        "merge",
        str(place / base),
        str(place / ("first", "second")[version]),
        "-o",
        str(place / out),
        "--overwrite",
    ]


def outputs(place: Path) -> dict[str, Output]:
    def merged(base: str, out: str, work: Callable[..., None] = saboteur.command) -> Output:
        return Output(place / out, lambda version: (work, *merge_line(place, base, out, version)))

    graph = place / "m.onnx"
    return {
        "folder": merged("base", "out"),
        "file": merged("bare.safetensors", "out.safetensors"),
        "folder without exchange": merged("base", "out", saboteur.command_without_exchange),
        "graph": Output(graph, lambda version: (saboteur.publish_graph, str(graph), float(version + 1))),
    }


EVERY_OUTPUT = pytest.mark.parametrize("kind", ["folder", "file", "folder without exchange", "graph"])


# --- SIGKILL ---


def is_cleaned_by_the_next_run(output: Output, version: int, known: tuple[Contents, Contents]) -> None:
    left = output.leftovers()
    after = output.child(version)
    assert (after.code, output.written()) == (0, known[version]), after.told
    assert output.leftovers() == set()
    back = "put out back, which a run that was killed had set aside"
    for name in left - {path for path in left if path.endswith(".lock")}:
        removed = f"removed {Path(name).with_suffix('.partial')}, which a run that was killed had left behind"
        assert removed in after.told or (name.endswith(".old") and back in after.told)


@pytest.mark.fault(28)
@EVERY_OUTPUT
def test_a_kill_at_any_moment_leaves_the_old_output_or_the_new_one_and_the_next_run_cleans_up(place, kind):
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
            assert everything(aside) in known
        else:
            assert output.written() in known
        is_cleaned_by_the_next_run(output, version, known)
        assert len(output.neighbours()) == len(neighbours)  # a graph's data has another name each time
    assert moment > 8, "hardly anything was struck"


@pytest.mark.fault(28)
def test_a_first_graph_that_is_killed_between_its_two_files_is_written_by_the_next_run(place):
    output = outputs(place)["graph"]
    for moment in itertools.count(1):
        ended = output.child(0, signal=signal.SIGKILL, at=moment)
        if ended.code == 0:
            break
        if any(output.target.parent.glob("m.onnx.*.data")) and not output.target.exists():
            data = next(output.target.parent.glob("m.onnx.*.data"))
            with files.stage_file(output.target, inputs=()) as stage:  # not told to overwrite anything
                for name in (output.target.name, data.name):
                    (stage / name).write_bytes(b"again")
            assert data.read_bytes() == b"again"
            return
    pytest.fail("it was never killed between its two files")


def killed_and_run_again(place: Path, rounds: int, *, seed: int) -> int:
    """A real merge over an old output, killed by the clock; how many of the rounds met it at work on its output."""
    rng = random.Random(seed)
    base_file(place / "base/model-00001-of-00002.safetensors", {"fc1.weight": W, "fc1.weight.rest": np.ones(1 << 20)})
    output = outputs(place)["folder"]
    known = output.versions()

    def start(version: int) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "lora_export", *merge_line(place, "base", "out", version)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begun = time.monotonic()
    assert start(1).wait() == 0
    duration, hit = time.monotonic() - begun, 0
    for number in range(rounds):
        version = number % 2
        process = start(version)
        if number % 4:  # three of four strike the work itself, whatever Python's start takes today
            until = time.monotonic() + duration * 3
            while not output.leftovers() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.0005)
        time.sleep(rng.uniform(0, duration if number % 4 == 0 else duration / 8))
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
    print(f"\n{rounds} merges were killed, {hit} of them at work on the output; a whole run takes {duration:.2f} s")
    return hit


@pytest.mark.fault(28)
def test_a_merge_that_is_killed_at_random_leaves_the_old_output_or_the_new_one(place):
    assert killed_and_run_again(place, 10, seed=1) > 0


@pytest.mark.soak
@pytest.mark.fault(28)
def test_300_merges_that_are_killed_at_random_leave_the_old_output_or_the_new_one(place):
    assert killed_and_run_again(place, 300, seed=2) > 100


@pytest.mark.soak
@pytest.mark.fault(28)
def test_300_graphs_whose_publication_is_killed_at_random_are_the_old_one_or_the_new_one(place):
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
def test_exports_that_are_killed_at_random_leave_the_old_graph_or_the_new_one(tmp_path):
    rounds, rng = 30, random.Random(4)
    target = tmp_path / "out.onnx"
    for name, alpha in (("first", 1), ("second", 2)):
        peft_adapter(tmp_path / name, {"dense": (np.ones((1, 8)), np.ones((8, 1)))}, lora_alpha=alpha)

    def start(version: int) -> subprocess.Popen[str]:
        model, adapter = f"{ROOT / 'tests/factories.py'}:scaled", str(tmp_path / ("first", "second")[version])
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
@EVERY_OUTPUT
@pytest.mark.parametrize(("sent", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_that_asks_leaves_nothing_at_whatever_moment_it_comes(place, kind, sent, times):
    output = outputs(place)[kind]
    known = output.versions()
    neighbours = len(output.neighbours())
    seen = set()
    for moment in itertools.count(1):
        old, version = known[(moment + 1) % 2], moment % 2
        ended = output.child(version, signal=sent, at=moment, times=times)
        if ended.code == 0:
            break
        assert ended.code == 128 + sent, ended.told
        *_, last = ended.told.splitlines()
        word = {signal.SIGINT: "Stopped", signal.SIGTERM: "Terminated"}[sent]
        written = output.written() != old
        assert output.written() == known[version if written else 1 - version]
        assert last == f"{word}; {f'{output.target} had been written' if written else 'nothing was left behind'}."
        assert output.leftovers() == set() and len(output.neighbours()) == neighbours
        assert "Traceback" not in ended.told
        seen.add(written)
        assert output.child(version).code == 0
    assert seen == {False, True}, "before and after the output was exchanged"


def large_merge(place: Path) -> list[str]:
    """A merge that takes a second or more: all of a base of 512 MB, which costs no disk."""
    shape = (16384, 8192)
    header = {"fc.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}}
    text = json.dumps(header).encode()
    with (place / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * shape[0] * shape[1])
    peft_adapter(place / "wide", {"fc": (np.ones((1, shape[1])), np.ones((shape[0], 1)))})
    line = ["merge", str(place / "large.safetensors"), str(place / "wide"), "-o", str(place / "out.safetensors")]
    return [sys.executable, "-m", "lora_export", *line]


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("sent", "times", "delay", "told"),
    [
        (signal.SIGINT, 1, 0.0, "Stopped; nothing was left behind."),
        (signal.SIGINT, 1, 0.1, "Stopped; nothing was left behind."),
        (signal.SIGINT, 2, 0.05, "Stopped; nothing was left behind."),
        (signal.SIGTERM, 1, 0.05, "Terminated; nothing was left behind."),
    ],
)
def test_ctrl_c_in_the_middle_of_a_large_merge_ends_it_within_a_second(place, sent, times, delay, told):
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


@pytest.mark.fault(28)
def test_too_little_memory_is_told_and_leaves_the_old_output(place, monkeypatch, capsys):
    line = merge_line(place, "base", "out", 0)
    assert cli.run(line) == 0
    before = everything(place)

    def too_large(*_: object, **__: object) -> None:
        np.empty(1 << 60, np.uint8)

    monkeypatch.setattr(merge, "merge_checkpoint", too_large)
    assert cli.run(line) == 6
    assert capsys.readouterr().err.startswith("Error: there is not enough memory: Unable to allocate")
    assert everything(place) == before


# --- A full disk ---


def positions(sizes: list[int]) -> list[int]:
    """Lengths at which a file stops: in and around every part of every file, and a few steps between."""
    around = {0, 1, 7, 8, 9, *(size + off for size in sizes for off in (-1, 0)), *(size // 2 for size in sizes)}
    return sorted(size for size in {*around, *range(0, max(sizes), max(sizes) // 12)} if 0 <= size < max(sizes))


@pytest.mark.fault(27)
@pytest.mark.parametrize("kind", ["folder", "file", "graph"])
def test_a_disk_that_is_full_at_any_byte_ends_with_7_and_leaves_the_old_output(place, kind):
    output = outputs(place)[kind]
    new, old = output.versions()[::-1]
    before = everything(place)
    before.pop("log")
    for limit in positions([len(content) for content in new.values()]):
        ended = output.child(1, limit=limit)
        assert ended.code == 7, (limit, ended.told)
        assert re.fullmatch(
            r"Error: .* could not be written: (File too large|.*requested and \d+ written).*\n", ended.told
        )
        now = everything(place)
        now.pop("log")
        assert now == before, limit
    assert output.written() == old
    assert output.child(1, limit=max(map(len, new.values()))).code == 0
    assert output.written() == new


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
    size = sum(-len(content) // 4096 * -4096 for content in everything(place / "old").values())
    script = [sys.executable, "-c", textwrap.dedent(FULL), str(size), "base", "second"]
    mounting = f"mount -t tmpfs -o size={2 * size + 8192} none full && cp -r old full/out"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mounting} && exec "$@"', "sh", *script],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search("^(unshare|mount): ", done.stderr):
        pytest.skip(f"a small disk can be made by root only: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    *failed, last = json.loads(done.stdout.splitlines()[-1])
    assert set(failed) == {7} and last == 0
    assert done.stderr.count("No space left on device") == len(failed) > 2


@pytest.mark.fault(27)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_an_answer_that_cannot_be_written_ends_with_7_and_without_a_traceback(place):
    line = [sys.executable, "-m", "lora_export", *merge_line(place, "base", "out", 0)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (
            7,
            "Error: the answer could not be written: No space left on device\n",
        )
        assert_whole(place / "out")
        line[line.index(str(place / "base"))] = "nowhere"
        assert subprocess.run(line, stdout=full, stderr=full, check=False).returncode == 3


def test_a_reader_who_has_seen_enough_is_no_failure_of_ours(place):
    line = [sys.executable, "-m", "lora_export", *merge_line(place, "base", "out", 0)]
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
    done = subprocess.run([*traced, "-o", log, *line], capture_output=True, text=True, check=False)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not look here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = (re.search(r"(fsync|fdatasync|rename\w*)\((.*)\)\s+= 0", text) for text in log.read_text().splitlines())
    log.unlink()
    return [(match[1], re.findall(r'(?:"|\d<)(/[^">]*)', match[2])) for match in found if match]


GRAPH = "import sys; sys.path.append(sys.argv[2]); import saboteur; saboteur.publish_graph(sys.argv[1], 1.0)"


@pytest.mark.fault(29)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed; test_files looks from inside")
@pytest.mark.parametrize("kind", ["folder", "file", "graph"])
def test_everything_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(place, kind):
    output = outputs(place)[kind]
    output.versions()
    line = [sys.executable, "-c", GRAPH, str(output.target), str(ROOT / "tests")]
    if kind != "graph":
        line = [sys.executable, "-m", "lora_export", *output.write(1)[1:]]
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
    if kind == "graph":  # first the data and its name, then the graph that knows the name
        assert [Path(made[number][1][-1]).suffix for number in names] == [".data", ".onnx"]
        assert [made[number][1] for number in flushes if names[0] < number < last] == [[str(place)]]
