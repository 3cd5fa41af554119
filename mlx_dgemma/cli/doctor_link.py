"""`mlx_dgemma.doctor --distributed`: the connection between machines, and whether it pays."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.errors import InputError


def examine(model: str) -> dict[str, Any]:
    """The link, and a denoising step of a model on one machine and on all, JSON-ready.

    model: a folder or Hub id; "" is the published 4-bit checkpoint. InputError where this process
    is the only one, or the model does not divide by their number.
    """
    import mlx.core as mx

    from mlx_dgemma.benchmark import chips
    from mlx_dgemma.benchmark.shared_step import alone_seconds, step_seconds
    from mlx_dgemma.benchmark.synthetic import synthetic_config
    from mlx_dgemma.checkpoint.sizes import weight_bytes
    from mlx_dgemma.distributed import joining
    from mlx_dgemma.distributed.link import measured
    from mlx_dgemma.distributed.team import Leader
    from mlx_dgemma.machine.hardware import machine
    from mlx_dgemma.model.config import ModelConfig
    from mlx_dgemma.model.share import Share

    team = joining.current()
    if not isinstance(team, Leader):
        raise InputError(
            "--distributed measures the connection between several processes: start them with "
            "mlx.launch, as docs/several-macs.md shows."
        )
    if model:
        from mlx_dgemma.checkpoint.hub import resolve_model

        config = ModelConfig.from_folder(resolve_model(model, weights=False))
    else:
        config = ModelConfig.from_dict(synthetic_config("26b-4bit"))
    shares = [Share(rank, team.size) for rank in range(team.size)]
    shares[0].check(config)
    link = measured(team, config.canvas_length, config.text.hidden_size)
    known = chips.known(machine().chip)
    chip = known or chips.measured("this machine", mx.float32)
    alone = alone_seconds(config, chip)
    together = step_seconds(config, chip, team.size, link)
    return {
        "link": link.record(),
        "chip": chip.name,
        "chip_figures": chip.source,
        "model": model or "the published 4-bit checkpoint",
        "alone_seconds": alone,
        "together_seconds": together,
        "pays": together < alone,
        "weight_bytes": weight_bytes(config),
        "rank_weight_bytes": [weight_bytes(config, share=share) for share in shares],
    }


def show(found: dict[str, Any], console: Console) -> None:
    link, ranks = found["link"], found["link"]["ranks"]
    console.print()
    console.print(Text(f"link between {ranks} processes, measured", "bold"))
    console.print(
        f"  smallest sum {1e3 * link['latency']:.2f} ms; {link['sum_bytes'] / 1e6:.2f} MB summed "
        f"in {1e3 * link['sum_seconds']:.2f} ms ({link['bandwidth'] / 1e9:.2f} GB/s beyond that); "
        f"statistics gathered in {1e3 * link['gather_seconds']:.2f} ms",
        soft_wrap=True,
    )
    held = ", ".join(f"{size / 1e9:.1f} GB" for size in found["rank_weight_bytes"])
    console.print(
        f"  {found['model']}: {found['weight_bytes'] / 1e9:.1f} GB, held as {held}",
        soft_wrap=True,
    )
    speedup = found["alone_seconds"] / found["together_seconds"]
    console.print(
        f"  a denoising step takes at least {_time(found['alone_seconds'])} on one machine "
        f"and {_time(found['together_seconds'])} on {ranks} "
        f"(predicted from {found['chip']}, {found['chip_figures']}): {speedup:.1f} times as fast",
        soft_wrap=True,
    )
    verdict = (
        "the other machines pay in speed"
        if found["pays"]
        else "over this link one machine is faster: use several only for a model that fits none"
    )
    console.print(Text(f"  {verdict}", "green" if found["pays"] else "yellow"), soft_wrap=True)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"
