"""`--regex`, `--choice` and `--json-schema`: what a reply or a hole must be."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_dgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_dgemma.constraints import Constraint


def add_constraint(parser: argparse.ArgumentParser, what: str = "the reply") -> None:
    """what: is held to the constraint."""
    group = parser.add_argument_group(f"what {what} must be").add_mutually_exclusive_group()
    group.add_argument(
        "--regex", metavar="PATTERN", help="text that the pattern matches as a whole"
    )
    group.add_argument(
        "--choice", action="append", metavar="TEXT", help="one of these texts; give it repeatedly"
    )
    group.add_argument(
        "--json-schema", metavar="FILE", help="JSON that satisfies the schema in the file"
    )


def read_constraint(arguments: argparse.Namespace) -> Constraint | None:
    """The constraint that the flags ask for; InputError for a file that holds no schema."""
    from mlx_dgemma.constraints import Constraint
    from mlx_dgemma.files import read_bytes
    from mlx_dgemma.untrusted_json import parse

    if arguments.regex is not None:
        return Constraint.regex(arguments.regex)
    if arguments.choice:
        return Constraint.choice(arguments.choice)
    if arguments.json_schema is None:
        return None
    path = arguments.json_schema
    try:
        schema = parse(read_bytes(path, 1 << 20))
    except OSError as error:
        raise InputError(f"Cannot read the schema {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"The schema {path} is not JSON: fix the file.") from error
    return Constraint.json_schema(schema)
