"""One message for all ranks: an error that stops them all, such as a mistyped option, is reported by one."""

from __future__ import annotations

import contextlib
import hashlib
from datetime import timedelta

import torch.distributed as dist

LINGER = timedelta(seconds=2)


def is_first_to_tell(message: str) -> bool:
    """Whether no other rank has reported this message yet. True where that cannot be found out."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    key = "told/" + hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        store = dist.distributed_c10d._get_default_store()
        is_first = store.add(key, 1) == 1
        store.set(f"{key}/{dist.get_rank()}", "")
    except RuntimeError:  # rank 0, which holds the store, is gone
        return True
    if dist.get_rank() == 0:  # where all stop for the same reason, the others ask within moments
        with contextlib.suppress(RuntimeError):
            store.wait([f"{key}/{rank}" for rank in range(dist.get_world_size())], LINGER)
    return is_first
