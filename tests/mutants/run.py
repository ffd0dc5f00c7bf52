"""Put small faults into copies of the package, one at a time, and see whether the tests find them: `make mutants`.

First each test file is run once, to learn which tests run which lines. Then each mutant is given to the tests that run
its line. All that was learned is kept under build/mutants, by the contents of package and tests: a second call goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from mutants.mutations import Finder, Mutant, Site, all_sites, choose, draw, mutated, probed
from mutants.watching import HIT, Chosen, Watch, Watched, read_lines

# Nothing here may import the package, or what imports it: each child imports a copy.
ROOT = Path(__file__).resolve().parents[2]
CHOSEN, BASELINE = Path("tests/mutants/mutants.json"), Path("tests/mutants/baseline.json")
NOT_COPIED = (".git", ".venv", "build", "dist", "*-output", "__pycache__", ".*_cache", ".hypothesis")
PRELOADED = "numpy,torch,torch.export,torch.onnx,onnx,onnxruntime,onnxscript,safetensors.torch,peft"
PRELOADED += ",transformers.models.bert.modeling_bert,transformers.models.llama.modeling_llama"
PRELOADED += ",transformers.exporters.exporter_onnx"
QUICK = "not slow and not soak and not matrix and not cuda"
MOST_TESTS = 40  # for one mutant
FEW_TESTS = 12  # fewer are joined by their neighbours: these share fixtures that only the first of them runs
OUTCOMES = ("killed", "survived", "uncovered", "gone")


# --- processes ---


def forked(action: Callable[[], int], processor_seconds: float) -> int | None:
    """Run in a child that has what is imported here. Returns its exit code, None if it was too slow or crashed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            limit = int(processor_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            code = action()
        finally:
            os._exit(code)
    with contextlib.suppress(OSError):  # whichever of the two comes first
        os.setpgid(child, child)
    # A deadlock takes no processor time. A machine with much else to do is slower, and no test is to blame.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    last = time.monotonic() + (10 + 2 * processor_seconds) * crowd
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            if time.monotonic() > last:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def run_pytest(root: Path, files: Sequence[str], plugin: Callable[[], object], *options: str) -> int:
    """In a child: the tests of a copy, on the package of this copy."""
    output = os.open(root.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(root)
    sys.path[:] = [str(root), *(place for place in sys.path if not Path(place).is_relative_to(ROOT) or "lib" in place)]
    os.environ["PYTHONPATH"] = str(root)
    sys.dont_write_bytecode = False  # the next child need not compile what is the same
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The same inputs always, however slow the machine is.
    hypothesis.settings.register_profile("mutants", deadline=None, database=None, derandomize=True)
    always = ("-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", f"--basetemp={root.parent / 'temporary'}")
    return int(pytest.main([*files, "-m", QUICK, *always, *options], plugins=[plugin()]))


class Copy:
    """A copy of the checkout, in which one file at a time is changed."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root = place / "copy"
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(*NOT_COPIED))

    @contextlib.contextmanager
    def changed(self, site: Site) -> Iterator[None]:
        source = (self.root / site.mutant.file).read_text(encoding="utf-8")
        try:
            self.write(site.mutant.file, mutated(source, site))
            yield
        finally:
            self.write(site.mutant.file, source)

    def write(self, file: str, source: str) -> None:
        path = self.root / file
        path.write_text(source, encoding="utf-8")
        # Python knows a changed file by its size and the second it was changed in: both can be equal.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()


def each_in_a_copy(
    root: Path,
    items: Sequence[Any],
    workers: int,
    action: Callable[[Copy, Any], None],
    prepare: Callable[[Copy], None] = lambda _: None,
) -> None:
    children = []
    for number in range(workers if items else 0):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                with tempfile.TemporaryDirectory(prefix="mutants-") as place:
                    copy = Copy(root, Path(place))
                    prepare(copy)
                    for item in items[number::workers]:
                        action(copy, item)
                code = 0
            finally:  # a usual exit would wait for threads that only the parent has
                if code:
                    traceback.print_exc()
                os._exit(code)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit("mutants: a worker failed")


# --- which tests ---


def mirrored(file: str) -> str:
    path = Path(file)
    return str(Path("tests", *path.parts[1:-1], f"test_{path.name}"))


def test_files(root: Path, sites: Sequence[Site]) -> list[str]:
    """Those named after modules with mutants, then those that import such a module; short ones first."""
    modules = {site.mutant.file for site in sites}
    named = {mirrored(file) for file in modules}
    imported = re.compile(rf"^(?:from|import) .*\b(?:{'|'.join({Path(file).stem for file in modules})})\b", re.M)
    found = [path.relative_to(root).as_posix() for path in sorted((root / "tests").rglob("test_*.py"))]
    found = [file for file in found if not file.startswith("tests/mutants/")]

    def rank(file: str) -> tuple[int, int]:
        text = (root / file).read_text(encoding="utf-8")
        return 0 if file in named else 1 if imported.search(text) else 2, len(text)

    return sorted(found, key=rank)


def covering(site: Site, watched: Watched, most_seconds: float, without: set[str]) -> list[str]:
    """The tests for a mutant: those of the file that mirrors its module, then the others, the fastest first.

    Among each, no test with many parameters comes before the rest.
    """

    def rank(test: str) -> tuple[bool, float]:
        return not test.startswith(f"{mirrored(site.mutant.file)}::"), watched.seconds[test] + watched.reach[test] / 10

    line = sorted(watched.tests[site.mutant.id], key=lambda test: (*rank(test), test))
    taken: Counter[str] = Counter()
    rounds = {}
    for test in line:
        function = test.partition("[")[0]
        rounds[test] = taken[function] // 2
        taken[function] += 1
    line.sort(key=lambda test: (rank(test)[0], rounds[test], rank(test)[1]))
    files = list(dict.fromkeys(test.partition("::")[0] for test in line))[:3]
    near = sorted(set(watched.seconds) - set(line), key=lambda test: watched.seconds[test])
    near = [test for test in near if test.partition("::")[0] in files]
    chosen: list[str] = []
    spent = 0.0
    for test in [*line[:MOST_TESTS], *near[: max(0, FEW_TESTS - len(line))]]:
        more = expected([*chosen, test], watched)
        if not chosen or more - spent <= most_seconds:
            spent = spent if chosen else more  # one test runs in any case
            chosen.append(test)
    return [test for test in chosen if test not in without]


def expected(tests: Sequence[str], watched: Watched) -> float:
    """The processor time for tests, in seconds: each file among them may first make what its tests share."""
    files = {test.partition("::")[0] for test in tests}
    return sum(watched.seconds[test] for test in tests) + sum(watched.heaviest[file] for file in files)


# --- the run ---


class Run:
    def __init__(self, root: Path, workers: int) -> None:
        self.root, self._workers = root, workers
        known = json.loads((root / CHOSEN).read_text(encoding="utf-8"))
        fields = [{**each, "around": tuple(each["around"])} for each in known["mutants"]]
        self.mutants = [Mutant(**{name: value for name, value in each.items() if name != "id"}) for each in fields]
        sites = all_sites(root)
        finder = Finder(sites)
        self.sites = {mutant.id: site for mutant in self.mutants if (site := finder.find(mutant))}
        self.new = {}  # in place of those that are gone
        present = {site.mutant.id for site in self.sites.values()}
        for mutant in self.mutants:
            if mutant.id not in self.sites:
                others = [site for site in sites if site.mutant.id not in present]
                near = [site for site in others if site.mutant.folder == mutant.folder]
                for drawn in draw(near or others, 1, f"{known['seed']} {mutant.id}"):
                    self.new[drawn.id] = next(site for site in others if site.mutant.id == drawn.id)
                    present.add(drawn.id)
        state = hashlib.sha256(repr([*self.sites, *self.new]).encode())
        for path in sorted([*(root / "lora_export").rglob("*.py"), *(root / "tests").rglob("*.py")]):
            if not path.is_relative_to(root / CHOSEN.parent):
                state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        self.folder = root / "build" / "mutants" / state.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._results, self._seen = self.folder / "results.jsonl", self.folder / "watched"

    def results(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in map(json.loads, read_lines(self._results))}

    def watch(self, minutes: float, longest: float) -> None:
        """Run the test files that were not yet run, for so long at most."""
        seen = set(read_lines(self._seen))
        killed = {name for name, each in self.results().items() if each["outcome"] == "killed"}
        wanted = [site for name, site in {**self.sites, **self.new}.items() if name not in killed]
        files = [file for file in test_files(self.root, wanted) if file not in seen]
        last = time.monotonic() + 60 * minutes
        print(f"{len(files)} test files to run once", flush=True)

        def prepare(copy: Copy) -> None:
            present = [site.mutant for site in (*self.sites.values(), *self.new.values())]
            for file in {mutant.file for mutant in present}:
                source = (copy.root / file).read_text(encoding="utf-8")
                copy.write(file, probed(source, file, {mutant.id for mutant in present}))
            copy.write("lora_export/mutants_hit.py", HIT.format(path=str(self.folder / "hits")))

        def action(copy: Copy, name: str) -> None:
            if time.monotonic() < last:
                code = forked(lambda: run_pytest(copy.root, [name], lambda: Watch(self.folder, longest)), 3600)
                if code not in (0, 1, 5):
                    output = (copy.root.parent / "output").read_text(encoding="utf-8", errors="replace")
                    print(f"pytest ended with {code}: {name}\n{output[-2000:]}", flush=True)
                with self._seen.open("a", encoding="utf-8") as file:
                    file.write(f"{name}\n")

        each_in_a_copy(self.root, files if minutes else [], self._workers, action, prepare)

    def try_all(self, most_seconds: float) -> None:
        watched, before = Watched(self.folder), self.results()
        wanted = []
        for name, site in {**self.sites, **self.new}.items():
            former = before.get(name, {"outcome": "", "tests": []})
            tests = covering(site, watched, most_seconds, set(former["tests"]))
            if former["outcome"] != "killed" and (tests or not former["outcome"]):
                wanted.append((name, site, tests, former["tests"], expected(tests, watched)))

        def action(copy: Copy, item: tuple[str, Site, list[str], list[str], float]) -> None:
            name, site, tests, former, seconds = item
            start = time.monotonic()
            outcome, by = self._tried(copy, site, tests, seconds)
            if former and outcome == "uncovered":
                outcome = "survived"
            took = round(time.monotonic() - start, 1)
            result = {"id": name, "outcome": outcome, "by": by, "tests": [*former, *tests], "seconds": took}
            with self._results.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(result)}\n")
            print(f"{outcome:9} {took:6.1f} s  {site.mutant.file}: {site.change}", flush=True)

        print(f"{len(wanted)} mutants to try", flush=True)
        each_in_a_copy(self.root, wanted, self._workers, action)

    def _tried(self, copy: Copy, site: Site, tests: list[str], seconds: float) -> tuple[str, str]:
        if not tests:
            return "uncovered", ""
        log = copy.root.parent / "failed"
        log.unlink(missing_ok=True)
        # Not one test of this file and one of that: each time the fixtures of the files would be made again.
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))

        def run() -> int | None:
            return forked(lambda: run_pytest(copy.root, files, lambda: Chosen(tests, log), "-x"), 20 + 3 * seconds)

        with copy.changed(site):
            code = run()
        if code is None:
            return ("survived", "too slow") if run() is None else ("killed", "time or a crash")
        if code in (0, 5):  # 5: the tests have other parameters, and none of the names is left
            return "survived", ""
        return "killed", [*read_lines(log), "import"][0]

    def doubt(self) -> bool:
        """Run the tests that found mutants on the unchanged package. One that fails there too found nothing."""
        killers: dict[str, list[str]] = {}
        for name, each in self.results().items():
            if each["outcome"] == "killed" and "::" in each["by"]:
                killers.setdefault(each["by"], []).append(name)
        trusted, doubted = self.folder / "trusted", self.folder / "doubted"
        tests = sorted(set(killers) - set(read_lines(trusted)))

        def action(copy: Copy, some: list[str]) -> None:
            log = copy.root.parent / "failed"
            files = list(dict.fromkeys(test.partition("::")[0] for test in some))
            code = forked(lambda: run_pytest(copy.root, files, lambda: Chosen(some, log)), 3600)
            failed = read_lines(log) if code in (0, 1) else some
            for path, those in ((doubted, failed), (trusted, [test for test in some if test not in failed])):
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{test}\n" for test in those))

        each_in_a_copy(self.root, [tests] if tests else [], 1, action)
        wrong = set(read_lines(doubted)) & set(killers)
        with self._results.open("a", encoding="utf-8") as file:
            for name in (name for test in wrong for name in killers[test]):
                file.write(f"{json.dumps({'id': name, 'outcome': '', 'by': '', 'tests': [], 'seconds': 0})}\n")
        return bool(wrong)

    def outcomes(self) -> list[dict[str, str]]:
        results, gone = self.results(), {"outcome": "gone", "by": ""}
        found = {mutant.id: results.get(mutant.id) if mutant.id in self.sites else gone for mutant in self.mutants}
        return [{"id": name, "outcome": each["outcome"], "by": each["by"]} for name, each in found.items() if each]

    def table(self) -> str:
        outcomes, results = {each["id"]: each["outcome"] for each in self.outcomes()}, self.results()
        counts: dict[str, Counter[str]] = {}
        for mutant in self.mutants:
            for row in (mutant.folder, "all"):
                counts.setdefault(row, Counter())[outcomes.get(mutant.id, "not tried")] += 1
        if self.new:
            counts["new, in place of those gone"] = Counter(
                results.get(name, {"outcome": "not tried"})["outcome"] for name in self.new
            )
        counts["all"] = counts.pop("all")
        width = max(map(len, counts))
        lines = [f"{row:{width}} " + "".join(f"{count[name]:10}" for name in OUTCOMES) for row, count in counts.items()]
        return "\n".join([" " * (width + 1) + "".join(f"{name:>10}" for name in OUTCOMES), *lines])


def commit(root: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(path: Path, head: dict[str, Any], name: str, entries: list[dict[str, Any]]) -> None:
    """One line for each mutant."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f'{json.dumps(head)[:-1]}, "{name}": [\n{lines}\n]}}\n', encoding="utf-8")


def lost(run: Run) -> list[str]:
    """The mutants that the tests found at the baseline, and do not find now."""
    path = run.root / BASELINE
    former = json.loads(path.read_text(encoding="utf-8"))["outcomes"] if path.exists() else []
    found = {each["id"] for each in former if each["outcome"] == "killed"}
    now = {each["id"]: each["outcome"] for each in run.outcomes()}
    return [
        f"{now[mutant.id]} now: {mutant.file}, {mutant.function}: {mutant.change}"
        for mutant in run.mutants
        if mutant.id in found and now.get(mutant.id) in ("survived", "uncovered")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--choose", type=int, help="choose so many mutants, and run nothing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=600, help="for the first run of the tests; the next call goes on"
    )
    parser.add_argument("--longest", type=float, default=10, help="seconds for a test; slower ones are left out")
    parser.add_argument("--seconds", type=float, default=6, help="for the tests of a mutant, when nothing is wrong")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--preload", default=PRELOADED, help="modules that are imported once, not for every mutant")
    parser.add_argument("--keep", action="store_true", help="write the outcomes as the baseline")
    options = parser.parse_args()
    root = options.root.resolve()
    if options.choose:
        chosen = choose(all_sites(root), options.choose, options.seed)
        head = {"seed": options.seed, "commit": commit(root)}
        write(root / CHOSEN, head, "mutants", [{"id": mutant.id, **asdict(mutant)} for mutant in chosen])
        return
    run = Run(root, options.workers)
    for module in filter(None, options.preload.split(",")):
        importlib.import_module(module)
    gc.freeze()  # no child visits all that was imported, each time it collects garbage
    run.watch(options.minutes, options.longest)
    run.try_all(options.seconds)
    while run.doubt():
        run.try_all(options.seconds)
    print(run.table())
    if options.keep:
        write(root / BASELINE, {"commit": commit(root)}, "outcomes", run.outcomes())
    if missed := lost(run):
        sys.exit("\n".join(["The tests found these before:", *missed]))


if __name__ == "__main__":
    main()
