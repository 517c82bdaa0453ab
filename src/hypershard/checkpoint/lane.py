"""One action at a time beside the training, and what it met."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Lane:
    """One action at a time, beside the training or in place."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], None], *, in_background: bool) -> None:
        assert not self.is_busy

        def run() -> None:
            try:
                action()
            except Exception as error:  # handed to the training thread, whatever it is
                self._error = error

        if not in_background:
            run()
            return
        # A daemon: a training that failed does not wait for its checkpoint.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> Exception | None:
        """Wait for the action; what it met, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
