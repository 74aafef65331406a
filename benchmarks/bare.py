"""HTTP with nothing behind it, as a process: the same server library, an app that only answers.

``PUT /`` says what every later ``POST`` is answered with. Run with the file to write the port to.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

from entidb.protocol import CONTENT_TYPE

_answer = [b""]


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["method"] == "PUT":
        _answer[0] = b"".join(parts)
    headers = [
        (b"content-type", CONTENT_TYPE.encode()),
        (b"content-length", b"%d" % len(_answer[0])),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _answer[0]})


def main(ready_file: str) -> None:
    bound = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(
        app, interface="asgi3", lifespan="off", ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}\n"
        temporary = Path(ready_file + ".new")
        temporary.write_text(url)
        temporary.replace(ready_file)
        await serving

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main(sys.argv[1])
