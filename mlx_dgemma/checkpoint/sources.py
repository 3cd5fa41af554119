"""How a parameter comes from the tensors of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_dgemma.headers import Entry


@dataclass(frozen=True)
class Source:
    """How one parameter comes from the files: a tensor, a stack of experts, or gate over up."""

    kind: Literal["tensor", "stack", "gate_up"]
    parts: tuple[Any, ...]  # a tensor's name, or Sources

    def shape(self, headers: Mapping[str, Entry]) -> tuple[int, ...] | None:
        """The resulting shape; None when the parts do not fit together."""
        if self.kind == "tensor":
            return headers[self.parts[0]].shape
        shapes = [part.shape(headers) for part in self.parts]
        first = shapes[0]
        if first is None or any(shape != first for shape in shapes):
            return None
        if self.kind == "stack":
            return (len(shapes), *first)
        return None if len(first) != 3 else (first[0], 2 * first[1], first[2])

    @property
    def names(self) -> list[str]:
        """The tensors that it is made of."""
        if self.kind == "tensor":
            return [self.parts[0]]
        return [name for part in self.parts for name in part.names]

    def dtype(self, headers: Mapping[str, Entry]) -> str:
        if self.kind == "tensor":
            return headers[self.parts[0]].dtype
        part: Source = self.parts[0]
        return part.dtype(headers)

    def read(self, tensors: Mapping[str, mx.array]) -> mx.array:
        """The parameter in its own shape and dtype, still unevaluated."""
        if self.kind == "tensor":
            return tensors[self.parts[0]]
        parts = [part.read(tensors) for part in self.parts]
        return mx.stack(parts) if self.kind == "stack" else mx.concatenate(parts, axis=1)
