"""A long prompt is encoded in pieces; the ids are those of the whole text, whatever it holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt import Tokenizer, load_tokenizer
from mlx_dgemma.prompt import tokenizer as module

PUBLISHED = Path(__file__).parents[3] / "shared" / "assets" / "checkpoint-4bit"
ALPHABETS = (
    "abcdefghij    \n",
    "  \t\n\n\r\u00a0\u2003",
    "0123456789,.:-+ ",
    "{}[]()<>|\"'\\/=;",
    "\u00e4\u00f6\u00fc\u00df\u00e9\u0301\u0308 ",
    "\u65e5\u672c\u8a9e\u4e2d\u6587\u3002\uac00\ub098",
    "\U0001f600\U0001f469\u200d\U0001f467\ufe0f\u2581",
    "\x00\x01\x7f\ufffd\ue000\U000e0001",
)
WORDS = ("<|turn>", "<turn|>user\n", "the quick brown fox ", "    return x\n", "aaaaaaaa", "\u2581")


def _tokenizers() -> list[Path]:
    return [CHECKPOINT, PUBLISHED]


@pytest.fixture(scope="module", params=_tokenizers(), ids=["demo", "published"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if not (request.param / "tokenizer.json").exists():
        pytest.skip("the published tokenizer is not here")
    return load_tokenizer(request.param, [1])


def _text(rng: random.Random) -> str:
    """Up to 300 characters of several kinds, mixed."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        letters = rng.choice(ALPHABETS)
        if rng.random() < 0.3:
            parts.append(rng.choice(WORDS) * rng.randint(1, 5))
        else:
            parts.append("".join(rng.choices(letters, k=rng.randint(1, 30))))
    return "".join(parts)


@pytest.mark.parametrize("piece", [1, 7, 40])
def test_pieces_encode_as_the_whole(
    tokenizer: Tokenizer, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(piece)
    texts = [_text(rng) for _ in range(150)]
    whole = [tokenizer.encode(text) for text in texts]
    cut = 0
    monkeypatch.setattr(module, "_PIECE", piece)
    for text, ids in zip(texts, whole, strict=True):
        cut += len(list(tokenizer._pieces(text))) > 1
        assert tokenizer.encode(text) == ids, text
    assert cut > 100


def test_one_endless_word_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 100)
    monkeypatch.setattr(module, "_LONGEST_PIECE", 1000)
    doubled = next(pair for pair in sorted(tokenizer._neighbours) if pair[0] == pair[1])
    with pytest.raises(InputError, match="read as one word"):
        tokenizer.encode(doubled * 2500)
