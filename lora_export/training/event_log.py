"""The metrics of a training as TensorBoard's event files, by accelerate's tracker: read while it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_export.errors import EnvironmentLacking, OutputFailed
from lora_export.options.spelling import named
from lora_export.training.history import EvaluationRecord, StepRecord


def require_tensorboard() -> None:
    """Raise EnvironmentLacking where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise EnvironmentLacking(f"{named('tensorboard')} needs tensorboard: pip install 'lora-export[tensorboard]'")


class EventLog:
    """The event files of one training, in a folder that is made with the first record.

    Files that are there stay. After a resumed training, TensorBoard shows no step twice. Raises OutputFailed where the
    folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tracker: Any = None

    def write(self, records: Iterable[StepRecord | EvaluationRecord]) -> None:
        """Write each number of the records as a curve of its own."""
        for record in records:
            numbers = {name: value for name, value in asdict(record).items() if name != "step" and value is not None}
            try:
                self._opened(record.step).log(numbers, step=record.step)
            except OSError as error:
                raise OutputFailed(f"{self.folder} could not be written: {error.strerror}") from error

    def close(self) -> None:
        """Write what is left."""
        if self._tracker is not None:
            self._tracker.finish()

    def _opened(self, step: int) -> Any:
        if self._tracker is None:
            from accelerate.tracking import TensorBoardTracker

            self._tracker = TensorBoardTracker("", str(self.folder), purge_step=step)
            self._tracker.start()
        return self._tracker
