"""Decisions on the demo: one pass beside generating, a state asked again, and many clients.

python studies/decisions.py --n 200     # answers of one letter: read by one pass, and generated
python studies/decisions.py --cache     # the first and the second question about a long state
python studies/decisions.py --clients   # 50 clients of POST /v1/systemone at once

The demo was not trained on the forms that `decide` writes. It knows one task whose answers are one
token: which letter of a few comes first or last in the alphabet. Its held-out prompts are read as
`decide` reads (a canvas pinned but for one place of noise, four noises, the softmax of the labels'
logits), in the prompt's own words.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np


def read_beside_generation(n: int, width: int) -> dict[str, Any]:
    from mlx_dgemma import load
    from mlx_dgemma.demo.tasks import held_out

    model, tokenizer = load()
    examples = [e for e in held_out("think", 5 * n) if not e.enable_thinking][:n]
    rows = []
    for number, example in enumerate(examples):
        prompt = example.messages[0]["content"]
        found = re.search(r"[A-Z]{4,}", prompt)
        assert found is not None
        letters = sorted(found.group())
        started, cpu = time.perf_counter(), time.process_time()
        p = read(model, tokenizer, prompt, letters, width, number)
        read_ms = 1000 * (time.perf_counter() - started), 1000 * (time.process_time() - cpu)
        started, cpu = time.perf_counter(), time.process_time()
        text, passes = generated(model, tokenizer, prompt, number)
        ms = 1000 * (time.perf_counter() - started), 1000 * (time.process_time() - cpu)
        right = letters.index(example.reply)
        rows.append((p, right, text == example.reply, passes, read_ms, ms))
    sure = np.array([p.max() for p, *_ in rows])
    hit = np.array([p.argmax() == right for p, right, *_ in rows])
    brier = np.mean([((p - np.eye(len(p))[right]) ** 2).sum() for p, right, *_ in rows])
    return {
        "n": len(rows), "width": width,
        "one pass": {"right": float(hit.mean()), "Brier": float(brier), "ECE": ece(sure, hit),
                     "passes": 1, "ms median": median(rows, 4, 0), "CPU ms": median(rows, 4, 1)},
        "generated": {"right": float(np.mean([row[2] for row in rows])),
                      "passes": float(np.mean([row[3] for row in rows])),
                      "ms median": median(rows, 5, 0), "CPU ms": median(rows, 5, 1)},
    }  # fmt: skip


def median(rows: list[Any], column: int, part: int) -> float:
    return round(float(np.median([row[column][part] for row in rows])), 1)


def read(
    model: Any, tokenizer: Any, prompt: str, labels: list[str], width: int, seed: int
) -> np.ndarray:
    """float64 [labels]: the mean of four noises at the reply's first place."""
    from mlx_dgemma.decisions.label_passes import NOISES
    from mlx_dgemma.decoding.draws import Place, SeededDraws
    from mlx_dgemma.generate import encode_prompt

    context = model.make_cache()
    model.prefill(np.array(encode_prompt(tokenizer, prompt))[None], context)
    form = [0, tokenizer.ids["eot"], *[tokenizer.ids["eos"]] * (width - 2)]
    canvas = mx.array(np.tile(np.array(form, dtype=np.int32), (NOISES, 1)))
    noise = SeededDraws(seed).canvas(Place(0, 0, 0), NOISES, model.config.text.vocab_size)
    canvas[:, 0] = noise
    hidden = model.hidden(canvas, context)[:, 0]
    ids = mx.array([tokenizer.encode(label)[0] for label in labels])
    logits = model.softcap(hidden @ model.embedding_matrix.take(ids).T)
    shares: np.ndarray = np.array(mx.softmax(logits, axis=-1)).astype(np.float64).mean(axis=0)
    return shares


def generated(model: Any, tokenizer: Any, prompt: str, seed: int) -> tuple[str, int]:
    from mlx_dgemma import stream_generate

    *events, finish = stream_generate(model, tokenizer, prompt, seed=seed)
    return "".join(event.text for event in events).strip(), sum(finish.steps_per_block)


def ece(sure: np.ndarray, hit: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width."""
    at = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [(at == b).mean() * abs(sure[at == b].mean() - hit[at == b].mean())
            for b in range(bins) if (at == b).any()]  # fmt: skip
    return float(np.sum(gaps))


STATE = "The customer writes: I was charged twice for order 4471. " * 40
ASKED = {"money": {"type": "noul", "instructions": "Does the writer want money back?"}}


def asked_again() -> dict[str, Any]:
    from mlx_dgemma import Noul, PromptCache, decide, load

    model, tokenizer = load()
    decide(model, tokenizer, "x", {"q": Noul("Is it?")})  # reads the weights
    cache, rows = PromptCache(model), []
    for question in ("Does the writer want money back?", "Is the writer angry?"):
        cpu = time.process_time()
        found = decide(model, tokenizer, STATE, {"q": Noul(question)}, cache=cache)
        rows.append({"prompt tokens": found.prompt_tokens, "cached": found.cached_tokens,
                     "passes": found.forwards, "seconds": round(found.seconds, 2),
                     "CPU s": round(time.process_time() - cpu, 2)})  # fmt: skip
    return {"first": rows[0], "second": rows[1]}


def clients(count: int = 50) -> dict[str, Any]:
    from starlette.testclient import TestClient

    from mlx_dgemma import Runtime
    from mlx_dgemma.server.app import create_app
    from mlx_dgemma.server.settings import ServerSettings

    def ask(client: Any, number: int) -> tuple[int, float, Any]:
        started = time.perf_counter()
        reply = client.post(
            "/v1/systemone", json={"state": f"Order {number % 5}.", "questions": ASKED}
        )
        return reply.status_code, time.perf_counter() - started, reply.json().get("answers")

    settings = ServerSettings(max_waiting=count)
    with TestClient(create_app(Runtime(), settings), base_url="http://127.0.0.1") as client:
        alone = [ask(client, number)[2] for number in range(5)]
        started, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(count) as pool:
            rows = list(pool.map(lambda number: ask(client, number), range(count)))
        wall = time.perf_counter() - started
    seconds = np.array([row[1] for row in rows])
    return {
        "clients": count,
        "answered": sum(row[0] == 200 for row in rows),
        "as alone": sum(row[2] == alone[n % 5] for n, row in enumerate(rows)),
        "seconds, all": round(wall, 1),
        "CPU s": round(time.process_time() - cpu, 1),
        "median": round(float(np.median(seconds)), 1),
        "slowest": round(float(seconds.max()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--clients", action="store_true")
    arguments = parser.parse_args()
    if arguments.cache:
        print(json.dumps(asked_again()))
    elif arguments.clients:
        print(json.dumps(clients()))
    else:
        for width in (16, 32):
            print(json.dumps(read_beside_generation(arguments.n, width)), flush=True)


if __name__ == "__main__":
    main()
