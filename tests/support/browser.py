"""Headless Chromium, a folder that is served to it, and the packages of npm."""

from __future__ import annotations

import http.server
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.local_server import Silent

NODE = Path(os.environ.get("NODE_FOLDER", ROOT / ".venv" / "node"))  # where `make test-node` installs packages of npm
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")


def needs_package(name: str) -> pytest.MarkDecorator:
    """A mark that skips a test, with the reason, where a package of npm is missing."""
    return pytest.mark.skipif(
        not (NODE / "node_modules" / name).is_dir(), reason=f"no {name} in {NODE}: make test-node"
    )


needs_onnxruntime_web = needs_package("onnxruntime-web")

# What a page's module calls with its result. A script that fails reports that, instead of nothing.
REPORT = """<script>
const report = (found) => fetch("/report", {method: "POST", body: JSON.stringify(found)});
for (const kind of ["error", "unhandledrejection"])
  addEventListener(kind, (event) => report({failed: String(event.reason ?? event.message)}));
</script>"""


class _Server(http.server.ThreadingHTTPServer):
    """Serves a folder to this machine alone, and takes what a page reports."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), lambda *arguments: _Handler(*arguments, directory=str(folder)))
        self.reports: queue.Queue[Any] = queue.Queue()


class _Handler(Silent, http.server.SimpleHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        self.server.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()


def shown(folder: Path, page: str, home: Path, limit: float = 600) -> Any:
    """What a page of a folder gives to `report` (see REPORT). Chromium is ended then. No other host is reached.

    The page's own clock runs: under a virtual one, Chromium waits without end for workers and late requests.

    Raises:
        AssertionError: A script of the page failed, Chromium ended, or `limit` seconds passed.
    """
    with _Server(folder) as server, (home.parent / f"{home.name}.log").open("w+b") as log:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", f"--user-data-dir={home}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"http://127.0.0.1:{server.server_port}/{page}",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=log, stderr=log) as browser:
            try:
                found = _first_report(server, browser, time.monotonic() + limit)
            finally:
                browser.terminate()
                server.shutdown()
        log.seek(0)
        printed = log.read().decode(errors="replace")[-2000:]
    assert found is not None, f"{page} reported nothing:\n{printed}"
    assert not (isinstance(found, dict) and "failed" in found), f"{page}: {found['failed']}"
    return found


def _first_report(server: _Server, browser: subprocess.Popen[bytes], deadline: float) -> Any:
    """What the page reports; None where Chromium ends or the time is over before."""
    while browser.poll() is None and time.monotonic() < deadline:
        try:
            return server.reports.get(timeout=1)
        except queue.Empty:
            continue
    return None
