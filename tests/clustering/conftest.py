from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mlcd_ds.distributed.collectives import Group


@pytest.fixture(scope="module")
def lone_group() -> Iterator[Group]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD)
    dist.destroy_process_group()
