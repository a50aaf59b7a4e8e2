"""What the system refuses, in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlcd_ds.stages.os_errors import FIXES, explain


def caught(action: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as error:
        action()
    return error.value


def test_the_file_and_the_fix_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    long = tmp_path / ("x" * 300)
    for action, path, fix in (
        ((tmp_path / "file" / "below").unlink, tmp_path / "file" / "below", errno.ENOTDIR),
        (tmp_path.read_bytes, tmp_path, errno.EISDIR),
        (loop.read_bytes, loop, errno.ELOOP),
        (long.touch, long, errno.ENAMETOOLONG),
        ((tmp_path / "gone").read_bytes, tmp_path / "gone", errno.ENOENT),
    ):
        message = explain(caught(action))
        assert message and message.startswith(f"{path}: ") and message.endswith(FIXES[fix])
    moved = explain(caught(lambda: os.rename(tmp_path / "gone", tmp_path / "new")))
    assert moved and moved.startswith(f"{tmp_path / 'gone'} -> {tmp_path / 'new'}: ")
    assert "mounted read-only" in (explain(OSError(errno.EROFS, "Read-only file system", "a")) or "")
    assert "sound" in (explain(OSError(errno.EIO, "Input/output error", "a")) or "")


def test_a_full_disk_has_no_name() -> None:
    def fill() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    assert (explain(caught(fill)) or "").startswith("No space left on device. Free the disk")


def test_what_is_about_no_file_is_not_the_users() -> None:
    assert explain(OSError("a library's own")) is None
    assert explain(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None
