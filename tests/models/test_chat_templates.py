"""Chat templates: they give what transformers gives, and what they take is bounded."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_export.errors import InputRefused
from lora_export.models import processors
from lora_export.models.processors import open_tokenizer, render_chat
from support.small_models import words_tokenizer

TURNS = [
    {"role": "system", "content": "be <b>good</b>\n"},
    {"role": "user", "content": "good film"},
    {"role": "assistant", "content": "naïve \ud800", "calls": [{"a": [1, 2.5, None, True]}]},
]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}good film{% endgeneration %}"
    "{% else %}film {% endif %}{% endfor %}"
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a template")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return open_tokenizer(words_tokenizer(tmp_path), needed=True)


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (PLAIN, {"tokenize": False}),
        (PLAIN, {"tokenize": False, "add_generation_prompt": True}),
        ("{{ messages | tojson(indent=2) }}{{ bos_token }}{{ eos_token }}{{ pad_token }}", {"tokenize": False}),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}good {% endfor %}", {"return_dict": False}),
        (MARKED, {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}),
        ("{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.role %}{% endfor %}{{ n.t }}", {}),
    ],
)
def test_a_template_gives_what_transformers_gives(tokenizer: Any, template: str, options: dict[str, Any]) -> None:
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(TURNS, **options)
    made = render_chat(tokenizer, TURNS, **options)
    assert made == (dict(expected) if hasattr(expected, "items") else expected) and len(made)


def test_elsewhere_a_template_is_rendered_in_this_process(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = PLAIN
    monkeypatch.setattr(processors, "sys", SimpleNamespace(platform="darwin"))
    assert render_chat(tokenizer, TURNS[1:2], tokenize=False) == "user: good film\n"
    assert tokenizer not in processors._processes


def test_values_that_json_does_not_have_are_placeholders(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].when }}"
    turns = [{"role": "user", "when": datetime.date(2026, 1, 1), "content": ""}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    assert render_chat(tokenizer, turns, tokenize=False) == expected == "<date>"


ATTACKS = {
    "{{ 'a' * 3000000000 }}": "needs more than 512 MiB of memory",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "memory",
    "{{ 'a' | center(3000000000) }}": "memory",
    "{% for i in range(300) %}{{ 'a' * 100000 }}{% endfor %}": "it makes more than 16,777,216 characters",
    "{{ 2 ** (10 ** 9) }}": "does not finish within 0.5 seconds",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "does not finish within 0.5",
    "{{ raise_exception('no\n\x1b[2J') }}": r"refuses the messages \(no\\n\\x1b\[2J\)",
    "{{ messages.nothing.more }}": r"refuses the messages \(.* has no attribute",
    "{{ open }": "refuses the messages",
    "{{ ().__class__.__bases__ }}": "refuses the messages",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses the messages",
}


@LINUX
@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_that_takes_too_much_is_refused(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "CHAT_SECONDS", 0.5 if "finish" in ATTACKS[template] else 20)
    tokenizer.chat_template = template
    with pytest.raises(InputRefused, match=ATTACKS[template]) as refused:
        render_chat(tokenizer, TURNS, tokenize=False)
    assert "\n" not in str(refused.value)
    tokenizer.chat_template = PLAIN
    assert render_chat(tokenizer, TURNS[1:2], tokenize=False) == "user: good film\n"


@LINUX
def test_all_conversations_have_one_process(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    render_chat(tokenizer, TURNS, tokenize=False)
    (state, process), begun = processors._processes[tokenizer], time.monotonic()
    for _ in range(200):
        render_chat(tokenizer, TURNS, tokenize=False)
    assert processors._processes[tokenizer] == (state, process) and process.is_running
    assert time.monotonic() - begun < 20  # some milliseconds each at most
    del tokenizer


@LINUX
def test_a_process_ends_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(words_tokenizer(tmp_path), needed=True)
    tokenizer.chat_template = PLAIN
    render_chat(tokenizer, TURNS, tokenize=False)
    number = processors._processes[tokenizer][1]._process.number
    os.kill(number, 0)
    processors._processes.pop(tokenizer)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@LINUX
def test_a_template_writes_no_files_and_prints_nothing(
    tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without jinja's sandbox, as after an escape from it."""

    class Escaped:
        chat_template = "any"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            print("same: forged", flush=True)
            try:
                (tmp_path / "planted").write_text("more")
            except OSError:
                return json.dumps(sorted(path.name for path in Path("/proc/self/fd").iterdir())[:3])
            return "written"

    assert render_chat(Escaped(), TURNS) == '["0", "1", "2"]'
    assert not (tmp_path / "planted").exists() or not (tmp_path / "planted").read_text()
    assert "forged" not in "".join(capfd.readouterr())
