"""Each failure of a store ends as one line with the object, and without what the store answered."""

from __future__ import annotations

import contextlib
import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed
from lora_export.storage import object_store
from lora_export.storage.atomic_output import stage_folder
from lora_export.storage.object_store import Bucket, Fence, ObjectChanged
from lora_export.storage.store_path import StorePath, newly_opened, place

pytest.importorskip("obstore", reason="obstore is not installed")
from support import stores
from support.stores import Stored

QUOTED = b"<Error><Code>%s</Code><Message>the key wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY</Message></Error>"
# status, body -> what a read ends as, the error of a write, and a part of both messages
FAILURES = {
    "denied": (403, QUOTED % b"AccessDenied", EnvironmentLacking, "refused the credentials, or they expired"),
    "signature": (403, QUOTED % b"SignatureDoesNotMatch", EnvironmentLacking, "refused the credentials"),
    "expired": (400, QUOTED % b"ExpiredToken", EnvironmentLacking, "they expired (400 ExpiredToken)"),
    "missing bucket": (404, QUOTED % b"NoSuchBucket", InputRefused, "there is no bucket for"),
    "missing container": (404, QUOTED % b"ContainerNotFound", InputRefused, "there is no bucket for"),
    "busy": (503, QUOTED % b"SlowDown", EnvironmentLacking, "the store answered 503 SlowDown, after 1 retries"),
    "full": (507, QUOTED % b"InsufficientStorage", EnvironmentLacking, "the store answered 507 InsufficientStorage"),
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up early."""
    monkeypatch.setattr(object_store, "RETRIES", 1)
    monkeypatch.setattr(object_store, "DEADLINE", timedelta(seconds=1))
    object_store.bucket_of.cache_clear()


def failure(path: StorePath, *, writing: bool) -> LoraExportError:
    with pytest.raises(LoraExportError) as failed:
        path.write_text("x") if writing else list(path.iterdir())
    shown = "".join(map(str, failed.traceback[-1].frame.f_locals.values()))
    assert stores.SECRET not in str(failed.value) and failed.value.__suppress_context__ and "s3://bucket/a" in shown
    return failed.value


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_names_the_object_and_no_secret(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    status, body, kind, reason = FAILURES[name]
    with stores.answering(status, body) as address:
        stores.use(monkeypatch, address)
        read, written = failure(stored_path(), writing=False), failure(stored_path(), writing=True)
    assert type(read) is kind and type(written) is (OutputFailed if kind is EnvironmentLacking else kind)
    assert all(reason in str(error) and "s3://bucket/a" in str(error) for error in (read, written))


def test_a_refused_copy_names_the_new_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.answering(403, QUOTED % b"AccessDenied") as address, pytest.raises(OutputFailed) as failed:
        stores.use(monkeypatch, address)
        stored_path().bucket.copy("a", "out/b")
    assert str(failed.value) == (
        "s3://bucket/out/b could not be written: the store refused the credentials, or they expired (403 AccessDenied)"
    )


@pytest.mark.parametrize(
    ("address", "settings", "reason"),
    [
        ("az://bucket", {}, "cannot be opened: a setting of its store is wrong or missing. The environment has none"),
        (
            "az://bucket",
            {"AZURE_STORAGE_ACCOUNT_NAME": "x", "AZURE_STORAGE_ACCOUNT_KEY": f"%{stores.SECRET}"},
            "_KEY, ",
        ),
        ("gs://bucket", {"GOOGLE_SERVICE_ACCOUNT_KEY": f'{{"private_key": "{stores.SECRET}"}}'}, "has GOOGLE_SERVICE"),
        ("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere"}, "has GOOGLE_APPLICATION_CREDENTIALS (guide"),
        ("s3://bucket", {"AWS_SKIP_SIGNATURE": "perhaps"}, "AWS_SKIP_SIGNATURE"),
        (
            "s3://bucket",
            {"AWS_ENDPOINT_URL": "bucket.example"},
            "AWS_ENDPOINT_URL is no address that begins with https",
        ),
    ],
)
def test_wrong_settings_are_named_without_their_values(
    address: str, settings: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentLacking) as failed:
        newly_opened(f"{address}/a")
    assert str(failed.value).startswith(address) and reason in str(failed.value)
    assert stores.SECRET not in "".join(traceback.format_exception(failed.value))


def test_what_was_not_there_is_found_when_another_run_puts_it(stored: Stored) -> None:
    bucket = (stored / "out").bucket
    assert not bucket.has_below("out")
    stored.put("out/m", b"of another run")
    assert bucket.has_below("out")


def test_the_objects_of_other_folders_do_not_count(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "MOST_OBJECTS", 2)
    for key in ("a/1", "a/2", "a-b/1", "b/1", "b/c/2"):
        stored.put(key, b"x")
    bucket = (stored / "a").bucket
    assert [list(bucket.below(folder)) for folder in ("a", "b", "b/c")] == [["1", "2"], ["1", "c/2"], ["2"]]
    stored.delete("a/1")
    bucket.forget("a")
    assert [list(bucket.below(folder)) for folder in ("a", "b")] == [["2"], ["1", "c/2"]]
    with pytest.raises(InputRefused, match="has more than 2 objects"):
        bucket.below("")


def test_settings_that_are_no_addresses_have_endpoint_in_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pods of a cluster at Amazon have them."""
    monkeypatch.setenv("AWS_STS_REGIONAL_ENDPOINTS", "regional")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "false")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    assert object_store.bucket_of("s3://bucket").address == "s3://bucket"


def test_what_azure_lists_without_quotes_is_the_same_version(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.put("folder/a", b"content")
    stores.lists_without_quotes(monkeypatch)
    bucket = Bucket("az://folder", (stored / "folder").bucket._store)
    (listed,) = bucket.below("folder").values()
    bucket.forget("folder")
    found = bucket.info("folder/a")
    assert found is not None and found.e_tag == listed.e_tag and bytes(bucket.read("folder/a", 0, 7)) == b"content"


class Untagged:
    """A store that states no version of an object, as a proxy that leaves ETags out."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def head(self, key: str) -> Any:
        return {**self.store.head(key), "e_tag": None}

    def put(self, *arguments: Any, **options: Any) -> Any:
        return {**self.store.put(*arguments, **options), "e_tag": None}


@pytest.mark.parametrize("scheme", ["az", "gs", "s3"])
def test_an_object_without_a_version_is_read_and_replaced(stored: Stored, scheme: str) -> None:
    stored.put("a", b"before")
    bucket = Bucket(f"{scheme}://folder", Untagged((stored / "a").bucket._store))
    assert bytes(bucket.read("a", 0, 6)) == b"before"
    bucket.refuse_changed("a")
    bucket.fences["a"] = Fence(lambda: None, lambda key: None)
    bucket.put("a", b"after", bucket.mode_of("a"))
    assert stored.get("a") == b"after"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("before", [None, b"{}"], ids=["nothing", "begun"])
def test_a_store_without_versions_takes_no_output(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, streamed: bool, before: bytes | None
) -> None:
    bucket = (stored / "out").bucket
    if before is not None:
        stored.put("out/.m.begun", before)
    monkeypatch.setattr(bucket, "_store", Untagged(bucket._store))
    refused = pytest.raises(OutputFailed, match="out/m: the store gives no ETags")
    with refused, stage_folder(stored / "out/m", inputs=[], streamed=streamed) as stage:
        (stage / "b").write_bytes(b"content")
    assert list(stored.objects()) == ([] if before is None else ["out/.m.begun"])


@pytest.mark.parametrize("stored", ["s3", "gs"], indirect=True)
@pytest.mark.parametrize("meanwhile", ["nothing", "changed", "deleted"])
def test_a_listed_object_is_replaced_while_it_is_the_same(stored: Stored, meanwhile: str) -> None:
    stored.put("out/m", b"before")
    bucket = (stored / "out").bucket
    (listed,) = bucket.below("out").values()
    if meanwhile == "changed":
        stored.put("out/m", b"of another run")
    if meanwhile == "deleted":
        stored.delete("out/m")
    with contextlib.nullcontext() if meanwhile == "nothing" else pytest.raises(ObjectChanged):
        bucket.put("out/m", b"after", listed.version)
    left = {"nothing": [b"after"], "changed": [b"of another run"], "deleted": []}
    assert [stored.get(key) for key in stored.objects()] == left[meanwhile]


def test_what_cannot_be_opened_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        stores.answering(403) as address,
        pytest.raises(EnvironmentLacking, match=r"^s3://bucket/out/m could not be read"),
    ):
        stores.use(monkeypatch, address)
        newly_opened("s3://bucket/out/m")


def stored_path() -> StorePath:
    found = place("s3://bucket/a")
    assert isinstance(found, StorePath)
    return found


def test_a_slow_store_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.answering(200, wait=20) as address:
        stores.use(monkeypatch, address)
        assert "did not answer within 1 seconds" in str(failure(stored_path(), writing=False))


def test_a_range_that_is_cut_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    when = {"Last-Modified": "Sat, 28 Nov 2026 10:00:00 GMT", "ETag": '"e"', "Content-Range": "bytes 0-3/4"}
    with stores.answering(206, b"abcd", headers=when) as address:
        stores.use(monkeypatch, address)
        path = stored_path()
        assert bytes(path.bucket.read(path.key, 0, 4)) == b"abcd"
        path.bucket._known["a"] = path.bucket.info("a")._replace(size=9)  # type: ignore[union-attr]
        with pytest.raises(LoraExportError, match="s3://bucket/a"):
            path.bucket.read(path.key, 0, 9)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("size", "requests"), [(10, 1), (stores.PART + 1, 4)])  # begin, two parts, complete
def test_the_version_of_what_was_put_is_not_requested(
    size: int, requests: int, stored: Stored, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    path, server = stored / "a", stores.Failing(monkeypatch, 0, seed=0)
    path.bucket.upload("a", tmp_path / "file")
    assert server.requests == requests and path.stat().st_size == size and server.requests == requests
    assert path.bucket.put_here == {"a": stored.objects()["a"]["ETag"]}


@pytest.mark.parametrize("other", [b"them", b"longer"])
def test_an_object_with_other_bytes_is_another_runs(stored: Stored, other: bytes) -> None:
    stored.put("a", other)
    bucket = (stored / "a").bucket
    with pytest.raises(OutputFailed, match=r"/a: another run has put it meanwhile"):
        bucket.put_in_place("a", b"mine", "create")
    assert stored.get("a") == other and bucket.put_here == {}


def test_without_credentials_the_message_tells_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.answering(404) as address:
        stores.use(monkeypatch, address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://169.254.169.254.invalid")
        with pytest.raises(EnvironmentLacking, match="no credentials were found"):
            stored_path().exists()


def test_without_obstore_the_message_is_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(EnvironmentLacking, match=r"s3://bucket needs obstore .* pip install"):
        stored_path().exists()
