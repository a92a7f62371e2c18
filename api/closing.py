"""Closing behind an error: the error that ended the body stays the one that is raised.

Frames of an error keep their variables alive, views of slabs among them, which then cannot be
given back.  ``ClosedAfter`` drops those variables first, and an error of the closing itself becomes
a note on the error that came before it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self, final


@final
class ClosedAfter:
    """Call ``close`` behind a ``with`` body, however that ends.

    >>> with ClosedAfter(lambda: print("closed")):
    ...     print("at work")
    at work
    closed
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._close()
            return
        _drop_variables(error)
        try:
            self._close()
        except Exception as second:  # noqa: BLE001 - reported, as a note on the first
            error.add_note(f"closing failed behind it: {type(second).__name__}: {second}")


def _drop_variables(error: BaseException) -> None:
    """Clear the ended frames of an error and of those it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]
