"""What flags are when they are not given: MLX_DGEMMA_MODEL and the configuration file.

The file is TOML. Keys at its top are flags of every command that has them, those of a table are
one command's; dashes or underscores, as you like:

    model = "4bit"
    preset = "balanced"
    [server]
    port = 9000
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.files import expanded, read_text

MODEL_VARIABLE = "MLX_DGEMMA_MODEL"
FILE_VARIABLE = "MLX_DGEMMA_CONFIG"
# These name another model themselves, or leave none open.
_OTHER_MODELS = ("--synthetic", "--demo", "--replay")


def config_file() -> Path:
    """MLX_DGEMMA_CONFIG, else mlx_dgemma/config.toml in XDG_CONFIG_HOME (~/.config)."""
    if given := os.environ.get(FILE_VARIABLE):
        return expanded(given)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "mlx_dgemma" / "config.toml"


def apply_defaults(parser: argparse.ArgumentParser, verb: str, argv: Sequence[str]) -> None:
    """Gives a command's flags the defaults of the file and of the environment.

    verb: the command's name, such as "server". argv: its arguments, for what they rule out.

    Raises InputError for a file that is no TOML, a flag that there is not, and a value that the
    flag itself would refuse.
    """
    path = config_file()
    values = _read(path)
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    shared = {name: value for name, value in values.items() if name not in tables}
    _check_names(path, tables, shared)
    if model := os.environ.get(MODEL_VARIABLE):
        shared["model"] = model
    own = tables.get(verb, {})
    ruled_out = any(word.split("=")[0] in _OTHER_MODELS for word in argv)
    for name, value in {**shared, **own}.items():
        action = parser._option_string_actions.get("--" + name.replace("_", "-"))
        # `--model` of another meaning, as convert's, is not meant at the top of the file.
        if action is None or (name in shared and action.dest != name.replace("-", "_")):
            if name in own:
                raise InputError(f"{path}: mlx_dgemma.{verb} has no flag --{name}.")
            continue
        if action.dest == "model" and ruled_out:
            continue
        source = MODEL_VARIABLE if name not in values and name not in own else str(path)
        action.default = _parsed(parser, action, value, source)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        if FILE_VARIABLE in os.environ:
            raise InputError(f"{path}, which {FILE_VARIABLE} names, does not exist.") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _check_names(path: Path, tables: dict[str, Any], shared: dict[str, Any]) -> None:
    from mlx_dgemma.cli import arguments as flags
    from mlx_dgemma.cli.verbs import VERBS

    for name in tables:
        if name not in VERBS:
            raise InputError(f"{path}: there is no command {name}; they are {', '.join(VERBS)}.")
    parser = argparse.ArgumentParser()
    flags.add_model(parser)
    flags.add_decoding(parser)
    for name in shared:
        if "--" + name.replace("_", "-") not in parser._option_string_actions:
            raise InputError(
                f"{path}: {name} is no flag that commands share; one command's belongs into a "
                f"table, such as [generate]."
            )


def _parsed(
    parser: argparse.ArgumentParser, action: argparse.Action, value: Any, source: str
) -> Any:
    """What the flag would make of the value."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f"{source}: {action.dest} is true or false, not {value!r}.")
        return value
    words = [str(word) for word in (value if isinstance(value, list) else [value])]
    single = action.nargs is None and not isinstance(action, argparse._AppendAction)
    if single and isinstance(value, list):
        raise InputError(f"{source}: {action.dest} takes one value, not {value!r}.")
    try:
        parsed = [parser._get_value(action, word) for word in words]
        for each in parsed:
            parser._check_value(action, each)
    except argparse.ArgumentError as error:
        raise InputError(f"{source}: {error}.") from error
    return parsed[0] if single or action.nargs == "?" else parsed
