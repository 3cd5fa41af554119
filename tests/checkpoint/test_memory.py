"""The plan made before loading: exact weights, enough context, and a refusal that helps."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dgemma.benchmark.synthetic import published_config, synthetic_config
from mlx_dgemma.checkpoint import loading, plan, sizes
from mlx_dgemma.checkpoint.hub import demo_path
from mlx_dgemma.checkpoint.known_repositories import (
    BESIDE_WEIGHTS,
    KNOWN_REPOSITORIES,
    LONGEST_CONTEXT,
    LONGEST_CONTEXT_BYTES,
)
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.errors import CheckpointError, ResourceError
from mlx_dgemma.kernels.sparse_embeddings import CAPACITY
from mlx_dgemma.machine import memory
from mlx_dgemma.machine.hardware import Machine, machine
from mlx_dgemma.model.config import ModelConfig

GIB = 1 << 30


def mac(gibibytes: int, working_set: int | None = None) -> Machine:
    return replace(machine(), memory=gibibytes * GIB, working_set=working_set, metal=True)


@pytest.fixture
def real() -> ModelConfig:
    """The published 4-bit checkpoint's; tests/model/test_names.py compares it with the files."""
    vision = published_config()["vision_config"]
    return ModelConfig.from_dict({**synthetic_config("26b-4bit"), "vision_config": vision})


def test_the_real_4bit_checkpoint_with_8k_context_stays_under_18_gb(real: ModelConfig) -> None:
    wanted = plan.plan(real, context_tokens=8192)
    assert wanted.weights == 16_542_844_632
    assert wanted.total < 18e9
    assert str(wanted).startswith("17.6 GB (16.5 GB weights, 0.5 GB context of 8,192 tokens")


@pytest.mark.parametrize("known", KNOWN_REPOSITORIES, ids=lambda known: known.id.split("-it")[-1])
def test_the_repository_table_follows_from_the_shapes(known, real: ModelConfig) -> None:  # type: ignore[no-untyped-def]
    own = real.quantization
    assert own is not None
    floats = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
    name = known.id.rsplit("-", 1)[-1]
    if name in floats:
        size, bits = floats[name]
        block = {**own, "group_size": size, "bits": bits, "mode": name}
    elif name.endswith("bit"):
        block = {**own, "bits": int(name[0])}
    else:
        real, block = replace(real, quantization=None), None
    assert sizes.weight_bytes(real, quantization=block) == known.weight_bytes
    beside = plan.plan(real, context_tokens=8192, weights=0).total
    assert beside == BESIDE_WEIGHTS


def test_context_grows_only_in_full_layers(real: ModelConfig) -> None:
    # 5 layers x keys and values x 2 heads x 512 wide x 2 bytes
    assert sizes.context_bytes(real, 1 << 18) - sizes.context_bytes(real, 1 << 17) == (
        (1 << 17) * 5 * 2 * 2 * 512 * 2
    )


def test_the_longest_context_takes_flat_working_memory(real: ModelConfig) -> None:
    short, long = (plan.plan(real, context_tokens=tokens) for tokens in (8192, 262_144))
    assert long.working == short.working
    assert long.context == pytest.approx(5.7e9, rel=0.01)


def test_the_head_is_sliced_only_where_that_makes_it_fit(real: ModelConfig) -> None:
    whole = plan.plan(real, context_tokens=8192)
    sliced = plan.plan(real, context_tokens=8192, sliced_head=True)
    between = (whole.total + sliced.total) // 2
    for working_set, in_slices in (
        (whole.total, False),
        (between, True),
        (sliced.total - 1, False),
    ):
        chosen = plan.plan_for(mac(24, working_set), real, context_tokens=8192)
        assert chosen.sliced_head is in_slices
    assert "the head in slices" in str(sliced)


def test_as_many_canvases_at_once_as_the_machine_has_room_for(
    real: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = [plan.plan(real, context_tokens=8192, canvases=n).total for n in range(1, 9)]
    logits = real.canvas_length * real.text.vocab_size * 2
    assert all(after - before > logits for before, after in pairwise(totals))
    for count, total in enumerate(totals, 1):
        for room, expected in ((total, count), (total - 1, max(count - 1, 1))):
            monkeypatch.setattr(plan, "_here", lambda room=room: mac(64, room))
            assert plan.canvases_together(real, 1000, 8) == expected
    monkeypatch.setattr(plan, "_here", lambda: mac(64, totals[-1]))
    longer = plan.canvases_together(real, 200_000, 8)
    assert longer < 8
    assert plan.canvases_together(real, 200_000, 8, kv_bits=8) > longer
    monkeypatch.setattr(plan, "_here", lambda: mac(24, 17_179_869_184))  # what macOS gives
    assert plan.canvases_together(real, 1000, 8) == 1


def test_mlx_is_told_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, int] = {}
    for name in ("set_wired_limit", "set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda size, name=name: told.update({name: size}))
    memory.set_limits(replace(mac(24, 16 * GIB), metal=False))
    assert told == {}
    memory.set_limits(mac(24, 16 * GIB))
    assert told == {
        "set_wired_limit": 16 * GIB,
        "set_memory_limit": 24 * GIB - memory.SYSTEM_RESERVE,
        "set_cache_limit": 2_000_000_000,
    }


def test_fifty_generations_end_with_the_memory_of_the_first() -> None:
    from mlx_dgemma import generate, load

    gc.collect()  # models of other tests are not to go meanwhile
    model, tokenizer = load()
    held = []
    for seed in range(50):
        generate(
            model, tokenizer, "Sort the letters CAB", seed=seed, max_tokens=8, max_denoising_steps=2
        )
        mx.clear_cache()
        held.append(mx.get_active_memory())
    # The tables of the last positions and a block's small arrays come and go.
    assert max(held[2:]) - min(held[2:]) < 1 << 20
    assert held[-1] - held[2] < 1 << 18


def test_freed_buffers_are_given_back_after_every_chunk_and_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(demo_path())
    cleared: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    cache = model.make_cache()
    model.prefill(range(10), cache, chunk_size=4)
    assert len(cleared) == 3
    model.prefill(range(model.config.canvas_length), cache)
    assert len(cleared) == 4


def test_the_plan_covers_what_a_context_really_takes() -> None:
    model = load_model(demo_path())
    config = model.config
    cache = model.make_cache()
    for count in (30, 100, 700):
        model.prefill(mx.zeros((1, count), dtype=mx.int32), cache)
        mx.eval(cache.arrays)
        item = sizes.ITEM_SIZE[config.text.dtype] / cache.arrays[0].itemsize
        assert cache.nbytes * item <= sizes.context_bytes(config, cache.offset)


def test_stored_bytes_come_from_the_headers() -> None:
    folder = demo_path()
    config = ModelConfig.from_folder(folder)
    assert sizes.stored_bytes(folder) == sizes.weight_bytes(config, layout="hf")


def test_float32_on_a_gpu_is_planned_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_path()
    config = ModelConfig.from_folder(folder)
    wide = plan.in_float32(config)
    stored, widened = (sizes.stored_bytes(folder, widened=wider) for wider in (False, True))
    assert widened == 2 * stored
    needs = [
        plan.plan(config, context_tokens=plan.LEAST_CONTEXT, weights=stored).total,
        plan.plan(wide, context_tokens=plan.LEAST_CONTEXT, weights=widened, sliced_head=True).total,
    ]
    between = sum(needs) // 2
    small = replace(machine(), memory=between * 4 // 3, working_set=None, metal=False)
    assert needs[0] < memory.usable(small) < needs[1]
    for module in (loading, plan):
        monkeypatch.setattr(module, "machine", lambda: small)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    loading.load_network()
    with pytest.raises(ResourceError, match="The demo checkpoint needs"):
        loading.load_network(dtype="float32")

    roomy = replace(machine(), metal=True, working_set=None)
    monkeypatch.setattr(plan, "machine", lambda: roomy)
    _, planned = plan.prepare(None, dtype="float32")
    assert planned.weights == widened
    monkeypatch.setattr("mlx_dgemma.checkpoint.hub.resolve_model", lambda *_, **__: folder)
    _, unread = plan.prepare("org/model", dtype="float32", weights=False)
    assert unread.weights == sizes.weight_bytes(wide)
    _, narrow = plan.prepare("org/model", weights=False)
    assert unread.working == planned.working > narrow.working
    assert unread.context == 2 * narrow.context


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02",
        b"\xff" * 8 + b"{}",
        b"\x02" + bytes(7) + b"[]",
        b"\x07" + bytes(7) + b'{"a":1}',
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors (is trunc|has a damaged)"):
        sizes.stored_bytes(tmp_path)


def test_weights_that_cannot_be_opened_are_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder, not a file"):
        sizes.stored_bytes(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        sizes.stored_bytes(tmp_path)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    wanted = plan.Plan(16_500_000_000, 500_000_000, 500_000_000, 8192)
    with pytest.raises(ResourceError) as refused:
        plan.check_fits(wanted, mac(16), name="The 4-bit model")
    assert str(refused.value) == (
        "The 4-bit model needs 17.5 GB (16.5 GB weights, 0.5 GB context of 8,192 tokens, 0.5 GB "
        "working memory), and this machine has 17.2 GB, of which 14.2 GB can be used; use a "
        "checkpoint with fewer bits (`mlx_dgemma.convert --recipe small` writes the smallest), or "
        "a machine with more memory."
    )


def test_a_shorter_context_is_offered_where_that_helps(real: ModelConfig) -> None:
    """The longest that fits, and never one below what commands plan with anyway."""
    needed = plan.plan(real, context_tokens=100_000, kv_bits=8)
    this = replace(mac(24), memory=needed.total + memory.SYSTEM_RESERVE, metal=False)
    with pytest.raises(ResourceError, match=r"a context of ([\d,]+) tokens fits") as refused:
        plan.check_fits(plan.plan(real, context_tokens=200_000, kv_bits=8), this)
    found = re.search(r"a context of ([\d,]+) tokens", str(refused.value))
    assert found is not None
    tokens = int(found[1].replace(",", ""))
    assert 100_000 - 2 * plan.CONTEXT_STEP <= tokens <= 100_000 + plan.CONTEXT_STEP
    assert plan.check_fits(plan.plan(real, context_tokens=tokens, kv_bits=8), this) is None

    short = plan.plan(real, context_tokens=4096, kv_bits=8)
    this = replace(this, memory=short.total + memory.SYSTEM_RESERVE)
    with pytest.raises(ResourceError, match="use a checkpoint with fewer bits"):
        plan.check_fits(plan.plan(real, context_tokens=8192, kv_bits=8), this)


def test_what_fits_is_silent_and_a_tight_fit_is_advised() -> None:
    wanted = plan.Plan(16_500_000_000, 500_000_000, 500_000_000, 8192)
    assert plan.check_fits(wanted, mac(64, 48 * GIB)) is None
    advice = plan.check_fits(wanted, mac(24, 16 * GIB))
    assert advice is not None
    assert "sudo sysctl iogpu.wired_limit_mb=17202" in advice
    assert plan.check_fits(wanted, replace(mac(8), memory=None)) is None


def test_the_machine_describes_itself() -> None:
    this = machine()
    assert this.memory is not None
    assert this.memory > 1 << 30
    assert this.cores >= 1
    assert json.loads(json.dumps(this.record()))["python"] == this.python


def test_unreadable_facts_are_none_and_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_dgemma.machine.hardware._lines", lambda _: [])
    monkeypatch.setattr("mlx_dgemma.machine.hardware._mlx", lambda: ({}, False, None))
    this = machine()
    assert this.limit is None or this.memory is not None
    assert this.metal is False
    assert this.mlx is None


def test_the_users_wired_limit_counts() -> None:
    this = replace(mac(24, 16 * GIB), wired_limit=20 * GIB)
    assert this.limit == 20 * GIB


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_plan_is_what_the_buffers_take(kv_bits: int | None) -> None:
    """To the byte, once every window is full and the prompt was announced with a canvas more."""
    model = load_model(demo_path())
    config = replace(model.config, text=replace(model.config.text, dtype="float32"))
    cache, canvas = model.make_cache(kv_bits), config.canvas_length
    cache.expect(700 + canvas)
    for count in (700 - 4 * canvas, *[canvas] * 4):
        model.prefill(mx.zeros((1, count), dtype=mx.int32), cache)
    mx.eval(cache.arrays)
    assert cache.nbytes == sizes.context_bytes(config, 700, kv_bits)


def test_eight_bits_are_offered_where_they_make_it_fit(real: ModelConfig) -> None:
    exact, packed = (
        plan.plan(real, context_tokens=262_144, kv_bits=kv_bits) for kv_bits in (None, 8)
    )
    assert exact.packed_total == packed.packed_total == packed.total
    assert "3.2 GB context of 262,144 tokens in 8 bits" in str(packed)
    assert packed.record()["kv_bits"] == 8
    this = replace(mac(24), memory=packed.total + memory.SYSTEM_RESERVE)
    with pytest.raises(ResourceError, match=r"in 8 bits \(20\.\d GB\) it fits: --kv-bits 8\."):
        plan.check_fits(exact, this)
    assert plan.check_fits(packed, replace(this, metal=False)) is None
    with pytest.raises(ResourceError, match=r"a context of .* tokens fits"):
        plan.check_fits(packed, mac(20))


def test_a_sparse_signal_takes_less_than_what_the_plan_holds_before_it(real: ModelConfig) -> None:
    """An id and a probability, 4 bytes each, of every token that it may be summed over."""
    assert real.text.vocab_size * 4 / 16 >= CAPACITY * 8


def test_the_longest_contexts_are_those_of_the_shapes() -> None:
    published = ModelConfig.from_dict(published_config())
    assert published.text.max_position_embeddings == LONGEST_CONTEXT
    assert {
        kv_bits: sizes.context_bytes(published, LONGEST_CONTEXT, kv_bits) for kv_bits in (None, 8)
    } == LONGEST_CONTEXT_BYTES
