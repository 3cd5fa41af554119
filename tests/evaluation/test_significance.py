"""The paired tests against SciPy's, and against what can be counted by hand."""

import numpy as np
import pytest

from mlx_dgemma.errors import InputError
from mlx_dgemma.evaluation import significance
from mlx_dgemma.evaluation.pairing import ALL, compared
from mlx_dgemma.evaluation.significance import DRAWS, compare, mcnemar, sign_flips

stats = pytest.importorskip("scipy.stats", reason="SciPy, the reference: pip install scipy")


@pytest.mark.parametrize(
    ("better", "worse"), [(0, 0), (5, 0), (9, 2), (7, 7), (40, 61), (900, 800)]
)
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_few_differences_are_flipped_in_every_way() -> None:
    differences = np.array([0.5, 0.25, -0.125, 0.0, 0.75])
    draws = np.random.default_rng(0)
    expected = stats.permutation_test(
        (differences, np.zeros(5)), lambda x, y: np.sum(x - y), permutation_type="samples"
    ).pvalue
    assert sign_flips(differences, draws) == pytest.approx(expected, abs=1e-9)


def test_many_differences_are_flipped_at_random_near_the_normal_limit() -> None:
    draws = np.random.default_rng(3)
    differences = draws.normal(0.05, 1.0, 400)
    limit = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    error = 4 * np.sqrt(limit * (1 - limit) / DRAWS)
    assert sign_flips(differences, draws) == pytest.approx(limit, abs=error + 0.01)


def test_a_comparison_of_right_and_wrong() -> None:
    a = [1.0] * 50 + [0.0] * 50
    b = [1.0] * 48 + [0.0] * 2 + [1.0] * 12 + [0.0] * 38
    found = compare(a, b)
    assert (found.n, found.better, found.worse, found.test) == (100, 12, 2, "McNemar, exact")
    assert found.p == pytest.approx(stats.binomtest(2, 14).pvalue)
    assert found.b - found.a == pytest.approx(0.1)
    spread = 1.96 * np.std(np.array(b) - np.array(a)) / 10
    assert (found.low, found.high) == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.02)
    assert compare(a, a).p == 1.0
    assert compare([0.25, 1], [0.5, 1]).test == "sign flips"


def test_large_results_are_compared_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "DRAWS", 120)
    draws = np.random.default_rng(1)
    a, b = draws.random(20_000), draws.random(20_000)
    assert 0 < compare(a, b).p <= 1


def report_of(values: dict[str, list[float]]) -> dict[str, object]:
    return {
        "samples": [
            {"task": task, "question": at, "digest": f"d{at}", "filter": "none",
             "values": {"acc": value}}
            for task, row in values.items()
            for at, value in enumerate(row)
        ]
    }  # fmt: skip


def test_reports_are_paired_by_question_and_pooled_over_tasks() -> None:
    a = report_of({"one": [1, 0, 0], "two": [1, 1]})
    b = report_of({"one": [1, 1, 1, 1], "two": [1, 0]})
    found = compared(a, b)
    assert set(found) == {"one acc,none", "two acc,none", f"{ALL} acc,none"}
    assert (found["one acc,none"]["n"], found["one acc,none"]["better"]) == (3, 2)
    assert (found[f"{ALL} acc,none"]["n"], found[f"{ALL} acc,none"]["worse"]) == (5, 1)
    assert set(compared(report_of({"one": [1]}), report_of({"one": [0]}))) == {"one acc,none"}
    with pytest.raises(InputError, match="no question in common"):
        compared(a, report_of({"three": [1]}))
