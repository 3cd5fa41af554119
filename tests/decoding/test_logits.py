"""The ways to hold a canvas' logits agree with each other and with float64."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.decoding.logits import ExponentialLogits, SlicedLogits, WholeLogits, make_logits
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.row_statistics import ROW_BLOCK, SLICE

VOCABULARY, HIDDEN, SOFTCAP, NOW = SLICE + 300, 64, 30.0, 0.6
BANNED = np.array([3, SLICE - 1, SLICE + 7], dtype=np.int32)


def model(table: mx.array, bits: int = 0):
    matrix = Matrix(table)
    if bits:
        matrix = Matrix(*mx.quantize(table, group_size=64, bits=bits), 64, bits)
    text = SimpleNamespace(final_logit_softcapping=SOFTCAP, vocab_size=VOCABULARY)
    return SimpleNamespace(
        team=None,
        config=SimpleNamespace(text=text),
        embedding_matrix=matrix,
        embed_scale=HIDDEN**0.5,
        raw_logits=lambda hidden: matrix.apply(hidden, transpose=True),
    )


@pytest.fixture(scope="module")
def table() -> mx.array:
    return mx.random.normal((VOCABULARY, HIDDEN), key=mx.random.key(0)) * 0.4


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("temp", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("length", [5, ROW_BLOCK // 2 + 3])
def test_every_way_gives_the_same_statistics_and_signal(table, bits, temp, length):
    network = model(table, bits)
    hidden = mx.random.normal((2 * length, HIDDEN), key=mx.random.key(length)) * 2
    uniforms = mx.random.uniform(shape=(2 * length, 2), key=mx.random.key(9))
    kinds = (WholeLogits, SlicedLogits, ExponentialLogits)
    ways = [kind(network, hidden, BANNED) for kind in kinds]
    stats = [way.statistics(NOW, uniforms, temp) for way in ways]
    signals = [np.array(way.signal(found, NOW)) for way, found in zip(ways, stats, strict=True)]

    rows = np.array(network.embedding_matrix.take(mx.arange(VOCABULARY)), dtype=np.float64)
    raw = np.array(hidden, dtype=np.float64).reshape(-1, HIDDEN) @ rows.T
    raw[:, BANNED] = -1e4
    tempered = SOFTCAP * np.tanh(raw / SOFTCAP) / NOW
    p = np.exp(tempered - tempered.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = p @ rows * HIDDEN**0.5
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)

    for found, signal in zip(stats, signals, strict=True):
        np.testing.assert_allclose(np.array(found.entropy), entropy, atol=2e-4)
        np.testing.assert_array_equal(np.array(found.argmax), raw.argmax(axis=1))
        np.testing.assert_array_equal(np.array(found.sample), np.array(stats[0].sample))
        np.testing.assert_allclose(signal, expected, atol=2e-5 * np.abs(expected).max())
    some = np.array([0, 3, 2 * length - 1])
    for way, found, signal in zip(ways, stats, signals, strict=True):
        part = np.array(way.signal(found, mx.full((2 * length,), NOW), some))
        np.testing.assert_allclose(part, signal[some], atol=2e-6 * np.abs(expected).max())
        ids = np.arange(2 * length) + 10  # none of them banned
        expected_at = raw[np.arange(2 * length), ids]
        np.testing.assert_allclose(np.array(way.at(mx.array(ids))), expected_at, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "metal", "options", "kind"),
    [
        (mx.float32, False, {}, ExponentialLogits),
        (mx.float32, False, {"sliced_head": True}, SlicedLogits),
        (mx.float32, False, {"conditioning": "sparse"}, WholeLogits),  # it looks for survivors
        (mx.float32, True, {}, WholeLogits),  # one kernel reads them once
        (mx.bfloat16, False, {"conditioning": "dense"}, WholeLogits),  # it casts before it sums
        (mx.bfloat16, True, {"sliced_head": True}, SlicedLogits),
    ],
)
def test_the_way_that_suits(monkeypatch, table, dtype, metal, options, kind):
    monkeypatch.setattr(dispatch, "available", lambda: metal)
    hidden = mx.zeros((2, HIDDEN), dtype)
    made = make_logits(model(table.astype(dtype)), hidden, BANNED, DecodingSettings(**options))
    assert type(made) is kind
