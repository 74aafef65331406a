"""The real server as a process. Arguments: data directory, file of the secret, ready file."""

from __future__ import annotations

import sys

from entidb.server import ServerConfig, serve


def main(data_dir: str, secret_file: str, ready_file: str) -> None:
    # The access log would measure the terminal; everything else is as it comes.
    config = ServerConfig(data_dir=data_dir, jwt_secret_file=secret_file, access_log=False)
    serve(config, port=0, ready_file=ready_file)


if __name__ == "__main__":
    main(*sys.argv[1:4])
