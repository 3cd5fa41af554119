"""The temperature schedule."""


def temperature(step: int, steps: int, t_min: float, t_max: float) -> float:
    """T(step) of the linear schedule, with `step` counting down from `steps` to 1.

    The first step of a block is the hottest but for none: T(steps) = t_max, and the last,
    T(1), stays just above t_min. Changing `steps` changes every temperature.
    """
    return t_min + (t_max - t_min) * step / steps
