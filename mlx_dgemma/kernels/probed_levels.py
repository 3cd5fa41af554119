"""Raw logits for probes of the survivors: exact in every dtype, with known probabilities."""

import math

PROBED_TEMPERATURE = 0.8


def tempered_level(raw: float) -> float:
    """A raw logit after softcap 30 and PROBED_TEMPERATURE."""
    return 30.0 * math.tanh(raw / 30.0) / PROBED_TEMPERATURE


def levels(capacity: int) -> tuple[float, float, float]:
    """Raw logits of three tokens that share 0.98 and of one under the threshold, and its mass.

    Raw logits are sixteenths, which every dtype has; tempered they are nearly quarters or eighths,
    which bfloat16 has.
    """
    exact = [
        raw
        for raw in (sixteenths / 16 for sixteenths in range(16, 256))
        if abs(tempered_level(raw) * 8 - round(tempered_level(raw) * 8)) < 1 / 32
    ]
    likely = exact[-1]

    def mass(raw: float) -> float:
        return 0.98 / 3.0 * math.exp(tempered_level(raw) - tempered_level(likely))

    unlikely = max(raw for raw in exact if mass(raw) < 0.5 / capacity)
    return likely, unlikely, mass(unlikely)
