"""`lora-export guide`: the list of pages, one page, and a page that does not exist."""

from __future__ import annotations

import pytest
import rich.console

from lora_export.cli.guide import TOPICS
from support.cli import call
from support.pages import page_text


def test_without_a_topic_every_page_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("guide") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(TOPICS)
    assert all(line.endswith(".") and len(line) <= 84 for line in lines)


@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_in_a_pipe_is_the_markdown_without_comments(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("guide", topic) == 0
    printed = capsys.readouterr().out
    comments = [line for line in page_text(topic).splitlines() if line.startswith("<!--")]
    assert [line for line in page_text(topic).splitlines() if line not in comments] == printed.splitlines()


def test_a_page_on_a_terminal_is_rendered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    assert call("guide", "verdict") == 0
    printed = capsys.readouterr().out
    assert "# The verdict" not in printed and "The verdict" in printed
    assert any(line in printed for line in "│─┃━")  # the tables are drawn
    assert "no-test" not in printed and "not run in the tests" not in printed


def test_an_unknown_topic_is_a_usage_error_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("guide", "merge") == 2
    assert (
        "Error: the guide has no page `merge`; the nearest is `merging`. The pages are: tasks, install, "
    ) in capsys.readouterr().err
    assert call("guide", "zzz") == 2
    assert "no page `zzz`. The pages are: tasks, install, ollama, " in capsys.readouterr().err
