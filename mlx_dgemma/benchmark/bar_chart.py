"""A benchmark as a picture: one bar per component, and a mark where the chip's floor lies."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 760, 190, 150, 18, 10, 64
_INK, _FILL, _FLOOR, _PAPER = "#1f2430", "#5b7fc7", "#d9480f", "#ffffff"


def svg(title: str, components: Mapping[str, Mapping[str, Any]], note: str = "") -> str:
    """The components' milliseconds as horizontal bars.

    components: name -> {"ms", "spread_ms", "floor_ms" or None}; the marked floor is what the
    roofline allows at best. note: one line under the title.
    """
    longest = max((values["ms"] + values["spread_ms"] for values in components.values()), default=1)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(longest, 1e-9)
    height = _TOP + len(components) * (_BAR + _GAP) + _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>',
        _text(20, 26, title, size=16, weight="bold"),
        _text(20, 46, note, size=12),
    ]
    for row, (name, values) in enumerate(components.items()):
        y = _TOP + row * (_BAR + _GAP)
        middle = y + _BAR * 0.72
        width = values["ms"] * scale
        spread = values["spread_ms"] * scale
        low, high = _LEFT + max(0.0, width - spread), _LEFT + width + spread
        lines += [
            _text(_LEFT - 8, middle, name, anchor="end"),
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_FILL}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" '
            f'y1="{y + _BAR / 2}" y2="{y + _BAR / 2}" stroke="{_INK}"/>',
            _text(high + 6, middle, f"{values['ms']:.3g} ms"),
        ]
        if values.get("floor_ms") is not None:
            x = _LEFT + values["floor_ms"] * scale
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + _BAR + 2}" '
                f'stroke="{_FLOOR}" stroke-width="2"/>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{_INK}">{escape(text)}</text>'
    )
