"""Fill holes in a text with both sides in view, edit spans, and redo what the network doubts.

result = infill(model, tokenizer, "the old <hole> sings in the garden.")
print(result.text)
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from mlx_dgemma.checkpoint.plan import canvases_together, slices_head
from mlx_dgemma.decoding.draws import check_seed, fresh_seed
from mlx_dgemma.decoding.settings import DecodingSettings, PresetName, SamplerName
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import Prompt
from mlx_dgemma.infilling.filled import Infill, Span, uncertain_spans
from mlx_dgemma.infilling.planning import MOST_TOGETHER, Job, LengthChoice
from mlx_dgemma.infilling.windows import Filler
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.holes import Hole, cut_spans, parse_holes

DEFAULT_PROMPT = "Fill in the blanks."


class InfillOptions(TypedDict, total=False):
    """Keywords that `infill`, `edit`, `regenerate` and `refine` share.

    prompt: what the user asked for, as in `generate`; system_prompt and images with it.
    n: alternatives, from seed, seed + 1, ...; seed: drawn when None.
    temp, preset, sampler, max_denoising_steps, entropy_bound, kv_bits: as in `stream_generate`.
    lengths: how a hole without a fixed length finds its own: candidates are tried ("try"), or
        the network ends it with pads ("pad"), for networks trained to, as the demo is.
    final: whether the text ends the reply; then the stop id and filler after it are pinned.
    cancel: ends the request between two denoising steps; raises CancelledError.
    """

    prompt: Prompt
    system_prompt: str | None
    images: Sequence[Any] | None
    n: int
    seed: int | None
    temp: float
    preset: PresetName
    sampler: SamplerName
    max_denoising_steps: int | None
    entropy_bound: float | None
    kv_bits: int | None
    lengths: LengthChoice
    final: bool
    cancel: threading.Event | None


def infill(
    model: Model,
    tokenizer: Tokenizer,
    text: str | Sequence[str | Hole],
    **options: Unpack[InfillOptions],
) -> Infill:
    """Fills every <hole> of `text`, seeing what stands before and after it.

    A hole may say its length in tokens, `<hole:3>` or `<hole:1-4>`; else the model chooses.
    Characters outside the holes stay exactly as they are. Text that reaches past one canvas
    is filled hole by hole, with as much right context as fits; `Infill.unseen` counts the rest.

    text: may also be given in parts, literals and Holes by turns, a literal first and last.

    Raises InputError for a text without a hole, a hole or pinned text longer than the canvas.
    """
    return _whole(infill_turns(model, tokenizer, text, **options))


def infill_turns(
    model: Model,
    tokenizer: Tokenizer,
    text: str | Sequence[str | Hole],
    **options: Unpack[InfillOptions],
) -> Generator[int | Infill, None, None]:
    """`infill` for a thread that others wait for: pauses after every few canvases.

    Yields how many decoder passes there were so far, and the Infill at last.
    """
    parts = parse_holes(text) if isinstance(text, str) else list(text)
    return _fill(model, tokenizer, parts, options)


def edit(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[Span],
    *,
    length: int | tuple[int, int] | None = None,
    strength: float = 1.0,
    **options: Unpack[InfillOptions],
) -> Infill:
    """Rewrites the characters of each span (start, end) and keeps everything else.

    length: tokens of each new span, a range, or None for as many as now, give or take two.
    strength: 1 starts from noise, 0 keeps the text; in between a share of the old tokens and
        of the schedule is kept, and so is the length.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength={strength!r} is not possible: use 0 (keep) to 1 (noise).")
    if strength < 1 and length is not None:
        raise InputError("A strength below 1 keeps the length: leave length out.")
    parts = cut_spans(text, spans, length)
    old = [text[start:end] for start, end in spans]
    return _whole(_fill(model, tokenizer, parts, options, old=old, strength=strength))


def regenerate(
    model: Model,
    tokenizer: Tokenizer,
    result: Infill | str,
    span: Span,
    **options: Unpack[InfillOptions],
) -> Infill:
    """Redoes one span of a result; with n=, several alternatives from one prefill."""
    text = result if isinstance(result, str) else result.text
    return edit(model, tokenizer, text, [span], **options)


def refine(
    model: Model,
    tokenizer: Tokenizer,
    result: Infill,
    *,
    min_probability: float = 0.5,
    **options: Unpack[InfillOptions],
) -> Infill:
    """Redoes just the filled tokens the network gave less than `min_probability`.

    Raises InputError unless that is from 0 to 1.
    """
    if not 0 <= min_probability <= 1:
        raise InputError(f"min_probability is {min_probability}; choose a number from 0 to 1.")
    spans = uncertain_spans(result.tokens, min_probability=min_probability)
    return edit(model, tokenizer, result.text, spans, **options) if spans else result


def _whole(turns: Generator[int | Infill, None, None]) -> Infill:
    *_, result = turns
    assert isinstance(result, Infill)
    return result


def _fill(
    model: Model,
    tokenizer: Tokenizer,
    parts: list[str | Hole],
    options: InfillOptions,
    *,
    old: Sequence[str] = (),
    strength: float = 1.0,
) -> Generator[int | Infill, None, None]:
    n = options.get("n", 1)
    if n < 1:
        raise InputError(f"n={n!r} is not possible: ask for at least one alternative.")
    seed = options.get("seed")
    seed = fresh_seed() if seed is None else check_seed(seed)
    prompt = prepare_prompt(
        model,
        tokenizer,
        options.get("prompt", DEFAULT_PROMPT),
        images=options.get("images"),
        system_prompt=options.get("system_prompt"),
    )
    kv_bits = options.get("kv_bits")
    literals = tuple(part for part in parts if isinstance(part, str))
    sizes = [len(tokenizer.encode(literal)) for literal in literals]
    text = sum(sizes)
    context = len(prompt.ids) + text
    _check_room(model, context - sizes[-1])
    sliced = slices_head(model.config, context, kv_bits)
    job = Job(
        model=model,
        tokenizer=tokenizer,
        settings=DecodingSettings.from_defaults(
            model.config.generation,
            {
                "temp": options.get("temp"),
                "preset": options.get("preset"),
                "sampler": options.get("sampler"),
                "max_denoising_steps": options.get("max_denoising_steps"),
                "entropy_bound": options.get("entropy_bound"),
                "sliced_head": sliced,
                "kv_bits": kv_bits,
            },
        ),
        prompt=prompt.network_ids(model.config.image_token_id),
        images=[image.patches for image in prompt.images],
        literals=literals,
        holes=tuple(part for part in parts if isinstance(part, Hole)),
        final=options.get("final", True),
        lengths=options.get("lengths", "try"),
        cancel=options.get("cancel"),
        old=tuple(old),
        strength=strength,
        together=canvases_together(
            model.config, context, MOST_TOGETHER, sliced_head=sliced, kv_bits=kv_bits
        ),
    )
    with explained():
        results = yield from Filler(job).fill([check_seed(seed + index) for index in range(n)])
    best, *others = sorted(results, key=lambda result: -result.score)
    yield replace(best, alternatives=tuple(others))


def _check_room(model: Model, tokens: int) -> None:
    """tokens: of the prompt and of all text before the last hole."""
    canvas = model.config.canvas_length
    room = model.config.text.max_position_embeddings - canvas
    if tokens > room:
        raise InputError(
            f"The prompt and the text before the last hole have {tokens} tokens, but only {room} "
            f"fit into the context beside a canvas of {canvas}: shorten them."
        )
