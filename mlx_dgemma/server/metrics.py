"""Counters in Prometheus' text form."""

from __future__ import annotations

import threading
from collections import defaultdict

from mlx_dgemma.decoding.events import Finish

_HELP = {
    "requests_total": ("counter", "HTTP requests by route and status."),
    "request_seconds_total": ("counter", "Time spent on HTTP requests by route."),
    "replies_total": ("counter", "Generated replies by finish reason."),
    "prompt_tokens_total": ("counter", "Prompt tokens of generated replies."),
    "cached_tokens_total": ("counter", "Prompt tokens found in the prefix cache."),
    "generated_tokens_total": ("counter", "Committed tokens."),
    "blocks_total": ("counter", "Denoised canvases."),
    "unconverged_blocks_total": ("counter", "Canvases that used every step without converging."),
    "denoising_steps_total": ("counter", "Denoising steps."),
    "prefill_seconds_total": ("counter", "Time spent reading prompts."),
    "denoise_seconds_total": ("counter", "Time spent denoising."),
    "requests_admitted": ("gauge", "Requests running or waiting for a turn."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Thread-safe counters; `render` is what /metrics answers."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] += value

    def finished(self, finish: Finish, cached_tokens: int) -> None:
        self.add("replies_total", reason=finish.reason)
        self.add("prompt_tokens_total", finish.prompt_tokens)
        self.add("cached_tokens_total", cached_tokens)
        self.add("generated_tokens_total", finish.generated_tokens)
        self.add("blocks_total", finish.blocks)
        self.add("unconverged_blocks_total", finish.converged.count(False))
        self.add("denoising_steps_total", sum(finish.steps_per_block))
        self.add("prefill_seconds_total", finish.prefill_seconds)
        self.add("denoise_seconds_total", finish.denoise_seconds)

    def render(self, admitted: int) -> str:
        with self._lock:
            values = dict(self._values)
        values["requests_admitted", ()] = admitted
        lines = []
        for name, (kind, about) in _HELP.items():
            lines += [f"# HELP mlx_dgemma_{name} {about}", f"# TYPE mlx_dgemma_{name} {kind}"]
            for (known, labels), value in sorted(values.items()):
                if known == name:
                    inside = ",".join(f'{key}="{text}"' for key, text in labels)
                    lines.append(f"mlx_dgemma_{name}{{{inside}}} {value:.10g}" if inside
                                 else f"mlx_dgemma_{name} {value:.10g}")  # fmt: skip
        return "\n".join(lines) + "\n"
