"""The real server as a process. Arguments: data directory, file of the secret, settings of
``ServerConfig`` as JSON, port (0: a free one), ready file.
"""

from __future__ import annotations

import json
import sys

from entidb.server import ServerConfig, serve


def main(data_dir: str, secret_file: str, settings: str, port: str, ready_file: str) -> None:
    # The access log would measure the terminal; everything else is as it comes.
    given = {"jwt_secret_file": secret_file, "access_log": False} | json.loads(settings)
    serve(ServerConfig(data_dir=data_dir, **given), port=int(port), ready_file=ready_file)


if __name__ == "__main__":
    main(*sys.argv[1:6])
