"""What two tokenizers do differently, whatever their files look like: ids of texts, and what shapes a batch.

A tokenizer that is saved again has other files and does the same. transformers opens both, offline and without code of
the folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_export.errors import EnvironmentLacking, InputRefused

# Where tokenizers part: case, accents, white space, scripts, digits, symbols, what is no character of any text.
CORPUS = (
    *("", " ", "  two  spaces ", "\ttab\n\nlines\r\n", "MiXeD CASE Word", "naïve café Ünïcode ﬁ ①", "e\u0301 é"),
    *("don't we'll it's", "1234567890 3.14 1,000", "a_b-c/d\\e", "foo(bar)[0] = {x: 'y'}; // z", "!?…—“”«»"),
    *("日本語の文章です。", "中文文本", "한국어 텍스트", "Русский текст", "العربية", "עברית", "हिन्दी", "ไทย"),
    *("👩‍👩‍👧 🏳️‍🌈 😀", "\u200b\u00a0\u2028\ufeff", "\x00\x07", "▁Ġ##", "<s> </s> [CLS] <|endoftext|> <unk>", "a" * 200),
)
SHAPING = ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "model_input_names")
SAMPLED = 500  # tokens of the vocabulary that are texts themselves
SHOWN_IDS = 8


def tokenizer_differences(base: Path, merged: Path) -> list[str] | None:
    """Sentences on what the tokenizer of a merged folder does otherwise than the base's.

    None where one cannot be opened or run, and where transformers is not installed.
    """
    from lora_export.models.processors import open_tokenizer, refusing_failures

    try:
        with refusing_failures("the tokenizers cannot be compared"):
            before, after = open_tokenizer(base, needed=True), open_tokenizer(merged, needed=True)
            return [*_of_vocabularies(before, after), *_of_ids(before, after), *_of_settings(before, after)]
    except (InputRefused, EnvironmentLacking):  # its files show what differs
        return None


def _of_vocabularies(before: Any, after: Any) -> Iterator[str]:
    one, other = before.get_vocab(), after.get_vocab()
    different = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    if different:
        token = different[0]
        more = f", and {len(different) - 1} more tokens differ" if len(different) > 1 else ""
        yield f"the token {token!r} has the id {other.get(token)}, in the base {one.get(token)}{more}"


def _of_ids(before: Any, after: Any) -> Iterator[str]:
    vocabulary = sorted(before.get_vocab())
    added = [str(token) for each in (before, after) for token in each.added_tokens_decoder.values()]
    around = [text for token in dict.fromkeys(added) for text in (token, f"a{token}b", f"a {token} b", token.upper())]
    texts = [*CORPUS, *around, *vocabulary[:: max(1, len(vocabulary) // SAMPLED)]]
    for special in (True, False):
        wrong = [
            (text, one, other)
            for text in texts
            if (one := before.encode(text, add_special_tokens=special))
            != (other := after.encode(text, add_special_tokens=special))
        ]
        if wrong:
            text, one, other = wrong[0]
            yield (
                f"the text {text!r} has the ids {other[:SHOWN_IDS]}, in the base {one[:SHOWN_IDS]} "
                f"({len(wrong)} of {len(texts)} texts differ)"
            )
            return


def _of_settings(before: Any, after: Any) -> Iterator[str]:
    names = [*SHAPING, *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))]
    for name in names:
        one, other = getattr(before, name, None), getattr(after, name, None)
        if one != other:
            yield f"{name} is {other!r}, the base has {one!r}"
