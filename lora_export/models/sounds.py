"""Sounds as a speech model takes them: .wav files, and the features that its folder's extractor makes."""

from __future__ import annotations

import contextlib
import io
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.models.processors import open_processor
from lora_export.storage import input_files

EXTRACTOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # of transformers 5: the extractor is a part of it
# Bytes of a sample of a .wav -> how NumPy reads it, and the number that stands for no sound
WAV_SAMPLES = {1: ("u1", 128), 2: ("<i2", 0), 4: ("<i4", 0)}


def open_extractor(folder: Path) -> Any:
    """The feature extractor of transformers in a folder.

    Raises InputRefused where it is missing or damaged, and EnvironmentLacking without transformers.
    """
    if not any((folder / name).is_file() for name in (EXTRACTOR_FILE, PROCESSOR_FILE)):
        raise InputRefused(
            f"{folder} has no {EXTRACTOR_FILE}: it states how a sound becomes what the encoder reads",
            "The features themselves may be given: lora_export.generate takes arrays",
        )
    return open_processor(
        "AutoFeatureExtractor", folder, needs="sounds need", failure=f"{folder}: {EXTRACTOR_FILE} cannot be read"
    )


@dataclass(frozen=True)
class WavHeader:
    """What the header of a .wav states."""

    name: str  # of the file, for messages
    samples: int  # of each channel
    rate: int  # samples a second
    channels: int
    width: int  # bytes of a sample

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def refuse_other_rate(self, rate: int) -> None:
        """Raise InputRefused for another number of samples a second."""
        if self.rate != rate:
            raise InputRefused(
                f"{self.name} has {self.rate} samples a second, and the model takes {rate}. "
                f"ffmpeg -i {self.name} -ar {rate} -ac 1 sound.wav converts it"
            )


def wav_header(source: Path | bytes) -> WavHeader:
    """The header of a .wav: a file, or its bytes. Raises InputRefused for what is no .wav of integers."""
    with _opened_wav(source) as (file, header):
        del file
        return header


def read_wav(source: Path | bytes, rate: int) -> NDArray[np.float32]:
    """The samples of a .wav between -1 and 1, (samples,); the mean of its channels.

    Raises InputRefused for a file that is no .wav of integers, and for one with another number of samples a second
    than `rate`.
    """
    with _opened_wav(source, f"-ar {rate} ") as (file, header):
        header.refuse_other_rate(rate)
        data = file.readframes(header.samples)
    kind, silence = WAV_SAMPLES[header.width]
    samples = np.frombuffer(data, kind).astype(np.float32) - silence
    return np.asarray(samples.reshape(-1, header.channels).mean(axis=1) / 2.0 ** (8 * header.width - 1), np.float32)


@contextlib.contextmanager
def _opened_wav(source: Path | bytes, option: str = "") -> Iterator[tuple[wave.Wave_read, WavHeader]]:
    name = "the sound" if isinstance(source, bytes) else str(source)
    if isinstance(source, Path):
        input_files.must_be_regular(source)
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "rb") as file:
            header = WavHeader(name, file.getnframes(), file.getframerate(), file.getnchannels(), file.getsampwidth())
            if header.width not in WAV_SAMPLES:
                raise InputRefused(f"{name} has {8 * header.width} bits for each sample; 8, 16 and 32 can be read")
            yield file, header
    except (wave.Error, EOFError) as error:
        raise InputRefused(
            f"{name} is no .wav of integers ({str(error) or 'it ends early'}). "
            f"ffmpeg -i {name} {option}-ac 1 sound.wav makes one"
        ) from error


def features_of(sounds: Sequence[NDArray[np.float32]], extractor: Any) -> dict[str, NDArray[Any]]:
    """What an extractor makes of sounds (samples,), one row each. Raises InputRefused where it refuses them."""
    # Whisper's extractor makes every sound as long as the model needs it. Others pad by an option.
    same_length = len({len(sound) for sound in sounds}) == 1
    padding = {} if same_length or hasattr(extractor, "nb_max_frames") else {"padding": True}
    try:
        made = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="np", **padding)
    except (ValueError, TypeError) as error:
        raise InputRefused(f"the sounds cannot be read by the model's extractor: {error}") from error
    return {name: np.asarray(value) for name, value in made.items()}
