"""What the operator decides: addresses, keys and limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from mlx_dgemma.decoding.settings import PresetName, preset_settings
from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.download import public_address
from mlx_dgemma.prompt.pictures import Access

# Images come in the request itself or from the public internet.
SERVER_ACCESS = Access(files=False, resolve=public_address, max_bytes=24 << 20)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """Limits have defaults that suit one person's machine.

    host: loopback unless the operator says otherwise, and then an api_key is a must.
    allowed_hosts: names other than loopback's that a loopback server answers to, such as
        host.docker.internal.
    model_name: what /v1/models calls the model. aliases: other names it is served by. any_model:
        whether it answers to every name. cors_origins: pages of other origins that may
        use the server; none by default. max_body_bytes: of a request. max_request_memory:
        bytes of the bodies and images of all requests together.
    max_prompt_tokens: None is the context less one canvas. max_output_tokens: larger requests
        are cut to it, with a warning. max_choices: the largest `n`.
    max_concurrent: requests that take turns on the model. max_waiting: requests that may wait
        beside them; more get 429. max_seconds: of a request; it then ends with what it has.
    prefix_cache_bytes: contexts kept in memory for later requests; 0 keeps none.
    prompt_cache_dir: a directory for contexts that memory has no room for, and for those of the
        last run; None keeps nothing on disk. prompt_cache_dir_bytes: of its files together.
    preset: the decoding preset of requests that name none.
    kv_bits: 8 keeps contexts in 8 bits where they grow; None keeps them exactly.
    log_prompts: whether the log may hold prompts and replies.
    image_access: where images of requests may come from.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    model_name: str = "diffusiongemma"
    allowed_hosts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    any_model: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_request_memory: int = 128 << 20
    max_prompt_tokens: int | None = None
    max_output_tokens: int = 8192
    max_choices: int = 8
    max_concurrent: int = 4
    max_waiting: int = 64
    max_seconds: float = 600.0
    prefix_cache_bytes: int = 2 << 30
    prompt_cache_dir: Path | None = None
    prompt_cache_dir_bytes: int = 8 << 30
    preset: PresetName = "reference"
    kv_bits: int | None = None
    log_prompts: bool = False
    image_access: Access = SERVER_ACCESS

    def __post_init__(self) -> None:
        if not self.loopback and not self.api_key:
            raise InputError(
                f"host {self.host} can be reached from other machines: set an API key as well."
            )
        if not 0 <= self.port <= 65535:
            raise InputError(f"port={self.port} is not possible: use 1 to 65535.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise InputError(
                f"max_prompt_tokens={self.max_prompt_tokens} is not possible: use at least 1, or "
                "leave it out."
            )
        counts = ("max_output_tokens", "max_choices", "max_concurrent")
        for name in ("max_body_bytes", "max_request_memory", *counts):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not possible: use at least 1.")
        for name in ("max_waiting", "prefix_cache_bytes", "prompt_cache_dir_bytes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} is not possible: use 0 or more.")
        preset_settings(self.preset)
        if self.kv_bits not in (None, 8):
            raise InputError(
                f"kv_bits={self.kv_bits!r} is not possible: use 8, or None for exact contexts."
            )
        if self.prompt_cache_dir is not None and not self.prefix_cache_bytes:
            raise InputError(
                "prompt_cache_dir needs prefix_cache_bytes: contexts go through memory."
            )
        if not self.max_seconds > 0:
            raise InputError(f"max_seconds={self.max_seconds} is not possible: use more than 0.")

    def serves(self, name: str) -> bool:
        """Whether a request for a model of this name is for the one that is loaded."""
        served = self.model_name
        known = ("", "default", served, served.rsplit("/", 1)[-1], *self.aliases)
        return self.any_model or name in known

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
