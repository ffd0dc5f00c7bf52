"""Compiles merge_blocks.c, with merge_rows.c in it, into a wheel: once for each instruction set of its platform."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

# The platform of the wheel -> what zig calls it, and the suffix of a library there
PLATFORMS = {
    "manylinux_2_17_x86_64": ("x86_64-linux-gnu.2.17", "so"),
    "manylinux_2_17_aarch64": ("aarch64-linux-gnu.2.17", "so"),
    "musllinux_1_2_x86_64": ("x86_64-linux-musl", "so"),
    "musllinux_1_2_aarch64": ("aarch64-linux-musl", "so"),
    "macosx_11_0_x86_64": ("x86_64-macos.11.0", "dylib"),
    "macosx_11_0_arm64": ("aarch64-macos.11.0", "dylib"),
    "win_amd64": ("x86_64-windows-gnu", "dll"),
}
# The processor -> the name of each instruction set in the package, and the compiler's flags for it
INSTRUCTIONS = {
    "x86_64": {"v4": ["-mcpu=x86_64_v4", "-mprefer-vector-width=512"], "v3": ["-mcpu=x86_64_v3"]},
    "aarch64": {"neon": []},
}
FLAGS = ["-shared", "-nostdlib", "-O3", "-g0", "-s", "-std=c11", "-ffp-contract=fast", "-fvisibility=hidden"]


class CompiledWheel(BuildHookInterface[Any]):
    """The hook of hatchling. LORA_EXPORT_KERNEL_PLATFORM names another platform than that of this machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling states it
        platform = os.environ.get("LORA_EXPORT_KERNEL_PLATFORM") or next(filter(PLATFORMS.get, platform_tags()), "")
        if platform not in PLATFORMS:
            raise SystemExit(f"lora-export-kernel has no code for {platform or sys.platform}: {', '.join(PLATFORMS)}")
        target, suffix = PLATFORMS[platform]
        build_data |= {"tag": f"py3-none-{platform}", "pure_python": False}
        self.folder = tempfile.TemporaryDirectory()
        for name, flags in INSTRUCTIONS[target.partition("-")[0]].items():
            library = Path(self.folder.name) / f"merge_rows_{name}.{suffix}"
            source = Path(self.root) / "merge_blocks.c"
            compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target]
            subprocess.run([*compiler, *FLAGS, *flags, "-o", str(library), str(source)], check=True)
            build_data["force_include"][str(library)] = f"lora_export_kernel/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        self.folder.cleanup()
