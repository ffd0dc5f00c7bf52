"""What `train` learns from: data read and checked before the model is loaded, then encoded as the model takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray

from lora_export.artifacts.kind import is_arrays
from lora_export.callbacks import OnMessage, ignore
from lora_export.errors import InputRefused, RuntimeRefused, WrongUsage, count
from lora_export.models.huggingface import load_image_processor, load_tokenizer, set_padding_token
from lora_export.models.model import Model
from lora_export.models.processors import open_extractor
from lora_export.models.text_inputs import text_lengths
from lora_export.options.spelling import named
from lora_export.options.train import TrainOptions
from lora_export.storage.hashes import file_sha256
from lora_export.storage.json_files import read_json
from lora_export.storage.store_copy import on_disk
from lora_export.storage.store_path import newly_opened
from lora_export.training import encoders
from lora_export.training.batches import (
    ArrayData,
    Data,
    EncodedRows,
    Encoder,
    ReadyBatches,
    batches_sha256,
    module_outputs,
    read_own_batches,
    scores_of,
)
from lora_export.training.encoders import FrameEncoder, SoundReader, SpeechEncoder, TranscriptEncoder
from lora_export.training.order import RowNumbers, split_rows
from lora_export.training.records.opening import IGNORED, LabelledArrays, open_records, read_labelled_arrays
from lora_export.training.records.rows import AUDIO, IMAGE, Records, sha256_with_files
from lora_export.training.row_forms import LabelKind, RowForm, Survey, form_of, refuse_rows, survey
from lora_export.training.token_rows import (
    CausalRows,
    MaskedRows,
    TokenFile,
    causal_rows,
    refuse_mixed_texts,
    refuse_reading_ahead,
)
from lora_export.user_code import find_function
from lora_export.weights.checkpoint import CONFIG
from lora_export.weights.task_head import CLASS_ENDINGS, TaskHead, label_names

CTC_ENDING = "ForCTC"
SPEECH_INPUTS = ("input_features", "input_values")
MASKED_ENDING = "ForMaskedLM"
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
PROBLEM_TYPES = {LabelKind.CLASSES: "multi_label_classification", LabelKind.VALUE: "regression"}
HEAD_ENDINGS = {
    RowForm.LABELLED: CLASS_ENDINGS["SEQ_CLS"],
    RowForm.TAGS: CLASS_ENDINGS["TOKEN_CLS"],
    RowForm.IMAGE: "ForImageClassification",
}


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """Rows of a file or folder, and what a pass over them found."""

    records: Records
    survey: Survey

    def __str__(self) -> str:
        return str(self.survey)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Data that were read and checked, but not encoded yet."""

    content: CheckedRows | LabelledArrays | ReadyBatches
    sha256: str

    def __str__(self) -> str:
        return f"{len(self.content):,} batches" if isinstance(self.content, ReadyBatches) else str(self.content)

    @property
    def head(self) -> TaskHead | None:
        """The head that a Hugging Face model needs for these labels."""
        if not isinstance(self.content, CheckedRows) or self.content.survey.form not in HEAD_ENDINGS:
            return None
        found = self.content.survey
        return TaskHead(HEAD_ENDINGS[found.form], found.class_names or ("LABEL_0",), PROBLEM_TYPES.get(found.kind, ""))

    @property
    def peft_task(self) -> str | None:
        """PEFT's name for the task."""
        if not isinstance(self.content, CheckedRows):
            return None
        tasks = {RowForm.LABELLED: "SEQ_CLS", RowForm.TAGS: "TOKEN_CLS", RowForm.SIMILARITY: "FEATURE_EXTRACTION"}
        return tasks.get(self.content.survey.form)

    def for_base(self, model: str | Path) -> tuple[TrainingData, str]:
        """The same data, with the classes of the base's classifier in its order, where that names all of theirs.

        And a note where its labels get other names; empty where they keep theirs, or had none. transformers calls
        labels without a name LABEL_0, LABEL_1 and so on.
        """
        head, config = self.head, Path(model) / CONFIG
        if head is None or not isinstance(self.content, CheckedRows) or not config.is_file():
            return self, ""
        found, names = self.content.survey, label_names(read_json(config), head.ending)
        own, now = dict(zip(found.class_names, found.classes, strict=True)), tuple(map(str, head.labels))
        if own and set(own) <= set(names) and not (len(own) < len(names) and isinstance(found.classes[0], int)):
            classes = tuple(own.get(name, name) for name in names)
            return replace(self, content=replace(self.content, survey=replace(found, classes=classes))), ""
        if all(name.startswith("LABEL_") for name in names) or names == now or len(names) != len(now):
            return self, ""
        return (
            self,
            f"note: the base's labels {', '.join(names)} are called {', '.join(now)} from now on, as in the data",
        )

    @property
    def groups(self) -> NDArray[np.int64]:
        """A number for each example: of each group, the same part is held out."""
        if isinstance(self.content, CheckedRows):
            return self.content.survey.groups
        if isinstance(self.content, LabelledArrays):
            labels = self.content.labels
            if labels.ndim == 1 and labels.dtype.kind == "i":
                return np.asarray(labels, np.int64)
        return np.zeros(len(self.content), np.int64)


def read_training_data(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    on_message: OnMessage = ignore,
) -> TrainingData:
    """Read data: a file, a folder, or `file.py:factory`, which is run. Data in a store are copied to the disk.

    Raises InputRefused with the files, lines and columns that are wrong.
    """
    path = on_disk(newly_opened(source), on_message, "data", is_alone=True)
    location, separator, name = str(source).rpartition(":")
    if separator and location and not path.exists() and (location.endswith(".py") or not path.suffix):
        batches = read_own_batches(str(source), find_function(location, name))
        return TrainingData(batches, batches_sha256(batches))
    if is_arrays(path):
        return TrainingData(read_labelled_arrays(path), file_sha256(path))
    records = open_records(path, columns)
    form = form_of(records, RowForm(task) if task else None)
    checked = CheckedRows(records, survey(records, form))
    # The hash of a folder of images is that of its files already.
    files = {RowForm.SPEECH: AUDIO} | ({RowForm.IMAGE: IMAGE} if path.is_file() else {})
    column = files.get(form)
    return TrainingData(checked, sha256_with_files(records, column) if column else records.sha256)


def encoded_data(loaded: Model, data: TrainingData, options: TrainOptions) -> tuple[Data, Data | None]:
    """The examples to train on and those held out, as the model takes them.

    Raises InputRefused for data that the model cannot take: texts without a tokenizer, texts to continue without a
    language model.
    """
    _note_own_loss(loaded, options.on_message)
    groups, holdout, packing = data.groups, options.holdout, options.packing
    split = split_rows(groups, holdout, seed=options.seed) if holdout else (np.arange(len(groups)),)
    if packing and not (isinstance(data.content, CheckedRows) and data.content.survey.form in _TOKENISERS):
        raise WrongUsage(f"{named('packing')} is for texts that a causal language model continues")
    match data.content:
        case LabelledArrays(inputs, labels):
            whole = _of_arrays(
                loaded, {name: torch.from_numpy(values) for name, values in inputs.items()}, torch.from_numpy(labels)
            )
            made: list[Data] = [
                ArrayData({name: values[rows] for name, values in whole.inputs.items()}, whole.labels[rows])
                for rows in split
            ]
        case ReadyBatches(batches, loss):
            made = [ReadyBatches([batches[row] for row in rows], loss) for rows in split]
        case CheckedRows():
            made = list(map(_Encoders(loaded, data.content, options).data, split))
            if isinstance(made[0], CausalRows):
                refuse_reading_ahead(loaded.module, made[0])
    return made[0], made[1] if len(made) > 1 else None


def _note_own_loss(loaded: Model, on_message: OnMessage) -> None:
    """ProphetNet's own loss also rates the scores of the tokens after the next one. Ours has no scores of these."""
    config = getattr(loaded.module, "config", None)
    most = getattr(config, "ngram", 1)
    if most > 1 and not getattr(config, "disable_ngram_loss", True):
        on_message(
            f"note: {type(loaded.module).__name__} is trained by the next token alone. Its own loss also rates its "
            f"prediction of the next {most} tokens"
        )


def _of_arrays(loaded: Model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> ArrayData:
    """Arrays of a user. Tokens as labels are those that the model's `forward` in transformers takes.

    Our loss compares the scores at a place with the label at this place.
    """
    if not loaded.is_huggingface or labels.ndim != 2 or labels.is_floating_point():
        return ArrayData(inputs, labels)
    if "decoder_input_ids" in loaded.axes and "decoder_input_ids" not in inputs:
        inputs = {**inputs, "decoder_input_ids": encoders.decoder_shift(loaded.module)(labels)}
    elif _shifts_labels(loaded.module, inputs, labels):
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return ArrayData(inputs, labels)


def _shifts_labels(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> bool:
    """Whether the module's own loss compares the scores at a place with the label at the next place.

    One row shows it: Llama's does, and BartForCausalLM's does not. A module without a loss is taken not to.
    """
    rows = torch.nonzero((labels[:, 1:] != IGNORED).any(1)).flatten().tolist()[:1]
    if not rows or "labels" not in inspect.signature(module.forward).parameters:
        return False
    row = {name: values[rows] for name, values in {**inputs, "labels": labels}.items()}
    try:
        with torch.no_grad():
            outputs = module_outputs(module, row)
    except RuntimeRefused:  # the training itself then fails in words
        return False
    own, scores = outputs.get("loss") if isinstance(outputs, Mapping) else None, scores_of(outputs).float()
    if own is None or scores.shape[:-1] != row["labels"].shape:
        return False
    as_given, shifted = (
        F.cross_entropy(scores[0, : len(wanted)], wanted, ignore_index=IGNORED)
        for wanted in (row["labels"][0], row["labels"][0, 1:])
    )
    return bool((own - shifted).abs() < (own - as_given).abs())


_TOKENISERS = {RowForm.TEXT, RowForm.COMPLETION, RowForm.CHAT}


@dataclass(frozen=True)
class _Encoders:
    """Makes the data of one model from rows."""

    loaded: Model
    content: CheckedRows
    options: TrainOptions

    def data(self, rows: RowNumbers) -> Data:
        form, loaded, records = self.content.survey.form, self.loaded, self.content.records
        labels = encoders.LabelEncoder(self.content.survey.kind, self.content.survey.classes)
        if form is RowForm.IMAGE:
            return EncodedRows(records, rows, encoders.ImageEncoder(records, load_image_processor(loaded), labels))
        tokenizer = load_tokenizer(loaded)
        if form is RowForm.SPEECH:
            return EncodedRows(records, rows, self._speech(tokenizer))
        self._set_padding(tokenizer)
        most = self._most_tokens
        of_texts: dict[RowForm, Callable[[], Encoder]] = {
            RowForm.LABELLED: lambda: encoders.TextEncoder(tokenizer, most, labels),
            RowForm.TAGS: lambda: encoders.TagEncoder(tokenizer, most, labels),
            RowForm.SIMILARITY: lambda: encoders.SimilarityEncoder(tokenizer, most),
        }
        if form in of_texts:
            return EncodedRows(records, rows, of_texts[form]())
        return self._language(rows, tokenizer, most)

    @functools.cached_property
    def _most_tokens(self) -> int:
        """The length to which texts are cut: the requested one, or all that the model takes."""
        requested, most = self.options.max_length, int(text_lengths(self.loaded.module, {"sequence"}).most("sequence"))
        if requested > most:
            self.options.on_message(
                f"note: texts are cut to {most} tokens, all that the model takes ({named('max_length', requested)})."
            )
        return min(requested, most)

    def _speech(self, tokenizer: Any) -> TranscriptEncoder | FrameEncoder:
        """The encoder of sounds with transcripts. Raises InputRefused with all rows that the model cannot take."""
        module: Any = self.loaded.module
        config, name = module.config, type(module).__name__
        sounds = SoundReader(self.content.records, open_extractor(Path(self.loaded.source)))
        encoder: TranscriptEncoder | FrameEncoder
        if name.endswith(CTC_ENDING):
            if hasattr(module, "freeze_feature_encoder"):
                module.freeze_feature_encoder()  # otherwise it asks for gradients of the sound itself
            frames = getattr(module, "_get_feat_extract_output_lengths", None)
            counted = None if config.ctc_zero_infinity or frames is None else lambda samples: int(frames(samples))
            encoder = FrameEncoder(sounds, tokenizer, counted, is_mean=config.ctc_loss_reduction == "mean")
        elif config.is_encoder_decoder and module.main_input_name in SPEECH_INPUTS:
            most = self.options.max_length
            most = min(most, getattr(config, "max_target_positions", None) or most)
            encoder = TranscriptEncoder(
                sounds, tokenizer, most, config.decoder_start_token_id, encoders.decoder_shift(module)
            )
        else:
            raise InputRefused(
                f"{self.loaded.source} is a {name}: rows of {RowForm.SPEECH} need a speech model with a decoder, such "
                f"as Whisper, or one whose class ends with {CTC_ENDING}"
            )
        refuse_rows(self.content.records, lambda row: self._problem(encoder, row))
        return encoder

    def _problem(self, encoder: SpeechEncoder, row: int) -> str:
        try:
            encoder.check(self.content.records[row])
        except InputRefused as error:
            return f"{self.content.records.where(row)}: {error}"
        return ""

    def _set_padding(self, tokenizer: Any) -> None:
        """Padding of a classifier must be known to the model. That of a language model is never looked at."""
        if tokenizer.pad_token is None and self.content.survey.form in _TOKENISERS and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
            return
        if tokenizer.pad_token is None:
            raise InputRefused(
                "the tokenizer has no padding token, so that texts of different lengths make no batch. Give it one, "
                "such as its end of text: tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained(FOLDER)"
            )
        set_padding_token(self.loaded, tokenizer)

    def _language(self, rows: RowNumbers, tokenizer: Any, most: int) -> Data:
        module: Any = self.loaded.module
        name, form = type(module).__name__, self.content.survey.form
        if module.config.is_encoder_decoder and form is RowForm.COMPLETION:
            if self.options.packing:
                raise WrongUsage(f"{named('packing')} is for causal language models; {name} has an encoder")
            encoder = encoders.AnswerEncoder(tokenizer, most, encoders.decoder_shift(module))
            return EncodedRows(self.content.records, rows, encoder)
        is_masked = name.endswith(MASKED_ENDING)
        if not name.endswith(CAUSAL_ENDINGS) and not (is_masked and form is RowForm.TEXT):
            raise InputRefused(
                f"{self.loaded.source} is a {name}: rows of {form} need a causal language model"
                f"{' or a masked one' if form is RowForm.TEXT else ''}, such as a class ending with ForCausalLM. "
                "Texts with a `label` train a classifier"
            )
        if is_masked:
            return self._masked(rows, tokenizer, most)
        tokenise: encoders.Tokenise = {
            RowForm.TEXT: lambda: encoders.text_tokens(tokenizer, ends=True),
            RowForm.COMPLETION: lambda: encoders.completion_tokens(tokenizer),
            RowForm.CHAT: lambda: encoders.chat_tokens(tokenizer),
        }[form]()
        file, pack = TokenFile(self.content.records, rows, tokenise), self.options.packing
        pad = tokenizer.pad_token_id
        made = causal_rows(file, max_length=most, cut=form is RowForm.TEXT, pack=pack, pad_token=pad)
        if form is not RowForm.TEXT:
            self._note_cut_texts(np.diff(file.ends), sum(map(len, made.bins)), most)
        if pack:
            refuse_mixed_texts(module, made)
        return made

    def _note_cut_texts(self, lengths: NDArray[np.int64], left: int, most: int) -> None:
        cut, lost = int((lengths > most).sum()), len(lengths) - left
        if cut or lost:
            self.options.on_message(
                f"note: of {count(len(lengths), 'text')}, {cut} are cut ({named('max_length', most)}), and {lost} are "
                "left out: nothing of what remains of them is predicted"
            )

    def _masked(self, rows: RowNumbers, tokenizer: Any, most: int) -> MaskedRows:
        if self.options.packing:
            raise WrongUsage(f"{named('packing')} is for causal language models: a masked one reads in both directions")
        if tokenizer.mask_token_id is None:
            raise InputRefused(f"the tokenizer of {self.loaded.source} has no mask token, which its model predicts")
        file = TokenFile(self.content.records, rows, encoders.text_tokens(tokenizer, ends=False))
        pieces = file.pieces(most, cut=True)
        return MaskedRows(
            file, pieces, tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer),
            frozenset(tokenizer.all_special_ids), self.options.seed,
        )  # fmt: skip
