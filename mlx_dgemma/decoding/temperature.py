"""The temperature schedule."""


def temperature(step: int, steps: int, t_min: float, t_max: float) -> float:
    """T(step) of the linear schedule, with `step` counting down from `steps` to 1.

    A block's first step is its hottest, T(steps) = t_max; its last, T(1), stays just above
    t_min. Changing `steps` changes every temperature.
    """
    return t_min + (t_max - t_min) * step / steps
