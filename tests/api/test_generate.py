"""Texts from exported decoders: the tokens of transformers, with and without adapters, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers as hf

import lora_export as le
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.errors import InputRefused, WrongUsage
from lora_export.graph.onnx_file.writing import append_metadata
from lora_export.provenance import LONGEST_KEY
from lora_export.runtime.generation.decoder import EncoderDecoder
from support.exporters import optimum_python
from support.generators import (
    DECODERS,
    LLAMA_LIKE,
    PROMPTS,
    STEPWISE,
    decoder_adapter,
    encoder_decoder_adapter,
    expected_texts,
    expected_tokens,
    images,
    small_decoder,
    small_encoder_decoder,
    sounds,
)
from support.slow import slow

SMALL = "t5 of one layer"
MERGED = ("qwen3", "gemma3", "gpt2", "lfm2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama `base` and its adapters `fr` and `de`."""
    folder = tmp_path_factory.mktemp("llama")
    base = small_decoder("llama", folder / "base")
    for seed, name in enumerate(("fr", "de"), 1):
        decoder_adapter(base, folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def swapped(llama: Path) -> Path:
    """Its graph that takes adapters as inputs, proven."""
    adapters = [f"{name}={llama / name}" for name in ("fr", "de")]
    le.export_onnx(llama / "base", llama / "swapped", adapters=adapters, lora="inputs", with_cache=True)
    return llama / "swapped"


Texts = dict[str | None, list[list[int]]]


@pytest.fixture(scope="module")
def texts(llama: Path) -> Texts:
    """What transformers generates after the prompts, without an adapter and with each: 64 tokens."""
    found = {own: expected_tokens(llama / "base", PROMPTS, llama / own if own else None) for own in (None, "fr", "de")}
    assert found[None] != found["fr"] != found["de"] != found[None]
    return found


def tokens(folder: Path, *, count: int = 64, **options: object) -> list[list[int]]:
    results = le.generate(folder, PROMPTS, max_new_tokens=count, **options)  # type: ignore[arg-type]
    return [list(result.tokens) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "fr", "de"])
def test_batch_gives_the_tokens_of_transformers_with_each_adapter(
    texts: Texts, swapped: Path, adapter: str | None
) -> None:
    assert tokens(swapped, adapters=adapter) == texts[adapter]
    assert any(len(set(text)) > 3 for text in texts[adapter])


@pytest.mark.parametrize("name", [slow(name) for name in MERGED])
def test_merged_and_fused_graphs_give_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    base = small_decoder(name, tmp_path / "base")
    adapter = decoder_adapter(base, tmp_path / "fr")
    le.export_onnx(base, tmp_path / "served", adapters=[adapter], with_cache=True, fuse="cpu", verify=False)
    assert tokens(tmp_path / "served") == expected_tokens(base, PROMPTS, adapter)
    search = json.loads((tmp_path / "served" / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] == (name != "lfm2")
    if search["past_present_share_buffer"]:
        expected = expected_tokens(base, PROMPTS[1:2], adapter, count=32)[0]
        assert by_genai(tmp_path / "served", prompt=PROMPTS[1]) == expected
        assert by_genai(tmp_path / "served", prompt=PROMPTS[1], pieces=(3, 7)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {*MERGED, "llama"}))
def test_other_decoders_give_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    base, said = small_decoder(name, tmp_path / "base"), list[str]()
    le.export_onnx(base, tmp_path / "served", with_cache=True, on_message=said.append)
    assert tokens(tmp_path / "served") == expected_tokens(base, PROMPTS)
    assert any("takes one token of each text in a run" in text for text in said) == (name in STEPWISE)
    assert (tmp_path / "served" / "genai_config.json").exists() == (name not in STEPWISE)


@pytest.mark.slow
def test_texts_of_phi_3_pass_the_length_where_its_rope_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0]}
    rope |= {"original_max_position_embeddings": 16, "factor": 4.0}
    long = {"rope_parameters": rope, "original_max_position_embeddings": 16, "initializer_range": 0.3}
    monkeypatch.setitem(DECODERS, "phi3-long", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA_LIKE, **long)))
    base = small_decoder("phi3-long", tmp_path / "base")
    le.export_onnx(base, tmp_path / "served", with_cache=True, verify=False)
    assert tokens(tmp_path / "served") == [expected_tokens(base, [prompt])[0] for prompt in PROMPTS]


OF_STATES = {"lfm2": ["in_proj", "q_proj"], "mamba": ["x_proj"]}
OF_STATES |= {"jamba": ["in_proj", "q_proj"], "qwen3_next": ["in_proj_qkvz", "q_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "kind"), [("merged", "int4"), ("nodes", "int8")])
@pytest.mark.parametrize("name", list(OF_STATES))
def test_models_with_states_are_fused_and_quantised(name: str, lora: str, kind: str, tmp_path: Path) -> None:
    base = small_decoder(name, tmp_path / "base")
    adapter = decoder_adapter(base, tmp_path / "fr", targets=OF_STATES[name])

    def made(fuse: str | None, quantize: str | None) -> tuple[list[list[int]], set[str]]:
        """The tokens of a proven graph, and its operators that are not ONNX's own."""
        folder = tmp_path / f"{fuse} {quantize}"
        options = {"lora": lora, "fuse": fuse, "quantize": quantize}
        le.export_onnx(base, folder, adapters=[adapter], with_cache=True, **options)  # type: ignore[arg-type]
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        return tokens(folder, count=16), {node.op_type for node in graph.node if node.domain}

    fused, operators = made("cpu", None)
    assert fused == [expected_tokens(base, [prompt], adapter, count=16)[0] for prompt in PROMPTS]
    assert "SkipSimplifiedLayerNormalization" in operators
    assert ("GroupQueryAttention" in operators) == (name in ("lfm2", "qwen3_next"))  # the others rotate nothing
    quantised, operators = made(None, kind)
    assert operators == {"MatMulNBits"}
    both, operators = made("cpu", kind)
    assert both == quantised
    assert {"MatMulNBits", "SkipSimplifiedLayerNormalization"} <= operators


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["inputs", "rows"])
def test_adapters_of_a_model_with_a_state_are_proven(lora: str, tmp_path: Path) -> None:
    base = small_decoder("mamba2", tmp_path / "base")
    adapter = decoder_adapter(base, tmp_path / "fr", targets=["in_proj"])
    le.export_onnx(base, tmp_path / "served", adapters=f"fr={adapter}", lora=lora, with_cache=True)
    for name in (None, "fr"):
        expected = expected_tokens(base, PROMPTS, adapter if name else None, count=32)
        assert tokens(tmp_path / "served", adapters=name, count=32) == expected


@pytest.mark.slow
def test_short_convolutions_run_in_onnxruntime_genai(tmp_path: Path) -> None:
    base = small_decoder("lfm2", tmp_path / "base")
    le.export_onnx(base, tmp_path / "served", with_cache=True, verify=False)
    assert by_genai(tmp_path / "served") == expected_tokens(base, PROMPTS[:1], count=32)[0]


def test_slots_are_filled_with_the_adapters_of_the_rows(llama: Path, texts: Texts) -> None:
    shape = {"target": "all-linear", "slots": 2, "max_rank": 9}
    le.export_onnx(llama / "base", llama / "slots", lora="slots", with_cache=True, verify=False, **shape)  # type: ignore[arg-type]
    for name in ("fr", "de"):
        le.convert(llama / name, llama / "slots" / f"{name}.onnx_adapter", graph=llama / "slots" / "model.onnx")
    for chosen in (["de", None, "fr"], [None, "fr", "fr"], "de", None):
        each = chosen if isinstance(chosen, list) else [chosen] * 3
        assert tokens(llama / "slots", adapters=chosen, count=16) == [
            texts[own][row][:16] for row, own in enumerate(each)
        ]
    with pytest.raises(InputRefused, match=r"there is no es\.onnx_adapter beside .*; the adapters there: de, fr"):
        tokens(llama / "slots", adapters="es")
    shutil.copy(llama / "slots" / "de.onnx_adapter", llama / "slots" / "it.onnx_adapter")
    with pytest.raises(InputRefused, match="has 2 slots, for 3 adapters"):
        tokens(llama / "slots", adapters=["de", "fr", "it"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"lora": "rows"}, {"lora": "rows", "per_row": 2}, {"lora": "inputs", "required_inputs": True, "max_rank": 9}],
)
def test_graphs_of_several_adapters_and_of_plain_inputs_generate(
    llama: Path, texts: Texts, tmp_path: Path, options: dict[str, object]
) -> None:
    adapters = [f"{name}={llama / name}" for name in ("fr", "de")]
    le.export_onnx(llama / "base", tmp_path / "out", adapters=adapters, with_cache=True, verify=False, **options)  # type: ignore[arg-type]
    for name, right in texts.items():
        assert tokens(tmp_path / "out", adapters=name, count=16) == [text[:16] for text in right]
    if options == {"lora": "rows"}:
        mixed = tokens(tmp_path / "out", adapters=(chosen := ["de", None, "fr"]), count=16)
        assert mixed == [texts[name][row][:16] for row, name in enumerate(chosen)]
        with pytest.raises(InputRefused, match="has no adapter es; it has fr, de"):
            tokens(tmp_path / "out", adapters="es")


def test_folder_runs_in_onnxruntime_genai_as_it_is(texts: Texts, swapped: Path) -> None:
    for name in (None, "fr"):
        assert by_genai(swapped, name) == texts[name][0][:32]


@pytest.mark.slow
def test_adapters_run_in_onnxruntime_genai_with_a_shared_buffer(llama: Path, texts: Texts, tmp_path: Path) -> None:
    adapters, folder = [f"{name}={llama / name}" for name in ("fr", "de")], tmp_path / "served"
    options = {"lora": "inputs", "with_cache": True, "fuse": "cpu"}
    le.export_onnx(llama / "base", folder, adapters=adapters, **options)  # type: ignore[arg-type]
    assert json.loads((folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is True
    for name, right in texts.items():
        assert by_genai(folder, name) == right[0][:32]


def by_genai(
    folder: Path, adapter: str | None = None, prompt: Sequence[int] = PROMPTS[0], pieces: Sequence[int] = ()
) -> list[int]:
    """32 tokens after a prompt, which is given at once, or in pieces that begin at these places."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    adapters = og.Adapters(model) if adapter else None
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 32)
    generator = og.Generator(model, parameters)
    if adapters is not None:
        adapters.load(str(folder / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    for piece in np.split(np.array(prompt, np.int32), pieces):
        generator.append_tokens(piece[None])
    while not generator.is_done():
        generator.generate_next_token()
    made: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    return made


OPTIMUM = """
import sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], use_cache=True)
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
print(*made[0, ids.shape[1]:].tolist())
"""


@pytest.mark.parametrize("fuse", [None, "cpu"])
def test_folder_runs_in_optimum_as_it_is(fuse: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """optimum-onnx 0.1 does not read the `head_dim` of a Llama: its heads are as wide as hidden_size / heads."""
    python = optimum_python()
    wide = LLAMA_LIKE | {"hidden_size": 64}
    monkeypatch.setitem(DECODERS, "llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide)))
    base, adapter, folder = tmp_path / "base", tmp_path / "adapter", tmp_path / "served"
    decoder_adapter(small_decoder("llama", base), adapter)
    le.export_onnx(base, folder, adapters=[adapter], with_cache=True, fuse=fuse, verify=False)
    line = [python, "-c", OPTIMUM, folder, ",".join(map(str, PROMPTS[0]))]
    ran = subprocess.run(line, check=False, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    assert [int(token) for token in ran.stdout.split()] == expected_tokens(base, PROMPTS[:1], adapter, count=32)[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each encoder-decoder: its `base`, its adapters `fr` and `de`, and `served` with both.

    Whisper takes them as inputs, BART in slots, the others by row. `de` changes the decoder alone.
    """

    @functools.cache
    def serve(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        base = small_encoder_decoder(name, folder / "base")
        fr = encoder_decoder_adapter(base, folder / "fr")
        targets = r".*decoder\..*\.(q|v|q_proj|v_proj|fc1)"
        de = encoder_decoder_adapter(base, folder / "de", seed=2, targets=targets)
        lora = {"whisper": "inputs", "bart": "slots"}.get(name, "rows")
        le.export_onnx(base, folder / "served", adapters=[fr, de], lora=lora, with_cache=True, verify=False)
        return folder

    return serve


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trocr", "vit-gpt2", "donut"])
def test_graphs_of_an_image_to_text_model_are_proven(name: str, tmp_path: Path) -> None:
    base = small_encoder_decoder(name, tmp_path / "base")
    adapter = encoder_decoder_adapter(base, tmp_path / "fr", targets=r".*\.(q_proj|v_proj|query|value|fc1|c_attn)")
    lora = "inputs" if name == "donut" else "rows"  # in windows of an image the batch is no dimension of its own
    result = le.export_onnx(base, tmp_path / "served", adapters=f"fr={adapter}", lora=lora, task="image-to-text")
    assert result.proof is not None and result.proof.verdict.same
    for own in (None, "fr"):
        made = le.generate(tmp_path / "served", images(), adapters=own, max_new_tokens=64)
        assert [list(text.tokens) for text in made] == expected_texts(base, adapter if own else None)
        for first in ([9, 8, 7], [1, 9]):
            made = le.generate(tmp_path / "served", images(), adapters=own, starts=[first], max_new_tokens=16)
            right = expected_texts(base, adapter if own else None, count=16, first=first)
            assert [list(text.tokens) for text in made] == [text[-16:] for text in right]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5gemma", "longt5"])
def test_graphs_of_an_encoder_decoder_are_proven(name: str, tmp_path: Path) -> None:
    base = small_encoder_decoder(name, tmp_path / "base")
    adapter = encoder_decoder_adapter(base, tmp_path / "fr")
    result = le.export_onnx(base, tmp_path / "served", adapters=adapter, with_cache=True)
    assert result.proof is not None and result.proof.verdict.same
    assert any("at positions of padding" in note for note in result.proof.verdict.notes) == (name == "longt5")
    made = le.generate(tmp_path / "served", PROMPTS, max_new_tokens=64)
    assert [list(text.tokens) for text in made] == expected_texts(base, adapter)
    assert le.verify(tmp_path / "served", base, adapters=adapter, weights=[0.5]).exit_code == 4


@pytest.mark.parametrize("name", [SMALL, slow("t5"), slow("whisper"), slow("bart")])
def test_encoder_decoder_gives_the_tokens_of_transformers(name: str, served: Callable[[str], Path]) -> None:
    folder = served(name)
    prompts = sounds() if name == "whisper" else PROMPTS
    count = 24  # T5 tells distances of more than 16 tokens apart by powers
    expected = {
        own: expected_texts(folder / "base", folder / own if own else None, count=count) for own in (None, "fr", "de")
    }
    assert expected[None] != expected["fr"] != expected["de"] != expected[None]
    for own, right in expected.items():
        results = le.generate(folder / "served", prompts, adapters=own, max_new_tokens=count)
        assert [list(result.tokens) for result in results] == right
    chosen, graph = ["de", None, "fr"], folder / "served" / "encoder_model.onnx"
    if name == "whisper":
        with pytest.raises(InputRefused, match="runs one adapter at a time"):
            le.generate(graph, prompts, adapters=chosen)
        with pytest.raises(
            InputRefused, match=r"there is no es\.encoder_model\.onnx_adapter in .*; the .* there: de, fr"
        ):
            le.generate(graph, prompts, adapters="es")
        return
    mixed = le.generate(graph, prompts, adapters=chosen, max_new_tokens=count)
    assert [list(result.tokens) for result in mixed] == [expected[own][row] for row, own in enumerate(chosen)]
    with pytest.raises(InputRefused, match=r"has no adapter es; it has fr, de|there is no es\..* there: de, fr"):
        le.generate(graph, prompts, adapters="es")


@pytest.mark.slow
def test_speech_model_tells_the_language_or_is_told(served: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(served("whisper") / "served", tmp_path / "served")
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "lang_to_id": {"<|en|>": 11, "<|de|>": 12}, "task_to_id": {"transcribe": 21}})
    )
    by_language = {
        name: [result.tokens for result in le.generate(folder, sounds(), language=name, max_new_tokens=8)]
        for name in ("en", "de")
    }
    assert by_language["en"] != by_language["de"]
    heard = [result.tokens for result in le.generate(folder, sounds(), max_new_tokens=8)]
    starts = np.array([[1]] * 3)
    logits = EncoderDecoder(folder).start({"input_features": np.stack(sounds())}).step(starts, starts, starts)
    names = np.where(logits[:, 11] > logits[:, 12], "en", "de")
    assert heard == [by_language[name][row] for row, name in enumerate(names)]
    with pytest.raises(InputRefused, match="no token of the language 'fr'"):
        le.generate(folder, sounds(), language="fr")
    with pytest.raises(InputRefused, match="no token for translating"):
        le.generate(folder, sounds(), translate=True)
    with pytest.raises(WrongUsage, match="for multilingual speech models"):
        le.generate(served("whisper") / "served", sounds(), language="en")


@pytest.mark.slow
def test_adapters_of_an_encoder_decoder_are_verified_by_their_files(
    served: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = served("whisper")
    file = folder / "served" / "de.decoder_model.onnx_adapter"
    assert le.verify(folder / "served", folder / "base", adapters=[folder / "de"], onnx_adapter=file)
    assert not le.verify(folder / "served", folder / "base", adapters=[folder / "fr"], onnx_adapter=file)
    copy = shutil.copytree(folder / "served", tmp_path / "copy")
    (copy / "de.encoder_model.onnx_adapter").unlink()
    with pytest.raises(InputRefused, match=r"there is no de\.encoder_model\.onnx_adapter"):
        le.verify(copy, folder / "base", adapters=[folder / "de"], onnx_adapter=copy / file.name)
    with pytest.raises(InputRefused, match=r"is no adapter of the graphs in .*NAME\.encoder_model\.onnx_adapter"):
        le.verify(copy, folder / "base", adapters=[folder / "de"], onnx_adapter=file)


def test_wishes_of_a_generation_config_that_are_not_done_are_named(
    served: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(served(SMALL) / "served", tmp_path / "served")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    said: list[str] = []
    le.generate(folder, PROMPTS, max_new_tokens=1, on_message=said.append)
    assert said == ["note: not done: num_beams 4, which the generation config asks for"]


@pytest.mark.slow
def test_encoder_decoder_is_verified_as_a_folder(served: Callable[[str], Path], tmp_path: Path) -> None:
    folder = served("t5")
    adapters = [folder / "fr", folder / "de"]
    assert le.verify(folder / "served", folder / "base", adapters=adapters[1:], adapter_id=2)
    wrong = shutil.copytree(folder / "served", tmp_path / "wrong")
    graph = onnx.load(wrong / "decoder_with_past_model.onnx")
    weight = next(tensor for tensor in graph.graph.initializer if "lm_head" in tensor.name)
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(graph, wrong / "decoder_with_past_model.onnx")
    result = le.verify(wrong, folder / "base", adapters=adapters[1:], adapter_id=2)
    assert not result
    assert "The first graph whose outputs differ: decoder_with_past_model.onnx" in str(result)
    assert set(result.as_document()["about"]["candidate"]["sha256"]) >= set(GRAPH_FILES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "inputs", "target": "q", "strength_input": True}, "strength_input= is not for text2text-generation"),
        ({"fuse": "cpu"}, "fuse= is for decoders alone, not for text2text-generation"),
    ],
)
def test_what_encoder_decoders_do_not_have_is_refused(
    served: Callable[[str], Path], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    folder = served(SMALL)
    with pytest.raises(WrongUsage, match=message):
        le.export_onnx(folder / "base", tmp_path / "out", adapters=[folder / "fr"], with_cache=True, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


OPTIMUM_ENCODED = """
import json, sys, numpy as np, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
given = {name: torch.tensor(value) for name, value in np.load(sys.argv[3]).items()}
model = {"t5": ORTModelForSeq2SeqLM, "whisper": ORTModelForSpeechSeq2Seq}[sys.argv[1]].from_pretrained(sys.argv[2])
made = model.generate(**given, max_new_tokens=32, do_sample=False)
print(json.dumps(made.tolist()))
"""


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_graphs_of_an_encoder_decoder_run_in_optimum(name: str, served: Callable[[str], Path], tmp_path: Path) -> None:
    python = optimum_python()
    base, adapter = served(name) / "base", served(name) / "fr"
    le.export_onnx(base, tmp_path / "merged", adapters=[adapter], with_cache=True, verify=False)
    if name == "t5":
        given = {"input_ids": np.array([PROMPTS[0]]), "attention_mask": np.ones((1, len(PROMPTS[0])), np.int64)}
    else:
        given = {"input_features": sounds()[0][None]}
    np.savez(tmp_path / "given.npz", **given)
    line = [python, "-c", OPTIMUM_ENCODED, name, tmp_path / "merged", tmp_path / "given.npz"]
    run = subprocess.run(line, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (made,) = json.loads(run.stdout.splitlines()[-1])
    expected = expected_texts(base, adapter, count=32)[0]
    assert made[-len(expected) :] == expected


def test_texts_are_passed_on_piece_by_piece(swapped: Path) -> None:
    pieces: list[tuple[int, str]] = []
    results = le.generate(
        swapped, ["w5 w9", "w7"], max_new_tokens=5, on_text=lambda row, text: pieces.append((row, text))
    )
    assert [result.prompt for result in results] == ["w5 w9", "w7"]
    for row, result in enumerate(results):
        own = [text for number, text in pieces if number == row]
        assert "".join(own) == result.text
        assert len(own) == 5
        assert result.text is not None
        assert [int(word[1:]) for word in result.text.split()] == list(result.tokens)


def test_chat_puts_the_prompt_into_the_template(swapped: Path) -> None:
    (plain,) = le.generate(swapped, ["w1 w5 w9 w2"], max_new_tokens=5)
    (chat,) = le.generate(swapped, ["w5 w9"], max_new_tokens=5, chat=True)
    assert chat.tokens == plain.tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ raise_exception('no\\nsystem') }}", r"the chat template refuses the messages \(no.*system\)"),
        ("{% for %}", "the chat template refuses the messages"),
        ("{{ messages[9].content.x.y }}", "the chat template refuses the messages"),
    ],
)
def test_a_chat_without_a_working_template_is_refused(
    swapped: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    folder = shutil.copytree(swapped, tmp_path / "served")
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputRefused, match=message) as refused:
        le.generate(folder, ["w5 w9"], max_new_tokens=5, chat=True)
    assert "\n" not in str(refused.value)


def test_text_ends_with_a_token_of_the_generation_config(texts: Texts, swapped: Path, tmp_path: Path) -> None:
    text = texts[None][0]
    folder = shutil.copytree(swapped, tmp_path / "served")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [59, {text[3]}]}}')
    (result,) = le.generate(folder, PROMPTS[:1])
    assert list(result.tokens) == text[: text.index(text[3]) + 1]


def test_seed_determines_the_draws(swapped: Path) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return tokens(swapped, temperature=1.5, top_p=0.9, seed=seed, count=16)

    assert drawn(1) == drawn(1) != drawn(2)


def test_options_of_draws_that_are_not_made_get_a_note(swapped: Path) -> None:
    said: list[str] = []
    le.generate(swapped, PROMPTS[:1], max_new_tokens=1, top_p=0.5, seed=3, on_message=said.append)
    assert said == ["note: no effect without temperature=, where nothing is drawn: top_p= and seed="]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapters": "es"}, InputRefused, r"there is no es.onnx_adapter beside .*; the adapters there: de, fr"),
        ({"adapters": "../fr"}, InputRefused, r"there is no \.\./fr.onnx_adapter beside"),
        ({"adapters": ["fr", "de", None]}, InputRefused, "runs one adapter at a time"),
        ({"adapters": ["fr", "de"]}, WrongUsage, "there are 2 adapters for 3 prompts"),
        ({"max_new_tokens": 0}, WrongUsage, "max_new_tokens= is 0; it must be at least 1"),
        ({"temperature": -1}, WrongUsage, "temperature= is -1; it must be at least 0"),
        ({"temperature": float("nan")}, WrongUsage, "temperature= is nan; it must be at least 0"),
        ({"top_p": 0.0}, WrongUsage, "top_p= is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, WrongUsage, "top_p= is 1.5; it must be above 0 and at most 1"),
        ({"seed": -1}, WrongUsage, "seed= is -1; it must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    swapped: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        le.generate(swapped, PROMPTS, **options)  # type: ignore[arg-type]


def test_prompts_that_the_model_cannot_take_are_refused(swapped: Path) -> None:
    with pytest.raises(WrongUsage, match="there is no prompt"):
        le.generate(swapped, [])
    with pytest.raises(InputRefused, match="a prompt has no token"):
        le.generate(swapped, [""])
    with pytest.raises(InputRefused, match="a prompt has the token 60; the model has rows for 0 to 59"):
        le.generate(swapped, [[3, 60]])
    with pytest.raises(InputRefused, match="a prompt has the token -1"):
        le.generate(swapped, [[3, -1, 5]])


def made_for(graph: Path, sizes: str, target: Path, name: str) -> Path:
    """A copy of a folder whose graphs state sizes up to which they were made."""
    shutil.copytree(graph, target)
    append_metadata(target / name, {LONGEST_KEY: sizes})
    return target


def test_texts_beyond_what_a_graph_was_made_for_are_refused(swapped: Path, tmp_path: Path) -> None:
    folder, notes = made_for(swapped, '{"sequence": 20, "frames": 9}', tmp_path / "made", "model.onnx"), []
    le.generate(folder, [[3] * 5, [4] * 11], max_new_tokens=10, on_message=notes.append)
    assert notes[-1].endswith("was made for sizes of up to 9 in frames, which are not checked here")
    for prompt, count in (([3] * 21, 1), ([3] * 11, 11)):
        with pytest.raises(
            InputRefused, match="sizes of up to 20 in sequence, and this run has 21: its model computes"
        ):
            le.generate(folder, [[3], prompt], max_new_tokens=count)


def test_texts_beyond_what_an_encoder_was_made_for_are_refused(served: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made_for(served(SMALL) / "served", '{"sequence": 9}', tmp_path / "made", GRAPH_FILES[0])
    assert le.generate(folder, [[3] * 9], max_new_tokens=20)
    with pytest.raises(InputRefused, match="sizes of up to 9 in sequence, and this run has 10"):
        le.generate(folder, [[3] * 9, [4] * 10], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"with_cache": True, "task": "poetry"}, "task= is 'poetry'; it must be text-generation"),
        ({"fuse": "tpu"}, "fuse= is 'tpu'; it must be cpu, cuda or webgpu"),
    ],
)
def test_unknown_tasks_and_providers_are_refused(
    llama: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.export_onnx(llama / "base", tmp_path / "served", **options)  # type: ignore[arg-type]


def test_folders_without_what_is_needed_are_refused(swapped: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r'has no \.onnx\. `export_onnx\("MODEL", output="FOLDER", with_cache=True'):
        le.generate(tmp_path, ["w1"])
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(InputRefused, match=r"has several graphs \(a.onnx, b.onnx\): name the \.onnx itself"):
        le.generate(tmp_path, ["w1"])
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).unlink()
    shutil.copy(swapped / "model.onnx", tmp_path)
    with pytest.raises(InputRefused, match=r"has no tokenizer(?s:.*)lists of token ids"):
        le.generate(tmp_path, ["w1"])
    assert tokens(tmp_path / "model.onnx", count=4) == tokens(swapped, count=4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputRefused, match="the tokenizer cannot be read"):
        le.generate(tmp_path, ["w1"])
