"""Which modules of a model are trained: the layers that get a pair, and the heads that are trained whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_export import layers, plan
from lora_export.api.training_strategies import TrainingRun
from lora_export.callbacks import OnMessage
from lora_export.errors import SHOWN_PROBLEMS, InputRefused, MatchError, listed
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.weights.checkpoint import open_checkpoint

HEADS = ("classifier", "score", "classification_head", "qa_outputs")  # names of task heads in transformers


def refuse_rank_beyond_layers(adapter: Adapter, *, named: bool, on_message: OnMessage) -> None:
    """Raise InputRefused for a rank that is larger than a named layer, or than all layers. Others get a note.

    A pattern that gives a layer a rank of its own names it.
    """
    small = layers.full_rank_layers(adapter)
    if not small:
        return
    message = f"the rank is larger than {len(small)} of {len(adapter.pairs)} layers"
    of_pattern = [name for name in small if adapter.pairs[name].rank != adapter.metadata["r"]]
    if named or of_pattern or len(small) == len(adapter.pairs):
        first = sorted(small, key=lambda name: name not in of_pattern)
        raise InputRefused(f"{message}. Lower it, or choose other layers:", listed([small[name] for name in first]))
    on_message(f"note: {message}, such as {next(iter(small.values()))}")


def heads_of(loaded: Model) -> tuple[str, ...]:
    """The task head of a Hugging Face classifier: the modules that its class has besides the base model."""
    if not loaded.is_huggingface:
        return ()
    return tuple(name for name, _ in loaded.module.named_children() if name in HEADS)


def with_new_modules(loaded: Model, heads: Sequence[str]) -> tuple[str, ...]:
    """The heads, and the modules whose weights the folder lacks. They are trained and saved too, or would be lost.

    Raises InputRefused where a new weight is not in a module of new weights alone.
    """
    new = set(loaded.new_weights)
    found: list[str] = []
    for path, part in loaded.module.named_modules():
        tensors = {f"{path}.{name}" for name in part.state_dict()} if path else set()
        if tensors and tensors <= new and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    if lost := [name for name in sorted(new) if not name.startswith(tuple(f"{path}." for path in found))]:
        raise InputRefused(f"{loaded.source} lacks weights that no head contains:", listed(lost, 10))
    return (*heads, *(path for path in found if not any(f".{path}.".startswith(f".{head}.") for head in heads)))


def note_on_other_names(loaded: Model, new: Adapter) -> str:
    """A note where the names of the module are not those of the folder's files; empty where the adapter fits both."""
    if not loaded.is_huggingface:
        return ""
    try:
        checkpoint = open_checkpoint(Path(loaded.source), dequantise=True)
        plan.make([new], checkpoint.specs, identity_ok=True, may_add=True, rules=checkpoint.rules)
    except MatchError as error:
        example = min(misfit.key for misfit in error.misfits)
        return (
            f"note: the adapter will not fit the files of {loaded.source}: {len(error.misfits)} of its {error.targets} "
            f"tensors have names that transformers gives them when it loads the model, such as {example}. `merge` will "
            "refuse it. `onnx`, `torchscript` and PEFT take it"
        )
    return ""


def note_on_untrained(run: TrainingRun) -> str:
    """A note on the layers that the loss does not depend on; empty where there are none."""
    assert run.adapter is not None
    names = [f"`{name}`" for name, pair in run.adapter.pairs.items() if not (pair.a.any() and pair.b.any())]
    more = f" and {len(names) - SHOWN_PROBLEMS} more" if len(names) > SHOWN_PROBLEMS else ""
    listing = ", ".join(names[:SHOWN_PROBLEMS])
    return f"note: {listing}{more} got no gradient, so that the adapter does not change them" if names else ""
