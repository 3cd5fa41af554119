"""What a model needs, reckoned from its config before a byte of it is read.

weights        every tensor of the layout and precision at hand
context        keys and values of the committed tokens: full layers grow, sliding layers do not
working set    the most that one denoising step or one prefill chunk holds at once

Weights are exact. The context is exact for a prompt read at once; one that grows turn by turn may
hold up to 2,048 positions more in its full layers. The working set is an upper estimate from the
arrays the loop keeps alive at once; work sent ahead to a GPU may hold more, up to the limit that
`set_limits` sets. The peak really reached is reported with every generation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.errors import CheckpointError, ResourceError
from mlx_dgemma.headers import read_header
from mlx_dgemma.machine.hardware import Machine, machine
from mlx_dgemma.model.config import ModelConfig, TextConfig
from mlx_dgemma.model.names import Layout
from mlx_dgemma.model.parameters import parameter_shapes

GB = 1e9
ITEM_SIZE = {"float32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
# Left to macOS and other programs; below this a Mac pages and everything crawls.
SYSTEM_RESERVE = 3_000_000_000
LEAST_CONTEXT = 1024  # tokens that a model must have room for to be worth loading
PLANNED_CONTEXT = 8192  # tokens that a plan counts with, unless more are asked for
CONTEXT_STEP = 256  # contexts grow in multiples of this
PREFILL_CHUNK = 2048  # tokens per encoder pass
QUERY_BLOCK = 256  # prompt tokens that attend at a time
KEY_CHUNK = 2048  # keys that they attend to at a time
SCORES_HELD = 3  # arrays of scores [heads, queries, keys] that are held at once
PACKED_GROUPS = (64, 32)  # numbers of an 8-bit context that share a scale and a bias
PACKED_SCALES = 4  # bytes of those two
VOCABULARY_SLICE = 16384  # columns of the sliced head
# What MLX may keep of freed buffers; it would otherwise grow to the whole machine.
CACHE_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose for one model at one context length.

    sliced_head: the logits of a canvas are never held whole, which costs time and saves memory.
    kv_bits: 8 where the context is kept in 8 bits. packed_total: the total if it were; None where
        it cannot be. token_bytes: what each further token adds to the context.
    """

    weights: int
    context: int
    working: int
    context_tokens: int
    sliced_head: bool = False
    kv_bits: int | None = None
    packed_total: int | None = None
    token_bytes: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.context + self.working

    def record(self) -> dict[str, int | bool | None]:
        return {
            "weights_bytes": self.weights,
            "context_bytes": self.context,
            "working_bytes": self.working,
            "total_bytes": self.total,
            "context_tokens": self.context_tokens,
            "sliced_head": self.sliced_head,
            "kv_bits": self.kv_bits,
        }

    def __str__(self) -> str:
        head = ", the head in slices" if self.sliced_head else ""
        bits = f" in {self.kv_bits} bits" if self.kv_bits else ""
        return (
            f"{gigabytes(self.total)} ({gigabytes(self.weights)} weights, "
            f"{gigabytes(self.context)} context of {self.context_tokens:,} tokens{bits}, "
            f"{gigabytes(self.working)} working memory{head})"
        )


def plan(
    config: ModelConfig,
    *,
    context_tokens: int,
    weights: int | None = None,
    canvases: int = 1,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> Plan:
    """The plan for a context of `context_tokens`, prompt and replies together.

    weights: bytes when they are known from the files; otherwise reckoned from the config.
    canvases: how many are denoised together. kv_bits: 8 for a context in 8 bits.
    """

    def made(kv_bits: int | None) -> Plan:
        return Plan(
            weights=weight_bytes(config) if weights is None else weights,
            context=context_bytes(config, context_tokens, kv_bits),
            working=working_bytes(
                config, context_tokens, canvases, sliced_head=sliced_head, kv_bits=kv_bits
            ),
            context_tokens=context_tokens,
            sliced_head=sliced_head,
            kv_bits=kv_bits,
            token_bytes=_token_bytes(config.text, kv_bits),
        )

    return replace(made(kv_bits), packed_total=made(8).total if _packable(config.text) else None)


def plan_for(
    machine: Machine,
    config: ModelConfig,
    *,
    context_tokens: int,
    weights: int | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """The plan that suits a machine: with the head in slices only where that makes it fit.

    What the GPU keeps resident by default is tried first, then all that can be used; a plan that
    fits neither is for `check_fits` to refuse.
    """
    whole, sliced = (
        plan(
            config,
            context_tokens=context_tokens,
            weights=weights,
            sliced_head=in_slices,
            kv_bits=kv_bits,
        )
        for in_slices in (False, True)
    )
    room = usable(machine)
    if room is None:
        return whole
    resident = min(room, machine.limit or room) if machine.metal else room
    for bound in (resident, room):
        for candidate in (whole, sliced):
            if candidate.total <= bound:
                return candidate
    return whole


def plan_checkpoint(
    folder: Path,
    *,
    name: str,
    context_tokens: int = 0,
    kv_bits: int | None = None,
    dtype: str | None = None,
    stored: bool = True,
) -> tuple[Plan, str | None]:
    """What a checkpoint will need on this machine, and advice where that is tight.

    context_tokens: what a request may take, where that is more than PLANNED_CONTEXT.
    dtype: what is computed in, where that is not the checkpoint's own.
    stored: the weights lie in the folder; otherwise their bytes follow from the config.
    Raises ResourceError when it cannot fit.
    """
    here = machine()
    config, widened = computed_config(folder, dtype)
    wanted = plan_for(
        here,
        config,
        context_tokens=_planned_tokens(config, context_tokens),
        weights=stored_bytes(folder, widened=widened) if stored else None,
        kv_bits=kv_bits,
    )
    return wanted, check_fits(wanted, here, name=name)


def in_float32(config: ModelConfig) -> ModelConfig:
    """The same model as a GPU holds it that computes in float32."""
    return replace(config, text=replace(config.text, dtype="float32"))


def computed_config(folder: str | Path, dtype: str | None) -> tuple[ModelConfig, bool]:
    """A checkpoint's config as it is computed in `dtype`, and whether that widens what is stored.

    On a GPU float32 takes the place of every 16-bit float; None is the checkpoint's own dtype.
    """
    config = ModelConfig.from_folder(folder)
    widened = dtype == "float32" and mx.default_device() != mx.Device(mx.cpu)
    return (in_float32(config) if widened else config), widened


def slices_head(config: ModelConfig, context_tokens: int, kv_bits: int | None = None) -> bool:
    """Whether a request needs its head in slices to fit this machine.

    Follows from config and machine alone, not from what is free now: rounding differs between
    the two heads, and a seed must repeat its reply.
    """
    return plan_for(
        _here(),
        config,
        context_tokens=_planned_tokens(config, context_tokens),
        weights=weight_bytes(config),
        kv_bits=kv_bits,
    ).sliced_head


def canvases_together(
    config: ModelConfig,
    context_tokens: int,
    most: int,
    *,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> int:
    """How many canvases this machine can denoise at once, 1 to `most`.

    Follows from config and machine alone, as `slices_head` does and for the same reason.
    """
    here = _here()
    room = usable(here)
    if room is None:
        return most
    if here.metal:
        room = min(room, here.limit or room)

    def fits(canvases: int) -> bool:
        wanted = plan(
            config,
            context_tokens=_planned_tokens(config, context_tokens),
            weights=weight_bytes(config),
            canvases=canvases,
            sliced_head=sliced_head,
            kv_bits=kv_bits,
        )
        return wanted.total <= room

    return next((count for count in range(most, 1, -1) if fits(count)), 1)


@cache
def _here() -> Machine:
    """Read once: a request should not wait for a dozen answers from the system."""
    return machine()


def _planned_tokens(config: ModelConfig, asked: int) -> int:
    return min(max(asked, PLANNED_CONTEXT), config.text.max_position_embeddings)


def set_limits(machine: Machine) -> None:
    """Sets MLX's limits: up to the GPU's working set stays wired, allocations beyond what a model
    may take wait for others to be freed, and few freed buffers are kept for reuse. Does nothing
    without Metal."""
    if not machine.metal or machine.working_set is None:
        return
    import mlx.core as mx

    mx.set_wired_limit(machine.working_set)
    mx.set_memory_limit(max(machine.working_set, usable(machine) or 0))
    mx.set_cache_limit(min(CACHE_LIMIT, machine.working_set // 8))


def weight_bytes(
    config: ModelConfig, *, quantization: dict[str, Any] | None = None, layout: Layout = "mlx"
) -> int:
    """Bytes of all tensors; `quantization` (config.json's block) replaces the config's own."""
    if quantization is not None:
        config = replace(config, quantization=quantization)
    shapes = parameter_shapes(config, layout).values()
    return sum(prod(shape) * ITEM_SIZE[dtype] for shape, dtype in shapes)


def context_bytes(config: ModelConfig, tokens: int, kv_bits: int | None = None) -> int:
    """Bytes of the context cache once it holds `tokens`, a canvas behind them included.

    kv_bits: 8 for the layers that grow in 8 bits.
    """
    text, slack = config.text, config.canvas_length
    total = 0
    for layer in range(text.num_hidden_layers):
        window = text.window_of(layer)
        kept = tokens if window is None else min(tokens, window - 1 + slack)
        slots = -(-(kept + 2 * slack) // CONTEXT_STEP) * CONTEXT_STEP
        total += slots * _position_bytes(text, layer, kv_bits)
    return total


def _token_bytes(text: TextConfig, kv_bits: int | None) -> int:
    """Bytes that each token adds to a context that is longer than the sliding window."""
    return sum(
        _position_bytes(text, layer, kv_bits)
        for layer in range(text.num_hidden_layers)
        if text.window_of(layer) is None
    )


def _position_bytes(text: TextConfig, layer: int, kv_bits: int | None) -> int:
    """Bytes of one position's keys and values in a layer."""
    size = key_bytes(text, layer, ITEM_SIZE[text.dtype], kv_bits)
    return 2 * text.kv_heads_of(layer) * size


def key_bytes(text: TextConfig, layer: int, item_size: int, kv_bits: int | None = None) -> int:
    """Bytes that a committed position's key, or value, takes in one head of a layer."""
    head_dim = text.head_dim_of(layer)
    if kv_bits is None or text.window_of(layer) is not None:
        return head_dim * item_size
    group = next(size for size in PACKED_GROUPS if head_dim % size == 0)
    return head_dim * kv_bits // 8 + head_dim // group * PACKED_SCALES


def working_bytes(
    config: ModelConfig,
    tokens: int,
    canvases: int = 1,
    *,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> int:
    """An upper estimate of what a denoising step or a prefill chunk adds to weights and context.

    A step holds the raw logits, or a slice of them, and while statistics are taken one float32
    array of their size; the widest layer needs its experts' rows and the attention scores over
    the context. Of a context in 8 bits, one chunk of keys and values is whole at a time.
    """
    text = config.text
    rows = canvases * config.canvas_length
    columns = min(text.vocab_size, VOCABULARY_SLICE) if sliced_head else text.vocab_size
    logits = rows * columns * (ITEM_SIZE[text.dtype] + 4)
    step = logits + _layer_bytes(text, rows, rows, tokens)
    unpacked = 0
    if kv_bits is not None:
        width = max(text.kv_heads_of(i) * text.head_dim_of(i) for i in _full_layers(text))
        # As they leave the packing, and in the dtype of the activations.
        unpacked = 2 * min(tokens, KEY_CHUNK) * width * 2 * ITEM_SIZE[text.dtype]
    return max(step, _layer_bytes(text, PREFILL_CHUNK, QUERY_BLOCK, tokens)) + unpacked


def _full_layers(text: TextConfig) -> list[int]:
    return [i for i in range(text.num_hidden_layers) if text.window_of(i) is None]


def _packable(text: TextConfig) -> bool:
    return all(text.head_dim_of(i) % PACKED_GROUPS[-1] == 0 for i in _full_layers(text))


def _layer_bytes(text: TextConfig, rows: int, queries: int, tokens: int) -> int:
    """Activations of the widest layer for `rows` tokens, `queries` of them attending at a time to
    `tokens` others."""
    routed = rows * text.top_k_experts
    experts = routed * (2 * text.hidden_size + 3 * text.moe_intermediate_size)
    scores = text.num_attention_heads * queries * min(tokens + rows, KEY_CHUNK)
    residual = rows * text.hidden_size * 8
    return (experts + residual) * ITEM_SIZE[text.dtype] + SCORES_HELD * scores * 4


def stored_bytes(folder: str | Path, *, widened: bool = False) -> int:
    """Bytes of the tensors in a checkpoint folder, from the headers of its safetensors files.

    widened: as a GPU holds them that computes in float32, with no float of 16 bits left.
    Raises CheckpointError when there are none or a header cannot be read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; download the checkpoint again.")
    entries = [entry for file in files for entry in read_header(file).entries.values()]
    narrow = ("bfloat16", "float16") if widened else ()
    return sum(entry.nbytes * (2 if entry.dtype in narrow else 1) for entry in entries)


def check_fits(wanted: Plan, machine: Machine, *, name: str = "This model") -> str | None:
    """Refuses a plan that this machine's memory cannot hold.

    Returns a sentence of advice where the plan fits the memory but not what the GPU keeps
    resident by default, else None. Raises ResourceError with the numbers and a way out.
    """
    room = usable(machine)
    if room is None or machine.memory is None:
        return None
    if wanted.total > room:
        raise ResourceError(
            f"{name} needs {wanted}, and this machine has {gigabytes(machine.memory)}, of which "
            f"{gigabytes(room)} can be used; {_way_out(wanted, room)}."
        )
    if machine.metal and machine.limit is not None and wanted.total > machine.limit:
        megabytes = -(-wanted.total // (1 << 20)) + 512
        return (
            f"{name} needs {gigabytes(wanted.total)}, but macOS keeps only "
            f"{gigabytes(machine.limit)} resident for the GPU by default; raise that until the "
            f"next restart with: sudo sysctl iogpu.wired_limit_mb={megabytes}"
        )
    return None


def usable(machine: Machine) -> int | None:
    """Bytes that a model may take before macOS pages; None where memory cannot be read."""
    if machine.memory is None:
        return None
    return machine.memory - min(SYSTEM_RESERVE, machine.memory // 4)


def is_short(machine: Machine, needed: int) -> bool:
    """Whether what MLX holds and `needed` bytes more exceed what this machine keeps resident."""
    import mlx.core as mx

    room = usable(machine)
    if room is not None and machine.metal:
        room = min(room, machine.limit or room)
    return room is not None and mx.get_active_memory() + needed > room


def _way_out(wanted: Plan, room: int) -> str:
    packed = wanted.packed_total
    if wanted.kv_bits is None and packed is not None and packed <= room:
        return f"with the context in 8 bits ({gigabytes(packed)}) it fits: --kv-bits 8"
    if wanted.token_bytes:
        over = -(-(wanted.total - room) // wanted.token_bytes)
        tokens = (wanted.context_tokens - over) // CONTEXT_STEP * CONTEXT_STEP
        if tokens >= PLANNED_CONTEXT:  # for less, every command would plan that much again
            return f"a context of {tokens:,} tokens fits"
    return (
        "use a checkpoint with fewer bits (`mlx_dgemma.convert --recipe small` writes the "
        "smallest), or a machine with more memory"
    )


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
