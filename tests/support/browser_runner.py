"""A runner for `verify --runner`: the graph in headless Chromium, by onnxruntime-web. It is loaded as a user's is."""

from __future__ import annotations

import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 300.0
ENDS_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")  # however the process of the runner ends
PAGE = """<script type="module">
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
ort.env.wasm.numThreads = 1;
const arrays = {int64: (data) => BigInt64Array.from(data, BigInt), float32: (data) => Float32Array.from(data)};
const answer = (found) => fetch("/answer", {method: "POST", body: JSON.stringify(found)});
try {
  const session = await ort.InferenceSession.create("model.onnx");
  await answer({ready: ort.env.versions.web});
  for (;;) {
    const feeds = {}, outputs = {};
    for (const [name, type, dims, data] of await (await fetch("/next")).json())
      feeds[name] = new ort.Tensor(type, arrays[type](data), dims);
    for (const [name, value] of Object.entries(await session.run(feeds)))
      outputs[name] = [value.dims, [...value.data]];
    await answer({outputs});
  }
} catch (error) { await answer({failed: String(error)}); }
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.path != "/next":
            super().do_GET()
            return
        content = json.dumps(self.server.requests.get()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.server.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.requests: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()


class Page:
    """A page of Chromium that has loaded a graph."""

    def __init__(self, path: str):
        folder = Path(tempfile.mkdtemp())
        (folder / "index.html").write_text(PAGE, encoding="utf-8")
        (folder / "model.onnx").symlink_to(Path(path).absolute())
        (folder / "node_modules").symlink_to(Path(os.environ["NODE_FOLDER"]) / "node_modules")
        self.server = _Server(folder)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        command = [
            *ENDS_WITH_PARENT, str(shutil.which("chromium")),
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder / 'home'}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"http://127.0.0.1:{self.server.server_port}/index.html",
        ]  # fmt: skip
        self.browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.notes = [f"run by onnxruntime-web {self._answer()['ready']} in Chromium"]

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.server.requests.put(
            [[name, str(value.dtype), value.shape, value.ravel().tolist()] for name, value in inputs.items()]
        )
        outputs = self._answer()["outputs"]
        return {name: np.array(data, np.float32).reshape(dims) for name, (dims, data) in outputs.items()}

    def _answer(self) -> Any:
        found = self.server.answers.get(timeout=SECONDS)
        if "failed" in found:
            raise RuntimeError(found["failed"])
        return found
