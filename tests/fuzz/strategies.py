"""What hypothesis tries: files that are nearly right, JSON that no writer would write, and mutated bytes."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzz.every_target import GOOD
from fuzz.megatron_targets import LAYER, LINES
from fuzz.targets import ADAPTER_TENSORS, GRAPH_TENSORS, KINDS, TASK_LINES

Text = SearchStrategy[str]
UNICODE = st.characters(exclude_categories=("Cs",))  # those of UTF-8, which hypothesis would find by encoding each

# JSON as it is spelled: what Python's writer cannot say (twins, halves of surrogate pairs) is among it.
ODD_VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.0", "1e999", "-1e999", "NaN", "Infinity", "1e-400"),
    *("9223372036854775808", "18446744073709551616", "1" + "0" * 400, "1" * 5000, "2.0", "1e2", "4294967296"),
    *('""', '"0"', '"a"', '"fc"', '"fc.weight"', '"../x"', '"/etc/passwd"', '"."', '".."', '"model.safetensors"'),
    *(r'"\ud800"', r'"\u0000"', r'"\u001b[2J"', r'"\n"', '"é"', '"' + "n" * 300 + '"', '"none"', '"all"', '"LORA"'),
    *('"torch.ops.aten.add.Tensor"', '"torch.ops.aten.resize_.default"', '"os.system"', '"as_tensor"', '{"as_int": 7}'),
    *('"(a+)+$"', '"("', '"F32"', '"BF16"', '"F4"', '"gpt2"', '"gaussian"', '"pissa"'),
    *("[]", "{}", "[[]]", '[""]', "[null]", "[1]", '["fc"]', '{"": null}', '{"a": {"a": {}}}', "[1, 2]", "[2, 3]"),
    *("[" * depth + "]" * depth for depth in (60, 500, 3000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (60, 500, 3000)),
)
ODD_NAMES = ('""', r'"\ud800"', r'"\u001b[2J"', '"__metadata__"', '"a.b"', '"fc.weight"', '"quantization_config"')


@functools.cache
def json_text() -> Text:
    """Any JSON, objects with odd and repeated names among it. One object: hypothesis prepares each at its first use."""
    names = st.sampled_from(ODD_NAMES) | st.text(UNICODE, max_size=8).map(json.dumps)
    return st.recursive(
        st.sampled_from(ODD_VALUES) | st.integers().map(str) | st.text(UNICODE, max_size=8).map(json.dumps),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
            st.lists(st.tuples(names, inner), max_size=4).map(_object),
        ),
        max_leaves=12,
    )


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"


@st.composite
def near_json(draw: Callable[..., Any], good: bytes) -> bytes:
    """A good JSON object, a few of its parts replaced, dropped, renamed, doubled or added to."""

    def spelled(value: Any, chances: list[str]) -> str:
        fate = chances.pop() if chances and draw(st.integers(0, 3)) == 0 else "kept"
        if fate == "replaced":
            return draw(json_text())
        if isinstance(value, dict):
            pairs = [(json.dumps(name), spelled(inner, chances)) for name, inner in value.items()]
            if pairs and chances and draw(st.integers(0, 1)):
                _change(draw, chances.pop(), pairs)
            return _object(pairs)
        if isinstance(value, list):
            return f"[{', '.join(spelled(inner, chances) for inner in value)}]"
        return json.dumps(value)

    kinds = ("replaced", "replaced", "replaced", "dropped", "renamed", "doubled", "added")
    text = spelled(json.loads(good), draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)))
    return text.encode("utf-8", draw(st.sampled_from(("replace", "surrogatepass"))))


def _change(draw: Callable[..., Any], fate: str, pairs: list[tuple[str, str]]) -> None:
    place = draw(st.integers(0, len(pairs) - 1))
    name, value = pairs[place]
    if fate == "dropped":
        del pairs[place]
    elif fate == "renamed":
        pairs[place] = (draw(st.sampled_from(ODD_NAMES)), value)
    elif fate == "doubled":
        pairs.append((name, draw(json_text())))
    else:
        pairs.append((draw(st.sampled_from(ODD_NAMES)), draw(json_text())))


@st.composite
def mutated(draw: Callable[..., Any], good: bytes) -> bytes:
    """Good bytes after a few of the changes that disks, editors and enemies make."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 16)))
        kind = draw(st.sampled_from(("overwrite", "insert", "delete", "double", "cut")))
        if kind == "overwrite":
            data[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif kind == "insert":
            data[start:start] = draw(st.binary(max_size=8))
        elif kind == "delete":
            del data[start:stop]
        elif kind == "double":
            data[start:start] = data[start:stop] * draw(st.integers(1, 50))
        else:
            del data[start:]
    return bytes(data)


def keys() -> SearchStrategy[bytes]:
    """Keys of an adapter, one a line."""
    parts = ("base_model.model.", "fc", ".lora_A", ".lora_B", ".a", ".weight", ".bias", ".base_layer", ".out_proj")
    odd = (".lora_embedding_A", ".modules_to_save", ".token_adapter", "lora_", ".", "\x1b[2J", "é", "\0", "x" * 3000)
    made = st.lists(st.sampled_from(parts + odd), max_size=7).map("".join)
    free = st.text(UNICODE, max_size=20).map(lambda text: text.replace("\n", ""))
    key = st.sampled_from(list(ADAPTER_TENSORS)) | made | free
    return st.lists(key, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))


def keys_of_formats() -> SearchStrategy[bytes]:
    """Keys of files without a config, in any format, one a line."""
    starts = ("", "diffusion_model.", "unet.", "lora_unet_", "lora_te1_", "lycoris_", "transformer.h.0.", "layers.0.")
    owners = (
        *("fc", "attn.q_proj", "attn.qkv", "mlp.experts", "down_blocks_0", "embed", "blocks.0.switch_mlp.up_proj"),
        "",
    )
    ends = (
        *(".lora_A", ".lora_B", ".lora_a", ".lora_b", ".m", ".lora_A.weight", ".lora_B.weight", ".lora_a.weight"),
        *(".lora_b.weight", ".magnitude", ".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_mid.weight"),
        *(".bias", ".hada_w1_a", ".hada_w1_b", ".lokr_w1", ".lokr_w2", ".diff", ".dora_scale", ".lora_gate_a", ""),
        "\x1b[2J",
    )
    key = st.tuples(*map(st.sampled_from, (starts, owners, ends))).map("".join)
    good = st.sampled_from(("fc.lora_A", "fc.lora_B", "lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight"))
    return st.lists(key | good, min_size=1, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))


def diffusion_files() -> SearchStrategy[bytes]:
    """Adapters of image models, as `diffusion_file` reads them: mixed prefixes, kinds of changes and shapes."""
    prefixes = ("lora_unet_", "lora_te_", "lora_te3_", "lycoris_", "unet.", "text_encoder_2.", "diffusion_model.", "")
    modules = ("fc", "fc", "fc", "embed", "norm", "encoder.block.0.layer.0.q", "up_blocks.9.x", "a[0]")
    sides = ("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "lora_mid.weight", "alpha")
    lycoris = (
        *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *("diff", "diff_b", "w_norm", "b_norm", "dora_scale", "oft_blocks", "rescale"),
        *("on_input", "weight", "a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    )
    shapes = ("1,3", "2,1", "2,3", "3", "2", "1", "0,3", "2,1,1,1", "1,3,1,1", "1,1,3,3", "1,2,2", "1,1,2,2", "1,1", "")
    one = st.tuples(st.sampled_from(prefixes), st.sampled_from(modules))
    tensor = st.tuples(st.sampled_from((*sides, *lycoris)), st.sampled_from(shapes))
    recorded = st.sampled_from(("", "", "", '{"unet.r": 1, "unet.lora_alpha": 2}', '{"r": 0}', "[1]", '{"unet.r": []}'))
    lines = st.tuples(one, st.lists(tensor, min_size=1, max_size=5)).map(
        lambda both: [f"{both[0][0]}{both[0][1]}.{part} {shape}" for part, shape in both[1]]
    )
    return st.tuples(recorded, st.lists(lines, min_size=1, max_size=2)).map(
        lambda both: "\n".join([both[0], *(line for group in both[1] for line in group)]).encode()
    )


def peft_kinds() -> SearchStrategy[bytes]:
    """Adapters of PEFT's kinds, as `peft_kind` reads them: other fields, other shapes, parts of another kind."""
    good = st.sampled_from(KINDS).map(lambda one: one.split(b"\n"))
    names = [line.rpartition(b" ")[0] for one in KINDS for line in one.split(b"\n")[1:]]
    shapes = st.sampled_from((b"1", b"2", b"3", b"1,3", b"2,1", b"3,1", b"1,1,1", b"0", b"2,2", b""))
    line = st.tuples(st.sampled_from(names), shapes).map(b" ".join)
    changed = st.tuples(good, st.lists(line, max_size=2)).map(lambda both: (both[0][0], [*both[0][1:], *both[1]]))
    return changed.flatmap(
        lambda one: near_json(one[0]).map(lambda config: b"\n".join([config.replace(b"\n", b" "), *one[1]]))
    )


def with_tensors(
    good: bytes, lines: list[bytes], odd: tuple[bytes, ...], shapes: tuple[bytes, ...]
) -> SearchStrategy[bytes]:
    """Configs of `good`, one a line, then lines of a key and a shape; an odd one wins over a good one of its key."""
    configs = [near_json(one).map(lambda text: text.replace(b"\n", b" ")) for one in good.split(b"\n")[: -len(lines)]]
    names = (*(line.rpartition(b" ")[0] for line in lines), *odd)
    line = st.tuples(st.sampled_from(names), st.sampled_from(shapes)).map(b" ".join)
    kept = st.integers(0, 2 * len(lines)).map(lambda number: lines[:number])
    parts = st.tuples(st.tuples(*configs), kept, st.lists(line, max_size=2))
    return parts.map(lambda three: b"\n".join(itertools.chain(*three)))


def megatron_adapters() -> SearchStrategy[bytes]:
    """Adapters of Megatron-Bridge, as `megatron_adapter` reads them: layers, experts and parts of others among them."""
    layers = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.experts.linear_fc2", "mlp.experts.0.linear_fc1", "x")
    parts = ("adapter.linear_in", "adapter.linear_out", "adapter.adapter_q.linear_in", "adapter.adapter_up.linear_out")
    outer = (LAYER, f"module.module.{LAYER}", "decoder.layers.", f"decoder.layers.{'9' * 40}.", "\x1b[2J", "")
    odd = [f"{place}{layer}.{part}.weight".encode() for place in outer for layer in layers for part in parts]
    shapes = (b"1,3", b"6,1", b"4,1", b"1,6,1", b"2,1,3", b"2,4,1", b"1,2,1,3", b"1,2,4,1", b"0,1,3", b"0", b"3", b"")
    odd += [b"decoder.layers.0.mlp.adapter._extra_state", b"embedding.word_embeddings.weight"]
    return with_tensors(GOOD["megatron_adapter"], [line.encode() for line in LINES], tuple(odd), shapes)


def models_with_tasks() -> SearchStrategy[bytes]:
    """Models with an adapter for each task, as `model_with_tasks` reads them: other stacks and parametrizations."""
    ends = ("original", "original0", "0.lora_A", "0.lora_B", "0.magnitude", "1.lora_A", "0.lora_C")
    odd = [
        f"{module}.parametrizations.weight.{end}" for module in ("fc", "embed", "a.b", "\x1b[2J", "") for end in ends
    ]
    odd += ["fc.weight", "fc.parametrizations.bias.0.lora_A", "norm.weight"]
    shapes = (b"2,3", b"1,3", b"2,1", b"2,1,3", b"2,2,1", b"1,1,3", b"3,2,1", b"2,1,1", b"0,1,3", b"2,1,1,3", b"0", b"")
    return with_tensors(GOOD["model_with_tasks"], TASK_LINES, tuple(name.encode() for name in odd), shapes)


def yaml_settings() -> SearchStrategy[bytes]:
    """litgpt's two files of settings, with odd values."""
    names = (
        *("lora_r", "lora_alpha", "lora_query", "lora_key", "name", "mlp_class_name", "n_head", "n_embd"),
        "head_size",
    )
    odd = ("", "1", "2", "-1", "0", "true", "null", ".inf", ".nan", "1e400", "Llama-3", "falcon", "phi-3", "LLaMAMoE")
    more = ("[1]", "{a: 1}", "&a [*a]", "!!python/name:os.system", "2001-01-01", "'\x1b[2J'", "9" * 400, "[" * 300)
    line = st.tuples(st.sampled_from(names), st.sampled_from((*odd, *more))).map(": ".join)
    change = st.lists(line, max_size=2).map("\n".join)
    settings, config = GOOD["litgpt_settings"].decode().split("\n---\n")
    return st.tuples(change, change).map(lambda two: f"{settings}{two[0]}\n---\n{config}{two[1]}".encode())


def records() -> SearchStrategy[bytes]:
    """External-data records, as `external_data` reads them."""
    locations = ("weights.data", "../model/w.data", "/etc/passwd", "", ".", "model.onnx", "weights.data/", "a\0b")
    numbers = ("0", "8", "24", "-1", "32", "9223372036854775808", "1" * 5000, "0x8", "8.0", "", "NaN", "٨")
    entry = st.one_of(
        st.sampled_from(locations).map("location={}".format),
        st.tuples(st.sampled_from(("offset", "length")), st.sampled_from(numbers)).map("=".join),
        st.sampled_from(("checksum=da39a3ee5e6b4b0d3255bfef95601890afd80709", "checksum=\x1b[2J", "new=1", "=", "")),
    )
    record = st.lists(entry, max_size=4).map(lambda more: "\n".join(["location=weights.data", *more]))
    count = len(GRAPH_TENSORS)
    return st.lists(record, min_size=count, max_size=count).map(lambda two: "\n\n".join(two).encode())


def fields() -> SearchStrategy[bytes]:
    """What a graph may say of its quantised weights, as `quantised_fields` reads it."""
    names = ("fc.weight_Q4", "s", "z", "up.weight_quantized", "t", "p")
    attributes = ("K", "N", "bits", "block_size", "axis", "weight_prepacked", "output_dtype", "saturate", "g")
    odd = st.sampled_from((0, 1, 2, 3, 4, 5, 8, 16, 17, 255, -1, -2, 2147483647, -2147483648, 1 << 29))
    several = st.lists(odd, max_size=4).map(lambda numbers: " ".join(map(str, numbers)))
    small = st.lists(st.integers(0, 4), max_size=3).map(lambda numbers: " ".join(map(str, numbers)))
    line = st.one_of(
        st.tuples(st.sampled_from("01"), st.sampled_from(attributes), odd.map(str) | several).map(
            "{0[0]}.{0[1]}={0[2]}".format
        ),
        st.tuples(st.sampled_from(names), st.just("dims"), small | several).map("{0[0]}.{0[1]}={0[2]}".format),
        st.tuples(st.sampled_from(names), st.just("type"), st.integers(0, 28)).map("{0[0]}.{0[1]}={0[2]}".format),
        st.tuples(st.sampled_from(names), st.just("bytes"), several).map("{0[0]}.{0[1]}={0[2]}".format),
        st.tuples(st.sampled_from("01"), st.lists(st.sampled_from((*names, "x", "w")), max_size=6)).map(
            lambda both: f"inputs={both[0]} {' '.join(both[1])}"
        ),
    )
    return st.lists(line, max_size=3).map(lambda lines: "\n".join(lines).encode())


HEADERS = ("adapter_header", "base_header", "comfyui_header")
JSON_FILES = (
    *("mlx_config", "pipeline_index"),
    *("adapter_config", "adapter_model_config", "base_index", "base_config", "manifest", "contract"),
    *("exported_graph", "exported_weights", "tokenizer", "tokenizer_config", "generation_config", "image_processor"),
    *("extractor", "gguf_config", "comfyui_layers"),
)


def inputs(target: str) -> SearchStrategy[bytes]:
    """What to try on a target."""
    good = GOOD[target]
    structured = {
        "adapter_keys": keys(),
        "keys_of_a_file": keys_of_formats(),
        "litgpt_settings": yaml_settings(),
        "diffusion_file": diffusion_files(),
        "peft_kind": peft_kinds(),
        "megatron_adapter": megatron_adapters(),
        "model_with_tasks": models_with_tasks(),
        "external_data": records(),
        "quantised_fields": fields(),
        "examples_jsonl": json_lines(),
        "chat_template": templates(),
        "project_table": project_tables(),
    }
    structured |= {name: near_json(GOOD[name]) for name in (*HEADERS, *JSON_FILES)}
    ways = [structured[target]] * 3 if target in structured else []
    return st.one_of(*ways, mutated(good), st.binary(max_size=64))


def json_lines() -> SearchStrategy[bytes]:
    line = near_json(b'{"text": "a", "label": "x"}')
    good = st.sampled_from((b'{"text": "a", "label": "x"}', b'{"text": "b", "label": "y"}'))
    return st.lists(line | good, min_size=1, max_size=4).map(b"\n".join)


def templates() -> SearchStrategy[bytes]:
    """Chat templates of parts of such, in any sequence."""
    parts = (
        *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] | upper }}"),
        *("{% if loop.last %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ strftime_now('%d') }}"),
        *("{% set n = namespace(a=1) %}", "{% set n.a = n.a * 9 %}", "{{ n }}", "{{ messages | tojson }}"),
        *("{% break %}", "{% generation %}", "{{ eos_token }}", "{% endgeneration %}", "{{ 1 // 0 }}"),
        *("{{ ().__class__ }}", "{{ messages[9] }}", "{% include 'x' %}", "\n", "{#", "{{ lipsum(2) }}"),
        *("{{ cycler.__init__ }}", "{% macro f(x) %}{{ x }}{% endmacro %}", "{{ f(f) }}", "{{ 'é\x1b' }}"),
    )
    return st.lists(st.sampled_from(parts), max_size=8).map(lambda some: "".join(some).encode())


def project_tables() -> SearchStrategy[bytes]:
    """Tables of options, with odd names and values."""
    names = (
        *("lora-rank", "lora-alpha", "report", "model", "quiet", "json", "allow-pickle", "format", "x", '"a b"'),
        "inspect",
    )
    values = (
        *(
            *("5", "true", '"a"', "[]", '["a.html"]', "{}", "{a = 1}", "1e400", "nan", "2026-01-01", "[[1]]"),
            '"\\u001b[2J"',
        ),
        *("-1", "9" * 400, '"' + "n" * 300 + '"', "[" * 3000, '"a.py:f"', "0x7f", '"\\u0000.json"', '""'),
    )
    line = st.tuples(st.sampled_from(names), st.sampled_from(values)).map(" = ".join)
    head = st.sampled_from(
        ("[tool.lora-export]", "[tool.lora-export.inspect]", "[tool.lora-export.x]", "[tool]", "[[tool]]")
    )
    return st.lists(head | line, max_size=5).map(lambda lines: "\n".join(["[tool.lora-export]", *lines]).encode())
