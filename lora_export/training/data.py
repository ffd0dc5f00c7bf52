"""Read labelled examples from a file: texts, or arrays by the names of forward's parameters. NumPy only."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.storage.npz import read_arrays

IGNORED = -100  # the label that cross-entropy ignores
MAX_PROBLEMS = 5  # bad lines that an error lists
DATA_FORMATS = ".jsonl and .csv (with `text` and `label`) and .npz (with the model's inputs and `labels`)"


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples: texts, or arrays with one row per example for each of the model's inputs."""

    labels: NDArray[Any]  # (n, ...): int64 indices into `classes`, or float32 values to predict
    classes: tuple[str, ...] = ()  # empty where values are predicted
    texts: tuple[str, ...] = ()
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # parameter of forward -> (n, ...)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The examples in these rows, in this order."""
        return Examples(
            labels=self.labels[rows],
            classes=self.classes,
            texts=tuple(self.texts[row] for row in rows) if self.texts else (),
            inputs={name: values[rows] for name, values in self.inputs.items()},
        )

    def __str__(self) -> str:
        return f"{len(self):,} examples" + (f" of {len(self.classes)} classes" if self.classes else "")


def read_examples(path: Path) -> Examples:
    """Read .jsonl or .csv (`text`, `label`) or .npz (arrays named like forward's parameters, and `labels`).

    Labels that are strings or integers are classes, sorted; float labels in an .npz are values to predict.
    Raises InputRefused with the lines or arrays that are wrong.
    """
    readers: dict[str, Callable[[Path], Examples]] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise InputRefused(f"{path}: examples are read from {DATA_FORMATS}")
    if path.exists() and not path.is_file():  # a FIFO would wait for a writer, a device may never end
        raise InputRefused(f"{path} is not a regular file")
    try:
        examples = readers[path.suffix.lower()](path)
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror or error}") from error
    if not len(examples):
        raise InputRefused(f"{path} contains no examples")
    if examples.classes and len(np.unique(examples.labels[examples.labels != IGNORED])) < 2:
        raise InputRefused(f"{path}: all {len(examples)} examples have the same label; there is nothing to learn")
    return examples


def _read_jsonl(path: Path) -> Examples:
    texts: list[Any] = []
    labels: list[Any] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        problem = _record_problem(record)
        if problem:
            problems.append(f"line {number}: {problem}")
        else:
            texts.append(record["text"])
            labels.append(record["label"])
    _refuse(path, problems)
    return _text_examples(path, texts, labels)


def _record_problem(record: Any) -> str:
    if not isinstance(record, dict):
        return "not an object with `text` and `label`"
    missing = [f"no `{name}`" for name in ("text", "label") if name not in record]
    if missing:
        return ", ".join(missing)
    if not isinstance(record["text"], str) or not record["text"].strip():
        return f"`text` is {record['text']!r}"
    if any("\ud800" <= character <= "\udfff" for character in record["text"]):
        return "`text` contains half a surrogate pair, which is no character"
    if isinstance(record["label"], bool) or not isinstance(record["label"], str | int) or record["label"] == "":
        return f"`label` is {record['label']!r}; it must be a string or an integer"
    return ""


def _read_csv(path: Path) -> Examples:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path} is not UTF-8: byte {error.start}") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    texts: list[str] = []
    labels: list[str] = []
    problems: list[str] = []
    try:
        header = next(reader, [])
        if header.count("text") != 1 or header.count("label") != 1:
            raise InputRefused(
                f"{path}: the first line must name `text` and `label` once each, not {', '.join(header)}"
            )
        for row in reader:
            if len(row) != len(header):
                problems += [f"line {reader.line_num}: {len(row)} fields, the header has {len(header)}"] if row else []
                continue
            record = dict(zip(header, row, strict=True))
            problem = _record_problem(record)
            problems += [f"line {reader.line_num}: {problem}"] if problem else []
            texts.append(record["text"])
            labels.append(record["label"])
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    _refuse(path, problems)
    integers = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) for label in labels)  # 007 is a name
    return _text_examples(path, texts, [int(label) for label in labels] if integers else labels)


def _text_examples(path: Path, texts: Sequence[str], labels: Sequence[str | int]) -> Examples:
    if len({type(label) for label in labels}) > 1:
        raise InputRefused(f"{path}: some labels are strings and some are numbers; make them all the same")
    classes = sorted(set(labels))
    index_of = {label: index for index, label in enumerate(classes)}
    indices = np.array([index_of[label] for label in labels], np.int64)
    return Examples(indices, classes=tuple(map(str, classes)), texts=tuple(texts))


def _read_npz(path: Path) -> Examples:
    arrays = read_arrays(path)
    if "labels" not in arrays:
        raise InputRefused(f"{path} has no `labels` beside {', '.join(arrays) or 'nothing'}")
    labels = arrays.pop("labels")
    _refuse(path, _array_problems(arrays, labels))
    # NumPy's default is fp64, but a module is trained in fp32.
    inputs = {
        name: values.astype(np.float32) if values.dtype.kind == "f" else values for name, values in arrays.items()
    }
    if labels.dtype.kind == "f":
        return Examples(labels.astype(np.float32), inputs=inputs)
    labels = labels.astype(np.int64)
    return Examples(labels, classes=tuple(map(str, range(int(labels.max(initial=-1)) + 1))), inputs=inputs)


def _array_problems(arrays: Mapping[str, NDArray[Any]], labels: NDArray[Any]) -> list[str]:
    count = len(labels) if labels.ndim else 0
    problems = [] if arrays else ["it contains labels alone"]
    for name, values in {**arrays, "labels": labels}.items():
        if values.shape[:1] != (count,):
            problems.append(f"`{name}` has the shape {values.shape}, and there are {count} labels")
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))
            problems.append(f"`{name}` contains {len(bad)} values that are not finite, the first in row {bad[0][0]}")
        elif values.dtype.kind not in "fiub":
            problems.append(f"`{name}` contains {values.dtype}, not numbers")
    negative = labels[(labels < 0) & (labels != IGNORED)] if labels.dtype.kind == "i" else labels[:0]
    if negative.size:
        problems.append(f"`labels` contain {negative[0]}; classes are counted from 0 ({IGNORED} is ignored)")
    return problems


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise InputRefused(f"{path}:", listed(problems, MAX_PROBLEMS))


def split(examples: Examples, holdout: float, *, seed: int) -> tuple[Examples, Examples]:
    """The examples to train on and those held out: of each class the same part, drawn by the seed.

    `holdout` is the part to hold out, between 0 and 1. A class always has an example to train on. Raises InputRefused
    for another `holdout`, and where nothing would be held out.
    """
    if not 0 < holdout < 1:
        raise InputRefused(f"the part to hold out is {holdout}; it must be between 0 and 1")
    rng = np.random.default_rng(seed)
    one_label_each = bool(examples.classes) and examples.labels.ndim == 1
    groups = examples.labels if one_label_each else np.zeros(len(examples), np.int64)
    trained_on: list[NDArray[np.int64]] = []
    held_out: list[NDArray[np.int64]] = []
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        count = min(round(len(rows) * holdout), len(rows) - 1)
        held_out.append(rows[:count])
        trained_on.append(rows[count:])
    if not sum(map(len, held_out)):
        raise InputRefused(f"{len(examples)} examples are too few to hold out {holdout:g} of them")
    return examples[np.sort(np.concatenate(trained_on))], examples[np.sort(np.concatenate(held_out))]
