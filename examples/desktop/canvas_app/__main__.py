"""A window that draws the canvas while it resolves: a Runtime under tkinter.

The window's loop never waits for the model. `Runtime.submit` calls back on the model's thread,
the callback fills a queue, and the window empties it thirty times a second. A line with holes is
filled instead of answered: "the small cat <hole:1> the dog".

    cd examples/desktop && python -m canvas_app [--model MODEL] [TEXT]

TEXT is asked at once; with --close the window prints what came of it and closes.
"""

import argparse
import queue
import threading
import tkinter as tk
from collections.abc import Sequence
from typing import Any

from mlx_dgemma import Commit, Draft, Finish, Infill, Runtime
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.infilling import infill_turns

FRAME = 33  # milliseconds
GREYS = ("#1c1b22", "#55535f", "#8b8995", "#b9b7c0")  # sure to unsure


class Window:
    """A line to ask or to fill, the answer so far, and the canvas behind it.

    ended: called whenever a request is over.
    """

    def __init__(self, root: tk.Tk, runtime: Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.answer = ""
        self.closed = False
        self.ended = lambda: None
        self.arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.cancel: threading.Event | None = None
        root.title("DiffusionGemma")
        self.entry = tk.Entry(root, font="TkTextFont")
        self.entry.insert(0, "Count from 3 to 9.")
        self.entry.bind("<Return>", lambda _: self.ask())
        self.button = tk.Button(root, text="Ask", command=self.ask)
        self.text = tk.Text(root, width=60, height=12, wrap="word", padx=8, pady=8)
        self.status = tk.Label(root, anchor="w")
        self.entry.grid(row=0, column=0, sticky="ew", padx=8, pady=8)
        self.button.grid(row=0, column=1, padx=8)
        self.text.grid(row=1, column=0, columnspan=2, sticky="nsew")
        self.status.grid(row=2, column=0, columnspan=2, sticky="ew", padx=8)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(1, weight=1)
        for level, colour in enumerate(GREYS):
            self.text.tag_configure(f"level{level}", foreground=colour)
        root.protocol("WM_DELETE_WINDOW", self.close)
        self.poll()

    def ask(self) -> None:
        """Asks, or stops the answer that is on its way."""
        if self.cancel is not None:
            self.cancel.set()
            return
        self.answer, text = "", self.entry.get()
        self.button["text"] = "Stop"
        if "<hole" in text:
            self.fill(text)
        else:
            self.cancel = self.runtime.submit(text, self.arrived.put, drafts=True)

    def fill(self, text: str) -> None:
        """Fills the holes of a text on the model's thread; the window goes on."""
        self.cancel = threading.Event()
        try:
            turns = infill_turns(
                self.runtime.model, self.runtime.tokenizer, text, cancel=self.cancel
            )
        except DGemmaError as error:  # such as a hole of no length
            self.arrived.put(error)
            self.arrived.put(None)
        else:
            self.runtime.take_turns(turns, self.arrived.put, self.cancel)

    def poll(self) -> None:
        while not self.arrived.empty():
            self.show(self.arrived.get())
        if not self.closed:
            self.root.after(FRAME, self.poll)

    def show(self, event: Any) -> None:
        if event is None:  # the request is over, however it ended
            self.cancel = None
            self.button["text"] = "Ask"
            self.ended()
        elif isinstance(event, BaseException):
            self.status["text"] = str(event)
        elif isinstance(event, Draft):
            sure = min(int(event.entropy.mean() * 4), len(GREYS) - 1)
            self.draw(event.draft_text, f"level{sure}")
            self.status["text"] = f"block {event.block + 1}, step {event.step}"
        elif isinstance(event, Commit):
            self.answer += event.text
            self.draw()
        elif isinstance(event, int):  # decoder passes that filling has taken so far
            self.status["text"] = f"{event} passes"
        elif isinstance(event, Infill):
            self.answer = event.text
            self.draw()
            self.status["text"] = f"filled: seed {event.seed}, {event.forwards} passes"
        elif isinstance(event, Finish):
            self.status["text"] = f"{event.reason}: seed {event.seed}, {event.blocks} blocks"

    def draw(self, draft: str = "", tag: str = "") -> None:
        """The answer in ink, and a draft after it, the fainter the less sure."""
        self.text.delete("1.0", "end")
        self.text.insert("end", self.answer)
        self.text.insert("end", draft, tag)

    def close(self) -> None:
        if self.cancel is not None:
            self.cancel.set()
        self.closed = True
        self.root.destroy()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="canvas_app")
    parser.add_argument("text", nargs="*", help="asked or filled at once, one after the other")
    parser.add_argument("--model", help="a folder or a Hub id (default: the bundled demo)")
    parser.add_argument("--close", action="store_true", help="print what came of it, and close")
    arguments = parser.parse_args(argv)
    waiting = list(arguments.text)
    try:
        root = tk.Tk()  # first: without a display no model is loaded
    except tk.TclError as error:
        parser.exit(2, f"canvas_app: there is no window: {error}\n")
    root.withdraw()  # until there is something to ask
    try:
        runtime = Runtime(arguments.model)
    except DGemmaError as error:
        parser.exit(2, f"canvas_app: {error}\n")
    with runtime:
        window = Window(root, runtime)
        root.deiconify()

        def following() -> None:
            """Prints the answer and asks the next text; closes after the last, with --close."""
            if window.answer:
                print(window.answer, flush=True)
            if waiting:
                window.entry.delete(0, "end")
                window.entry.insert(0, waiting.pop(0))
                window.ask()
            elif arguments.close:
                window.close()

        window.ended = following
        root.after(0, following)
        root.mainloop()


if __name__ == "__main__":
    main()
