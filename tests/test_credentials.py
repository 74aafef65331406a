"""Files with a secret or a token, as people, shells and editors really make them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from entidb.credentials import (
    exposure,
    read_credential,
    read_token,
    why_unreadable,
    write_credential,
)
from entidb.errors import ConfigError, EntiDBError

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
TOKEN = "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "credential"
    path.touch(mode=0o600)
    return path


@pytest.mark.parametrize(
    "data",
    [
        TOKEN.encode(),
        TOKEN.encode() + b"\n",
        TOKEN.encode() + b"\r\n\r\n",
        b"  " + TOKEN.encode() + b"\t",
        b"\xef\xbb\xbf" + TOKEN.encode() + b"\r\n",
    ],
)
def test_a_token_is_read_without_its_mark_and_whitespace(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert read_token(file) == TOKEN
    assert read_credential(file, "secret file") == TOKEN.encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TOKEN.encode("utf-16"), "UTF-16"),
        (b"\xfe\xff" + TOKEN.encode("utf-16-be"), "UTF-16"),
        (TOKEN.encode("utf-16-le"), "UTF-16"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"Bearer " + TOKEN.encode(), '"Bearer"'),
        (b"Authorization: Bearer " + TOKEN.encode(), "more than one word"),
        (TOKEN.encode() + b"\n" + TOKEN.encode(), "more than one word"),
        ("tökén".encode(), "visible ASCII"),
        (b"\xff\x80\x81", "visible ASCII"),
        (b"x" * 70_000, "larger than"),
    ],
)
def test_what_is_no_token_is_named_and_not_repeated(file: Path, data: bytes, said: str) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as caught:
        read_token(file)
    assert str(file) in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", ".", "nul\0byte"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_credential(f"{tmp_path}/{name}", "secret file")


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.EACCES, "; check owner and mode"),
        (errno.ENOENT, "; check the path"),
        (errno.EMFILE, "; raise the limit of open files"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_with_what_to_do(number: int, todo: str) -> None:
    assert why_unreadable(OSError(number, os.strerror(number))).startswith(
        os.strerror(number) + todo
    )


@posix
@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)]
)
def test_who_else_can_read_is_warned_of(file: Path, mode: int, warned: bool) -> None:
    file.write_text(TOKEN)
    file.chmod(mode)
    warning = exposure(file, "token file")
    assert (warning is not None) is warned
    assert warning is None or f"chmod 600 {file}" in warning
    assert read_token(file) == TOKEN


@posix
def test_a_file_that_everybody_can_write_is_refused(file: Path) -> None:
    file.write_text(TOKEN)
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="every user of this machine can write"):
        read_token(file)


def test_nothing_is_warned_of_where_there_is_no_file(tmp_path: Path) -> None:
    assert exposure(tmp_path / "none", "token file") is None


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_credential_never_takes_the_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for place in (pipe, link, tmp_path):
        with pytest.raises(ConfigError, match="is no file and stays as it is"):
            write_credential(place, TOKEN, replace=True)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_credential_never_takes_the_place_of_a_database(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"entities")
    for name in ("data.mdb", "token"):
        with pytest.raises(ConfigError, match="would be inside the database"):
            write_credential(tmp_path / name, TOKEN, replace=True)
    assert (tmp_path / "data.mdb").read_bytes() == b"entities"
    assert os.listdir(tmp_path) == ["data.mdb"]


def test_a_credential_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    before = os.umask(0)
    try:
        write_credential(path, TOKEN, replace=False)
    finally:
        os.umask(before)
    assert read_token(path) == TOKEN
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        write_credential(path, "other", replace=False)
    assert read_token(path) == TOKEN
    write_credential(path, "other", replace=True)
    assert read_token(path) == "other"
    assert os.listdir(tmp_path) == ["token"]
    with pytest.raises(ConfigError, match="cannot write"):
        write_credential(tmp_path / "none" / "token", TOKEN, replace=True)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, "storage_full", "free space"),
        (errno.EDQUOT, "storage_full", "free space"),
        (errno.EIO, "storage_error", "check the disk"),
        (errno.EACCES, "invalid_config", "that you may write to"),
    ],
)
def test_a_credential_that_a_disk_stops_says_what_helps_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, says: str
) -> None:
    """Also the last of its steps: one that was there was in the way of the next try."""

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EntiDBError, match=says) as raised:
        write_credential(tmp_path / "secret", "word", replace=False)
    assert raised.value.code == code
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    write_credential(tmp_path / "secret", "word", replace=False)
