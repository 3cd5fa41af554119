"""A program with a loop of its own, as every window has one, and the model on a worker thread.

The loop never waits for the model: it polls a queue, redraws, and may cancel at any moment. Swap
the loop below for a GUI toolkit's timer and `redraw` for a label.

python examples/app_worker.py [FOLDER_OR_HUB_ID]
"""

import queue
import sys
import threading
import time

from mlx_dgemma import Commit, Draft, Event, Finish, Runtime

FRAME = 1 / 30


def ask(runtime: Runtime, prompt: str, cancel: threading.Event) -> "queue.Queue[Event]":
    """Starts a reply; its events arrive in the queue."""
    events: queue.Queue[Event] = queue.Queue()

    def work() -> None:
        for event in runtime.stream(prompt, drafts=True, cancel=cancel, seed=1):
            events.put(event)

    threading.Thread(target=work).start()
    return events


def loop(runtime: Runtime, prompt: str, cancel_after_steps: int | None = None) -> Finish:
    """The program's loop: one turn per frame until the reply is over."""
    cancel = threading.Event()
    events = ask(runtime, prompt, cancel)
    frames = steps = 0
    text = ""
    while True:
        frames += 1
        time.sleep(FRAME)  # a toolkit draws its window and handles clicks here
        while not events.empty():
            event = events.get()
            if isinstance(event, Draft):
                steps += 1
                redraw(text, event.draft_text)
                if steps == cancel_after_steps:
                    cancel.set()  # the Stop button
            elif isinstance(event, Commit):
                text += event.text
                redraw(text, "")
            else:
                print(f"\n{event.reason} after {steps} steps and {frames} frames")
                return event


def redraw(text: str, draft: str) -> None:
    line = (text + draft).replace("\n", " ")[-70:]
    print(f"\r{line:<70}", end="", flush=True)


def main() -> None:
    with Runtime(sys.argv[1] if len(sys.argv) > 1 else None) as runtime:
        loop(runtime, "List 4 animals in alphabetical order, starting with cat.")
        loop(
            runtime,
            "List 5 fruits in alphabetical order, starting with cherry.",
            cancel_after_steps=2,
        )


if __name__ == "__main__":
    main()
