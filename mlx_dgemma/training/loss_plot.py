"""The losses of a run as one SVG picture."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_dgemma.training.run_events import Evaluated, Event, Report

WIDTH, HEIGHT, MARGIN = 720, 360, 48


def curves(events: Sequence[Event]) -> str:
    """Training and validation loss over the steps."""
    series = {
        "training": ([(e.step, e.loss) for e in events if isinstance(e, Report)], "#2563eb"),
        "validation": ([(e.step, e.loss) for e in events if isinstance(e, Evaluated)], "#dc2626"),
    }
    points = [point for found, _ in series.values() for point in found]
    last = max((step for step, _ in points), default=1)
    top = max((loss for _, loss in points), default=1.0) or 1.0

    def place(step: int, loss: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * loss / top
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" '
        'stroke="#888"/>',
        f'<text x="{MARGIN - 6}" y="{MARGIN + 4}" text-anchor="end">{top:.2f}</text>',
        f'<text x="{MARGIN - 6}" y="{HEIGHT - MARGIN + 4}" text-anchor="end">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 18}" text-anchor="end">step {last}'
        "</text>",
    ]
    for row, (name, (found, colour)) in enumerate(series.items()):
        path = " ".join(place(*point) for point in found)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        lines.append(
            f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 16 * row}" text-anchor="end" '
            f'fill="{colour}">{name} loss</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"
