"""What a function tells its caller while it runs."""

from __future__ import annotations

from lora_export.callbacks import Progress, ignore, in_bytes, in_stages


def test_a_stage_is_reported_by_its_name() -> None:
    events: list[Progress] = []
    in_stages(events.append)("tracing")
    assert events == [Progress("tracing", 0, 0, "", "")]


def test_bytes_are_summed_up_to_the_total() -> None:
    events: list[Progress] = []
    more = in_bytes(events.append, "merging", 100)
    for count in (30, 60, 60):  # headers are written too
        more(count)
    assert events == [Progress("merging", done, 100, "bytes") for done in (30, 90, 100)]
    other = in_bytes(events.append, "merging", 100)
    other(5)
    assert events[-1].done == 5, "each has a sum of its own"


def test_the_default_does_nothing() -> None:
    assert ignore("a message") is None and ignore(Progress("tracing")) is None  # type: ignore[func-returns-value]
