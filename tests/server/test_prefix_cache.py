"""Contexts shared by conversations and kept on disk: what is reused, and that nobody can tell."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.context import disk_cache
from mlx_dgemma.context.disk_cache import DiskCache
from mlx_dgemma.context.prefix_cache import LEAST, PrefixCache, SharedContext
from mlx_dgemma.decoding.events import Commit
from mlx_dgemma.demo.tasks.pictures import Picture
from mlx_dgemma.demo.tasks.tools import DECLARATIONS
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import prepare_prompt, stream_generate
from mlx_dgemma.prompt import encode_messages
from mlx_dgemma.prompt.media import PreparedPrompt

from .conftest import tokenizer

TOOLS = list(DECLARATIONS.values())
SYSTEM = {"role": "system", "content": "Answer briefly, in English, and never guess a number."}
LARGE = 1 << 30


@pytest.fixture(scope="module")
def owner() -> Any:
    model, tokens = load()
    return SimpleNamespace(model=model, tokenizer=tokens)


def ask(question: str, *turns: dict[str, Any]) -> list[int]:
    messages = [SYSTEM, {"role": "user", "content": question}, *turns]
    return encode_messages(tokenizer(), messages, tools=TOOLS)


def run(
    store: PrefixCache, prompt: list[int] | PreparedPrompt, **options: Any
) -> tuple[SharedContext, list[int]]:
    """The context a request used, and the ids it committed."""
    context = store.lease()
    assert context is not None
    quick = {"max_tokens": 8, "max_denoising_steps": 2, "canvas_length": 8, "seed": 1}
    events = stream_generate(
        store.owner.model, store.owner.tokenizer, prompt, cache=context, **quick, **options
    )
    ids = [id_ for event in events if isinstance(event, Commit) for id_ in event.ids]
    return context, ids


def assert_same(one: SharedContext, other: SharedContext) -> None:
    """Bit by bit."""
    ours, theirs = one.cache.freeze(), other.cache.freeze()
    assert ours.offset == theirs.offset
    for mine, yours in zip(ours.tails, theirs.tails, strict=True):
        assert mine[0] == yours[0]
        assert mine[1] is not None
        assert yours[1] is not None
        assert all(mx.array_equal(a, b) for a, b in zip(mine[1], yours[1], strict=True))


@given(st.lists(st.sampled_from([*range(13, 17), 100, 200]), max_size=200), st.integers(0, 200))
def test_prompts_that_begin_the_same_are_divided_the_same(keys: list[int], length: int) -> None:
    store = PrefixCache(SimpleNamespace(model=None, tokenizer=tokenizer()), LARGE)
    whole = store.divisions(keys)
    assert store.divisions(keys[:length]) == [at for at in whole if at < length]
    assert all(b - a >= LEAST for a, b in zip([0, *whole], whole, strict=False))


def test_another_conversation_begins_from_the_system_prompt(owner: Any) -> None:
    store = PrefixCache(owner, LARGE)
    run(store, ask("What is the weather in Oslo?"))
    second = ask("What time is it in Rome?")
    reused, ids = run(store, second)
    first_turn = store.divisions(second)[0]
    assert reused.cached_tokens == first_turn > 100
    assert tokenizer().decode(second[first_turn:][:3]).startswith("<|turn>user")
    fresh, expected = run(PrefixCache(owner, LARGE), second)
    assert fresh.cached_tokens == 0
    assert ids == expected
    assert_same(reused, fresh)


def test_a_conversation_goes_on_from_its_last_turn(owner: Any) -> None:
    store = PrefixCache(owner, LARGE)
    question = "What is the weather in Oslo, and how is it in Rome and in Paris? " * 3
    opening = ask(question)
    run(store, opening)
    more = [{"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And Bern?"}]
    following = ask(question, *more)
    reused, ids = run(store, following)
    assert reused.cached_tokens == store.divisions(opening)[-1] > len(opening) - 8
    fresh, expected = run(PrefixCache(owner, LARGE), following)
    assert ids == expected
    assert_same(reused, fresh)


def loop(*cities: str) -> list[int]:
    """A tool loop with one finished call per city."""
    turns: list[dict[str, Any]] = []
    for number, city in enumerate(cities):
        function = {"name": "get_weather", "arguments": {"city": city}}
        call = {"id": str(number), "type": "function", "function": function}
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        report = f"{number} degrees and rather windy, with some rain towards the evening"
        turns.append({"role": "tool", "tool_call_id": str(number), "content": report})
    return ask("How is the weather in these cities?", *turns)


def test_a_tool_loop_goes_on_from_its_very_end(owner: Any) -> None:
    store = PrefixCache(owner, LARGE)
    one, two = loop("Oslo"), loop("Oslo", "Rome")
    run(store, one)
    reused, ids = run(store, two)
    assert reused.cached_tokens == len(one)
    fresh, expected = run(PrefixCache(owner, LARGE), two)
    assert ids == expected
    assert_same(reused, fresh)


def test_what_two_conversations_share_is_learned(owner: Any) -> None:
    """A document both begin with lies after the first division; the third one profits."""
    store = PrefixCache(owner, LARGE)
    text = "Here is a long story about a king and a garden. " * 4
    told = [{"role": "assistant", "content": "I have read it, and now I know it by heart. " * 3}]
    asked = [{"role": "user", "content": f"Question {n}: " + "what then? " * 12} for n in range(3)]
    prompts = [ask(text, *told, question) for question in asked]
    cached = [run(store, prompt)[0].cached_tokens for prompt in prompts]
    first, _, told_at, _ = store.divisions(prompts[2])
    assert cached == [0, first, told_at]


def test_a_picture_is_shared_by_what_it_shows(owner: Any) -> None:
    """Pictures of one size have the same placeholders; another picture is another context."""

    def about(color: str, question: str) -> PreparedPrompt:
        turn = [{"type": "image", "image": Picture("circle", color, "in the center").draw()}]
        turn += [{"type": "text", "text": question}]
        answered = [{"role": "user", "content": turn}, {"role": "assistant", "content": "red"}]
        last = {"role": "user", "content": "Where is the shape?"}
        return prepare_prompt(owner.model, owner.tokenizer, [SYSTEM, *answered, last])

    store, question = PrefixCache(owner, LARGE), "What color is the shape?"
    first, other = about("red", question), about("blue", question)
    assert first.ids == other.ids
    run(store, first)
    shared, ids = run(store, about("red", question))
    apart, _ = run(store, other)
    picture = first.ids.index(owner.model.config.image_token_id)
    assert apart.cached_tokens <= picture < shared.cached_tokens
    fresh, expected = run(PrefixCache(owner, LARGE), first)
    assert ids == expected
    assert_same(shared, fresh)


def test_the_least_recently_used_goes_first(owner: Any) -> None:
    one = PrefixCache(owner, LARGE)
    run(one, ask("What is the weather in Oslo?"))
    store = PrefixCache(owner, one.nbytes)
    run(store, ask("What is the weather in Oslo?"))
    assert 0 < store.nbytes <= one.nbytes
    other = encode_messages(tokenizer(), [{"role": "user", "content": "Reverse: " + "ab " * 40}])
    run(store, other)
    assert 0 < store.nbytes <= one.nbytes
    assert run(store, other)[0].cached_tokens > 0


def test_nothing_is_kept_without_memory(owner: Any) -> None:
    assert PrefixCache(owner, 0).lease() is None


def test_the_disk_outlives_the_server(owner: Any, tmp_path: Path) -> None:
    prompt = ask("What is the weather in Oslo?")
    before = PrefixCache(owner, LARGE, DiskCache(tmp_path / "cache", LARGE))
    run(before, prompt)
    assert list(before.flush())
    after = PrefixCache(owner, LARGE, DiskCache(tmp_path / "cache", LARGE))
    reused, ids = run(after, prompt)
    assert reused.cached_tokens == after.divisions(prompt)[-1]
    fresh, expected = run(PrefixCache(owner, LARGE), prompt)
    assert ids == expected
    assert_same(reused, fresh)
    files = list((tmp_path / "cache").iterdir())
    assert files
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


@pytest.mark.parametrize("damage", ["version", "model", "bytes"])
def test_what_cannot_be_trusted_is_read_afresh(
    owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    prompt = ask("What is the weather in Oslo?")
    before = PrefixCache(owner, LARGE, DiskCache(tmp_path, LARGE))
    run(before, prompt)
    list(before.flush())
    if damage == "version":
        monkeypatch.setattr(disk_cache, "__version__", "another")
    elif damage == "model":
        monkeypatch.setattr(owner.model, "_fingerprint", "another")
    else:
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes()[:-100])
    context, _ = run(PrefixCache(owner, LARGE, DiskCache(tmp_path, LARGE)), prompt)
    assert context.cached_tokens == 0


def test_the_directory_has_a_limit_too(owner: Any, tmp_path: Path) -> None:
    store = PrefixCache(owner, LARGE)
    for city in ("Oslo", "Rome", "Paris"):
        run(store, ask(f"What is the weather in {city}? " * 8))
    limit = store.nbytes // 2
    store.disk = DiskCache(tmp_path, limit)
    written = sum(1 for _ in store.flush())
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert 0 < len(sizes) < written
    assert sum(sizes) <= limit


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept in"):
        DiskCache(tmp_path / "file" / "below", LARGE)


def test_contexts_in_8_bits_are_shared_and_kept_apart(owner: Any, tmp_path: Path) -> None:
    """In memory and on disk, bit by bit; what another server keeps exactly is no concern."""
    first, second = ask("What is the weather in Oslo?"), ask("What time is it in Rome?")

    def store(kv_bits: int | None, folder: str = "") -> PrefixCache:
        disk = DiskCache(tmp_path / folder, LARGE) if folder else None
        return PrefixCache(owner, LARGE, disk, kv_bits)

    exact, packed = store(None, "both"), store(8, "both")
    for kept in (exact, packed):
        run(kept, first)
        list(kept.flush())
    assert packed.nbytes < exact.nbytes
    fresh, expected = run(store(8), second)
    assert fresh.cache.kv_bits == 8
    for begun in (packed, store(8, "both")):
        reused, ids = run(begun, second)
        assert reused.cached_tokens > 100
        assert ids == expected
        assert_same(reused, fresh)


def test_a_directory_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    directory = tmp_path / "contexts"
    directory.mkdir()
    directory.chmod(0o777)
    DiskCache(directory, 1 << 20)
    assert directory.stat().st_mode & 0o777 == 0o700
