"""Predicted denoising steps on one, two and four Macs, by chip and link. Nothing here is measured.

    python -m studies.several_macs

Floors: the largest part's arithmetic and bytes at the chip's ceilings, then the step's collectives
one after another over an assumed link (`benchmark/shared_step.py`). Their number and bytes are
those that two processes of the demo model really exchange (tests/distributed/test_same_ids.py).
"""

from __future__ import annotations

from mlx_dgemma.benchmark.chips import CHIPS
from mlx_dgemma.benchmark.shared_step import (
    ASSUMED,
    alone_seconds,
    ring,
    step_seconds,
    step_traffic,
)
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.model.config import ModelConfig

SIZES = (2, 4)


def main() -> None:
    config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    for size in SIZES:
        traffic = step_traffic(config, size, config.canvas_length, 2)
        print(
            f"n = {size}: {traffic.collectives} collectives, {traffic.nbytes / 1e6:.0f} MB a step"
        )
    print("| chip | link | n = 1 | " + " | ".join(f"n = {size}" for size in SIZES) + " |")
    print("| --- | --- | --- | " + " | ".join("---" for _ in SIZES) + " |")
    for name in ("Apple M4 Max", "Apple M3 Ultra"):
        chip = CHIPS[name]
        alone = alone_seconds(config, chip)
        for link, latency, bandwidth in ASSUMED:
            cells = []
            for size in SIZES:
                seconds = step_seconds(config, chip, size, ring(link, latency, bandwidth, size))
                cells.append(f"{1e3 * seconds:.0f} ms ({alone / seconds:.1f}x)")
            print(f"| {name} | {link} | {1e3 * alone:.0f} ms | {' | '.join(cells)} |")
    print("Pipelines by layers, which there are none of yet, one canvas under way:")
    for name in ("Apple M4 Max", "Apple M3 Ultra"):
        alone = alone_seconds(config, CHIPS[name])
        for link, latency, bandwidth in ASSUMED:
            # From each machine to the next, and from the last to the first.
            hop = latency + config.canvas_length * config.text.hidden_size * 2 / bandwidth
            cells = [f"n = {size}: {1e3 * (alone + size * hop):.0f} ms" for size in SIZES]
            print(f"{name}, {link}: {', '.join(cells)}")


if __name__ == "__main__":
    main()
