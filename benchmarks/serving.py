"""The real server as a process. Arguments: data directory, file of the secret, number of workers,
entities from which on a database has an image (empty: as it comes), ready file.
"""

from __future__ import annotations

import sys
from typing import Any

from entidb.server import ServerConfig, serve


def main(
    data_dir: str, secret_file: str, workers: str, segments_min_entities: str, ready_file: str
) -> None:
    # The access log would measure the terminal; everything else is as it comes.
    settings: dict[str, Any] = {"jwt_secret_file": secret_file, "access_log": False}
    if workers != "1":  # older versions, which are compared with this one, do not know of it
        settings["workers"] = int(workers)
    if segments_min_entities:
        settings["segments_min_entities"] = int(segments_min_entities)
    config = ServerConfig(data_dir=data_dir, **settings)
    serve(config, port=0, ready_file=ready_file)


if __name__ == "__main__":
    main(*sys.argv[1:6])
