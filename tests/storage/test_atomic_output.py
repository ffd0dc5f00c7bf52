"""Outputs are whole or absent, whatever happens. Files of others are not touched."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from lora_export.errors import OutputFailed
from lora_export.storage import atomic_output
from lora_export.storage.manifest import MANIFEST, write_manifest
from lora_export.storage.publication import watched


def write_folder(target: Path, content: str = "new", **options: object) -> None:
    """An output folder as a command makes it."""
    with atomic_output.stage_folder(target, inputs=options.pop("inputs", ()), **options) as stage:
        (stage / "sub").mkdir()
        (stage / "sub/model").write_text(content)
        write_manifest(stage, {"made_by": "a test"})


def write_file(target: Path, content: str = "new", **options: object) -> None:
    with atomic_output.stage_file(target, inputs=options.pop("inputs", ()), **options) as stage:
        (stage / target.name).write_text(content)


ON_LINUX = pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="only Linux exchanges names and flushes folders")
WRITERS = pytest.mark.parametrize("write", [write_folder, write_file])


def content(target: Path) -> str:
    return (target / "sub/model" if target.is_dir() else target).read_text()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def python_command(code: str, *arguments: object) -> list[str]:
    """A command line for another process, which prints what it did."""
    prelude = "import sys, time\nfrom pathlib import Path\nfrom lora_export.storage import atomic_output\n"
    return [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]


# --- Success and failure ---


@WRITERS
def test_success_leaves_only_the_output(tmp_path, write):
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert content(tmp_path / "out") == "new"


@pytest.mark.fault(28, 30)
@pytest.mark.parametrize("stage", [atomic_output.stage_folder, atomic_output.stage_file])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("target", ["mine/out", "mine/no/such/out"])
def test_an_exception_leaves_nothing(tmp_path, stage, failure, target):
    (tmp_path / "mine").mkdir()
    with pytest.raises(failure), stage(tmp_path / target, inputs=()) as folder:
        (folder / "out").write_text("half")
        raise failure
    assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == set()


@pytest.mark.fault(28)
@WRITERS
def test_a_failure_leaves_the_old_output_unchanged(tmp_path, write):
    write(tmp_path / "out", "old")
    stage = atomic_output.stage_folder if write is write_folder else atomic_output.stage_file
    with pytest.raises(RuntimeError), stage(tmp_path / "out", inputs=(), overwrite=True) as folder:
        (folder / "out").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == {"out"}
    assert content(tmp_path / "out") == "old"


@pytest.mark.fault(47)
def test_the_stage_is_beside_the_absent_target_while_writing(tmp_path):
    with atomic_output.stage_folder(tmp_path / "out", inputs=()) as stage:
        assert stage.parent == tmp_path and not list(stage.iterdir())
        assert names(tmp_path) == {stage.name, ".out.lock"}
        assert stage.name.startswith(".out.")


def test_companions_are_moved_before_the_target(tmp_path, monkeypatch):
    order = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(self.name), replace(self, target)))
    with atomic_output.stage_file(tmp_path / "a.onnx", inputs=()) as stage:
        for name in ("a.onnx", "a.onnx.data", "z.adapter"):
            (stage / name).write_text(name)
    assert order == ["a.onnx.data", "z.adapter", "a.onnx"]
    assert names(tmp_path) == set(order)


@pytest.mark.fault(27)
@pytest.mark.parametrize(("place", "shown"), [("gone", r"\(gone\)"), ("../gone", r"\(/.*/gone\)"), ("./", "")])
def test_a_file_system_error_becomes_output_failed(tmp_path, place, shown):
    """It names the files of a stage without its name, which no user knows."""
    with (
        pytest.raises(OutputFailed, match=rf"out could not be written: [NI]\w.* directory ?{shown}$"),
        atomic_output.stage_folder(tmp_path / "out", inputs=()) as stage,
    ):
        Path(os.path.normpath(stage / place)).read_text()
    assert names(tmp_path) == set()


def test_a_lock_that_cannot_be_made_is_not_named(tmp_path, monkeypatch):
    def read_only(lock, _):
        raise OSError(errno.EROFS, "Read-only file system", str(lock))

    monkeypatch.setattr(atomic_output, "output_lock", read_only)
    with (
        pytest.raises(OutputFailed, match=r"out could not be written: Read-only file system$"),
        atomic_output.stage_folder(tmp_path / "out", inputs=()),
    ):
        raise AssertionError


@ON_LINUX
@pytest.mark.fault(29)
@pytest.mark.parametrize(("write", "publish"), [(write_folder, "rename"), (write_file, "replace")])
def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch, write, publish):
    # A test cannot cut the power. So it checks that whatever is renamed has been flushed before.
    flushed: list[str] = []
    fsync, rename = os.fsync, getattr(Path, publish)
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))
    )
    monkeypatch.setattr(Path, publish, lambda self, target: (flushed.append("published"), rename(self, target)))
    write(tmp_path / "out")
    before, after = flushed[: flushed.index("published")], flushed[flushed.index("published") + 1 :]
    stage = next(path for path in before if path.endswith(".partial"))
    paths = ["", "/sub", "/sub/model", f"/{MANIFEST}"] if write is write_folder else ["", "/out"]
    assert set(before) == {stage + path for path in paths}
    assert after == [str(tmp_path)]


# --- Overwriting ---


@pytest.mark.fault(34)
@WRITERS
def test_an_existing_output_is_replaced_only_with_overwrite(tmp_path, write):
    write(tmp_path / "out", "old")
    with pytest.raises(OutputFailed, match="out exists already; add overwrite=True to replace it"):
        write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.fault(28)
@ON_LINUX
def test_an_old_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("for a moment there was no output"))
    write_folder(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.fault(34)
def test_a_replaced_folder_contains_no_old_files(tmp_path):
    with atomic_output.stage_folder(tmp_path / "out", inputs=()) as stage:
        (stage / "stale-00003-of-00003").write_text("old")
        write_manifest(stage, {})
    write_folder(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == {"sub", MANIFEST}


@pytest.mark.fault(28)
def test_without_an_exchange_the_old_folder_is_set_aside(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    monkeypatch.setattr(atomic_output, "_exchange", lambda *_: False)
    write_folder(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.fault(28)
def test_an_old_folder_set_aside_by_a_killed_run_is_restored(tmp_path):
    write_folder(tmp_path / ".out.123.old", "old")
    messages: list[str] = []
    with pytest.raises(OutputFailed, match="out exists already; add overwrite=True"):
        write_folder(tmp_path / "out", on_message=messages.append)
    assert messages == ["put out back, which a run that was killed had set aside"]
    assert names(tmp_path) == {"out"} and content(tmp_path / "out") == "old"


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("left", "message", "remaining"),
    [
        ([".out.123.old"], "removed .out.123.partial, which a run that was killed had left behind", []),
        (  # of an unknown run
            [".out.123.old", ".out.123.partial"],
            "{}/.out.123.old is a former out, set aside by a run that was killed: keep it or delete it",
            [".out.123.old", ".out.123.partial"],
        ),
    ],
)
def test_an_old_folder_beside_its_successor_is_removed_or_reported(tmp_path, left, message, remaining):
    write_folder(tmp_path / "out")
    for name in left:
        (tmp_path / name).mkdir()
    messages: list[str] = []
    write_folder(tmp_path / "out", overwrite=True, on_message=messages.append)
    assert messages == [message.format(tmp_path)]
    assert names(tmp_path) == {"out", *remaining}


@pytest.mark.fault(28)
def test_a_failed_rename_restores_the_old_folder_at_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(atomic_output, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputFailed, match="Input/output error"):
        write_folder(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == {"out"} and content(tmp_path / "out") == "old"


@pytest.mark.fault(34)
def test_a_folder_with_foreign_files_is_never_replaced(tmp_path):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out/sub/thesis.tex").write_text("years of work")
    with pytest.raises(OutputFailed, match=r"no record of .* names, .* output: sub/thesis\.tex"):
        write_folder(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/sub/thesis.tex").exists() and content(tmp_path / "out") == "old"


def test_a_folder_without_a_manifest_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    for number in range(12):
        (tmp_path / f"home/{number:02}").touch()
    with pytest.raises(OutputFailed, match=r"choose another output: 00, .*, 09 and \d+ more$"):
        write_folder(tmp_path / "home", overwrite=True)
    assert len(names(tmp_path / "home")) == 12


def test_a_folder_never_replaces_a_file_nor_a_file_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFailed, match="file is a file; the output is a folder"):
        write_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputFailed, match="folder is a folder; name a file"):
        write_file(tmp_path / "folder", overwrite=True)


@pytest.mark.fault(32, 34)
@pytest.mark.parametrize("theirs", ["other contents", "a link to equal contents"])
def test_a_companion_never_replaces_a_foreign_file_or_link(tmp_path, theirs):
    (tmp_path / "elsewhere").write_text("same")
    if theirs == "other contents":
        (tmp_path / "a.data").write_text("mine")
    else:
        (tmp_path / "a.data").symlink_to("elsewhere")
    before = (tmp_path / "a.data").read_text()
    with (
        pytest.raises(OutputFailed, match=r"a\.data exists already"),
        atomic_output.stage_file(tmp_path / "a", inputs=()) as stage,
    ):
        (stage / "a").touch()
        (stage / "a.data").write_text("same")
    assert names(tmp_path) == {"elsewhere", "a.data"} and (tmp_path / "a.data").read_text() == before


@pytest.mark.fault(34)
def test_an_equal_companion_is_left_as_it_is(tmp_path):
    (tmp_path / "a.data").write_text("same")
    before, messages = (tmp_path / "a.data").stat(), []
    with atomic_output.stage_file(tmp_path / "a", inputs=(), on_message=messages.append) as stage:
        (stage / "a").touch()
        (stage / "a.data").write_text("same")
    after = (tmp_path / "a.data").stat()
    assert names(tmp_path) == {"a", "a.data"}
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert messages == ["a.data exists already, with the same contents"]


@pytest.mark.fault(34)
@pytest.mark.parametrize("stage", [atomic_output.stage_folder, atomic_output.stage_file])
def test_a_target_created_during_the_run_is_not_touched(tmp_path, stage):
    with pytest.raises(OutputFailed, match="out exists already"), stage(tmp_path / "out", inputs=()) as folder:
        (folder / "out").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").touch()
    assert names(tmp_path / "out") == {"theirs"}


@pytest.mark.fault(34)
def test_foreign_files_added_during_the_run_are_not_touched(tmp_path):
    write_folder(tmp_path / "out", "old")
    with (
        pytest.raises(OutputFailed, match="choose another output: theirs"),
        atomic_output.stage_folder(tmp_path / "out", inputs=(), overwrite=True),
    ):
        (tmp_path / "out/theirs").touch()
    assert content(tmp_path / "out") == "old"


# --- The output and the inputs ---


@WRITERS
def test_inputs_elsewhere_are_accepted(tmp_path, write):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").touch()
    write(tmp_path / "out", "old", inputs=[tmp_path / "base", tmp_path / "adapter"])
    write(tmp_path / "out", "new", inputs=[tmp_path / "base", tmp_path / "adapter"], overwrite=True)
    assert content(tmp_path / "out") == "new"


@pytest.mark.fault(32)
@WRITERS
@pytest.mark.parametrize("goal", ["elsewhere", "nowhere"])
def test_an_output_that_is_a_symbolic_link_is_refused(tmp_path, write, goal):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / goal)
    with pytest.raises(OutputFailed, match="out is a symbolic link; name the file or folder that it refers to"):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out", "elsewhere"} and names(tmp_path / "elsewhere") == set()


# --- Targets that cannot be written to ---


@pytest.mark.fault(30)
@WRITERS
def test_missing_folders_above_the_output_are_created(tmp_path, write):
    write(tmp_path / "no/such/out")
    assert names(tmp_path / "no/such") == {"out"}
    assert content(tmp_path / "no/such/out") == "new"


@pytest.mark.fault(30)
def test_created_folders_with_files_of_another_run_stay(tmp_path):
    with pytest.raises(RuntimeError), atomic_output.stage_file(tmp_path / "no/such/out", inputs=()):
        (tmp_path / "no/theirs").touch()
        raise RuntimeError
    assert names(tmp_path / "no") == {"theirs"}


@pytest.mark.fault(30)
@WRITERS
@pytest.mark.parametrize("above", ["file", "loop", "dangling"])
def test_a_file_or_broken_link_above_the_output_is_named(tmp_path, write, above):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "file/x")
    with pytest.raises(OutputFailed, match=r"(file|loop) is not a folder, so nothing can be written into it"):
        write(tmp_path / above / "such/out")
    assert names(tmp_path) == {"file", "loop", "dangling"}


@pytest.mark.fault(30)
@WRITERS
@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_target_without_a_name_is_refused(tmp_path, monkeypatch, write, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputFailed, match="cannot be written to: name a file or folder in it"):
        write(Path(target), overwrite=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1 KB"), (100_000, "100 KB"), (401_234, "401 KB")),
        *((1_500_000, "1.5 MB"), (2**30, "1.07 GB"), (13_500_000_000, "13.5 GB"), (10**15, "1,000,000 GB")),
    ],
)
def test_sizes_have_a_unit_that_shows_them(count, text):
    assert atomic_output.byte_size(count) == text


def test_small_sizes_of_a_full_disk_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_output.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(OutputFailed, match=f"{tmp_path} has 100 KB free, 401 KB needed"):
        write_file(tmp_path / "out", required_bytes=401_000)


@pytest.mark.fault(27, 30)
@WRITERS
def test_too_little_space_is_refused_before_writing(tmp_path, write):
    with pytest.raises(OutputFailed, match=r" [KMG]B free, 1,000,000,000 GB needed"):
        write(tmp_path / "out", required_bytes=10**18)


# --- Other runs, living and dead ---

HOLD = """
    with atomic_output.stage_folder(Path(sys.argv[1]), inputs=()) as stage:
        (stage / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@contextlib.contextmanager
def another_run(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing `target`."""
    command = python_command(HOLD, target)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
        process.kill()


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", ["out", "n" * 250])
def test_a_second_run_on_one_output_ends_at_once(tmp_path, name):
    if filelock.has_fcntl:  # elsewhere such a file would be a lock
        (tmp_path / atomic_output._hidden_name(tmp_path / name, "lock")).write_text("a lock that a killed run left\n")
    with another_run(tmp_path / name) as first:
        before = names(tmp_path)
        with pytest.raises(OutputFailed, match=rf"another run \(process {first.pid}\) is writing .*/{name}$"):
            write_folder(tmp_path / name)
        assert names(tmp_path) == before


@pytest.mark.fault(33)
@pytest.mark.parametrize(("name", "neighbour"), [("out", "out.v2"), ("out", "out.2"), ("n" * 250, "n" * 250 + ".v2")])
def test_a_live_run_on_a_similar_name_is_not_disturbed(tmp_path, name, neighbour):
    with another_run(tmp_path / neighbour):
        before = names(tmp_path)
        messages: list[str] = []
        write_folder(tmp_path / name, on_message=messages.append)
        assert names(tmp_path) == before | {name}
        assert not messages


@pytest.mark.fault(28)
@pytest.mark.parametrize("name", ["out", "n" * 240, "n" * 255])
def test_the_next_run_reports_and_removes_what_sigkill_left(tmp_path, name):
    with another_run(tmp_path / name) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = names(tmp_path)
    assert len(left) == 2 and name not in left  # the stage and the lock
    (stage,) = (one for one in left if one.endswith(".partial"))
    messages: list[str] = []
    write_folder(tmp_path / name, on_message=messages.append)
    assert messages == [f"removed {stage}, which a run that was killed had left behind"]
    assert names(tmp_path) == {name}


@WRITERS
def test_ctrl_c_while_an_output_is_announced_leaves_nothing(tmp_path, write):
    """A fleet reads the whole output then."""
    with pytest.raises(KeyboardInterrupt), watched(lambda _: signal.raise_signal(signal.SIGINT)):
        write(tmp_path / "out")
    assert names(tmp_path) == set()
