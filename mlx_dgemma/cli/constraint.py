"""`--regex`, `--choice` and `--json-schema`: what a reply or a hole must be."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_dgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_dgemma.constraints import Constraint

_MOST_BYTES = 1 << 20  # of a schema


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
    """The constraint that the flags ask for, with a warning of what of a schema it cannot hold;
    InputError for one that cannot be followed."""
    from mlx_dgemma.constraints import Constraint

    if arguments.regex is not None:
        constraint = Constraint.regex(arguments.regex)
    elif arguments.choice:
        constraint = Constraint.choice(arguments.choice)
    elif arguments.json_schema is not None:
        constraint = Constraint.json_schema(_read_schema(arguments.json_schema))
    else:
        return None
    if left := constraint.check():
        words = ", ".join(left)
        print(f"warning: No reply is held to {words} of the schema: check that.", file=sys.stderr)
    if getattr(arguments, "enable_thinking", False):
        print("warning: A constrained reply begins at once, without thinking.", file=sys.stderr)
    return constraint


def _read_schema(path: str) -> Any:
    from mlx_dgemma.files import read_argument
    from mlx_dgemma.untrusted_json import UntrustedJSONError, parse

    try:
        return parse(read_argument(path, "schema", _MOST_BYTES))
    except UntrustedJSONError as error:
        raise InputError(f"The schema {path} {error}: fix the file.") from error
