"""Objects in S3, Google Cloud Storage and Azure: what is there, ranges of it, and uploads, through obstore.

A bucket caches the sizes and ETags of objects, until `forget`. Each read requests the cached ETag (If-Match): what is
read is what was planned. Small objects are read whole, once for each ETag. Credentials come from the usual places of
obstore (the environment, the machine's role). The text of its errors is never shown, because a store's answer may quote
a key.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed
from lora_export.extras import pip_install

_T = TypeVar("_T")

UPLOADED_PART = 12 << 20  # bytes; a store takes at most 10,000 parts of an object
PARTS_AT_ONCE = 4
OF_UPLOAD = (PARTS_AT_ONCE + 1) * UPLOADED_PART  # bytes of memory: parts on their way, and the one that is filled
RETRIES, DEADLINE = 5, timedelta(minutes=3)  # of one request: a store joins the parts of a large object in minutes
LISTED_AT_ONCE = 1000  # objects of one answer of a store
SMALL_OBJECT = 8 << 10  # bytes; an adapter's configuration
SMALL_OBJECTS = 64  # whose bytes are in memory
MOST_OBJECTS = 100_000  # below an address; more is no model
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound")
_HEADER_SETTING = re.compile(r"(_KEY_ID|_ACCESS_KEY|_TOKEN|_REGION|_ACCOUNT_NAME)$")
_ADDRESS_SETTING = re.compile(r"(AWS_ENDPOINT(_URL(_S3)?)?|AZURE_(STORAGE_)?ENDPOINT|GOOGLE_BASE_URL)")
_SETTINGS = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # scheme -> the beginning of environment variables


class ObjectInfo(NamedTuple):
    """What a store states of an object."""

    size: int  # bytes
    modified: datetime  # by the clock of the store, or by that of this machine when it has just put it
    version: dict[str, str]  # its ETag, and in some stores a number

    @property
    def e_tag(self) -> str | None:
        return self.version.get("e_tag")


class ObjectChanged(Exception):
    """A condition of a request does not hold: the object is another one, or is there already."""


@dataclass(frozen=True)
class Fence:
    """What keeps a process out of an output that another run may have by now."""

    refuse: Callable[[], None]  # raises OutputFailed where that is so
    withdraw: Callable[[str], None]  # removes what was put too late, by its key, unless the other run has put the same


@contextlib.contextmanager
def _errors(address: str, failure: type[LoraExportError]) -> Iterator[None]:
    """Turn an error of obstore into one line that names the object, without the store's own text."""
    from obstore import exceptions as known

    try:
        yield
    except (known.PreconditionError, known.AlreadyExistsError):
        raise ObjectChanged from None
    except (known.BaseError, OSError) as error:
        if _NO_BUCKET.search(str(error)):
            raise InputRefused(f"there is no bucket for {address}") from None
        if isinstance(error, FileNotFoundError | known.NotFoundError):
            raise InputRefused(f"there is no object {address}") from None
        if "InvalidBlockList" in str(error):  # Azure keeps no parts of an object that another run has put
            raise OutputFailed(
                f"{address}: its parts are gone. Another run has put it meanwhile, or the store's answer was lost"
            ) from None
        verb = "written" if failure is OutputFailed else "read"
        raise failure(f"{address} could not be {verb}: {_reason(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        raise EnvironmentLacking(
            f"{address}: obstore fails. A setting of its store in the environment is wrong"
        ) from None


def _reason(error: Exception) -> str:
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    stated = " ".join(found[1] for found in (status, code) if found)
    if "169.254." in text or "metadata.google" in text:
        return "no credentials were found. Set those of the store in the environment (guide stores)"
    if stated.startswith(("401", "403")) or "Token" in stated:
        return f"the store refused the credentials, or they expired ({stated or 'no status'})"
    if "BadScheme" in text:
        return "its endpoint is no https address. AWS_ALLOW_HTTP=true allows http"
    if stated:
        return f"the store answered {stated}, after {RETRIES} retries where it may recover"
    return f"the store did not answer within {DEADLINE.seconds} seconds, or the connection broke"


class KeyTable(Generic[_T]):
    """Values of keys. Those below a folder are found without a look at the others: a bucket may have many adapters."""

    def __init__(self) -> None:
        self._values, self._sorted, self._lock = dict[str, _T](), list[str](), threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __setitem__(self, key: str, value: _T) -> None:
        with self._lock:
            if key not in self._values:
                bisect.insort(self._sorted, key)
            self._values[key] = value

    def get(self, key: str) -> _T | None:
        return self._values.get(key)

    def below(self, folder: str) -> list[tuple[str, _T]]:
        """The keys below a folder with their values, in their order; below an empty one all."""
        with self._lock:
            return [(key, self._values[key]) for key in self._sorted[self._range_below(folder)]]

    def forget(self, key: str) -> None:
        """Forget a key, and those below it."""
        with self._lock:
            own, found = self._range_below(key), bisect.bisect_left(self._sorted, key)
            for gone in (own, slice(found, found + (key in self._values))):  # the key comes before those below it
                for each in self._sorted[gone]:
                    del self._values[each]
                del self._sorted[gone]

    def _range_below(self, folder: str) -> slice:
        ends = f"{folder}/", f"{folder}0"  # 0 is the character after the slash
        return slice(*(bisect.bisect_left(self._sorted, end) for end in ends)) if folder else slice(0, None)


class Bucket:
    """A bucket, and what is known of its objects."""

    def __init__(self, address: str, store: Any):
        self.address, self._store = address, store
        self._known, self._listed = KeyTable[ObjectInfo | None](), KeyTable[bool]()
        self._small = OrderedDict[tuple[str, str, int], memoryview]()  # of small objects, by key, ETag and size
        self.held: dict[str, bytes | None] = {}  # objects that are put when their output is whole
        self.fences: dict[str, Fence] = {}  # by the keys of outputs
        self.put_here: dict[str, str | None] = {}  # the ETags of what this process has put and not deleted, by key

    def _of(self, key: str) -> str:
        return f"{self.address}/{key}"

    def _stated(self, meta: Any) -> ObjectInfo:
        return ObjectInfo(meta["size"], meta["last_modified"], self._version(meta))

    def _version(self, stated: Any) -> dict[str, str]:
        """What a store states of a version, if it does. Azure leaves out an ETag's quotes in lists, and only there."""
        version = {key: stated[key] for key in ("e_tag", "version") if stated[key]}
        e_tag = version.get("e_tag", "")
        if self.address.startswith("az:") and e_tag and not e_tag.endswith('"'):
            version["e_tag"] = f'"{e_tag}"'
        return version

    def forget(self, key: str) -> None:
        """Forget what is known of an object, and of those below it."""
        self._known.forget(key)
        self._listed.forget(key)
        for folder in _folders_of(key):
            self._listed[folder] = False

    def _is_listed(self, folder: str) -> bool:
        """Whether all objects below a folder are known."""
        return any(map(self._listed.get, _folders_of(folder)))

    def info(self, key: str) -> ObjectInfo | None:
        """What the store states of an object; None where there is none."""
        if (held := self.held.get(key)) is not None:
            return ObjectInfo(len(held), datetime.now(UTC), {})
        if key not in self._known and not self._is_listed(key.rpartition("/")[0]):
            try:
                with _errors(self._of(key), EnvironmentLacking):
                    self._known[key] = self._stated(self._store.head(key)) if key else None
            except InputRefused:
                self._known[key] = None
        return self._known.get(key)

    def has_below(self, key: str) -> bool:
        """Whether there are objects below a key."""
        if any(info is not None for _, info in self._known.below(key)):
            return True
        if self._is_listed(key):
            return False
        with _errors(self._of(key), EnvironmentLacking):
            page: list[Any] = next(iter(self._store.list(key or None, chunk_size=LISTED_AT_ONCE)), [])
        self._know(page)
        if 0 < len(page) < LISTED_AT_ONCE:  # another run may put the first one
            self._listed[key] = True
        return len(page) > 0

    def _know(self, page: list[Any]) -> None:
        for each in page:
            self._known[each["path"]] = self._stated(each)

    def below(self, key: str) -> dict[str, ObjectInfo]:
        """The objects below a key, by their names from there on."""
        if not self._is_listed(key):
            found = 0
            with _errors(self._of(key), EnvironmentLacking):
                for page in self._store.list(key or None):
                    self._know(page)
                    found += len(page)
                    if found > MOST_OBJECTS:
                        raise InputRefused(
                            f"{self._of(key)} has more than {MOST_OBJECTS:,} objects. Name a model in it"
                        )
            self._listed[key] = True
        prefix = f"{key}/" if key else ""
        return {name.removeprefix(prefix): info for name, info in self._known.below(key) if info is not None}

    def read(self, key: str, start: int, stop: int) -> memoryview:
        """The bytes [start, stop) of the object that was planned. Raises InputRefused where it changed or is short."""
        if (held := self.held.get(key)) is not None:
            return memoryview(held)[start:stop]
        info = self.info(key)
        if info is None:
            raise InputRefused(f"there is no object {self._of(key)}")
        if start >= (stop := min(stop, info.size)):
            return memoryview(b"")
        if info.size > SMALL_OBJECT or info.e_tag is None:
            return self._requested(key, info, start, stop)
        name = key, info.e_tag, info.size
        if (content := self._small.pop(name, None)) is None:
            content = self._requested(key, info, 0, info.size)
        self._small[name] = content  # as the last one that was used
        while len(self._small) > SMALL_OBJECTS:
            self._small.popitem(last=False)
        return content[start:stop]

    def _requested(self, key: str, info: ObjectInfo, start: int, stop: int) -> memoryview:
        options: dict[str, Any] = {"range": (start, stop)} | ({"if_match": info.e_tag} if info.e_tag else {})
        try:
            with _errors(self._of(key), EnvironmentLacking):
                content = memoryview(self._store.get(key, options=options).bytes())
        except ObjectChanged:
            raise InputRefused(f"{self._of(key)} changed while it was being read") from None
        if len(content) != stop - start:
            raise InputRefused(f"{self._of(key)}: the store returned {len(content)} of {stop - start} bytes")
        return content

    def put(self, key: str, content: bytes, mode: Any = "overwrite") -> None:
        """Put a small object. With `mode` "create" or a version, raises ObjectChanged where that does not hold."""
        if key in self.held:
            self.held[key] = content
            return
        self._put(key, content, len(content), mode)

    def upload(self, key: str, path: Path) -> None:
        """Put a local file. Raises OutputFailed, and puts nothing, where its fence does not let it change."""
        size = path.stat().st_size
        if size <= UPLOADED_PART:
            self.put_in_place(key, path.read_bytes(), self.mode_of(key))
        else:
            self._put(key, path, size, "overwrite")

    def _put(self, key: str, content: bytes | Path, size: int, mode: Any) -> None:
        self.refuse_fenced(key)
        with _errors(self._of(key), OutputFailed):
            mode = self._with_generation(key, mode)
            put = self._store.put(key, content, mode=mode, chunk_size=UPLOADED_PART, max_concurrency=PARTS_AT_ONCE)
        self._record_put(key, ObjectInfo(size, datetime.now(UTC), self._version(put)))
        if mode == "overwrite":
            self.refuse_late(key)

    def _with_generation(self, key: str, mode: Any) -> Any:
        """The mode, where it is a version, as Google's conditions take it: its lists have ETags alone."""
        if mode in ("create", "overwrite") or "version" in mode or not self.address.startswith("gs:"):
            return mode
        try:
            now = self._version(self._store.head(key))
        except FileNotFoundError:
            raise ObjectChanged from None
        if now.get("e_tag") != mode["e_tag"]:
            raise ObjectChanged
        return now

    def mode_of(self, key: str) -> Any:
        """The mode that puts an object with a fence of its own only in place of what is known to be there."""
        if key not in self.fences:
            return "overwrite"
        before = self.info(key)
        return "create" if before is None else before.version or "overwrite"

    def put_once(self, key: str, content: bytes, mode: Any) -> None:
        """As `put`. Raises ObjectChanged where the mode does not hold, and the object has other bytes than these.

        With these bytes it is this process's own: the store put it and answered 5xx, and obstore put it again.
        """
        try:
            self.put(key, content, mode)
        except ObjectChanged:
            info = self._info_if_equal(key, content) if content else None
            if info is None:
                raise
            self.refuse_fenced(key)  # another run may have put the same
            self._record_put(key, info)

    def put_in_place(self, key: str, content: bytes, mode: Any) -> None:
        """As `put_once`. Raises OutputFailed where the object has other bytes."""
        try:
            self.put_once(key, content, mode)
        except ObjectChanged:
            raise OutputFailed(f"{self._of(key)}: another run has put it meanwhile") from None

    def _info_if_equal(self, key: str, content: bytes) -> ObjectInfo | None:
        """What the store states of an object that has these bytes; None where it has others or is gone."""
        self.forget(key)
        info = self.info(key)
        if info is None or info.size != len(content):
            return None
        with contextlib.suppress(InputRefused):  # it changed
            return info if self.read(key, 0, info.size) == content else None
        return None

    def release(self, key: str, *, replaces: bool = False) -> None:
        """Put an object that was held. Raises ObjectChanged where there is one by now, unless that is replaced."""
        content = self.held.pop(key, None)
        if content is None:
            return
        self.forget(key)
        found = self.info(key) if replaces else None
        self.put_once(key, content, "create" if found is None else found.version)

    def copy(self, key: str, target: str) -> bool:
        """Copy an object on the server. False where it is gone, or the store copies none of its size in one request."""
        from obstore.exceptions import GenericError, NotFoundError

        self.refuse_fenced(target)
        with _errors(self._of(target), OutputFailed):
            try:
                self._store.copy(key, target)
            except (GenericError, NotFoundError, FileNotFoundError):
                return False
        self.refuse_late_unseen(target)
        return True

    def delete(self, key: str, *, is_late: bool = False) -> None:
        """Delete an object. `is_late`: also where its fence lets nothing change."""
        if not is_late:
            self.refuse_fenced(key)
        with _errors(self._of(key), OutputFailed), contextlib.suppress(FileNotFoundError):
            self._store.delete(key)
        self._known[key] = None
        self.put_here.pop(key, None)

    def fence_of(self, key: str) -> Fence | None:
        """The fence of an object, or of the output that it is in."""
        while key not in self.fences and key:
            key = key.rpartition("/")[0]
        return self.fences.get(key)

    def refuse_fenced(self, key: str) -> None:
        """Raise OutputFailed where the fence of an object does not let it change."""
        if (fence := self.fence_of(key)) is not None:
            fence.refuse()

    def refuse_late(self, key: str) -> None:
        """Raise OutputFailed, and withdraw an object, where its fence closed before it was put without a condition."""
        if (fence := self.fence_of(key)) is not None:
            try:
                fence.refuse()
            except OutputFailed:
                fence.withdraw(key)
                raise

    def refuse_changed(self, key: str) -> None:
        """Raise InputRefused where an object is no longer the one that is known."""
        before = self.info(key)
        with _errors(self._of(key), EnvironmentLacking):
            now = self._stated(self._store.head(key))
        if before is None or (now.size, now.e_tag) != (before.size, before.e_tag):
            raise InputRefused(f"{self._of(key)} changed while it was being read")

    def refuse_late_unseen(self, key: str) -> None:
        """The same for an object that was put by requests whose answers obstore does not return."""
        with _errors(self._of(key), OutputFailed):
            self._record_put(key, self._stated(self._store.head(key)))
        self.refuse_late(key)

    def _record_put(self, key: str, info: ObjectInfo) -> None:
        self._known[key], self.put_here[key] = info, info.e_tag


class Upload:
    """An object that is written from its first byte to its last, and is there when it is closed.

    One that is no larger than a part, and has a fence of its own, is put only in place of what was there at first.
    obstore has no condition for the parts of a larger one (apache/arrow-rs-object-store#289), and Google Cloud Storage
    neither; and it repeats no put with a condition when the connection breaks. So the others have none, and what came
    too late is withdrawn. Another name and a copy on the server with a condition was weighed: it takes a third of the
    upload's time again (SeaweedFS, 512 MB), and S3 copies no more than 5 GB in one request.
    """

    def __init__(self, bucket: Bucket, key: str):
        self._bucket, self._key, self._address = bucket, key, f"{bucket.address}/{key}"
        self._first = bytearray()
        self._file: Any = None
        self._mode = bucket.mode_of(key)

    def write(self, content: memoryview) -> None:
        if self._file is None and len(self._first) + len(content) <= UPLOADED_PART:
            self._first += content
            return
        with _errors(self._address, OutputFailed):
            self._parts().write(bytes(content))  # a copy: obstore sends the memory itself, later

    def _parts(self) -> Any:
        """The upload in parts, which begins with what was written so far."""
        import obstore

        if self._file is None:
            self._file = obstore.open_writer(
                self._bucket._store, self._key, buffer_size=UPLOADED_PART, max_concurrency=PARTS_AT_ONCE
            )
            self._file.write(bytes(self._first))
            self._first.clear()
        return self._file

    def close(self) -> None:
        """Put the object. Raises OutputFailed, and puts nothing, where its fence does not let it change."""
        if self._file is None:
            self._bucket.put_in_place(self._key, bytes(self._first), self._mode)
            return
        try:
            self._bucket.refuse_fenced(self._key)
        except BaseException:
            self.abort()
            raise
        with _errors(self._address, OutputFailed):
            self._file.close()
        self._bucket.refuse_late_unseen(self._key)

    def abort(self) -> None:
        """Remove what was uploaded."""
        if self._file is not None:
            with contextlib.suppress(Exception):  # the error that led here is the one to report
                self._file.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


@functools.cache
def bucket_of(address: str) -> Bucket:
    """The bucket with an address such as s3://name. Raises EnvironmentLacking without obstore."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise EnvironmentLacking(f"{address} needs obstore ({error}): {pip_install('stores')}") from error
    return Bucket(address, _opened(address, from_url))


def _opened(address: str, from_url: Callable[..., Any]) -> Any:
    """The store, with the settings in the environment. Raises EnvironmentLacking where these are wrong."""
    from obstore.exceptions import BaseError

    scheme = address.partition(":")[0]
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS[scheme])}
    for name, value in settings.items():  # obstore would panic in the first request
        is_address = _ADDRESS_SETTING.fullmatch(name) and value
        if is_address and not re.fullmatch(r"https?://[^\s/\[\]]+(/\S*)?", value):
            raise EnvironmentLacking(f"{address}: {name} is no address that begins with https:// or http://")
        if _HEADER_SETTING.search(name) and not value.isprintable():
            raise EnvironmentLacking(f"{address}: {name} contains a line break, or another sign that is not printable")
    allowed = (os.environ.get(f"{prefix}ALLOW_HTTP", "") for prefix in ("AWS_", _SETTINGS[scheme]))
    insecure = any(value.lower() in ("1", "true") for value in allowed)
    try:
        return from_url(
            address,
            client_options={"timeout": DEADLINE, "connect_timeout": timedelta(seconds=10), "allow_http": insecure},
            retry_config={"max_retries": RETRIES, "retry_timeout": DEADLINE},
        )
    except (BaseError, ValueError):  # its text may quote a key
        given = f"has {', '.join(sorted(settings))}" if settings else "has none"
        raise EnvironmentLacking(
            f"{address} cannot be opened: a setting of its store is wrong or missing. The environment {given} "
            "(guide stores)"
        ) from None


def _folders_of(key: str) -> list[str]:
    """The folders that a key is in, from the bucket on, and the key."""
    return ["", *itertools.accumulate(key.split("/"), "{}/{}".format)]
