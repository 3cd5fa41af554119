"""Do two results on the same questions differ by more than chance: paired tests, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
SEED = 2026
EXACT_PAIRS = 14  # differing pairs up to which every flip of signs is counted


@dataclass(frozen=True)
class Difference:
    """b beside a, question by question.

    a, b: means. low, high: 95 % bootstrap interval of b - a, over questions. p: two-sided, of the
    null hypothesis that a and b are exchangeable in every question. better, worse: questions in
    which b is above and below a. test: "McNemar, exact" or "sign flips".
    """

    n: int
    a: float
    b: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    test: str


def compare(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compares the values of the same questions in the same order.

    McNemar's exact test where each is 0 or 1; otherwise a test that flips the signs of the
    differences, all ways where few differ and 10,000 drawn ways where many do.
    """
    first, second = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"two vectors of one length: {first.shape} and {second.shape}")
    differences = second - first
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    plain = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    draws = np.random.default_rng(SEED)
    means = [
        differences[draws.integers(0, differences.size, (rows, differences.size))].mean(axis=1)
        for rows in _portions(differences.size)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(
        n=differences.size,
        a=float(first.mean()),
        b=float(second.mean()),
        low=float(low),
        high=float(high),
        better=better,
        worse=worse,
        p=mcnemar(better, worse) if plain else sign_flips(differences, draws),
        test="McNemar, exact" if plain else "sign flips",
    )


def mcnemar(better: int, worse: int) -> float:
    """Two-sided: the chance that fair coins split the differing pairs as unevenly or more so."""
    pairs = better + worse
    tail = sum(math.comb(pairs, k) for k in range(min(better, worse) + 1))
    return float(min(1.0, tail * 2 / 2**pairs)) if pairs else 1.0


def sign_flips(differences: np.ndarray, draws: np.random.Generator) -> float:
    """Two-sided: the chance that random signs give a sum as far from 0 or further."""
    differing = differences[differences != 0]
    if not differing.size:
        return 1.0
    if differing.size <= EXACT_PAIRS:
        numbers = np.arange(2**differing.size)[:, None] >> np.arange(differing.size) & 1
        sums = (1 - 2 * numbers) @ differing
        return float((np.abs(sums) >= abs(differing.sum()) - 1e-12).mean())
    beyond = 0
    for rows in _portions(differing.size):
        signs = 1.0 - 2.0 * draws.integers(0, 2, (rows, differing.size))
        beyond += int((np.abs(signs @ differing) >= abs(differing.sum()) - 1e-12).sum())
    return (beyond + 1) / (DRAWS + 1)  # the signs that came about are one way


def _portions(size: int) -> list[int]:
    """All draws in portions of some ten megabytes."""
    rows = max(1, 1_000_000 // size)
    return [min(rows, DRAWS - start) for start in range(0, DRAWS, rows)]
