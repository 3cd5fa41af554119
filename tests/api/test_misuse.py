"""Arguments of the wrong type, one cache for two requests, a runtime that waits for itself."""

import random
from pathlib import Path

import pytest

from mlx_dgemma import PromptCache, Runtime
from mlx_dgemma.errors import CheckpointError, InputError


def test_misuse_is_an_error_and_no_deadlock(tmp_path: Path) -> None:
    with Runtime() as runtime:
        for waits in (lambda: runtime.generate("a"), lambda: runtime.call(int), runtime.close):
            with pytest.raises(InputError, match="own thread cannot wait"):
                runtime.call(waits)
        for wrong in ({"cache": 3}, {"cancel": True}, {"cache": runtime.model.make_cache()}):
            with pytest.raises(InputError, match="or None, not a"):
                runtime.generate("a", **wrong)
        cache = PromptCache(runtime.model)
        first = runtime.stream("Count from 10 to 99.", cache=cache, canvas_length=8, max_tokens=99)
        next(first)
        with pytest.raises(InputError, match="in use by another request"):
            runtime.generate("Sort: b a", cache=cache)
        first.close()
        path = tmp_path / "context.safetensors"
        again = PromptCache(runtime.model)
        runtime.generate("Sort: b a", cache=again, seed=1, max_tokens=8)
        runtime.call(lambda: again.save(path))
        whole, rng = path.read_bytes(), random.Random(1)
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                runtime.call(lambda: PromptCache.load(path, runtime.model))
