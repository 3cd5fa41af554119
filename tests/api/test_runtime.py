"""One thread owns the model; others ask, interrupt and leave."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dgemma import Commit, Finish, Runtime, generate, infill, load, stream_generate
from mlx_dgemma.checkpoint import plan, sizes
from mlx_dgemma.decoding.trace import Trace
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError, ModelNotFoundError, ResourceError
from mlx_dgemma.infilling.windows import Filler
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model.config import ModelConfig

PROMPT = "Count from 10 to 99"  # a reply of several canvases
QUICK = {"max_denoising_steps": 2, "max_tokens": 40}
ENDLESS = {"max_denoising_steps": 48, "max_tokens": 4000, "canvas_length": 8, "seed": 1}


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as running:
        yield running


def test_it_gives_what_a_direct_call_gives(runtime):
    assert runtime.generate(PROMPT, seed=3, **QUICK) == generate(*load(), PROMPT, seed=3, **QUICK)


def test_ids_may_be_an_array_that_this_thread_has_yet_to_compute(runtime):
    expected = runtime.generate(list(range(60, 80)), max_tokens=32, seed=1)
    assert runtime.generate(mx.arange(60, 80), max_tokens=32, seed=1) == expected


def test_many_threads_get_their_own_answers(runtime):
    expected = {seed: runtime.generate(PROMPT, seed=seed, **QUICK) for seed in range(4)}
    answers = {}

    def ask(seed):
        answers[seed] = runtime.generate(PROMPT, seed=seed, **QUICK)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected
    assert runtime.waiting == 0


def test_requests_take_turns_block_by_block(runtime):
    order, release = [], threading.Event()
    runtime.call(lambda: None)
    # Both are queued before the first may run.
    blocker = threading.Thread(target=runtime.call, args=(release.wait,))
    blocker.start()
    done = [threading.Event(), threading.Event()]

    def deliver(name):
        def take(event):
            if isinstance(event, Commit):
                order.append((name, event.block))
            elif event is None:
                done[name].set()

        return take

    for name in (0, 1):
        runtime.submit(PROMPT, deliver(name), seed=name, **QUICK)
    release.set()
    blocker.join()
    assert all(event.wait(60) for event in done)
    first_blocks = [entry for entry in order if entry[1] == 0]
    assert order[: len(first_blocks)] == [(0, 0), (1, 0)]


def test_errors_arrive_where_the_question_was_asked(runtime):
    with pytest.raises(InputError, match="empty"):
        runtime.generate("")
    with pytest.raises(InputError, match="max_tokens"):
        list(runtime.stream(PROMPT, max_tokens=0))
    assert runtime.generate(PROMPT, seed=1, **QUICK) is not None  # and it still answers


def test_a_reader_who_leaves_ends_the_request(runtime):
    stream = runtime.stream(PROMPT, drafts=True, **ENDLESS)
    next(stream)
    stream.close()
    assert runtime.call(lambda: "free") == "free"


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: None])
def test_a_reader_who_leaves_before_the_first_event_ends_the_request_too(runtime, leave):
    cancel = threading.Event()
    stream = runtime.stream(PROMPT, cancel=cancel, **ENDLESS)
    leave(stream)
    del stream
    assert cancel.is_set()
    assert runtime.call(lambda: "free") == "free"


def test_a_receiver_that_raises_ends_its_own_request_alone(runtime, caplog):
    def deliver(item):
        raise RuntimeError("the receiver's own mistake")

    cancel = runtime.submit(PROMPT, deliver, **ENDLESS)
    assert runtime.call(lambda: "still here") == "still here"
    assert "the receiver's own mistake" in caplog.text
    assert not cancel.is_set()


def test_cancelling_from_another_thread(runtime):
    cancel = threading.Event()
    stream = runtime.stream(PROMPT, drafts=True, cancel=cancel, **ENDLESS)
    next(stream)
    cancel.set()
    *_, last = stream
    assert isinstance(last, Finish)
    assert last.reason == "cancelled"


def test_asyncio_may_ask_too(runtime):
    async def ask():
        return [event async for event in runtime.astream(PROMPT, seed=3, **QUICK)]

    events = asyncio.run(ask())
    assert "".join(event.text for event in events) == runtime.generate(PROMPT, seed=3, **QUICK)


def test_closing_ends_what_runs_and_refuses_what_comes():
    runtime = Runtime()
    stream = runtime.stream(PROMPT, drafts=True, **ENDLESS)
    next(stream)
    runtime.close()
    runtime.close()
    *_, last = stream
    assert isinstance(last, Finish)
    assert last.reason == "cancelled"
    with pytest.raises(InputError, match="closed"):
        runtime.stream(PROMPT)


def test_requests_may_share_what_cancels_them():
    """One that ends, or fails, ends no other; closing ends all that are left."""
    runtime, cancel = Runtime(), threading.Event()
    long = runtime.stream(PROMPT, drafts=True, cancel=cancel, **ENDLESS)
    next(long)
    list(runtime.stream(PROMPT, cancel=cancel, seed=1, **QUICK))
    with pytest.raises(InputError, match="empty"):
        next(runtime.stream("", cancel=cancel))
    assert not cancel.is_set()
    runtime.close()
    *_, last = long
    assert last.reason == "cancelled"


def test_a_model_that_is_not_there_raises_in_the_constructor(tmp_path):
    with pytest.raises(ModelNotFoundError):
        Runtime(tmp_path / "nothing")


def test_a_closed_runtime_leaves_its_thread_to_the_next():
    """MLX's state of a thread is freed with Python's lock as the thread dies: so none dies."""
    idents = []
    for _ in range(2):
        with Runtime() as running:
            idents.append(running.call(threading.get_ident))
    assert idents[0] == idents[1]
    assert idents[0] in {thread.ident for thread in threading.enumerate()}


@pytest.fixture
def tight(monkeypatch):
    """A machine on which the demo fits with its head in slices alone."""
    # Slices thinner than the demo's vocabulary, and nothing else to ask for more than a step.
    for name, small in (("VOCABULARY_SLICE", 64), ("PREFILL_CHUNK", 1), ("QUERY_BLOCK", 1)):
        monkeypatch.setattr(sizes, name, small)
    config = ModelConfig.from_folder(CHECKPOINT)
    whole, sliced = (
        plan.plan(config, context_tokens=8192, sliced_head=in_slices).total
        for in_slices in (False, True)
    )
    here = replace(machine(), memory=(whole + sliced) * 2 // 3 + 1)  # of which 3/4 can be used
    monkeypatch.setattr(plan, "machine", lambda: here)
    monkeypatch.setattr(plan, "_here", lambda: here)
    return here


def sliced(tmp_path, generated, **options):
    trace = tmp_path / "trace.json"
    generated(PROMPT, trace=trace, seed=1, **QUICK, **options)
    return Trace.load(trace).settings["sliced_head"]


def test_the_head_is_sliced_where_memory_asks_for_it(tight, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mlx_dgemma.runtime")
    with Runtime() as running:
        assert sliced(tmp_path, running.generate)
        assert not sliced(tmp_path, running.generate, sliced_head=False)
        model, tokenizer = running.model, running.tokenizer
    assert "The demo checkpoint needs" in caplog.text
    assert "the head in slices" in caplog.text

    def direct(prompt, **options):
        list(stream_generate(model, tokenizer, prompt, **options))

    assert sliced(tmp_path, direct)


def test_the_head_is_whole_where_there_is_room(runtime, tmp_path):
    assert not sliced(tmp_path, runtime.generate)
    assert sliced(tmp_path, runtime.generate, sliced_head=True)


def test_infilling_slices_the_head_as_well(tight, monkeypatch):
    seen = []
    filler = Filler.__init__
    monkeypatch.setattr(
        Filler, "__init__", lambda self, job: (seen.append(job.settings), filler(self, job))[1]
    )
    infill(*load(), "a <hole:1> b", seed=1, max_denoising_steps=1)
    assert [settings.sliced_head for settings in seen] == [True]


def test_a_tight_machine_is_told_once_and_a_small_one_is_refused(tight, monkeypatch, caplog):
    limit = tight.memory // 2
    mac = replace(tight, metal=True, working_set=limit)
    monkeypatch.setattr(plan, "machine", lambda: mac)
    with Runtime() as running:
        for _ in range(2):
            running.generate(PROMPT, seed=1, **QUICK)
    assert caplog.text.count("sudo sysctl iogpu.wired_limit_mb=") == 1
    small = replace(tight, memory=tight.memory // 2)
    monkeypatch.setattr(plan, "machine", lambda: small)
    with pytest.raises(ResourceError, match="The demo checkpoint needs"):
        Runtime()


def test_requests_take_the_runtimes_kv_bits(tmp_path):
    with Runtime(kv_bits=8) as running:
        trace = tmp_path / "trace.json"
        running.generate(PROMPT, trace=trace, seed=1, **QUICK)
        assert Trace.load(trace).settings["kv_bits"] == 8
