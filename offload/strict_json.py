"""JSON from files that may be hostile: no duplicate keys, no NaN, no deep nesting.  No torch."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.200} appears twice")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes) -> Any:
    """Return the value that UTF-8 JSON text holds; a ``ValueError`` says what is wrong with it.

    >>> parse_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
