"""From the model's thread to asyncio: what one thread delivers, another's event loop awaits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

# Takes every item, an exception that ends the work, and None at the end.
Deliver = Callable[[Any], None]


async def arrivals(
    start: Callable[[Deliver], object], cancel: threading.Event
) -> AsyncGenerator[Any, None]:
    """Yields what the work delivers that `start` begins on another thread.

    An exception that is delivered is raised here. Leaving the generator before its end sets
    `cancel`, which the work must heed.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Any] = asyncio.Queue()

    def deliver(item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended before the work did
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    start(deliver)
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, BaseException):
                break
            yield item
    except BaseException:  # the reader leaves
        cancel.set()
        raise
    if item is not None:
        raise item
