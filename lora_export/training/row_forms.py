"""What rows of data are for: found by their columns, and checked before anything is trained. NumPy only."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import SHOWN_PROBLEMS, InputRefused, count, listed
from lora_export.options.spelling import named
from lora_export.training.records.rows import AUDIO, IMAGE, Records, Row, file_problem, same_label

HALF_A_CHARACTER = "`{}` contains half a surrogate pair, which is no character"
ROLES = frozenset({"system", "user", "assistant", "tool"})
INT64 = 1 << 63  # the first number beyond
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
DECIMAL = re.compile(r"-?[0-9]+\.[0-9]+([eE][-+]?[0-9]+)?|-?[1-9]e[-+][0-9]{2,}")  # or 1e-05, as Python writes it


class RowForm(StrEnum):
    """What a row contains. The value names its task on the command line."""

    CHAT = "chat"
    COMPLETION = "completion"
    TAGS = "tags"
    SIMILARITY = "similarity"
    IMAGE = "image-classification"
    SPEECH = "automatic-speech-recognition"
    LABELLED = "classification"
    TEXT = "language-modelling"


class LabelKind(StrEnum):
    """What is predicted for a row."""

    NONE = "nothing"  # texts to continue
    CLASS = "one of several classes"
    CLASSES = "any of several classes"
    VALUE = "a value"


@dataclass(frozen=True, eq=False)
class Survey:
    """What a pass over all rows found."""

    form: RowForm
    kind: LabelKind
    count: int  # rows
    classes: tuple[str | int, ...] = ()  # sorted
    groups: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # (n,): class, or 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, self.classes))

    def __str__(self) -> str:
        classes = f" of {count(len(self.classes), 'class', 'classes')}" if self.classes else ""
        value = ", a value each" if self.kind is LabelKind.VALUE and self.form is RowForm.LABELLED else ""
        return f"{count(self.count, 'example')}{classes} ({self.form}{value})"


def form_of(records: Records, wanted: RowForm | None = None) -> RowForm:
    """The form of the rows, by the columns of the first. Raises InputRefused where there is none, or not `wanted`."""
    # A column may be for other rows; the first label that is missing is refused with its row.
    present = {name for name, value in records[0].items() if value is not None or name == "label"}
    forms = [wanted] if wanted else list(FORMS)
    for form in forms:
        if present >= set(FORMS[form][0]):
            return form
    raise InputRefused(
        f"{records.path}, {records.where(0)} has the columns {', '.join(sorted(present)) or '(none)'}. Needed are:",
        *(f"  {form}: {', '.join(FORMS[form][0])}" for form in forms),
        f"Name the columns of your data, such as {named('columns', {'text': 'body'})}",
    )


def survey(records: Records, form: RowForm) -> Survey:
    """Check every row, and collect the classes.

    Raises InputRefused with the places of rows that are wrong: values of another type, empty texts, labels of several
    types, scores out of range; and where all labels are the same.
    """
    labels = _Labels()
    refuse_rows(records, lambda row: _row_problem(records, row, form, labels))
    return _with_labels(records, form, labels)


def refuse_rows(records: Records, problem_of: Callable[[int], str]) -> None:
    """Raise InputRefused where rows have a problem, with the first of them."""
    found = filter(None, map(problem_of, range(len(records))))
    if problems := list(itertools.islice(found, SHOWN_PROBLEMS)):
        more = sum(1 for _ in found)
        raise InputRefused(f"{records.path}:", listed(problems), *([f"  and {more} more"] if more else []))


class _Labels:
    """The labels of all rows. Equal ones are one object, so that a row takes 8 bytes."""

    def __init__(self) -> None:
        self.distinct: dict[Any, Any] = {}  # the members of tags, each as a list of one
        self.of_rows: list[Any] = []

    def add(self, label: Any) -> None:
        label = tuple(label) if isinstance(label, list | tuple) else label
        self.of_rows.append(self.distinct.setdefault(label, label))

    def add_tags(self, tags: list[Any]) -> None:
        self.distinct.update(((tag,), tag) for tag in tags)


def _row_problem(records: Records, row: int, form: RowForm, labels: _Labels) -> str:
    """What is wrong with a row, with its place; its label is added to `labels`."""
    try:
        values = records[row]
    except InputRefused as error:
        return str(error).removeprefix(f"{records.path}, ").removeprefix(f"{records.path}/")
    columns, problem_of = FORMS[form]
    problem = ", ".join(f"no `{name}`" for name in columns if name not in values) or problem_of(values)
    if not problem and (column := {RowForm.SPEECH: AUDIO, RowForm.IMAGE: IMAGE}.get(form)):
        problem = file_problem(records, values[column], column)
    if problem:
        return f"{records.where(row)}: {problem}"
    if form in (RowForm.LABELLED, RowForm.IMAGE):
        labels.add(values["label"])
    elif form is RowForm.TAGS:
        labels.add_tags(values["tags"])
    return ""


# --- Checks of one row ---


def _text_problem(values: Row, name: str) -> str:
    text = values[name]
    if not isinstance(text, str) or not text.strip():
        return f"`{name}` is {text!r:.80}; it must be a text that is not empty"
    return HALF_A_CHARACTER.format(name) if _has_surrogates(text) else ""


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _texts(*names: str) -> Callable[[Row], str]:
    return lambda values: ", ".join(filter(None, (_text_problem(values, name) for name in names)))


def _is_class(label: Any) -> bool:
    if isinstance(label, int):
        return not isinstance(label, bool) and -INT64 <= label < INT64
    return isinstance(label, str) and label != ""


def _label_problem(values: Row) -> str:
    label = values["label"]
    if isinstance(label, list | tuple):
        is_right = all(map(_is_class, label))
        return "" if is_right else f"`label` is {label!r:.80}; a list of labels contains names or integers"
    if isinstance(label, float):
        return "" if math.isfinite(label) else f"`label` is {label!r}"
    if not _is_class(label):
        return f"`label` is {label!r:.80}; it must be a string, a number, or a list of strings or integers"
    return ""


def _labelled(values: Row) -> str:
    texts = ("text",) if values.get("text_pair") is None else ("text", "text_pair")
    return _texts(*texts)(values) or _label_problem(values)


def _tagged(values: Row) -> str:
    tokens, tags = values["tokens"], values["tags"]
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        return f"`tokens` is {tokens!r:.80}; it must be a list of words"
    if any(map(_has_surrogates, tokens)):
        return HALF_A_CHARACTER.format("tokens")
    if not isinstance(tags, list) or not all(map(_is_class, tags)):
        return f"`tags` is {tags!r:.80}; it must be a list of strings or integers"
    return "" if len(tokens) == len(tags) else f"{len(tokens)} tokens and {len(tags)} tags"


def _compared(values: Row) -> str:
    if problem := _texts("sentence1", "sentence2")(values):
        return problem
    score = values["score"]
    try:
        in_range = not isinstance(score, bool) and -1 <= float(score) <= 1
    except (TypeError, ValueError, OverflowError):
        in_range = False
    return "" if in_range else f"`score` is {score!r:.80}; a cosine is from -1 to 1"


def tools_of(values: Row) -> list[dict[str, Any]] | None:
    """The descriptions of tools for a chat template; None where `tools` is something else. Tables have them as JSON."""
    tools = values.get("tools") or []
    with contextlib.suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    return tools if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools) else None


def _chat(values: Row) -> str:
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        return f"`messages` is {messages!r:.80}; it must be a list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
            return f"message {number} has no `role` of {', '.join(sorted(ROLES))}"
        if not isinstance(message.get("content"), str):
            return f"message {number} has no text in `content`"
        if _has_surrogates(message["content"]):
            return HALF_A_CHARACTER.format("content")
    if tools_of(values) is None:
        return f"`tools` is {values['tools']!r:.80}; it must be a list of descriptions, or that as JSON"
    return "" if any(message["role"] == "assistant" for message in messages) else "no message of the assistant"


# The columns of each form, and what is wrong with the values of a row: empty where nothing is
FORMS: Mapping[RowForm, tuple[tuple[str, ...], Callable[[Row], str]]] = {
    RowForm.CHAT: (("messages",), _chat),  # `tools` is optional
    RowForm.COMPLETION: (("prompt", "completion"), _texts("prompt", "completion")),
    RowForm.TAGS: (("tokens", "tags"), _tagged),
    RowForm.SIMILARITY: (("sentence1", "sentence2", "score"), _compared),
    RowForm.IMAGE: ((IMAGE, "label"), _label_problem),
    RowForm.SPEECH: ((AUDIO, "text"), _texts("text")),
    RowForm.LABELLED: (("text", "label"), _labelled),  # `text_pair` is optional
    RowForm.TEXT: (("text",), _texts("text")),
}


# --- Labels of all rows ---


def label_value(label: Any, classes: tuple[str | int, ...]) -> Any:
    """A label as one of the classes: those of a .csv are strings, where the classes may be integers."""
    return int(label) if isinstance(label, str) and classes and isinstance(classes[0], int) else label


def _with_labels(records: Records, form: RowForm, labels: _Labels) -> Survey:
    number = len(records)
    zeros = np.zeros(number, np.int64)
    if form is RowForm.SIMILARITY:
        return Survey(form, LabelKind.VALUE, number, groups=zeros)
    if not labels.distinct:
        return Survey(form, LabelKind.NONE, number, groups=zeros)
    distinct = set(labels.distinct)
    several = {isinstance(label, tuple) for label in distinct}
    if len(several) > 1:
        raise InputRefused(
            f"{records.path}: some labels are lists and some are not{_first_of_each(records, labels, tuple)}; "
            "make them all the same"
        )
    members = {label for group in distinct for label in group} if True in several else distinct
    members, kind = _typed(records, members, labels)
    if True in several:
        kind = LabelKind.CLASS if form is RowForm.TAGS else LabelKind.CLASSES
    elif kind is LabelKind.VALUE:
        return Survey(form, kind, number, groups=zeros)
    classes = tuple(sorted(members))
    if len(members) < 2 and kind is LabelKind.CLASS:
        raise InputRefused(f"{records.path}: {same_label(number)}")
    if not members:
        raise InputRefused(f"{records.path}: no example has a label")
    if True in several:
        return Survey(form, kind, number, classes, zeros)
    index_of = {label: number for number, label in enumerate(classes)}
    indices = (index_of[label_value(label, classes)] for label in labels.of_rows)
    return Survey(form, kind, number, classes, np.fromiter(indices, np.int64, number))


def _first_of_each(records: Records, labels: _Labels, kind: type) -> str:
    """Where the first label of this type is, and the first of another; empty where no row has either alone."""
    are = [isinstance(label, kind) for label in labels.of_rows]
    if all(are) or not any(are):
        return ""
    return f" ({records.where(are.index(True))} and {records.where(are.index(False))})"


def _typed(records: Records, members: set[Any], labels: _Labels) -> tuple[set[Any], LabelKind]:
    """The labels in one type, and what that makes of them. 007 is a name, and not a number."""
    types = {type(label) for label in members}
    if types == {str}:
        if records.has_types:
            return members, LabelKind.CLASS
        if all(INTEGER.fullmatch(label) for label in members):
            return {int(label) for label in members}, LabelKind.CLASS
        numbers = all(DECIMAL.fullmatch(label) or INTEGER.fullmatch(label) for label in members)
        return members, LabelKind.VALUE if numbers else LabelKind.CLASS
    if types <= {int, float} and float in types:
        return members, LabelKind.VALUE
    if len(types) > 1:
        raise InputRefused(
            f"{records.path}: some labels are strings and some are numbers{_first_of_each(records, labels, str)}; "
            "make them all the same"
        )
    return members, LabelKind.CLASS
