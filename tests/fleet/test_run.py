"""A run does what is not done, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import lora_export as le
from lora_export.api import load_model
from lora_export.api.convert import convert
from lora_export.errors import InputRefused, OutputFailed
from lora_export.fleet import records, run, worker
from lora_export.fleet.status import FleetStatus
from lora_export.fleet.worker import JobBatch, perform, session_of_process
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.storage.hashes import file_hash
from lora_export.storage.output_lock import output_lock
from lora_export.storage.signature import refuse_unsigned
from lora_export.storage.store_path import StorePath
from support.endpoints import save_adapter, save_base
from support.fleets import BASES, FLEET, JOBS, MERGE, PAIRS, VERIFY, Here, run_here
from support.folder_contents import folder_contents
from support.graphs import a_graph
from support.handmade import peft_adapter
from support.keys import a_key
from support.slow import slow
from support.small_graphs import GEMM, filled
from support.stores import Stored

FR = JOBS[2:]
ONNX = '[[steps]]\nstep = "onnx"\noutput = "graphs/{adapter}.onnx"\n'


def record(job: str) -> tuple[Path, dict[str, object]]:
    path = Path("fleet.records") / f"{job}.json"
    return path, json.loads(path.read_text())


def change_byte(place: Path, folder: str = "base") -> None:
    """Change a weight, and put the times of its file back."""
    path = place / folder / "model.safetensors"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def interrupt(place: Path) -> None:
    """Leave what a run leaves that is killed between an output and its record."""
    path, content = record(FR[0])
    path.write_text(json.dumps({"outcome": "started", "facts": content["facts"], "published": content["written"]}))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda place: None, []),
    "times of the base": (lambda place: os.utime(place / "base" / "model.safetensors"), []),
    "a weight of the base": (change_byte, JOBS),
    "the base's config": (lambda place: (place / "base" / "config.json").write_text("{}"), JOBS),
    "an output is gone": (lambda place: shutil.rmtree(place / "release" / "fr"), FR[:1]),
    "a byte of an output": (lambda place: change_byte(place, "release/fr"), FR[:1]),
    "times of an output": (lambda place: os.utime(place / "release" / "fr" / "model.safetensors"), []),
    "a shard is gone": (lambda place: (place / "release" / "fr" / "model.safetensors").unlink(), FR[:1]),
    "an adapter": (lambda place: peft_adapter(place / "adapters" / "fr", {"up": ([[1, 1, 1]], [[1], [1]])}), FR),
    "an option": (
        lambda place: (place / "fleet.toml").write_text(BASES + MERGE + 'dtype = "float16"\n' + VERIFY),
        JOBS,
    ),
    "an option of the proof": (lambda place: (place / "fleet.toml").write_text(FLEET + "strict = true\n"), JOBS[1::2]),
    "a limit of the run": (lambda place: (place / "fleet.toml").write_text(FLEET + "download = true\n"), []),
    "killed before the record": (interrupt, FR[:1]),
}


@pytest.mark.parametrize("reports", ['["{adapter}.json"]', '"{adapter}.json"'])
def test_a_report_that_is_gone_is_written_again(reports: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.toml").write_text(FLEET + f"report = {reports}\n")
    run_here(monkeypatch)
    report = place / "fr.json"
    report.unlink()
    assert run_here(monkeypatch)[1] == FR[1:] and report.is_file()
    report.write_text("of somebody else")
    status, ran = run_here(monkeypatch)
    assert ran == FR[1:] and status.counts == {"done": 2, "same": 1, "refused": 1}
    assert not run_here(monkeypatch)[1]  # it is still there
    report.unlink()
    assert run_here(monkeypatch)[1] == FR[1:] and report.is_file()


@pytest.mark.parametrize("changed", CHANGES)
def test_what_changed_is_done_again(changed: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, ran = run_here(monkeypatch)
    assert ran == JOBS and status.exit_code == 0 and status.counts == {"done": 2, "same": 2}
    change, expected = CHANGES[changed]
    change(place)
    assert (le.run_fleet("status", "fleet.toml").exit_code == 5) is bool(expected)
    status, ran = run_here(monkeypatch)
    assert ran == expected and status.counts == {"done": 2, "same": 2}
    weight = load_file(place / "base" / "model.safetensors")["up.weight"]
    for name, (a, b) in PAIRS.items() if changed != "an adapter" else ():
        merged = load_file(place / "release" / name / "model.safetensors")["up.weight"]
        assert np.array_equal(merged, weight + np.array(b) @ np.array(a))


@pytest.mark.parametrize("options", ["", 'hash = "sha256"\n'])
def test_what_a_job_wrote_is_not_read_again_for_its_hash(
    options: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "fleet.toml").write_text(BASES + MERGE + options + VERIFY)
    read: list[Path] = []
    monkeypatch.setattr(records, "file_hash", lambda path, kind: read.append(path) or file_hash(path, kind))
    run_here(monkeypatch)
    weights = [path for path in read if path.name == "model.safetensors" and "base" not in path.parts]
    assert len(weights) == 2 * bool(options)  # the manifest has another hash: each is read once
    hashes = json.loads((place / "fleet.records" / "hashes.json").read_text())
    assert not any("/release/" in name for name in hashes)
    read.clear()
    (place / "release").rename(place / "elsewhere")
    (place / "elsewhere").rename(place / "release")
    assert le.run_fleet("status", "fleet.toml").counts == {"done": 2, "same": 2}
    change_byte(place)
    read.clear()
    assert run_here(monkeypatch)[1] == JOBS
    assert [path for path in read if path.parent.name in ("fr", "de") and "release" in path.parts] == []


def test_a_byte_that_changes_before_the_record_is_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = worker._record_of
    with monkeypatch.context() as changed:

        def change_first(request: worker.JobRequest, *others: Any) -> dict[str, Any]:
            if request.job.id == FR[0]:
                change_byte(place, "release/fr")
                os.utime(place / "release" / "fr" / "model.safetensors")
            return written(request, *others)

        changed.setattr(worker, "_record_of", change_first)
        status, _ = run_here(changed)
        assert status.counts == {"done": 1, "same": 1, "failed": 1, "not run": 1}
        assert "release/fr: something changed its files" in status.jobs[2].message
    status, ran = run_here(monkeypatch)
    assert ran == FR and status.counts == {"done": 2, "same": 2}


def test_a_folder_whose_files_a_result_lists_is_done_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a decoder with its cache."""

    def listed(**options: Any) -> SimpleNamespace:
        output = convert(**options).output
        return SimpleNamespace(output=output, files=tuple(output.iterdir()))

    monkeypatch.setattr("lora_export.api.convert.convert", listed)
    (place / "fleet.toml").write_text(BASES + TO_KOHYA.replace("kohya", "mlx"))
    assert run_here(monkeypatch)[0].counts == {"done": 2}
    assert run_here(monkeypatch)[1] == []
    peft_adapter(place / "adapters" / "fr", {"up": ([[1, 1, 1]], [[1], [1]])})
    status, ran = run_here(monkeypatch)
    assert ran == ["base/fr/1-convert"] and status.counts == {"done": 2}


def test_a_base_that_is_nowhere_ends_its_jobs_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = BASES.replace("path", 'name = "there"\npath')
    (place / "fleet.toml").write_text(
        BASES.replace('"base"', '"org/missing"') + there + (MERGE + VERIFY).replace("/{", "/{base}-{")
    )
    status, _ = run_here(monkeypatch)
    assert [job.outcome for job in status.jobs] == ["refused", "not run"] * 2 + ["done", "same"] * 2
    assert status.exit_code == 3 and "no file or folder org/missing" in status.jobs[0].message


def test_a_job_whose_process_dies_is_tried_alone_and_fails_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs beside it go on, and a result that a dead process has recorded is not made again."""
    engine = Dying(at_once=2)
    monkeypatch.setattr(run, "processes", lambda *_: contextlib.nullcontext(engine))
    status = le.run_fleet("run", "fleet.toml")
    assert [job.outcome for job in status.jobs] == ["failed", "not run", "done", "same"] and status.exit_code == 6
    assert engine.ran == [JOBS[0], JOBS[2], JOBS[0], JOBS[0], JOBS[3]]
    assert status.jobs[0].message == "killed (3 times)"
    assert le.run_fleet("status", "fleet.toml").jobs[0].outcome == "failed"


class Dying(Here):
    """An engine of which each process that merges `de` dies, and the one beside it too, after its record."""

    def __init__(self, at_once: int) -> None:
        super().__init__(at_once)
        self.at_once = at_once

    def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> Future[list[dict[str, Any]]]:
        is_beside = self.ran == [JOBS[0]]
        own = [request.job.id for request in batch.requests]
        self.ran += own
        future: Future[list[dict[str, Any]]] = Future()
        result = None if JOBS[0] in own else perform(batch)
        if result is None or is_beside:
            future.set_exception(BrokenPipeError())
        else:
            future.set_result(result)
        return future

    def died(self, error: BaseException) -> str:
        return "killed" if isinstance(error, BrokenPipeError) else ""


def test_a_worker_that_was_taken_for_dead_replaces_no_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Here):
        """Gives the first job to two workers, of which the first one sleeps while the second one works."""

        def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> Future[list[dict[str, Any]]]:
            work, submit, found = worker._results, super().submit, list[Future[list[dict[str, Any]]]]()

            def late(*_: Any) -> list[Any]:
                monkeypatch.setattr(worker, "_results", work)
                found.append(submit(batch, memory, on_gpu=on_gpu))
                return [OutputFailed("another run has it")]

            if not self.ran:
                monkeypatch.setattr(worker, "_results", late)
                assert perform(batch)[0]["outcome"] == "failed"
            return found[0] if found else submit(batch, memory, on_gpu=on_gpu)

    assert run_here(monkeypatch, Twice())[0].exit_code == le.run_fleet("status", "fleet.toml").exit_code == 0


def test_another_version_does_all_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(records, "__version__", "next")
    assert run_here(monkeypatch)[1] == JOBS


def test_an_output_of_somebody_else_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    foreign = place / "release" / "fr" / "lora_export.json"
    shutil.copy(place / "release" / "de" / "lora_export.json", foreign)
    status, ran = run_here(monkeypatch)
    assert ran == FR[:1] and status.counts == {"done": 1, "same": 1, "failed": 1, "not run": 1}
    assert status.jobs[2].message.endswith("release/fr exists already; add `overwrite = true` to replace it")
    assert status.exit_code == 7 and foreign.read_bytes() == (place / "release/de/lora_export.json").read_bytes()
    (problem,) = le.run_fleet("plan", "fleet.toml").problems
    assert problem.text.startswith("release/fr exists, and this fleet did not write it")


TO_KOHYA = '[[steps]]\nstep = "convert"\nto = "kohya"\noutput = "release/{adapter}"\n'
PUBLISHED = {"folder": (MERGE, "de/lora_export.json"), "file": (TO_KOHYA, "de.safetensors")}


MOVES = {"on the disk": (False, False), "in a store": (True, True), "from a store": (True, False)}


@pytest.mark.parametrize(
    ("move", "kind"),
    [
        ("on the disk", "file"),
        ("in a store", "folder"),
        ("from a store", "file"),
        slow("on the disk", "folder"),
        slow("in a store", "file"),
        slow("from a store", "folder"),
    ],
)
def test_under_another_output_the_former_one_stays_and_nothing_is_own(
    move: str, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    def use(folder: str, in_store: bool) -> None:
        (place / "fleet.toml").write_text(BASES + step.replace("release", str(stored / folder) if in_store else folder))

    def outputs(folder: str) -> dict[str, bytes]:
        on_disk = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in on_disk.items()} or stored.files(folder)

    (step, name), (before, after) = PUBLISHED[kind], MOVES[move]
    use("first", before)
    run_here(monkeypatch)
    former = outputs("first")
    if after:
        stored.put(f"second/{name}", b"mine")
    else:
        (path := place / "second" / name).parent.mkdir(parents=True)
        path.write_bytes(b"mine")
    use("second", after)
    (problem,) = le.run_fleet("plan", "fleet.toml").problems
    assert problem.adapter == "de" and "exists, and this fleet did not write it" in problem.text
    status, ran = run_here(monkeypatch)
    assert len(ran) == 2 and [job.outcome for job in status.jobs] == ["failed", "done"]
    assert "exists already" in status.jobs[0].message and outputs("second")[name] == b"mine"
    assert outputs("first") == former and name in former


@pytest.mark.parametrize(
    ("kind", "in_store"), [("folder", True), ("file", False), slow("folder", False), slow("file", True)]
)
def test_a_former_output_that_is_named_again_is_own(
    kind: str, in_store: bool, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    step, name = PUBLISHED[kind]
    home = stored / "x" if in_store else place / "x"
    for folder in ("x/second", "x/first", "x/second"):
        output = str(stored / folder) if in_store else folder
        (place / "fleet.toml").write_text(BASES + step.replace("release", output))
        assert le.run_fleet("plan", "fleet.toml").problems == ()
        status, ran = run_here(monkeypatch)
        assert status.counts == {"done": 2} and len(ran) == 2 and run_here(monkeypatch)[1] == []
    assert {
        each.relative_to(home).parts[0] for each in (home.newly() if isinstance(home, StorePath) else home).rglob("*")
    } == {"first", "second"}
    (home / "first" / name).write_bytes(b"mine")
    (place / "fleet.toml").write_text((place / "fleet.toml").read_text().replace("x/second", "x/first"))
    assert run_here(monkeypatch)[0].counts == {"failed": 1, "done": 1}
    assert (home / "first" / name).read_bytes() == b"mine"


def test_another_kind_of_output_replaces_nothing_of_others(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(kind: str) -> FleetStatus:
        (place / "fleet.toml").write_text(BASES + TO_KOHYA.replace("kohya", kind))
        return run_here(monkeypatch)[0]

    assert use("kohya").counts == {"done": 2}
    foreign = le.convert("adapters/fr", to="peft", output="release/de").output
    before = folder_contents(foreign)
    status = use("peft")
    assert status.counts == {"failed": 1, "done": 1} and folder_contents(foreign) == before
    assert status.jobs[0].message.startswith("release/de exists, and this fleet did not write it")
    shutil.rmtree(foreign)
    assert use("peft").counts == {"done": 2} and run_here(monkeypatch)[1] == []


def with_weights_beside(place: Path, up: NDArray[np.float32], large: NDArray[np.float32]) -> None:
    """A base `out/base.onnx`, whose large weight is in a file beside it."""
    body = """g (float[N,3] x) => (float[N,9000] y) <float[1,1] up.weight = {0}, float[1,1] large = {0}>
        { h = Gemm <transB = 1> (x, up.weight) y = MatMul(h, large) }"""
    (place / "out").mkdir()
    base = filled(body, **{"up.weight": up, "large": large})
    ir.save(base, place / "out" / "base.onnx", external_data="w.data", size_threshold_bytes=1000)


def test_graphs_of_a_fleet_share_the_weights_of_their_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    up, large = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3), (2, 9000)))
    with_weights_beside(place, up, large)
    share = 'share-with = "out/base.onnx"\n'
    steps = MERGE.replace("release/{adapter}", "out/m-{adapter}.onnx") + share + ONNX.replace("graphs/", "out/") + share
    (place / "fleet.toml").write_text(BASES.replace('"base"', '"out/base.onnx"') + steps)
    assert run_here(monkeypatch)[0].counts == {"done": 2, "same": 2}
    assert run_here(monkeypatch)[1] == []
    x = rng.standard_normal((2, 3)).astype(np.float32)
    for adapter, (a, b) in PAIRS.items():
        for path in (place / "out" / f"m-{adapter}.onnx", place / "out" / f"{adapter}.onnx"):
            assert path.stat().st_size < 4000 and not list(path.parent.glob(f"{path.name}.*"))
            expected = x @ (up + np.array(b) @ np.array(a)).T @ large
            np.testing.assert_allclose(OnnxRunner(path).run({"x": x})["y"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", ["", 'share-with = "out/base.onnx"\n'])
def test_a_signed_file_is_made_again_with_its_signature(
    options: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_key(place, "own")
    with_weights_beside(place, np.ones((2, 3), np.float32), np.ones((2, 9000), np.float32))
    merge = MERGE.replace("release/{adapter}", "out/{adapter}.onnx") + 'sign = "own.pem"\n' + options
    (place / "fleet.toml").write_text(BASES.replace('"base"', '"out/base.onnx"') + merge)
    assert run_here(monkeypatch)[0].counts == {"done": 2}
    assert le.run_fleet("status", "fleet.toml").counts == {"done": 2}  # type: ignore[union-attr]
    peft_adapter(place / "adapters" / "de", {"up": ([[3, 1, 0]], [[2], [10]])})
    status, ran = run_here(monkeypatch)
    assert status.counts == {"done": 2} and ran == [JOBS[0]]
    (place / "out" / "fr.onnx.sig").unlink()
    status, ran = run_here(monkeypatch)
    assert status.counts == {"done": 2} and ran == [JOBS[2]]
    for name in PAIRS:
        refuse_unsigned(place / "out" / f"{name}.onnx", place / "own.pub")
    # A signature of somebody else stays.
    (place / "out" / "fr.onnx.sig").write_bytes(b"mine")
    assert run_here(monkeypatch)[0].counts == {"done": 1, "failed": 1}
    assert (place / "out" / "fr.onnx.sig").read_bytes() == b"mine"


def test_a_graph_in_a_store_is_made_once(place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored) -> None:
    """Its record is read on the disk alone: it is known by its size and its ETag."""
    ir.save(a_graph(GEMM.replace("m.weight", "up.weight")), place / "base.onnx")
    step = ONNX.replace("graphs", str(stored / "graphs"))
    (place / "fleet.toml").write_text(BASES.replace('"base"', '"base.onnx"') + step)
    status, ran = run_here(monkeypatch)
    assert status.counts == {"same": 2} and len(ran) == 2 and run_here(monkeypatch)[1] == []
    peft_adapter(place / "adapters" / "fr", {"up": ([[1, 1, 1]], [[1], [1]])})
    before = stored.files("graphs")
    status, again = run_here(monkeypatch)
    assert status.counts == {"same": 2} and again == ran[1:]
    assert [name for name, content in stored.files("graphs").items() if content != before[name]] == ["fr.onnx"]
    stored.put("graphs/fr.onnx", b"mine")
    assert run_here(monkeypatch)[0].counts == {"same": 1, "failed": 1} and stored.get("graphs/fr.onnx") == b"mine"


class KilledBeforeRecordError(BaseException):
    """The end of a worker between an output and its record."""


def kill(*_: object) -> None:
    raise KilledBeforeRecordError


@pytest.mark.parametrize("is_foreign", [False, True])
def test_a_graph_that_a_killed_run_put_into_a_store_is_own(
    is_foreign: bool, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    ir.save(a_graph(GEMM.replace("m.weight", "up.weight")), place / "base.onnx")
    step = ONNX.replace("graphs", str(stored / "graphs"))
    (place / "fleet.toml").write_text(BASES.replace('"base"', '"base.onnx"') + step)
    with monkeypatch.context() as killed, pytest.raises(KilledBeforeRecordError):
        killed.setattr(worker, "_record_of", kill)
        run_here(killed)
    assert [*stored.files("graphs")] == ["de.onnx"]
    if is_foreign:
        stored.put("graphs/de.onnx", b"mine")
    expected = {"same": 1, "failed": 1} if is_foreign else {"same": 2}
    assert run_here(monkeypatch)[0].counts == expected
    assert (stored.get("graphs/de.onnx") == b"mine") == is_foreign


def test_a_file_of_others_beside_an_output_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(options: str) -> FleetStatus:
        (place / "fleet.toml").write_text(BASES.replace('"base"', '"base.onnx"') + ONNX + options)
        return run_here(monkeypatch)[0]

    ir.save(a_graph(GEMM.replace("m.weight", "up.weight")), place / "base.onnx")
    assert use("").counts == {"same": 2}
    foreign = place / "graphs/fr.onnx_adapter"
    foreign.write_bytes(b"mine")
    status = use('lora = "inputs"\n')
    assert status.counts == {"same": 1, "failed": 1} and foreign.read_bytes() == b"mine"
    assert status.jobs[1].message.startswith("graphs/fr.onnx_adapter exists, and this fleet did not write it")
    foreign.unlink()
    assert use('lora = "inputs"\n').counts == {"same": 2} and foreign.exists()


@pytest.mark.parametrize("in_store", [False, True])
@pytest.mark.parametrize("kept", [0, 4, -3])
def test_a_damaged_file_is_made_again_also_after_a_failure(
    kept: int, in_store: bool, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    folder = stored / "release" if in_store else Path("release")
    (place / "fleet.toml").write_text(BASES + TO_KOHYA.replace("release", str(folder)))
    run_here(monkeypatch)
    output = folder / "de.safetensors"
    whole = output.read_bytes()
    stored.put("release/de.safetensors", whole[:kept]) if in_store else output.write_bytes(whole[:kept])
    if not in_store:
        with monkeypatch.context() as failing:
            failing.setattr("lora_export.api.convert.convert", lambda **_: 1 / 0)
            assert run_here(failing)[0].counts == {"failed": 1, "done": 1}
    status, ran = run_here(monkeypatch)
    assert status.counts == {"done": 2} and ran == ["base/de/1-convert"]
    assert (stored.get("release/de.safetensors") if in_store else output.read_bytes()) == whole


OTHER_RUN = b'{"process": 1, "host": "elsewhere", "finished": {}}'
NOT_DELETED = "so it does not delete them. Remove them, or choose another output: "
OF_OTHERS: dict[str, tuple[str, dict[str, bytes], list[str]]] = {  # step, objects, how the messages of failed jobs end
    "another run is writing": (
        TO_KOHYA,
        {"de.safetensors": b"of the other", ".de.safetensors.begun": OTHER_RUN},
        ["(process 1 on elsewhere) is writing {release}/de.safetensors"],
    ),
    "files in a folder": (
        MERGE,
        {"de/README.md": b"mine", "fr/sub/lora_export.json": b"{}"},
        [f"{NOT_DELETED}README.md", f"{NOT_DELETED}sub/lora_export.json"],
    ),
}


@pytest.mark.parametrize("kind", OF_OTHERS)
def test_what_others_have_in_a_store_is_not_deleted(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    step, foreign, endings = OF_OTHERS[kind]
    (place / "fleet.toml").write_text(BASES + step.replace("release", str(stored / "release")))
    run_here(monkeypatch)
    for name, content in foreign.items():
        stored.put(f"release/{name}", content)
    before = stored.files("release")
    change_byte(place)
    for _ in range(2):
        failed = [job.message for job in run_here(monkeypatch)[0].jobs if job.outcome == "failed"]
        for message, ending in zip(failed, endings, strict=True):
            assert message.endswith(ending.format(release=stored / "release"))
        assert stored.files("release") == before
    for name in foreign:
        stored.delete(f"release/{name}")
    assert run_here(monkeypatch)[0].counts == {"done": 2} and stored.files("release") != before


@pytest.mark.parametrize("in_store", [False, True])
@pytest.mark.parametrize("is_foreign", [False, True])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_after_a_kill_what_was_published_is_own_and_nothing_else(
    kind: str, is_foreign: bool, in_store: bool, place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    step, name = PUBLISHED[kind]
    (place / "fleet.toml").write_text(
        BASES + step.replace("release", str(stored / "release") if in_store else "release")
    )
    job = "base/de/1-merge" if step == MERGE else "base/de/1-convert"
    with monkeypatch.context() as killed, pytest.raises(KilledBeforeRecordError):
        killed.setattr(worker, "_record_of", kill)
        run_here(killed)
    assert record(job)[1]["outcome"] == "started"
    if is_foreign:
        foreign = b'{"lora_export": "0"}'
        stored.put(f"release/{name}", foreign) if in_store else (place / "release" / name).write_bytes(foreign)
    expected = stored.get(f"release/{name}") if in_store else (place / "release" / name).read_bytes()
    planned = le.run_fleet("plan", "fleet.toml").problems  # which reads no file that has no record
    assert [problem.adapter for problem in planned] == ["de"] * (is_foreign and kind == "folder")
    status, ran = run_here(monkeypatch)
    assert job in ran and status.counts == ({"failed": 1, "done": 1} if is_foreign else {"done": 2})
    assert ("exists already" in status.jobs[0].message) is is_foreign
    assert (stored.get(f"release/{name}") if in_store else (place / "release" / name).read_bytes()) == expected


def test_a_refusal_ends_no_other_job_and_is_a_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_adapter(place / "adapters" / "dd", {"up": ([[1, 2, 3, 4]], [[1], [10]])})
    status, ran = run_here(monkeypatch)
    assert ran == ["base/dd/1-merge", *JOBS] and status.exit_code == 3
    assert [job.outcome for job in status.jobs] == ["refused", "not run", "done", "same", "done", "same"]
    assert "(2, 3), the adapter was trained on (2, 4)" in status.jobs[0].message
    assert status.jobs[1].message == "after base/dd/1-merge: refused" and not (place / "release" / "dd").exists()
    status, ran = run_here(monkeypatch)
    assert ran == [] and status.counts["refused"] == 1


def test_a_wrong_merge_is_different(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.toml").write_text(FLEET + "weight = [0.5]\n")
    status, _ = run_here(monkeypatch)
    assert status.counts == {"done": 2, "different": 2} and status.exit_code == 4
    assert status.jobs[1].message.startswith("different: ")


def test_a_bug_in_one_job_ends_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = le.merge
    broken = "lora_export.api.merge.merge"
    monkeypatch.setattr(broken, lambda **k: 1 / 0 if "de" in str(k["adapters"]) else merge(**k))
    status, ran = run_here(monkeypatch)
    assert ran == [JOBS[0], *FR] and status.exit_code == 1
    assert status.jobs[0].message == "a bug in lora-export: ZeroDivisionError('division by zero')"
    assert "ZeroDivisionError" in record(JOBS[0])[1]["details"]
    monkeypatch.undo()
    os.chdir(place)
    assert run_here(monkeypatch)[1] == JOBS[:2]  # a failure is tried again


def test_the_output_has_the_suffix_of_its_kind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof finds the file under the name that the merge gave it."""
    (place / "base" / "model.safetensors").rename(place / "base.safetensors")
    (place / "fleet.toml").write_text(FLEET.replace('"base"', '"base.safetensors"'))
    status, ran = run_here(monkeypatch)
    assert status.counts == {"done": 2, "same": 2} and len(ran) == 4
    assert sorted(path.name for path in Path("release").iterdir()) == ["de.safetensors", "fr.safetensors"]
    assert run_here(monkeypatch)[1] == []


def test_a_fleet_has_one_run_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fleet.records").mkdir()
    with output_lock(place / "fleet.records" / ".lock", place), pytest.raises(OutputFailed, match="another run"):
        run_here(monkeypatch)
    assert sorted(path.name for path in place.iterdir()) == ["adapters", "base", "fleet.records", "fleet.toml"]


def test_processes_are_as_many_as_the_memory_allows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.fleet.description import read_fleet
    from lora_export.fleet.needs import NeedsOfJobs
    from lora_export.fleet.run import _at_once
    from lora_export.options.fleet import FleetOptions
    from lora_export.runtime.memory import AVAILABLE

    told: list[str] = []
    options = FleetOptions("run", "fleet.toml", jobs=8, on_message=told.append)
    fleet = read_fleet(Path("fleet.toml"))
    for available, expected in ((700 << 20, 2), (1, 1), (99 << 30, 8)):
        monkeypatch.setenv(AVAILABLE, str(available))
        assert _at_once(fleet, NeedsOfJobs(), options) == expected
    assert len(told) == 2 and told[0].startswith("note: jobs at the same time: 2, not 8. A job needs 0.3 GiB")


def put_in_store(place: Path, stored: Stored, base: str) -> list[str]:
    """Inputs and outputs of the fleet are in a store then; returns its jobs."""
    for name in ("base", "adapters"):
        stored.put(name, place / name)
        shutil.rmtree(place / name)
    bucket = stored.address
    text = FLEET.replace('"base"', f'"{bucket}/{base}"').replace('"adapters/', f'"{bucket}/adapters/')
    (place / "fleet.toml").write_text(text.replace('"release/', f'"{bucket}/release/'))
    return [job.replace("base", Path(base).stem, 1) for job in JOBS]


@pytest.mark.parametrize("base", ["base", slow("base/model.safetensors")], ids=["folders", "files"])
def test_a_fleet_from_store_to_store(place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored, base: str) -> None:
    jobs = put_in_store(place, stored, base)
    status, ran = run_here(monkeypatch)
    assert ran == jobs and status.counts == {"done": 2, "same": 2}
    assert run_here(monkeypatch)[1] == [] and not Path("release").exists()
    first = stored.files("release")
    late = next(name for name in first if name.startswith("fr") and name.endswith(".safetensors"))
    stored.put(f"release/{late}", first[late][:-1] + bytes([first[late][-1] ^ 1]))  # of the same size
    again = jobs[2:3] if stored.tags_contents else jobs[2:]
    assert run_here(monkeypatch)[1] == again and stored.files("release") == first
    stored.put(f"release/{(beside := 'fr.json')}", b"{}")  # of another step or user
    peft_adapter(place / "fr", {"up": ([[3, 2, 1]], [[1], [10]])})
    stored.put("adapters/fr", place / "fr")
    assert run_here(monkeypatch)[1] == jobs[2:] and stored.files("release").keys() == {*first, beside}
    first[beside] = b"{}"
    changed = [name for name, content in stored.files("release").items() if content != first[name]]
    assert changed and all(name.startswith("fr") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["base", "base/model.safetensors"], ids=["folders", "files"])
def test_after_a_changed_adapter_a_file_of_others_makes_nothing_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored, base: str
) -> None:
    jobs = put_in_store(place, stored, base)
    assert run_here(monkeypatch)[1] == jobs
    stored.put("release/fr.json", b"{}")
    peft_adapter(place / "fr", {"up": ([[3, 2, 1]], [[1], [10]])})
    stored.put("adapters/fr", place / "fr")
    assert run_here(monkeypatch)[1] == jobs[2:]
    status, ran = run_here(monkeypatch)
    assert ran == [] and status.counts == {"done": 2, "same": 2} and stored.get("release/fr.json") == b"{}"


def test_a_glob_in_a_store_that_matches_nothing_is_refused(place: Path, stored: Stored) -> None:
    stored.put("adapters", place / "adapters")
    pattern = f"{stored.address}/adapters/x*"
    (place / "fleet.toml").write_text(FLEET.replace("adapters/*", pattern))
    with pytest.raises(InputRefused, match=f"{re.escape(repr(pattern))} matches no adapter"):
        le.run_fleet("plan", "fleet.toml")


def test_a_base_is_exported_once_for_all_adapters(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.models import export

    exported: list[Any] = []
    to_onnx = export.to_onnx
    monkeypatch.setattr(export, "to_onnx", lambda *one, **more: (exported.append(one), to_onnx(*one, **more))[1])
    (place / "model.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(0)\n    module = torch.nn.Sequential()\n"
        '    module.add_module("up", torch.nn.Linear(3, 2))\n    return module, torch.ones(2, 3)\n'
    )
    text = BASES.replace('"base"', '"model.py:make"\nname = "base"') + ONNX
    (place / "fleet.toml").write_text(text)
    status, ran = run_here(monkeypatch)
    assert ran == ["base/de/1-onnx", "base/fr/1-onnx"] and status.counts == {"same": 2} and len(exported) == 1
    assert not any(path.name.startswith(".") for path in (place / "fleet.records").iterdir())
    alone = le.export_onnx("model.py:make", "alone/fr.onnx", adapters="adapters/fr")
    assert alone.output.read_bytes() == Path("graphs/fr.onnx").read_bytes() and len(exported) == 2


def test_proofs_of_one_base_share_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(base, tmp_path / "adapters" / f"a{seed}", seed=seed)
    step = '[[steps]]\nstep = "verify"\ncandidate = "release/{adapter}"\n'
    (tmp_path / "fleet.toml").write_text(BASES + MERGE + step)
    loads = []
    resolve = load_model.resolve_model

    def counted(*given: object, **more: object) -> object:
        loads.append(given)
        return resolve(*given, **more)

    monkeypatch.setattr(load_model, "resolve_model", counted)
    session_of_process.cache_clear()
    status, _ = run_here(monkeypatch)
    session_of_process.cache_clear()
    assert status.counts == {"done": 2, "same": 2} and len(loads) == 1
