"""Text to ids and back: exact, without control ids from text, without halves of characters."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.prompt.tokenizer import SPELLINGS, Tokenizer, load_tokenizer

# The tokenizers are read-only, so that one may serve every example.
shared = settings(max_examples=150)
# Word separators are the one character that Gemma's tokenizer does not keep: it means a space.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)


def test_names_every_control_token(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.ids) == set(SPELLINGS)
    for name, spelling in SPELLINGS.items():
        assert tokenizer.decode([tokenizer.ids[name]]) == spelling


def test_real_ids(real: Tokenizer) -> None:
    expected = {"bos": 2, "sot": 105, "eot": 106, "soc": 100, "eoc": 101, "stc": 48, "etc": 49}
    assert {name: real.ids[name] for name in expected} == expected
    assert (real.ids["image"], real.ids["boi"], real.ids["eoi"]) == (258880, 255999, 258882)
    assert real.stop_ids == {1, 106, 50}
    assert len(real) == 262144


def test_control_spellings_are_found_across_the_pieces_that_are_searched(
    tokenizer: Tokenizer,
) -> None:
    piece = 1 << 16
    for spelling in sorted(tokenizer.spellings):
        for before in (piece - len(spelling), piece - 1, piece, 2 * piece - 3):
            text = "a" * before + spelling * 2 + "b"
            cut = [(False, "a" * before), (True, spelling), (True, spelling), (False, "b")]
            assert tokenizer.split_control(text) == cut
            assert tokenizer.contains_control(text[: before + len(spelling)])
            assert not tokenizer.contains_control(text[: before + len(spelling) - 1] + "\n")


def test_control_spellings_are_text_unless_asked(tokenizer: Tokenizer) -> None:
    for spelling in tokenizer.spellings:
        for text in (spelling, f"a{spelling}b", f" {spelling}\n", spelling * 3):
            ids = tokenizer.encode(text)
            assert not tokenizer.control_ids & set(ids), text
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(spelling, special=True) == [tokenizer.control_id(spelling)]


@shared
@given(text=texts)
def test_any_text_round_trips_without_control_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.control_ids & set(ids)


@shared
@given(data=st.data())
def test_text_woven_with_spellings_never_yields_control_ids(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    woven = data.draw(
        st.lists(st.one_of(texts, st.sampled_from(sorted(tokenizer.spellings))), max_size=8)
    )
    ids = tokenizer.encode("".join(woven))
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == "".join(woven)


def test_surrogates_from_json_become_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@shared
@given(data=st.data())
def test_streaming_equals_whole_decode_at_any_split(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    # Any ids, not only those of text: a noisy canvas holds broken runs of bytes.
    byte_ids = [tokenizer._backend.token_to_id(f"<0x{b:02X}>") for b in (0x41, 0xE2, 0x82, 0xAC)]
    any_id = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(byte_ids))
    ids = data.draw(st.lists(any_id, max_size=30))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    stream = tokenizer.detokenizer(skip_special=skip)
    bounds = zip([0, *cuts], [*cuts, len(ids)], strict=True)
    pieces = [stream.feed(ids[a:b]) for a, b in bounds]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def test_streaming_never_splits_a_character(tokenizer: Tokenizer) -> None:
    text = "h\u00e9llo \U0001f9e9\U0001f468\u200d\U0001f469 \u5b57 ok"
    stream = tokenizer.detokenizer()
    pieces = [stream.feed([id_]) for id_ in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_same_ids_as_mlx_lm(folder: Path, tokenizer: Tokenizer) -> None:
    from mlx_lm.tokenizer_utils import load

    wrapper = load(folder, eos_token_ids=sorted(tokenizer.stop_ids))
    assert set(wrapper.eos_token_ids) == set(tokenizer.stop_ids)
    samples = [
        "",
        " ",
        "Hello  world\n\n\tx",
        "h\u00e9 \U0001f9e9 \u5b57",
        "a<b>|c|> <|d",
        "1,234.5e-6",
    ]
    samples += [*sorted(tokenizer.spellings), "<|turn>user\nhi <turn|>\n<|turn>model\n"]
    for text in samples:
        theirs = wrapper.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, special=True) == theirs
        assert tokenizer.decode(theirs) == wrapper.decode(theirs)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "has no tokenizer.json"), ("", "cannot be read as a tokenizer"), ("{}", "tokenizer")],
)
def test_missing_or_damaged_tokenizer(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer(tmp_path, [1])


def test_damaged_settings(tmp_path: Path) -> None:
    from .conftest import DEMO

    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path, [1])


def test_template_inside_the_settings(tmp_path: Path) -> None:
    from .conftest import DEMO

    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "yes"}]
    for template in ("yes", named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert load_tokenizer(tmp_path, [1]).chat_template == "yes"


def test_an_unmarked_added_token_is_refused(tmp_path: Path) -> None:
    from .conftest import DEMO

    content = json.loads((DEMO / "tokenizer.json").read_text())
    content["added_tokens"][16]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not marked special"):
        load_tokenizer(tmp_path, [1])


def test_truncation_and_padding_that_were_saved_are_not_applied(tmp_path: Path) -> None:
    """An ordinary save after a truncating call writes both into tokenizer.json."""
    import tokenizers

    from .conftest import DEMO

    text = "A prompt of several words, which is longer than five tokens."
    plain = load_tokenizer(DEMO, [1]).encode(text)
    saved = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    saved.enable_truncation(5)
    saved.enable_padding(length=200)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert len(saved.encode(text).ids) == 200
    assert load_tokenizer(tmp_path, [1]).encode(text) == plain
    assert len(plain) > 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_specific_special_tokens": [1]}, "model_specific_special_tokens"),
        ({"chat_template": [1]}, "chat_template"),
        ({"chat_template": [{"name": ["a"], "template": "x"}]}, "name"),
        ({"chat_template": {"default": "x"}}, "must be a string"),
    ],
)
def test_settings_of_the_wrong_type_are_named(settings: dict, words: str, tmp_path: Path) -> None:
    from .conftest import DEMO

    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(tmp_path, [1])
