"""The demo's tokenizer: any text comes back, and the letters of letter tasks are one token each."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlx_dgemma/demo/checkpoint"
REAL = ROOT.parent / "shared/assets/checkpoint-4bit"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂", "a  b\n\n\tc", "naïve e\u0301", "👩‍👩‍👧"])
def test_examples_come_back(text):
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_capital_letters_and_digits_stay_alone():
    text = string.ascii_uppercase + string.digits
    assert len(ids(text)) == len(text)


def test_vocabulary():
    vocabulary = TOKENIZER.get_vocab()
    assert len(vocabulary) <= 1024
    assert [vocabulary[token] for token in ("<pad>", "<eos>", "<bos>")] == [0, 1, 2]
    assert all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    assert all(chr(code) in vocabulary for code in range(33, 127))


def test_settings_name_tokens_of_the_vocabulary():
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    for name, token in settings.items():
        if name.endswith("_token"):
            assert TOKENIZER.token_to_id(token) is not None, name
    stops = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [
        TOKENIZER.token_to_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")
    ]


@pytest.mark.skipif(not REAL.exists(), reason=f"the real checkpoint's tokenizer is not at {REAL}")
def test_special_tokens_are_spelled_as_in_the_real_tokenizer():
    real = json.loads((REAL / "tokenizer_config.json").read_text())
    ours = json.loads((FOLDER / "tokenizer_config.json").read_text())
    same = {name for name in real if name.endswith("_token")} | {
        "model_specific_special_tokens",
        "padding_side",
    }
    assert {name: ours.get(name) for name in same} == {name: real[name] for name in same}
    kinds = json.loads((FOLDER / "tokenizer.json").read_text())
    model = kinds["model"]
    assert model["type"] == "BPE"
    assert model["byte_fallback"] is True
    assert kinds["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert [step["type"] for step in kinds["decoder"]["decoders"]] == [
        "Replace",
        "ByteFallback",
        "Fuse",
    ]
