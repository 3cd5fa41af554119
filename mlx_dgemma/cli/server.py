"""`mlx_dgemma.server`: an OpenAI- and Anthropic-compatible endpoint on this machine."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_dgemma.checkpoint.known_repositories import DEMO_NAME
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.cli.exit_codes import INTERRUPTED
from mlx_dgemma.cli.session import DEMO_NOTICE
from mlx_dgemma.errors import InputError
from mlx_dgemma.server.quiet import OncePerMinute
from mlx_dgemma.server.settings import ServerSettings

KEY_VARIABLE = "MLX_DGEMMA_API_KEY"
_DEFAULTS = ServerSettings()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.server",
        description="Serve DiffusionGemma to OpenAI and Anthropic clients on this machine.",
    )
    flags.add_model(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default=_DEFAULTS.host,
        help="address to listen on (default: 127.0.0.1; any other than loopback needs a key)",
    )
    network.add_argument("--port", type=int, default=_DEFAULTS.port, help="default: 8080")
    network.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"clients must send this key (or set {KEY_VARIABLE}, which no process list shows)",
    )
    network.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this machine that clients use beside localhost, such as "
        "host.docker.internal (repeatable)",
    )
    network.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="serve the model by this name too, such as claude-haiku-4-5 (repeatable; NAME=default "
        "says the same)",
    )
    network.add_argument(
        "--any-model", action="store_true", help="answer whatever model a request names"
    )
    network.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin that may use the server (repeatable; default: none)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="of a reply (default: 8192)")
    limits.add_argument("--max-prompt-tokens", type=int, metavar="N", help="default: the context")
    limits.add_argument("--max-body-mb", type=int, metavar="MB", help="of a request (default: 16)")
    limits.add_argument("--max-concurrent", type=int, metavar="N", help="take turns (default: 4)")
    limits.add_argument("--max-waiting", type=int, metavar="N", help="may queue (default: 64)")
    limits.add_argument("--max-seconds", type=float, metavar="S", help="per reply (default: 600)")
    limits.add_argument(
        "--prefix-cache-mb",
        type=int,
        metavar="MB",
        help="memory for contexts kept between requests (default: 2048; 0 keeps none)",
    )
    flags.add_preset(parser)
    flags.add_setting(limits, "kv_bits")
    limits.add_argument(
        "--prompt-cache-dir",
        type=Path,
        metavar="DIR",
        help="keep contexts there as well, for the next start (default: nothing on disk)",
    )
    limits.add_argument(
        "--prompt-cache-dir-mb", type=int, metavar="MB", help="of that directory (default: 8192)"
    )
    parser.add_argument(
        "--log-prompts", action="store_true", help="let the log hold prompts (default: it does not)"
    )
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    settings = _settings(arguments)
    try:
        from mlx_dgemma.server.app import create_app
        from mlx_dgemma.server.connections import Server, configure
    except ImportError as error:
        raise InputError(
            f"The server needs {error.name}: pip install 'mlx-dgemma[server]'."
        ) from error
    from mlx_dgemma.runtime import Runtime

    shown = logging.StreamHandler(sys.stderr)
    shown.addFilter(OncePerMinute())
    logging.basicConfig(handlers=[shown], level=logging.INFO, format="%(message)s")
    for name in ("uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.WARNING)
    messages = Console(stderr=True, highlight=False, markup=False)
    with ExitStack() as opened:
        # Before the weights: a port in use should not take a minute.
        sockets = _bind(settings)
        for bound in sockets:
            opened.enter_context(bound)
        if arguments.model is None:
            messages.print(DEMO_NOTICE, style="dim", soft_wrap=True)
        runtime = opened.enter_context(
            Runtime(
                arguments.model,
                revision=arguments.revision,
                adapter_path=arguments.adapter_path,
                dtype=arguments.dtype,
                chat_template=arguments.chat_template,
                kv_bits=arguments.kv_bits,
            )
        )
        app = create_app(runtime, settings)
        server = Server(configure(app), app.state.stop)
        with _one_sentence(settings):
            for bound in sockets:
                bound.listen()
        port = sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        messages.print(f"Serving {settings.model_name} at http://{host}:{port}/v1", soft_wrap=True)
        server.run(sockets)
    return INTERRUPTED if server.interrupted else 1


def _bind(settings: ServerSettings) -> list[socket.socket]:
    """A socket on every address of the host; none listens yet."""
    bound: list[socket.socket] = []
    missing: OSError | None = None
    with _one_sentence(settings):
        for family, *_, address in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                bound.append(_bound(family, address))
            except OSError as error:
                # "localhost" may name an IPv6 address on a machine that has none.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not bound:
            raise missing
    return bound


def _bound(family: int, address: Any) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


@contextmanager
def _one_sentence(settings: ServerSettings) -> Iterator[None]:
    """Says what to do when the address cannot be listened on."""
    host, port = settings.host, settings.port
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"Port {port} of {host} is in use: choose another with --port, or end what "
                "listens there."
            ) from error
        if error.errno == errno.EACCES:
            raise InputError(
                f"Port {port} is not for this user: choose another with --port."
            ) from error
        raise InputError(
            f"Cannot listen on {host} ({error.strerror}): give an address of this machine "
            "with --host."
        ) from error


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    given = {
        "max_output_tokens": arguments.max_tokens,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "max_body_bytes": arguments.max_body_mb and arguments.max_body_mb << 20,
        "max_concurrent": arguments.max_concurrent,
        "max_waiting": arguments.max_waiting,
        "max_seconds": arguments.max_seconds,
        "preset": arguments.preset,
        "kv_bits": arguments.kv_bits,
        "prefix_cache_bytes": None
        if arguments.prefix_cache_mb is None
        else arguments.prefix_cache_mb << 20,
        "prompt_cache_dir": arguments.prompt_cache_dir,
        "prompt_cache_dir_bytes": arguments.prompt_cache_dir_mb
        and arguments.prompt_cache_dir_mb << 20,
    }
    return ServerSettings(
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
        model_name=arguments.model or DEMO_NAME,
        allowed_hosts=tuple(arguments.allowed_host),
        aliases=tuple(map(_alias, arguments.alias)),
        any_model=arguments.any_model,
        cors_origins=tuple(arguments.cors_origin),
        log_prompts=arguments.log_prompts,
        **{name: value for name, value in given.items() if value is not None},
    )


def _alias(given: str) -> str:
    """NAME, or NAME=TARGET where the target is the model that is served."""
    name, _, target = given.partition("=")
    if not name or target not in ("", "default"):
        raise InputError(f"--alias {given} is not possible: give NAME, or NAME=default.")
    return name
