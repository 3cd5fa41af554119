"""What a reply cost: one line for people, one object for machines."""

from __future__ import annotations

from typing import Any

from mlx_dgemma.decoding.events import Finish

GB = 1e9


def tokens_per_second(finish: Finish, held_seconds: float = 0.0) -> float:
    """Generated tokens per second of denoising; 0.0 when nothing was generated.

    held_seconds: time that a display slept inside the measured span.
    """
    seconds = finish.denoise_seconds - held_seconds
    return finish.generated_tokens / seconds if seconds > 0 else 0.0


def steps_per_block(finish: Finish) -> float:
    return sum(finish.steps_per_block) / finish.blocks if finish.blocks else 0.0


def parts(finish: Finish, held_seconds: float = 0.0) -> list[str]:
    """The figures, the most asked for first."""
    figures = [
        f"{finish.generated_tokens} tokens",
        f"{tokens_per_second(finish, held_seconds):.1f} tokens/s",
        f"{finish.tokens_per_forward:.1f} tokens per forward",
        f"{steps_per_block(finish):.1f} steps per block",
        f"peak memory {size(finish.peak_memory_bytes)}",
        f"seed {finish.seed}",
    ]
    if finish.reason != "stop":
        figures.insert(0, {"length": "cut at --max-tokens"}.get(finish.reason, finish.reason))
    unconverged = finish.converged.count(False)
    if unconverged:
        noun = "block" if unconverged == 1 else "blocks"
        figures.append(f"{unconverged} {noun} did not converge")
    return figures


def record(finish: Finish, **more: Any) -> dict[str, Any]:
    """A flat JSON-ready object: `more` first, then every field of the Finish and the rates."""
    return {
        **more,
        "finish_reason": finish.reason,
        "seed": finish.seed,
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "blocks": finish.blocks,
        "steps_per_block": list(finish.steps_per_block),
        "converged": list(finish.converged),
        "tokens_per_forward": finish.tokens_per_forward,
        "tokens_per_second": tokens_per_second(finish),
        "prefill_seconds": finish.prefill_seconds,
        "denoise_seconds": finish.denoise_seconds,
        "peak_memory_bytes": finish.peak_memory_bytes,
    }


def size(count: float) -> str:
    """Bytes for people, in decimal units as Macs and the Hub count: 1.24 GB, 310 MB."""
    if count >= GB:
        return f"{count / GB:.2f} GB" if count < 10 * GB else f"{count / GB:.1f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.0f} kB"
