"""Tables as this command prints them."""

from rich.table import Table


def figures(first: str, *numbers: str) -> Table:
    """A column of names, then columns of numbers."""
    made = Table(first, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in numbers:
        made.add_column(title, justify="right")
    return made
