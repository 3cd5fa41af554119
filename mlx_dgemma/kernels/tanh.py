"""tanh, which MLX's CPU backend computes one element at a time.

There a rational function of the kind that Eigen and XNNPACK use takes a sixth of the time: an odd
polynomial of degree 13 over an even one of degree 6, for |x| up to where tanh rounds to 1.
"""

import mlx.core as mx

_END = 7.90531110763549805
_ODD = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def tanh(x: mx.array) -> mx.array:
    """tanh of float32 values, to 4e-7; NaN stays NaN."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.tanh(x)
    inside = mx.minimum(mx.maximum(x, -_END), _END)
    bounded = mx.stop_gradient(inside)
    square = bounded * bounded
    odd, even = mx.array(_ODD[0], mx.float32), mx.array(_EVEN[0], mx.float32)
    for coefficient in _ODD[1:]:
        odd = odd * square + coefficient
    for coefficient in _EVEN[1:]:
        even = even * square + coefficient
    value = bounded * odd / even
    return value + (inside - bounded) * (1 - value * value)  # a gradient, of a term that is zero
