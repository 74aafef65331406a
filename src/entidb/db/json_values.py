"""Entity values as JSON. What JSON cannot express are byte strings: they are written as a map with
the one key ``$bytes`` and base64 (RFC 4648, section 4); a map that really looks like that gets one
more ``$``, so that every value survives the way out and back:

    b"\\x01"              <->  {"$bytes": "AQ=="}
    {"$bytes": "hello"}  <->  {"$$bytes": "hello"}

The way back is the command line's (``cli.values``).
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Final

BYTES: Final = "$bytes"
ESCAPED: Final = re.compile(r"\$+bytes")


def dump(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON in UTF-8's whole range, without the byte-string rule applied twice."""
    separators = None if indent else (",", ":")
    return json.dumps(_with_bytes(value), ensure_ascii=False, indent=indent, separators=separators)


def _with_bytes(value: Any) -> Any:
    if isinstance(value, bytes):
        return bytes_only(value)
    if isinstance(value, list):
        return [_with_bytes(item) for item in value]
    if isinstance(value, dict):
        made = {name: _with_bytes(item) for name, item in value.items()}
        if len(made) == 1 and ESCAPED.fullmatch(next(iter(made))):
            return {f"${name}": item for name, item in made.items()}
        return made
    return value


def bytes_only(value: Any) -> Any:
    """What the standard encoder calls for a type that it does not know, which is bytes alone."""
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return {BYTES: base64.b64encode(value).decode()}


__all__ = ["BYTES", "ESCAPED", "bytes_only", "dump"]
