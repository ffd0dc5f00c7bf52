"""Fuzzing every reader of files that nobody vouches for: what was found before, hypothesis, and coverage-guided runs.

`make test` replays the corpus and tries a few inputs, always the same, and `make test-slow` more. `make soak` tries
others for LORA_EXPORT_FUZZ_SECONDS a target (180 unless told) in each of the two ways, and says how many they were.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz import strategies
from fuzz.every_target import GOOD, TARGETS
from fuzz.targets import Target
from support.slow import slow

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SECONDS = float(os.environ.get("LORA_EXPORT_FUZZ_SECONDS", "180"))
SHORT = 15  # inputs a target in `make test`
CHEAP = (  # less than 5 ms an input: twice as many
    *("examples_csv", "examples_jsonl", "examples_npz", "examples_parquet", "inputs_npz"),
    *("exported_archive", "exported_weights", "gguf_adapter", "image_processor"),
    *("image_gif", "image_png", "image_tiff", "sound_flac", "sound_wav"),
)
BATCH = 1000  # inputs between two looks at the clock

EVERY_TARGET = pytest.mark.parametrize("name", TARGETS)
FOUND = [pytest.param(path.parent.name, path, id=f"{path.parent.name}-{path.name}") for path in CORPUS.glob("*/*")]


@EVERY_TARGET
def test_a_good_input_is_accepted(name: str) -> None:
    assert TARGETS[name](GOOD[name]), "a fuzzer that begins here would try nothing but refusals"


@pytest.mark.parametrize(("name", "path"), FOUND)
def test_what_was_found_once_stays_mended(name: str, path: Path) -> None:
    TARGETS[name](path.read_bytes())


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 500_000


def tried(name: str, target: Target, *, count: int, start: int | None) -> list[bool]:
    """Try inputs on a target; returns which of them were accepted. `start` seeds them, None: the same ones always."""
    accepted: list[bool] = []

    @settings(
        max_examples=count,
        derandomize=start is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.inputs(name))
    def attempt(data: bytes) -> None:
        accepted.append(target(data))

    (attempt if start is None else seed(start)(attempt))()
    return accepted


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(dict.fromkeys(TARGETS, SHORT) | dict.fromkeys(CHEAP, 2 * SHORT)).items(),
        *(slow(name, 4 * SHORT) for name in TARGETS),
    ],
)
def test_odd_inputs_are_read_or_refused(name: str, count: int) -> None:
    accepted = tried(name, TARGETS[name], count=count, start=None)
    assert len(accepted) >= count // 2 and not all(accepted)


@pytest.mark.soak
@EVERY_TARGET
def test_odd_inputs_are_read_or_refused_for_a_long_time(name: str) -> None:
    start, begun, accepted = random.randrange(1 << 32), time.monotonic(), []
    print(f"\n{name}: hypothesis from seed {start}", end="", flush=True)
    while not accepted or time.monotonic() - begun < SECONDS:
        accepted += tried(name, TARGETS[name], count=BATCH, start=start + len(accepted))
    print(f": {len(accepted):,} inputs, {sum(accepted):,} accepted, in {time.monotonic() - begun:.0f} s")


def guided(name: str, folder: Path, *options: str) -> tuple[int, str, int]:
    """A coverage-guided run of its own: exit code, the end of what it said, and how many inputs it tried."""
    seeds = folder / "seeds"
    for place in (seeds, folder / "grown"):
        place.mkdir()
    (seeds / "good").write_bytes(GOOD[name])
    places = [
        place for place in (folder / "grown", seeds, CORPUS / name) if place.is_dir()
    ]  # the first one is added to
    # The clock of libFuzzer's own time limit goes on while a machine sleeps; the targets count processor time.
    always = ("-print_final_stats=1", "-timeout=3600", "-max_len=4096", f"-artifact_prefix={folder}/")
    child = subprocess.run(
        [sys.executable, HERE / "guided.py", name, *options, *always, *places],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS * 2 + 120,
        check=False,
    )
    counts = re.findall(r"stat::number_of_executed_units: (\d+)", child.stderr)
    return child.returncode, child.stderr[-4000:], int(counts[-1]) if counts else 0


NEEDS_ATHERIS = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has no wheel for this system"
)


@pytest.mark.slow
@NEEDS_ATHERIS
def test_a_guided_run_finds_its_way(tmp_path: Path) -> None:
    code, said, count = guided("examples_csv", tmp_path, "-runs=300", "-seed=1")
    assert (code, count >= 300) == (0, True), said


@pytest.mark.soak
@NEEDS_ATHERIS
@EVERY_TARGET
def test_guided_inputs_are_read_or_refused_for_a_long_time(name: str, tmp_path: Path) -> None:
    code, said, count = guided(name, tmp_path, f"-max_total_time={SECONDS:.0f}")
    print(f"\n{name}: atheris: {count:,} inputs in {SECONDS:.0f} s")
    assert code == 0, f"{said}\nThe input is among {[str(path) for path in tmp_path.iterdir()]}"
