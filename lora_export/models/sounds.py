"""Sounds as a speech model takes them: .wav files, and the features that its folder's extractor makes."""

from __future__ import annotations

import importlib
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.storage import input_files

EXTRACTOR_FILE = "preprocessor_config.json"
# Bytes of a sample of a .wav -> how NumPy reads it, and the number that stands for no sound
WAV_SAMPLES = {1: ("u1", 128), 2: ("<i2", 0), 4: ("<i4", 0)}


def open_extractor(folder: Path) -> Any:
    """The feature extractor of transformers in a folder.

    Raises InputRefused where it is missing or damaged, and EnvironmentLacking without transformers.
    """
    if not (folder / EXTRACTOR_FILE).is_file():
        raise InputRefused(
            f"{folder} has no {EXTRACTOR_FILE}: it states how a sound becomes what the encoder reads",
            "The features themselves may be given: lora_export.generate takes arrays",
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentLacking("sounds need transformers: pip install 'lora-export[hf]'") from error
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged config raises any type
        first = str(error).strip().split("\n")[0]
        raise InputRefused(f"{folder}: {EXTRACTOR_FILE} cannot be read: {first}") from error


def read_wav(path: Path, rate: int) -> NDArray[np.float32]:
    """The samples of a .wav between -1 and 1, (samples,); the mean of its channels.

    Raises InputRefused for a file that is no .wav of integers, and for one with another number of samples a second
    than `rate`.
    """
    input_files.must_be_regular(path)
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own_rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise InputRefused(
            f"{path} is no .wav of integers ({error or 'it ends early'}). ffmpeg -i {path} -ar {rate} -ac 1 sound.wav "
            "makes one"
        ) from error
    if own_rate != rate:
        raise InputRefused(
            f"{path} has {own_rate} samples a second, and the model takes {rate}. "
            f"ffmpeg -i {path} -ar {rate} -ac 1 sound.wav converts it"
        )
    if width not in WAV_SAMPLES:
        raise InputRefused(f"{path} has {8 * width} bits for each sample; 8, 16 and 32 can be read")
    kind, silence = WAV_SAMPLES[width]
    samples = np.frombuffer(data, kind).astype(np.float32) - silence
    return np.asarray(samples.reshape(-1, channels).mean(axis=1) / 2.0 ** (8 * width - 1), np.float32)


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
