"""A window that draws the canvas while it resolves: a Runtime under tkinter.

The window's loop never waits for the model. `Runtime.submit` calls back on the model's thread,
the callback fills a queue, and the window empties it thirty times a second.

python examples/window.py [FOLDER_OR_HUB_ID]
"""

import queue
import sys
import threading
import tkinter as tk
from typing import Any

from mlx_dgemma import Commit, Draft, Finish, Runtime

FRAME = 33  # milliseconds
GREYS = ("#1c1b22", "#55535f", "#8b8995", "#b9b7c0")  # sure to unsure


class Window:
    """A line to ask, the answer so far, and the canvas behind it."""

    def __init__(self, root: tk.Tk, runtime: Runtime) -> None:
        self.root, self.runtime = root, runtime
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
        self.answer = ""
        self.button["text"] = "Stop"
        self.cancel = self.runtime.submit(self.entry.get(), self.arrived.put, drafts=True)

    def poll(self) -> None:
        while not self.arrived.empty():
            self.show(self.arrived.get())
        self.root.after(FRAME, self.poll)

    def show(self, event: Any) -> None:
        if event is None:  # the request is over, however it ended
            self.cancel = None
            self.button["text"] = "Ask"
        elif isinstance(event, BaseException):
            self.status["text"] = str(event)
        elif isinstance(event, Draft):
            sure = min(int(event.entropy.mean() * 4), len(GREYS) - 1)
            self.draw(event.draft_text, f"level{sure}")
            self.status["text"] = f"block {event.block + 1}, step {event.step}"
        elif isinstance(event, Commit):
            self.answer += event.text
            self.draw()
        elif isinstance(event, Finish):
            self.status["text"] = f"{event.reason}: seed {event.seed}, {event.blocks} blocks"

    def draw(self, draft: str = "", tag: str = "") -> None:
        """The answer in ink, and a draft behind it, the fainter the less sure."""
        self.text.delete("1.0", "end")
        self.text.insert("end", self.answer)
        self.text.insert("end", draft, tag)

    def close(self) -> None:
        if self.cancel is not None:
            self.cancel.set()
        self.root.destroy()


def main() -> None:
    with Runtime(sys.argv[1] if len(sys.argv) > 1 else None) as runtime:
        root = tk.Tk()
        Window(root, runtime)
        root.mainloop()


if __name__ == "__main__":
    main()
