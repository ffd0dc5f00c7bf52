"""Sounds as a speech model takes them: samples of files, and the features that its folder's extractor makes.

libsndfile reads .wav, .flac, .ogg, .mp3 and others. A sound of another rate is resampled.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.models.processors import open_processor, optional_package
from lora_export.storage import input_files

EXTRACTOR_FILE = "preprocessor_config.json"
NEED = "sounds need"
PROCESSOR_FILE = "processor_config.json"  # of transformers 5: the extractor is a part of it


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
        "AutoFeatureExtractor", folder, needs=NEED, failure=f"{folder}: {EXTRACTOR_FILE} cannot be read"
    )


@dataclass(frozen=True)
class SoundHeader:
    """What the header of a sound states."""

    samples: int  # of each channel
    rate: int  # samples a second
    channels: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def samples_at(self, rate: int) -> int:
        """How many samples of each channel the sound has at another rate."""
        return self.samples * rate // self.rate


def sound_header(source: Path | bytes) -> SoundHeader:
    """The header of a sound: of a file, or of its bytes. Raises as `read_sound`."""
    with _opened(source) as sound:
        return SoundHeader(sound.frames, sound.samplerate, sound.channels)


def read_sound(source: Path | bytes, rate: int) -> NDArray[np.float32]:
    """The samples of a sound, mostly between -1 and 1, (samples,): the mean of its channels, at this rate.

    Raises InputRefused for what libsndfile does not read and for samples that are not finite, and EnvironmentLacking
    without soundfile, or without soxr for a sound of another rate.
    """
    with _opened(source) as sound:
        samples: NDArray[np.float32] = sound.read(dtype="float32", always_2d=True).mean(axis=1)
        own_rate = sound.samplerate
    if not np.isfinite(samples).all():
        raise InputRefused(f"{_name(source)} has samples that are not finite")
    return samples if own_rate == rate else optional_package("soxr", NEED, "audio").resample(samples, own_rate, rate)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    soundfile = optional_package("soundfile", NEED, "audio")
    if isinstance(source, Path):
        input_files.must_be_regular(source)
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as sound:
            yield sound
    except soundfile.LibsndfileError as error:
        name = _name(source)
        raise InputRefused(
            f"{name} is damaged, or no sound that libsndfile reads. ffmpeg -i {name} sound.flac makes one"
        ) from error


def _name(source: Path | bytes) -> str:
    return "the sound" if isinstance(source, bytes) else str(source)


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
