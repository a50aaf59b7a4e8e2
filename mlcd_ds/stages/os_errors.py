"""What the operating system refuses, in words for the user: the file, what is wrong with it, and the fix."""

from __future__ import annotations

import errno
import os

_PERMISSION = "Let this user read (and for outputs write) it and its folders, or name another path."
_FULL = "Free the disk, or write somewhere else; the same command goes on."
FIXES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "It is mounted read-only: write somewhere else.",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EISDIR: "A folder stands where a file is wanted: name the file, or move the folder away.",
    errno.ENOTDIR: "A file stands where a folder is wanted: name the folder, or move the file away.",
    errno.EEXIST: "Move it away, or write somewhere else.",
    errno.ENOENT: "It was moved or removed, or is not mounted on this machine: put it back, or name another path.",
    errno.ELOOP: "Its symbolic links lead in a circle: remove them.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
}


def explain(error: OSError) -> str | None:
    """A message for an error that is about a file or a full disk; None for others, which are not the user's."""
    if error.filename is None:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write does not say to which file
        return f"{error.strerror}. {_FULL}" if is_full else None
    names = (error.filename, error.filename2)
    files = [os.fsdecode(name) for name in names if isinstance(name, (str, bytes, os.PathLike))]
    fix = FIXES.get(error.errno or 0, "Look whether the path and its file system are sound, or name another.")
    return f"{' -> '.join(files)}: {error.strerror}. {fix}"
