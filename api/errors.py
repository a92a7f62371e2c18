"""Errors about what a user handed to the package's face: options, data files, folders.

They extend the tree of ``headrace.offload.errors``; each message is one line that says what was
refused, with its value, and what to do.
"""

from __future__ import annotations

from pathlib import Path

from headrace.offload.errors import HeadraceError


class InputError(HeadraceError, ValueError):
    """An option, a path or a file of the user cannot be used as given.

    >>> import headrace
    >>> try:
    ...     headrace.parse_bytes("12 parsecs", what="the host budget")
    ... except headrace.InputError as error:
    ...     print(error)
    ...
    the host budget is '12 parsecs'; give bytes such as 12GB or 512MiB
    """


class DataError(InputError):
    """A data file cannot be used; ``line`` counts from 1 and is None if no line is to blame.

    >>> from pathlib import Path
    >>> import headrace
    >>> error = headrace.DataError(Path("chats.jsonl"), 7, "is not JSON")
    >>> str(error), error.line
    ('chats.jsonl:7: is not JSON', 7)
    """

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        self.path = path
        self.line = line
        where = f"{path}" if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {reason}")
