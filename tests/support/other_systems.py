"""Children of the tests that run as on a system that is not Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

WITHOUT_LINUX = Path(__file__).parent / "without_linux"


def python_without_linux(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, without fcntl and the other calls that only Linux has (see `without_linux`)."""
    paths = os.pathsep.join([str(WITHOUT_LINUX), str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment)
