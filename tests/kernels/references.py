"""What each operation means, in NumPy float64: the judge of twins and of Metal kernels."""

import mlx.core as mx
import numpy as np

SLICE = 16384


def numpy(array: mx.array) -> np.ndarray:
    """Values of an MLX array; floats as float64."""
    if array.dtype in (mx.bfloat16, mx.float16, mx.float32):
        return np.array(array.astype(mx.float32)).astype(np.float64)
    return np.array(array)


def tempered(raw: np.ndarray, temperature: np.ndarray | float, softcap: float) -> np.ndarray:
    return softcap * np.tanh(raw / softcap) / np.asarray(temperature).reshape(-1, 1)


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def sample(p: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two-level inverse CDF, and per row its uniforms' distance from a boundary."""
    ids, margins = [], []
    for row, (first, second) in zip(p, uniforms, strict=True):
        shares = np.array([row[i : i + SLICE].sum() for i in range(0, row.size, SLICE)])
        edges = np.cumsum(shares) / shares.sum()
        k = min(int((edges <= first).sum()), edges.size - 1)
        inside = np.cumsum(row[k * SLICE : (k + 1) * SLICE]) / shares[k]
        j = min(int((inside <= second).sum()), int((inside < inside[-1]).sum()))
        ids.append(k * SLICE + j)
        gap_slices = np.abs(edges[:-1] - first).min() if edges.size > 1 else 1.0
        margins.append(min(gap_slices, np.abs(inside - second).min()))
    return np.array(ids), np.array(margins)


def accept(entropies: np.ndarray, bound: float, pinned: np.ndarray) -> np.ndarray:
    """Accepted mask by the definition, one row at a time, sums in float32."""
    mask = np.zeros(entropies.shape, dtype=bool)
    for b in range(entropies.shape[0]):
        free = [i for i in range(entropies.shape[1]) if not pinned[b, i]]
        running = np.float32(0)
        for i in sorted(free, key=lambda i: (entropies[b, i], i)):
            running = np.float32(running + np.float32(entropies[b, i]))
            mask[b, i] = np.float32(running - np.float32(entropies[b, i])) <= np.float32(bound)
    return mask


def route(
    scores: np.ndarray, per_expert_scale: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    experts = np.array(
        [sorted(range(row.size), key=lambda e: (-row[e], e))[:top_k] for row in scores]
    )
    weights = softmax(np.take_along_axis(scores, experts, axis=1)) * per_expert_scale[experts]
    flat = experts.reshape(-1)
    order = np.argsort(flat, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=scores.shape[1]))])
    return experts, weights, order, offsets


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gate_up(x: np.ndarray, experts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """GeGLU per (token, choice) pair in pair order: [N, F]."""
    half = weight.shape[1] // 2
    rows = []
    for token in range(x.shape[0]):
        for e in experts[token]:
            rows.append(gelu(weight[e, :half] @ x[token]) * (weight[e, half:] @ x[token]))
    return np.array(rows)


def moe(
    x: np.ndarray, experts: np.ndarray, weights: np.ndarray, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    top_k = experts.shape[1]
    hidden = gate_up(x, experts, up).reshape(x.shape[0], top_k, -1)
    out = np.zeros((x.shape[0], down.shape[1]))
    for token in range(x.shape[0]):
        for choice, e in enumerate(experts[token]):
            out[token] += weights[token, choice] * (down[e] @ hidden[token, choice])
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return normed if weight is None else normed * weight


def rope(x: np.ndarray, positions: np.ndarray, inverse_frequencies: np.ndarray) -> np.ndarray:
    """x [..., L, D] in halves."""
    angles = positions[:, None] * inverse_frequencies[None, :]
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    )


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """[B, heads, L, D] over [B, kv heads, S, D], scale 1; mask [L, S], True where visible."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = queries @ keys.swapaxes(-1, -2)
    return softmax(scores if mask is None else np.where(mask, scores, -np.inf)) @ values
