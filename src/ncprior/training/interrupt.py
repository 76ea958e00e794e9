"""Ctrl-C as a request that is met between two steps."""

import signal
import threading
from types import FrameType
from typing import Self


class Interrupt:
    """Within the block SIGINT and SIGTERM set `asked`; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._previous[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)  # type: ignore[arg-type]

    def _note(self, _: int, __: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
