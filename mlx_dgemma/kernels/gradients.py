"""What training runs in place of twins: their values to rounding, gradients in closed form.

MLX's own gradient of such a chain goes over memory many times, and its CPU backend takes tanh and
roots one element at a time and reads 1 / cosh(x)^2 of a large x as a number below the smallest
normal one, with which matrix products run several times as slowly.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

_wanted: ContextVar[bool] = ContextVar("gradients are wanted", default=False)


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Within it this thread's operations are those of this module where it has them, else twins,
    as kernels have no gradient. Nothing goes through mx.compile: inside a gradient MLX bakes the
    first shapes that it sees into a function that was compiled for any."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Whether `gradients` is in force."""
    return _wanted.get()


def by_hand() -> bool:
    """Whether norms and rotations are those of this module: a GPU keeps MLX's fused ones."""
    return wanted() and on_cpu()


def on_cpu() -> bool:
    """Whether work runs on MLX's CPU backend."""
    return mx.default_device() == mx.Device(mx.cpu)


def with_gradient(
    forward: Callable[..., Any], backward: Callable[..., Sequence[mx.array]]
) -> Callable[..., Any]:
    """forward(*arrays) with the gradient backward(arrays, cotangents, outputs), of every array.

    All three are tuples where there is more than one."""

    def call(*arrays: mx.array) -> Any:
        function = mx.custom_function(forward)
        function.vjp(backward)
        return function(*arrays)

    return call


_END = 7.75  # where the quotient is 1 exactly: times a cube, what is missing there would show
_ODD = (1.1531881682458334e-05, 0.0029604772571474314, 0.12934423983097076, 1.0000001192092896)
_EVEN = (
    2.492560327027604e-07, 0.00024001258134376258, 0.023854097351431847, 0.462676465511322, 1.0,
)  # fmt: skip


def tanh(x: mx.array) -> mx.array:
    """tanh of float32 values, to 6e-7; NaN stays NaN."""
    if not on_cpu():
        return mx.tanh(x)
    x = mx.minimum(mx.maximum(x, -_END), _END)
    square = x * x
    odd, even = square * _ODD[0] + _ODD[1], square * _EVEN[0] + _EVEN[1]
    for coefficient in _ODD[2:]:
        odd = odd * square + coefficient
    for coefficient in _EVEN[2:]:
        even = even * square + coefficient
    return x * odd / even


_ROOT, _CUBE = 0.7978845608028654, 0.044715  # of gelu's tanh approximation


def _geglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    g = gate.astype(mx.float32)
    share = tanh(g * (g * g * (_ROOT * _CUBE) + _ROOT)) * 0.5 + 0.5
    return (g * share * up.astype(mx.float32)).astype(gate.dtype), share


def _geglu_gradient(inputs: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    g, u = gate.astype(mx.float32), up.astype(mx.float32)
    given, share = cotangents[0].astype(mx.float32), outputs[1]
    slope = (1 - share) * g * (g * g * (6 * _ROOT * _CUBE) + 2 * _ROOT) + 1
    given = given * share
    return (given * u * slope).astype(gate.dtype), (given * g).astype(up.dtype)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, see `moe.geglu`."""
    found: mx.array = with_gradient(_geglu, _geglu_gradient)(gate, up)[0]
    return found


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """mx.fast.rms_norm, of [..., W] by weight [W] or None."""
    if not by_hand():
        return mx.fast.rms_norm(x, weight, eps)
    normed: mx.array = _unit(eps)(x)[0]
    return normed if weight is None else normed * weight


@functools.cache
def _unit(eps: float) -> Callable[..., Any]:
    def forward(x: mx.array) -> tuple[mx.array, mx.array]:
        wide = x.astype(mx.float32)
        inverse = mx.rsqrt(_row_means(wide * wide) + eps)
        return (wide * inverse).astype(x.dtype), inverse

    def backward(x: mx.array, cotangents: Any, outputs: Any) -> list[mx.array]:
        normed, given = outputs[0].astype(mx.float32), cotangents[0].astype(mx.float32)
        found = (given - normed * _row_means(given * normed)) * outputs[1]
        return [found.astype(x.dtype)]

    return with_gradient(forward, backward)


def row_sums(x: mx.array, factor: float = 1.0) -> mx.array:
    """[..., 1] of float32 [..., W]: as a product, which the CPU adds many times as fast."""
    width = x.shape[-1]
    return (x.reshape(-1, width) @ _column(width, factor)).reshape(*x.shape[:-1], 1)


@functools.cache
def _column(length: int, value: float) -> mx.array:
    column = mx.full((length, 1), value)
    mx.eval(column)
    return column


def _row_means(x: mx.array) -> mx.array:
    return row_sums(x, 1 / x.shape[-1])


def _rotated(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    halves = x.reshape(*x.shape[:-1], 2, -1)
    found = halves * cosine + halves[..., ::-1, :] * sine
    return found.reshape(x.shape)


def _rotated_gradient(inputs: Any, given: mx.array, _: Any) -> list[mx.array]:
    x, cosine, sine = inputs
    halves = given.reshape(*x.shape[:-1], 2, -1)
    found = halves * cosine + (halves * sine)[..., ::-1, :]
    return [found.reshape(x.shape), mx.zeros_like(cosine), mx.zeros_like(sine)]


def rotate(x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
    """Turns the pairs (i, i + D/2) of x [B, L, heads, D] by cosine and sine, [L, D/2] each."""
    cosine, sine = (table[:, None, None] for table in rope)
    turn = with_gradient(_rotated, _rotated_gradient)
    found: mx.array = turn(x, cosine, mx.concatenate([-sine, sine], axis=2))
    return found


_SMALLEST, _POWERS = -127.0, (
    0.0013276314130052924, 0.009675516746938229, 0.05550713464617729, 0.24022120237350464,
    0.6931469440460205, 1.0000001192092896,
)  # fmt: skip


def exp(x: mx.array) -> mx.array:
    """exp of float32 values below 88: to 3e-7 of itself near 0, 1e-5 far from it, and 0 where it is
    below the normal numbers."""
    if not on_cpu():
        return mx.exp(x)
    x = mx.maximum(x * 1.4426950408889634, _SMALLEST)
    whole = mx.round(x)
    part = x - whole
    power = part * _POWERS[0] + _POWERS[1]
    for coefficient in _POWERS[2:]:
        power = power * part + coefficient
    return power * (whole * 2.0**23 + 127 * 2.0**23).astype(mx.int32).view(mx.float32)


def _attended(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    scores = (queries @ keys.swapaxes(-1, -2)).astype(mx.float32)
    # The heads that share a key head lie below one another.
    by_head = scores.reshape(*scores.shape[:2], -1, *mask.shape[-2:])
    scores = (by_head + mask[:, :, None]).reshape(scores.shape)
    found = exp(scores - scores.max(axis=-1, keepdims=True))
    found = found * (1 / row_sums(found))
    return (found.astype(values.dtype) @ values), found


def _attended_gradient(inputs: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
    queries, keys, values, mask = inputs
    (mixed, likely), given = outputs, cotangents[0]
    wide = mixed.astype(mx.float32) * given.astype(mx.float32)
    slope = (given @ values.swapaxes(-1, -2)).astype(mx.float32) - row_sums(wide)
    slope = (slope * likely).astype(queries.dtype)
    return [
        slope @ keys,
        slope.swapaxes(-1, -2) @ queries,
        likely.astype(given.dtype).swapaxes(-1, -2) @ given,
        mx.zeros_like(mask),
    ]


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """softmax(q k^T + mask) v, [B, heads, L, D], of queries [B, heads, L, D], keys and values
    [B, kv_heads, K, D] and a mask [B, 1, L or 1, K]."""
    if not by_hand():
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    batch, heads, length, width = queries.shape
    folded = queries.reshape(batch, keys.shape[1], -1, width)
    attended = with_gradient(_attended, _attended_gradient)
    arrays = (folded, mx.contiguous(keys), mx.contiguous(values), mask)
    found: mx.array = attended(*arrays)[0]
    return found.reshape(batch, heads, length, -1)
