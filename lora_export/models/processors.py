"""What a folder has beside a model: its tokenizer, and what makes inputs of image and sound files.

Nothing is downloaded, and no code of the folder is run. Pillow reads images. libsndfile reads .wav, .flac, .ogg, .mp3
and others.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, first_line, one_line
from lora_export.extras import optional_package
from lora_export.isolation.limits import CHAT_MEMORY, CHAT_SECONDS, MAX_CHAT, MAX_PIXELS, MAX_SAMPLES
from lora_export.isolation.process import IsolatedProcess, ProcessEnded, read_request, write_message
from lora_export.storage import input_files

PROCESSOR = "preprocessor_config.json"  # of images, or of sounds
PIXELS = "pixel_values"  # the input that an image processor makes
# Pillow opens others by programs of their own: an EPS starts Ghostscript, whatever the name of the file.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# One of them is in every folder that transformers reads a tokenizer from.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "spiece.model"),
)


def open_processor(auto_class: str, folder: Path, *, needs: str, failure: str) -> Any:
    """Open what a folder has by one of transformers' Auto classes, offline and without code of the folder.

    Raises EnvironmentLacking without transformers, with `needs` ("sounds need") before its name, and InputRefused, with
    `failure` before the cause, for what is missing or damaged.
    """
    transformers = optional_package("transformers", needs, "hf")
    with refusing_failures(failure):
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def refusing_failures(failure: str) -> Iterator[None]:
    """Raise InputRefused, with `failure` before the cause, for whatever a library raises on what a file states."""
    try:
        yield
    except (InputRefused, MemoryError):
        raise
    except BaseException as error:  # any type: tokenizers' panics in Rust are no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputRefused(f"{failure}: {first_line(error)}") from error
        raise


def open_tokenizer(folder: Path, *, needed: bool) -> Any:
    """The tokenizer of transformers in a folder; None where there is none and it is not needed.

    Raises InputRefused where it is needed and missing or damaged, and EnvironmentLacking without transformers.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if needed:
            raise InputRefused(
                f"{folder} has no tokenizer (tokenizer.json and the like). Save it there: "
                f"transformers.AutoTokenizer.from_pretrained(NAME).save_pretrained({str(folder)!r})"
            )
        return None
    failure = f"{folder}: the tokenizer cannot be read"
    return open_processor("AutoTokenizer", folder, needs="a tokenizer needs", failure=failure)


def tokenised(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """What a tokenizer makes of texts. Raises InputRefused where it fails: its rules are the folder's."""
    with refusing_failures("the tokenizer fails on a text"):
        return tokenizer(*texts, **options)


def open_image_processor(folder: Path) -> Any:
    """The image processor of transformers in a folder.

    Raises InputRefused where it is missing or damaged, and EnvironmentLacking without transformers.
    """
    failure = f"{folder} has no image processor ({PROCESSOR})"
    return open_processor("AutoImageProcessor", folder, needs="images need", failure=failure)


def read_image(image: Path | bytes | Any) -> Any:
    """An image file, its bytes, or an image of Pillow, as Pillow's image in RGB.

    Raises InputRefused for a file that is no image, and EnvironmentLacking without Pillow.
    """
    pillow = optional_package("PIL.Image", "images need Pillow:", "data", "pillow")
    if not isinstance(image, Path | bytes):
        return image.convert("RGB")
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    with refusing_failures("no image that can be read"), pillow.open(source, formats=IMAGE_FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise InputRefused(f"{opened.width:,} x {opened.height:,} pixels; at most {MAX_PIXELS:,} are decoded")
        return opened.convert("RGB")


def image_pixels(processor: Any, image: Any) -> Any:
    """What an image processor makes of an image: (channels, height, width). Raises InputRefused where it fails."""
    with refusing_failures("the image processor fails on an image"):
        return processor(image, return_tensors="pt")[PIXELS][0]


def pixels_of(paths: Sequence[Path], folder: Path) -> NDArray[np.float32]:
    """The pixels of image files as the image processor in a folder makes them, (files, channels, height, width).

    Raises InputRefused for what is no image, for a processor that is missing or makes images of several sizes, and
    EnvironmentLacking without Pillow or transformers.
    """
    processor = open_image_processor(folder)
    for path in paths:
        input_files.must_be_regular(path)
    made = [image_pixels(processor, read_image(path)).numpy() for path in paths]
    shapes = {array.shape for array in made}
    if len(shapes) > 1:
        sizes = " and ".join(sorted(str(list(shape)) for shape in shapes))
        raise InputRefused(f"the image processor in {folder} makes images of several sizes: {sizes}")
    return np.stack(made).astype(np.float32)


# --- Sounds ---

NEED = "sounds need"
PROCESSOR_FILE = "processor_config.json"  # of transformers 5: the extractor is a part of it


def open_extractor(folder: Path) -> Any:
    """The feature extractor of transformers in a folder.

    Raises InputRefused where it is missing or damaged, and EnvironmentLacking without transformers.
    """
    if not any((folder / name).is_file() for name in (PROCESSOR, PROCESSOR_FILE)):
        raise InputRefused(
            f"{folder} has no {PROCESSOR}: it states how a sound becomes what the encoder reads",
            "The features themselves may be given: lora_export.generate takes arrays",
        )
    return open_processor("AutoFeatureExtractor", folder, needs=NEED, failure=f"{folder}: {PROCESSOR} cannot be read")


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
        if sound.frames * sound.channels > MAX_SAMPLES:
            raise InputRefused(f"{_name(source)} has {sound.frames:,} samples of {sound.channels} channels: too many")
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
        message = "{0} is damaged, or no sound that libsndfile reads. ffmpeg -i {0} sound.flac makes one"
        raise InputRefused(message.format(_name(source))) from error


def _name(source: Path | bytes) -> str:
    return "the sound" if isinstance(source, bytes) else str(source)


def refuse_longer(seconds: float, extractor: Any, sound: str = "the sound") -> None:
    """Raise InputRefused for a sound that is longer than the model hears."""
    most = getattr(extractor, "n_samples", None)  # of Whisper, which cuts what is longer
    limit = most / extractor.sampling_rate if most else seconds
    if seconds > limit:
        raise InputRefused(f"{sound} takes {seconds:.4g} s, and the model hears {limit:g} s; cut it into parts")


def features_of(sounds: Sequence[NDArray[np.float32]], extractor: Any) -> dict[str, NDArray[Any]]:
    """What an extractor makes of sounds (samples,), one row each.

    Raises InputRefused where it refuses them, or makes another number of rows.
    """
    # Whisper's extractor makes every sound as long as the model needs it. Others pad by an option.
    same_length = len({len(sound) for sound in sounds}) == 1
    padding = {} if same_length or hasattr(extractor, "nb_max_frames") else {"padding": True}
    with refusing_failures("the sounds cannot be read by the model's extractor"):
        made = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding)
        # A list states which part of which sound a row is, as of CohereAsr.
        arrays = {name: np.asarray(value) for name, value in made.items() if not isinstance(value, list)}
    rows = [array.shape[0] if array.ndim else 0 for array in arrays.values()]
    if wrong := [count for count in rows if count != len(sounds)]:
        why = ": it cuts long ones; give parts of them" if max(wrong) > len(sounds) else ", and not one for each"
        raise InputRefused(f"the model's extractor makes {max(wrong)} rows of {len(sounds)} sounds{why}")
    return arrays


# --- The chat template of a tokenizer: a program of its folder, run in a process of its own within memory and time ---
#
# The process is a copy of this one, on Linux: it has transformers loaded already, and one serves all conversations.
# Elsewhere the template is run in this process, in jinja's sandbox, which bounds neither memory nor time.

_processes: weakref.WeakKeyDictionary[Any, tuple[Any, IsolatedProcess]] = weakref.WeakKeyDictionary()


def chat_template_of(tokenizer: Any) -> Any:
    """The chat template of a tokenizer. Raises InputRefused where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputRefused(
            "the tokenizer has no chat template (chat_template.jinja beside the model), so that `messages` have no form"
        )
    return template


def render_chat(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """What the chat template of a tokenizer makes of messages. `options` are those of `apply_chat_template`.

    Raises InputRefused without a template, for whatever the template raises, and where it takes more than CHAT_MEMORY
    or CHAT_SECONDS, or makes more than MAX_CHAT characters.
    """
    template = chat_template_of(tokenizer)
    if sys.platform != "linux":
        return _made(_rendered(tokenizer, messages, options))
    plain = json.loads(json.dumps(messages, default=lambda value: f"<{type(value).__name__}>"))  # as in transformers
    request = {"messages": plain, "options": options}
    try:
        answer, _ = _process_of(tokenizer, template).ask(request, {}, CHAT_SECONDS)
    except ProcessEnded as ended:
        _processes.pop(tokenizer, None)
        what = f"does not finish within {CHAT_SECONDS} seconds" if ended.too_slow else f"cannot be run: {ended}"
        raise InputRefused(f"the chat template {what}") from ended
    return _made(answer)


def _made(answer: Mapping[str, Any]) -> Any:
    if failure := answer.get("failed"):
        raise InputRefused(one_line(f"the chat template refuses the messages ({failure})"))
    return answer["made"]


def _process_of(tokenizer: Any, template: Any) -> IsolatedProcess:
    """The process that renders for a tokenizer, in this process and with this template."""
    state = (os.getpid(), template)
    known, process = _processes.get(tokenizer, (None, None))
    if process is None or known != state:
        process = IsolatedProcess.copy_of(functools.partial(_serve, tokenizer), memory=CHAT_MEMORY)
        _processes[tokenizer] = state, process
    return process


def _serve(tokenizer: Any, requests: io.BufferedIOBase, answers: io.BufferedIOBase) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the copy has none of the threads
    with contextlib.suppress(EOFError):
        while True:
            request, _ = read_request(requests)
            write_message(answers, _rendered(tokenizer, request["messages"], request["options"]), {})


def _rendered(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the template makes, as JSON has it, or how it failed."""
    try:
        made = tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        return {"failed": f"it needs more than {CHAT_MEMORY / 2**20:.0f} MiB of memory"}
    except BaseException as error:  # a template raises any type, and the tokenizer panics in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"failed": str(error) or type(error).__name__}
    made = dict(made) if isinstance(made, Mapping) else made
    if max(map(len, made.values() if isinstance(made, dict) else [made])) > MAX_CHAT:
        return {"failed": f"it makes more than {MAX_CHAT:,} characters or tokens"}
    return {"made": made}
