"""Embeddings and values of labels at a server: `same` only where they are those of PyTorch with the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lora_export.errors import RuntimeRefused
from support.endpoints import LOCK, Folders, Server, verified

WORDS, HIDDEN = 60, 32
FIRST, LAST = 0, 1  # [CLS] and [SEP]

Compute = Callable[[torch.Tensor], torch.Tensor]  # ids (1, n) -> a vector


def save_tokenizer(folder: Path) -> None:
    words = {"[CLS]": FIRST, "[SEP]": LAST} | {f"w{number}": number for number in range(2, WORDS)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[SEP]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("[CLS]", FIRST), ("[SEP]", LAST)]
    tokens.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, cls_token="[CLS]", sep_token="[SEP]", pad_token="[SEP]"
    ).save_pretrained(folder)


def save_bert(folder: Path, cls: Any, **config: Any) -> Path:
    torch.manual_seed(0)
    fields = hf.BertConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.3, max_position_embeddings=64, **config,
    )  # fmt: skip
    cls(fields).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_embedder(folder: Path, *more: Any, mode: str = "mean") -> Path:
    plain = save_bert(folder / "bert", hf.BertModel)
    with warnings.catch_warnings(action="ignore"):
        modules = [Transformer(str(plain)), Pooling(HIDDEN, mode), *more]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder / "base"))
    return folder / "base"


def save_adapter(base: Path, folder: Path, seed: int, task: str | None = None) -> Path:
    torch.manual_seed(seed)
    cls: Any = hf.AutoModel if task is None else hf.AutoModelForSequenceClassification
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(cls.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("embedder")
    base = save_embedder(folder)
    return Folders(base, *(save_adapter(base, folder / name, seed) for seed, name in enumerate("ab", 1)))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("classifier")
    base = save_bert(folder / "base", hf.BertForSequenceClassification, num_labels=3)
    adapters = (save_adapter(base, folder / name, seed, "labels") for seed, name in enumerate("ab", 1))
    return Folders(base, *adapters)


def embedding(base: Path, adapter: Path | None, factor: float = 1.0) -> Compute:
    """What sentence-transformers computes, with an adapter attached by PEFT."""
    with warnings.catch_warnings(action="ignore"):
        model = SentenceTransformer(str(base), device="cpu").eval()
    if adapter is not None:
        attached = with_factor(peft.PeftModel.from_pretrained(model[0].model, adapter), factor)
        model[0].model = attached
    return lambda ids: model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"][0]


def labels(base: Path, adapter: Path | None, factor: float = 1.0) -> Compute:
    model: Any = hf.AutoModelForSequenceClassification.from_pretrained(base).eval()
    if adapter is not None:
        model = with_factor(peft.PeftModel.from_pretrained(model, adapter), factor)
    several = model.config.problem_type == "multi_label_classification"

    def compute(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids).logits[0]
        return logits.sigmoid() if several else logits.softmax(-1)

    return compute


def with_factor(model: Any, factor: float) -> Any:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling = {name: scale * factor for name, scale in module.scaling.items()}
    return model.eval()


@dataclass(eq=False)
class Served(Server):
    """A server of vectors, and what it does wrong."""

    compute: Compute
    tokenizer: Any
    paths: tuple[str, ...] = field(default=("/v1/embeddings",), kw_only=True)
    key: str = "embedding"
    takes_ids: bool = True
    prompt: Callable[[list[int]], list[int]] = list
    change: Callable[[list[Any]], Any] = list  # of the entries of an answer
    counts: bool = True

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.takes_ids and not all(isinstance(one, str) for one in body["input"]):
            raise ValueError("input must be texts")
        texts = [one if isinstance(one, list) else self.tokenizer(one)["input_ids"] for one in body["input"]]
        texts = [self.prompt(ids) for ids in texts]
        with LOCK, torch.no_grad():
            rows = [self.compute(torch.tensor([ids])).tolist() for ids in texts]
        entries = [{"index": place, self.key: row} for place, row in enumerate(rows)]
        usage = {"prompt_tokens": sum(map(len, texts))} if self.counts else None
        return {"object": "list", "model": body["model"], "data": self.change(entries), "usage": usage}


def served(folders: Folders, adapter: Path | None, *, factor: float = 1.0, **wrong: Any) -> Served:
    is_classifier = (folders.base / "config.json").read_text().count("ForSequenceClassification")
    made = labels if is_classifier else embedding
    fields: dict[str, Any] = {"models": [{"id": "a", "parent": "base", "max_model_len": 64}, {"id": "base"}]}
    fields |= {"paths": ("/classify",), "key": "probs"} if is_classifier else {}
    tokenizer = hf.AutoTokenizer.from_pretrained(folders.base)
    return Served(made(folders.base, adapter, factor), tokenizer, **{**fields, **wrong})


@pytest.fixture(params=["embedder", "classifier"])
def folders(request: pytest.FixtureRequest) -> Folders:
    found: Folders = request.getfixturevalue(request.param)
    return found


def truncated(entries: list[Any]) -> list[Any]:
    return [{**one, **{key: one[key][:-1] for key in ("embedding", "probs") if key in one}} for one in entries]


@pytest.mark.parametrize(("folders", "takes_ids"), [("embedder", False), ("classifier", True)], indirect=["folders"])
def test_a_right_serving_is_the_same(takes_ids: bool, folders: Folders) -> None:
    model = served(folders, folders.adapter, takes_ids=takes_ids)
    result = verified(folders, model, other=folders.other)
    assert result.verdict.same, str(result)
    sent = [one for request in model.requests[1:] for one in request["input"]]
    assert {isinstance(one, str) for one in sent[1:]} == {not takes_ids}
    assert result.about["endpoint"]["by"] == model.paths[0].rpartition("/")[2]
    assert {sensitivity.input for sensitivity in result.verdict.sensitivity} == {"input_ids"}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "the adapter is not used": ({"adapter": None}, "the server answers as the base model"),
    "alpha is left out": ({"factor": 0.5}, "0.5 times the correct strength (scale 2), as if the scale, 2, were left"),
    "another tenant": ({"adapter": "other"}, "the server answers as the other tenant b"),
    "a token is added": ({"prompt": lambda ids: [*ids, LAST]}, "it adds tokens"),
    "a token is dropped": ({"prompt": lambda ids: ids[:-1], "counts": False}, "neither the base"),
    "texts are exchanged": (
        {"change": lambda all_: [{**one, "index": len(all_) - 1 - one["index"]} for one in all_]}, "neither the base"
    ),
    "a value is left out": ({"change": truncated}, "vectors of another size"),
}  # fmt: skip


QUICK = {("the adapter is not used", "classifier"), ("another tenant", "embedder"), ("a value is left out", "embedder")}
QUICK |= {("texts are exchanged", "embedder")}


@pytest.mark.parametrize(
    ("fault", "folders"),
    [
        pytest.param(fault, kind, marks=() if (fault, kind) in QUICK else pytest.mark.slow)
        for fault in FAULTS
        for kind in ("embedder", "classifier")
    ],
    indirect=["folders"],
)
def test_a_wrong_serving_is_different(fault: str, folders: Folders) -> None:
    wrong, sentence = FAULTS[fault]
    adapter = getattr(folders, wrong.get("adapter", "adapter") or "", None)
    others = {name: value for name, value in wrong.items() if name != "adapter"}
    result = verified(folders, served(folders, adapter, **others), other=folders.other)
    assert result.verdict.outcome == "different" and sentence in str(result), str(result)


@pytest.mark.slow
def test_another_pooling_is_different(embedder: Folders, tmp_path: Path) -> None:
    wrong = save_embedder(tmp_path, mode="cls")
    result = verified(embedder, served(embedder._replace(base=wrong), embedder.adapter))
    assert result.verdict.outcome == "different", str(result)


@pytest.mark.parametrize("normalises", [pytest.param("the model", marks=pytest.mark.slow), "the server"])
def test_vectors_of_length_one_are_compared_by_their_direction(
    normalises: str, embedder: Folders, tmp_path: Path
) -> None:
    base = save_embedder(tmp_path, Normalize()) if normalises == "the model" else embedder.base
    model = served(embedder._replace(base=base), embedder.adapter)
    own = model.compute
    model.compute = lambda ids: torch.nn.functional.normalize(own(ids), dim=-1)
    result = verified(embedder._replace(base=base), model)
    assert result.verdict.same and "directions were compared" in str(result), str(result)
    wrong = served(embedder._replace(base=base), None)
    base_alone = wrong.compute
    wrong.compute = lambda ids: torch.nn.functional.normalize(base_alone(ids), dim=-1)
    assert verified(embedder._replace(base=base), wrong).verdict.outcome == "different"


@pytest.mark.slow
def test_several_labels_at_once_have_a_sigmoid_each(classifier: Folders, tmp_path: Path) -> None:
    kind = {"problem_type": "multi_label_classification", "num_labels": 3}
    own = classifier._replace(base=save_bert(tmp_path / "base", hf.BertForSequenceClassification, **kind))
    assert verified(own, served(own, own.adapter)).verdict.same
    assert verified(own, served(own, None)).verdict.outcome == "different"


@pytest.mark.slow
def test_labels_are_found_below_the_version_too(classifier: Folders) -> None:
    assert verified(classifier, served(classifier, classifier.adapter, paths=("/v1/classify",))).verdict.same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: all_[:-1], "`data` has 0 entries for 1 text"),
        (lambda _: None, "`data` has 0 entries"),
        (lambda all_: [{**one, "embedding": "AAAA"} for one in all_], "`embedding` is no list of numbers"),
        (lambda all_: [{**one, "embedding": [True]} for one in all_], "`embedding` is no list of numbers"),
        (lambda all_: [{**one, "index": [0]} for one in all_], "`data` has 1 entry"),
    ],
)
def test_an_answer_of_another_form_is_refused(change: Callable[[Any], Any], message: str, embedder: Folders) -> None:
    with pytest.raises(RuntimeRefused, match=f"JSON of another form: {message}"):
        verified(embedder, served(embedder, embedder.adapter, change=change))


def test_a_server_without_the_path_is_undecided(embedder: Folders) -> None:
    result = verified(embedder, served(embedder, embedder.adapter, paths=()))
    assert result.verdict.outcome == "undecided"
    assert "gives no embeddings" in str(result) and "404" in str(result)
