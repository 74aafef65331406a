"""The files of the console, as answers: all of them are in memory, and no path leads out of the
package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

from entidb import packing
from entidb.server import wire
from entidb.server.wire import ServerResponse

#: Where the page is, and what its files are below.
PAGE: Final = "/console"
#: The page may load its own files and ask its own server. No script or style stands in the page,
#: nothing may frame it, and no text may become markup.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # A new version of the server has new files, and they must fit each other.
    "cache-control": "no-cache",
    "vary": "Accept-Encoding",
}
_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX: Final = "index.html"


class Console:
    """Reads the files once."""

    def __init__(self) -> None:
        self._files = {name: _File(name, data) for name, data in read_files().items()}

    def serves(self, path: str) -> bool:
        return path == PAGE or path.startswith(PAGE + "/")

    def answer(self, path: str, headers: Mapping[str, str]) -> ServerResponse:
        """The file at ``path``; for what is none, the way to the page: 404, or 308 for the page
        with a slash behind it."""
        name = path.removeprefix(PAGE).removeprefix("/")
        if path == PAGE + "/":
            # The addresses in the page are below it, wherever the server is mounted.
            return ServerResponse(308, {"location": "../console", **_HEADERS})
        found = self._files.get(name or _INDEX)
        if found is None or name == _INDEX:
            kind = {"content-type": "text/plain; charset=utf-8"}
            return ServerResponse(404, {**kind, **_HEADERS}, b"the console has no such file\n")
        return found.answer(headers)


class _File:
    def __init__(self, name: str, data: bytes) -> None:
        self._headers = {
            "content-type": _KINDS[name.rpartition(".")[2]],
            "etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
            **_HEADERS,
        }
        self._bodies: dict[str | None, bytes] = {None: data}
        for encoding in packing.ENCODINGS:
            self._bodies[encoding] = packing.compress(encoding, data)

    def answer(self, headers: Mapping[str, str]) -> ServerResponse:
        given = headers.get("if-none-match", "")[:1000]
        if self._headers["etag"] in [each.strip().removeprefix("W/") for each in given.split(",")]:
            return ServerResponse(304, dict(self._headers))
        encoding = wire.accepted_encoding(headers)
        packed = {} if encoding is None else {"content-encoding": encoding}
        return ServerResponse(200, {**self._headers, **packed}, self._bodies[encoding])


def read_files() -> dict[str, bytes]:
    """The files of the page by name, those of a folder with its name and a slash before."""
    found = {}
    root = files(__package__) / "static"
    for each in root.iterdir():
        if each.is_dir():
            found.update({f"{each.name}/{one.name}": one.read_bytes() for one in each.iterdir()})
        else:
            found[each.name] = each.read_bytes()
    return {name: data for name, data in found.items() if name.rpartition(".")[2] in _KINDS}
