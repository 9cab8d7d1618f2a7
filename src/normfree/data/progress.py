"""How far one pass over text is."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

A_MINUTE = 60.0

log = logging.getLogger("normfree")


class TextProgress:
    """One bar; where standard error is no terminal, a line a minute. Neither with `shown=False`."""

    def __init__(self, task: str, *, shown: bool, most_documents: int | None) -> None:
        self._task = task
        self._most = f" of at most {most_documents:,}" if most_documents is not None else ""
        self._bar = tqdm(desc=task, unit="B", unit_scale=True, disable=None if shown else True)
        self._in_lines = shown and self._bar.disable
        self._documents, self._bytes = 0, 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> TextProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, size: int) -> None:
        """One more document, of `size` bytes."""
        self._bar.update(size)
        self._documents += 1
        self._bytes += size
        now = time.monotonic()
        if self._in_lines and now - self._told >= A_MINUTE:
            self._told = now
            log.info(
                "%s: %s%s documents, %.1f MB after %.0f min",
                self._task,
                f"{self._documents:,}",
                self._most,
                self._bytes / 1e6,
                (now - self._began) / 60,
            )
