"""Headless Chromium, and a folder that is served to it."""

from __future__ import annotations

import contextlib
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.local_server import Silent, local_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")


class _Files(Silent, http.server.SimpleHTTPRequestHandler):
    pass


def served(folder: Path) -> contextlib.AbstractContextManager[str]:
    """The address under which a folder is served to this machine alone."""
    return local_server(functools.partial(_Files, directory=str(folder)))


def shown(address: str, home: Path) -> Any:
    """What a page has as JSON in its element `report`, when its scripts have run. No other host is reached."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", "--dump-dom",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=100000", address,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
