"""What is asked of a model that several processes hold and of one that a single process holds.

`python tasks.py OUT FOLDER NAME ...`, run on every rank of a group, writes rank 0's answers.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_dgemma.kernels  # noqa: F401  every module that walks the vocabulary in slices
from mlx_dgemma import Constraint, infill, load, stream_generate
from mlx_dgemma.benchmark.shared_step import step_traffic
from mlx_dgemma.benchmark.synthetic import with_layers
from mlx_dgemma.checkpoint.random_weights import lead_synthetic, synthetic_model
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.decisions import decide
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.denoise import advance, denoise_block, step
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import held_out
from mlx_dgemma.replaying import replay

SLICE = 256  # of the demo's 896 ids, so that each rank has some of the vocabulary


@contextmanager
def narrow_slices():
    """Within it the vocabulary is walked in slices of `SLICE`, which also decide what is drawn."""
    before = []
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mlx_dgemma"):
            for name, value in (("SLICE", SLICE), ("VOCABULARY_SLICE", SLICE), ("_COLUMNS", 128)):
                if hasattr(module, name):
                    before.append((module, name, getattr(module, name)))
                    setattr(module, name, value)
    try:
        yield
    finally:
        for place in before:
            setattr(*place)


def reply(model, tokenizer, prompt, **options):
    """Ids, text and how it ended."""
    ids, text, finish = [], "", None
    for event in stream_generate(model, tokenizer, prompt, **options):
        if isinstance(event, Commit):
            ids, text = ids + list(event.ids), text + event.text
        elif isinstance(event, Finish):
            finish = [event.reason, list(event.steps_per_block)]
    return [ids, text, finish]


def logits(model, tokenizer, folder):
    """A prompt in two chunks, longer than the window; two canvases; with and without a signal."""
    cache = model.make_cache()
    model.prefill(np.arange(5, 155) % 800, cache, chunk_size=96)
    canvas = mx.array(np.arange(64).reshape(2, 32) * 7 % 800)
    hidden = model.hidden(canvas, cache)
    soft = mx.random.normal(hidden.shape, key=mx.random.key(1))
    found = [
        model.softcap(model.raw_logits(one)) for one in (hidden, model.hidden(canvas, cache, soft))
    ]
    np.save(Path(folder) / ("one.npy" if model.team is None else "many.npy"), np.stack(found))
    return None


def text(model, tokenizer, folder):
    return reply(model, tokenizer, "Count from 3 to 9.", seed=1, drafts=True)


def long(model, tokenizer, folder):
    """More than one block, and log-probabilities."""
    events = stream_generate(
        model, tokenizer, "Count from 1 to 40.", seed=4, logprobs=True, max_tokens=90, temp=0.7
    )
    commits = [event for event in events if isinstance(event, Commit)]
    return [
        [list(event.ids) for event in commits],
        [round(number, 3) for event in commits for number in event.logprobs],
    ]


def brief(model, tokenizer, folder):
    """Every feature in a pass or two each, of a network that means nothing by what it says; then
    with PEFT's two deltas on one weight, of the encoder's and of the decoder's pass."""
    few = {"max_denoising_steps": 2, "max_tokens": 32, "empty_reply": "allow", "seed": 1}
    ids, path = [2, 5, 6, 7], Path(folder) / f"brief {model.team is None}"
    example, cache = held_out("picture", 1, 3)[0], PromptCache(model)

    def ask(prompt=ids, model=model, **options):
        return reply(model, tokenizer, prompt, **few, **options)[::2]

    found = {
        "drafts": ask(drafts=True, logprobs=True),
        "confidence": ask(sampler="confidence-threshold"),
        "turbo in 8 bits": ask(preset="turbo", kv_bits=8),
        "picture": ask(example.messages, images=[example.picture.draw()]),
        "choice": ask(constraint=Constraint.choice(["yes", "perhaps", "no"])),
        "turn": ask(cache=cache),
        "trace": ask(trace=path),
        "replay": replay(model, tokenizer, path).divergence,
    }
    cache.save(path)
    found["kept"] = ask([*ids, 8], cache=PromptCache.load(path, model))
    holes = infill(model, tokenizer, "the <hole:1-2> sings.", n=2, seed=1, max_denoising_steps=2)
    found["holes"] = [one.text for one in (holes, *holes.alternatives)]
    left = stream_generate(model, tokenizer, ids, drafts=True, **few)
    next(event for event in left if isinstance(event, Draft))
    left.close()
    cancel, reasons = threading.Event(), []
    for event in stream_generate(model, tokenizer, ids, drafts=True, cancel=cancel, **few):
        cancel.set()
        reasons += [event.reason] if isinstance(event, Finish) else []
    found["left and cancelled"] = [reasons, ask(sliced_head=True)]
    question = {"type": "choice", "criteria": ["red", "green", "blue"]}
    decided = decide(model, tokenizer, "The sky.", {"colour": question}, orders=1).to_json()
    found["decided"] = json.loads(json.dumps(decided), parse_float=lambda one: round(float(one), 3))
    model, _ = load(Path(folder) / "model", adapter_path=Path(folder) / "peft")
    return found | {"two deltas": ask(model=model)}


def presets(model, tokenizer, folder):
    """Some of a canvas' positions a step; alone, and in a batch whose rows end apart."""
    found = [
        reply(model, tokenizer, "Count from 1 to 40.", seed=4, preset=preset)
        for preset in ("balanced", "turbo")
    ]
    cache = model.make_cache()
    model.prefill(np.arange(5, 25), cache)
    return [found, _block(model, cache, (1, 2, 3), preset="turbo")]


def turns(model, tokenizer, folder):
    """A conversation's context: kept, saved, loaded, frozen and copied."""
    cache = PromptCache(model)
    first = reply(model, tokenizer, "Count from 3 to 5.", seed=1, cache=cache)
    said = [{"role": "user", "content": "Count from 3 to 5."}]
    said += [{"role": "assistant", "content": first[1]}, {"role": "user", "content": "Again."}]
    path = Path(folder) / ("one" if model.team is None else "many")
    cache.save(path)
    second = reply(model, tokenizer, said, seed=2, cache=cache, max_denoising_steps=9)
    loaded = PromptCache.load(path, model)
    third = reply(model, tokenizer, said, seed=2, cache=loaded, max_denoising_steps=9)
    frozen = loaded.cache.freeze()
    other = model.make_cache()
    other.copy_in(frozen)
    canvas = mx.array([[5] * 32])
    same = mx.abs(model.hidden(canvas, other)).sum().item() > 0
    return [first, second, third, len(cache.ids), len(loaded.ids), same]


def adapted(model, tokenizer, folder):
    """A second model, with an adapter beside its weights; the first one goes on."""
    second, _ = load(adapter_path=Path(folder) / "adapter")
    found, canvas = [], mx.array([[5] * 32])
    for one in (second, model, second):
        cache = one.make_cache()
        one.prefill(np.arange(5, 25), cache)
        found.append(round(mx.abs(one.hidden(canvas, cache)).mean().item(), 3))
    assert found[0] == found[2] != found[1]
    return [found, reply(second, tokenizer, "Sort 5 3 9 1.", seed=2, max_tokens=32)]


def counted(model, tokenizer, folder):
    """What a pass and a step exchange: counted on two processes, and as it is predicted."""
    config, rows = model.config, model.config.canvas_length
    layers = config.text.num_hidden_layers
    if model.team is None:
        traffic = step_traffic(config, 2, rows, 4)
        return [2 * layers, 2 * (layers - 1), traffic.collectives, traffic.nbytes]
    team, cache = model.team, model.make_cache()

    def after(work):
        before = team.sums, team.collectives, team.nbytes
        work()
        return [
            now - then
            for now, then in zip((team.sums, team.collectives, team.nbytes), before, strict=True)
        ]

    prefill = after(lambda: model.prefill(np.arange(5, 25), cache))
    decode = after(lambda: mx.eval(model.hidden(mx.array(np.arange(rows)[None]), cache)))
    settings = DecodingSettings.from_defaults(config.generation, {})
    state = CanvasState.initial([CanvasRequest(SeededDraws(1))], Place(0, 0, 0), rows, 800, 48)

    def whole_step():
        outcome = step(model, cache, settings, state)
        advance(model, state, outcome, outcome.report.read())

    _, *whole = after(whole_step)
    return [decode[0], prefill[0], *whole]


def synthetic(model, tokenizer, folder):
    """A third model, which the benchmark draws: each process its part of the same weights, in one
    layer, with which a step that is begun is done."""
    raw = json.loads((CHECKPOINT / "config.json").read_text()) | {"vision_config": None}
    raw, team = with_layers(raw, 1), model.team
    drawn = synthetic_model(raw) if team is None else lead_synthetic(team, raw)
    cache = drawn.make_cache()
    drawn.prefill(np.arange(5, 25), cache)
    return _block(drawn, cache, [1], max_denoising_steps=3)


def _block(model, cache, seeds, **options):
    """Ids and steps of canvases that are denoised together."""
    settings = DecodingSettings.from_defaults(model.config.generation, options)
    steps = denoise_block(model, cache, settings, [CanvasRequest(SeededDraws(n)) for n in seeds])
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return [[row.ids.tolist(), row.steps] for row in ended.value]


DEMO = (logits, text, long, presets, turns, adapted, counted, synthetic)
SMALL = (logits, brief)  # of a network without meaning
TASKS = {task.__name__: task for task in (*DEMO, *SMALL)}


def answers(model, tokenizer, folder, tasks):
    return {task.__name__: task(model, tokenizer, folder) for task in tasks}


if __name__ == "__main__":
    out, folder, *names = sys.argv[1:]
    own = Path(folder) / "model"
    with narrow_slices():
        model, tokenizer = load(own if own.exists() else None, group=mx.distributed.init())
        found = answers(model, tokenizer, folder, [TASKS[name] for name in names])
    Path(out).write_text(json.dumps(found))
