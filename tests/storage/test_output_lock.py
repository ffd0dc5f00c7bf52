"""One run at a time writes an output; its lock leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import filelock
import pytest

from lora_export.errors import OutputFailed
from lora_export.storage.output_lock import output_lock

try:
    import fcntl
except ImportError:  # Windows, and the tests of a system without Linux's modules
    fcntl = None  # type: ignore[assignment]
FILE_LOCKS = pytest.mark.skipif(fcntl is None, reason="this system has no file locks")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / ".out.lock"


def locked_by_another(path: Path) -> pytest.RaisesContext[OutputFailed]:
    return pytest.raises(OutputFailed, match=rf"^another run \(process {os.getpid()}\) is writing {path.parent}/out$")


@pytest.mark.fault(33)
def test_a_lock_is_held_for_the_block_and_leaves_nothing(lock):
    with output_lock(lock, lock.with_name("out")):
        assert lock.exists()
        with locked_by_another(lock), output_lock(lock, lock.with_name("out")):
            pass
        assert lock.exists()
    assert not lock.exists()


def test_an_exception_releases_the_lock(lock):
    with pytest.raises(ZeroDivisionError), output_lock(lock, Path("out")):
        raise ZeroDivisionError
    assert not lock.exists()


@FILE_LOCKS
@pytest.mark.fault(33)
def test_a_lock_without_a_signature_is_still_held(lock):
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputFailed, match=r"another run \(process unknown\) is writing"), output_lock(lock, lock):
            pass


@pytest.mark.fault(32)
def test_a_lock_that_is_a_symbolic_link_is_not_followed(lock):
    theirs = lock.with_name("theirs")
    theirs.write_text("theirs")
    lock.symlink_to(theirs)
    with pytest.raises(OSError, match="Too many levels of symbolic links"), output_lock(lock, lock):
        pass
    assert theirs.read_text() == "theirs"


@FILE_LOCKS
@pytest.mark.fault(33)
def test_a_lock_file_removed_by_its_owner_meanwhile_is_created_anew(lock, monkeypatch):
    # The other run ends between our open and our lock: the file that we locked has no name any more.
    calls = []
    right = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(descriptor)
        right(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with output_lock(lock, lock.with_name("out")):
        assert len(calls) == 2
        with locked_by_another(lock), output_lock(lock, lock.with_name("out")):
            pass
    assert not lock.exists()


@FILE_LOCKS
@pytest.mark.parametrize(
    ("error", "raised", "stays"),
    [(PermissionError(13, "is writing"), OutputFailed, True), (OSError(95, "not supported"), OSError, False)],
    ids=["held by another run", "without locks"],
)
def test_a_file_system_may_refuse_the_lock(lock, monkeypatch, error, raised, stays):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(raised, match=error.strerror), output_lock(lock, lock):
        pass
    assert lock.exists() is stays  # what is another run's stays


def test_the_lock_is_removed_where_no_open_file_can_be(lock, monkeypatch):
    unlink = os.unlink

    def refuse_open(path: Path, **options: object) -> None:
        if any(open_file.resolve() == path for open_file in Path("/proc/self/fd").iterdir()):
            raise PermissionError(13, "the file is open")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse_open)
    with output_lock(lock, lock):
        assert lock.exists()
    assert not lock.exists()


@FILE_LOCKS
def test_the_first_byte_is_not_part_of_the_signature(lock):
    # Windows lets no other process read it.
    with output_lock(lock, lock):
        assert int(lock.read_bytes()[1:]) == os.getpid()


# --- systems without file locks ---


@pytest.fixture
def without_locks(monkeypatch):
    """A system without `flock`. filelock decides at its import what it has: it is imported before."""
    assert filelock.has_fcntl is (fcntl is not None)
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.usefixtures("without_locks")
def test_without_file_locks_the_existence_of_the_file_is_the_lock(lock):
    with output_lock(lock, lock.with_name("out")):
        with locked_by_another(lock), output_lock(lock, lock.with_name("out")):
            pass
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.usefixtures("without_locks")
def test_without_file_locks_the_file_of_a_dead_process_is_taken_over(lock):
    child = os.fork()
    if not child:
        with output_lock(lock, lock):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert lock.read_text().startswith(f"{child}\n")
    with output_lock(lock, lock):
        assert lock.read_text().startswith(f"{os.getpid()}\n")
    assert not lock.exists()


# --- signals ---


@FILE_LOCKS
@pytest.mark.fault(28)
def test_ctrl_c_while_the_lock_is_taken_releases_it(lock, monkeypatch):
    right = fcntl.flock

    def interrupted(descriptor: int, operation: int) -> None:
        signal.raise_signal(signal.SIGINT)
        right(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt), output_lock(lock, lock):
        pass
    assert not lock.exists()


def test_another_thread_may_take_a_lock(lock):
    taken = []

    def take() -> None:
        with output_lock(lock, lock):
            taken.append(lock.exists())

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert taken == [True] and not lock.exists()
