"""What each recipe takes at the published shapes: bytes, memory with an 8k context, smallest Mac.

    python studies/recipes.py

Reckoned from names and shapes alone, in seconds: the source is a sparse stand-in, nothing is
converted. Memory is predicted, not measured on a Mac.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from real_shapes import published_config, write_sparse
from rich.console import Console
from rich.table import Table

from mlx_dgemma.checkpoint.plan import plan
from mlx_dgemma.convert import RECIPES, convert
from mlx_dgemma.convert.inspection import CONTEXT_TOKENS, MAC_MEMORY, fit
from mlx_dgemma.machine.memory import gigabytes
from mlx_dgemma.model.config import ModelConfig


def rows() -> dict[str, tuple[str, str, str]]:
    """Recipe -> size, with the context, smallest Mac; a star where its GPU limit must be raised."""
    published = published_config()
    config = ModelConfig.from_dict(published)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_sparse(source, published)
        for name in RECIPES:
            size = convert(source, Path(folder) / "out", recipe=name, dry_run=True).total_size
            needed = plan(config, context_tokens=CONTEXT_TOKENS, weights=size).total
            mac = next(each for memory in MAC_MEMORY if (each := fit(memory, needed)).fits != "no")
            star = " *" if mac.fits == "raise" else ""
            found[name] = gigabytes(size), gigabytes(needed), f"{mac.memory_gb} GB{star}"
    return found


def main() -> None:
    table = Table("recipe", "size", "with an 8k context", "smallest Mac")
    for name, figures in rows().items():
        table.add_row(name, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
