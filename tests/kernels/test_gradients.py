"""What training runs in place of twins, against the twins and MLX's own gradients of them."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import kernels
from mlx_dgemma.kernels import expert_blocks
from mlx_dgemma.kernels.elementwise import fused
from mlx_dgemma.kernels.gradients import attend, exp, gradients, tanh
from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.moe import geglu

EPS = 1e-6


def normal(*shape, scale=1.0, key=0):
    return mx.random.normal(shape, key=mx.random.key(sum(shape) + 100 * key)) * scale


def rotated(x, weight):
    angles = mx.arange(7 * 4).reshape(7, 4) / 5.0
    return kernels.normed_heads(x, weight, (mx.cos(angles), mx.sin(angles)), EPS)


def attended(x, mixed, *norms):
    found = kernels.after_attention(x, mixed, kernels.Norms(*norms), EPS)
    return mx.concatenate(list(found), axis=0)


def branches(residual, dense, experts, scalar, *norms):
    eps = kernels.Epsilons(EPS, 2 * EPS)
    return kernels.after_branches(
        residual, dense, experts, kernels.BranchNorms(*norms), scalar, eps
    )


def experts_of(count):
    def run(x, scores, gate_up, down):
        routing = kernels.choose_experts(scores, mx.linspace(0.5, 1.5, count), 2)
        return kernels.moe(x, routing, Matrix(gate_up), Matrix(down))

    return run


def attention(queries, keys, values):
    hidden = mx.where(mx.arange(9) % 4 == 0, -mx.inf, 0.0)
    return attend(queries, keys, values, mx.broadcast_to(hidden, (2, 1, 7, 9)))


ROWS = [normal(5, 12, key=key) for key in range(3)]
WEIGHTS = [normal(12, key=key) for key in range(4, 8)]
OPERATIONS = {
    "geglu": (geglu, [normal(6, 9, scale=3), normal(6, 9, key=1)]),
    "heads": (rotated, [normal(2, 7, 3, 8), normal(8)]),
    "values": (lambda x: kernels.normed_heads(x, None, None, EPS), [normal(2, 7, 3, 8)]),
    "attention": (attention, [normal(2, 6, 7, 8), normal(2, 3, 9, 8), normal(2, 3, 9, 8, key=1)]),
    "attended": (attended, [*ROWS[:2], *WEIGHTS]),
    "branches": (branches, [*ROWS, normal(1), *WEIGHTS[:3]]),
    "experts": (
        experts_of(4),
        [normal(40, 12), normal(40, 4), normal(4, 16, 12), normal(4, 12, 8)],
    ),
    "an expert that nobody chose": (
        experts_of(3),
        [normal(90, 12), normal(90, 3) - mx.array([0, 99, 0]), normal(3, 16, 12), normal(3, 12, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_twin(name):
    function, arrays = OPERATIONS[name]

    def of(*arrays):
        found = function(*arrays)
        return (found * mx.sin(mx.arange(found.size).reshape(found.shape))).sum()

    every = list(range(len(arrays)))
    value, expected = mx.value_and_grad(of, argnums=every)(*arrays)
    with gradients():
        found_value, found = mx.value_and_grad(of, argnums=every)(*arrays)
    assert found_value.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert mx.abs(one - other).max().item() <= 2e-5 * max(mx.abs(other).max().item(), 1e-3)


@pytest.mark.parametrize(("pairs", "experts"), [(80, 4), (180, 3), (1024, 8), (4096, 128), (6, 2)])
def test_blocks_hold_every_pair_once_and_few_rows_besides(pairs, experts):
    scores = normal(pairs // 2, experts)
    routing = kernels.choose_experts(scores, mx.ones(experts), 2)
    laid = expert_blocks.blocks(routing)
    places, weights = np.array(laid.places), np.array(laid.weights)[:, 0]
    assert len(set(places.tolist())) == pairs
    assert (np.array(laid.tokens)[places] == np.arange(pairs) // 2).all()
    of_rows = np.repeat(np.array(laid.experts), laid.size)
    assert (of_rows[places] == np.array(routing.experts).reshape(-1)).all()
    assert np.allclose(weights[places], np.array(routing.weights).reshape(-1))
    assert (np.delete(weights, places) == 0).all()
    assert len(weights) <= (1 + 1 / 8) * pairs + 1


def test_tanh_is_one_where_it_rounds_to_one_and_keeps_what_is_no_number():
    x = mx.concatenate([mx.linspace(-12, 12, 100_001), mx.array([-1e30, 1e30, 0.0])])
    found, expected = np.array(tanh(x)), np.tanh(np.array(x, np.float64))
    assert np.abs(found - expected).max() < 6e-7
    assert np.abs(found).max() <= 1
    assert math.isnan(tanh(mx.array(math.nan)).item())


def test_exp_is_exact_to_a_few_roundings_and_zero_of_what_is_hidden():
    x = mx.concatenate([mx.linspace(-87, 87, 100_001), mx.array([0.0, -mx.inf, -1e30, -200.0])])
    found, expected = np.array(exp(x)), np.exp(np.array(x, np.float64))
    assert (np.abs(found - expected)[:-3] <= 1e-5 * expected[:-3]).all()
    near = np.abs(np.array(x)) < 1
    assert (np.abs(found - expected) <= 3e-7 * expected)[near].all()
    assert found[-3:].tolist() == [0, 0, 0]
    assert math.isnan(exp(mx.array(math.nan)).item())


def test_a_gate_far_below_zero_has_no_gradient_below_the_smallest_normal_number():
    with gradients():
        found = mx.grad(lambda gate: geglu(gate, mx.ones_like(gate)).sum())(mx.array([-9.0, -30]))
    assert found.tolist() == [0, 0]


def test_a_function_that_is_first_met_in_a_gradient_serves_other_shapes():
    """MLX 0.32 would give (6, 4) here: compiled in a gradient, a function keeps its first shape."""

    @fused
    def long_chain(x):
        y = x
        for _ in range(20):
            y = y * x + 1.0
        return y

    def of(weight):
        shapes = [long_chain(mx.ones(shape)).shape for shape in ((3, 4), (6, 2))]
        assert shapes == [(3, 4), (6, 2)]
        return weight

    with gradients():
        mx.grad(of)(mx.array(1.0))
    assert long_chain(mx.ones((5, 1))).shape == (5, 1)
