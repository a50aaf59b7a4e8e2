from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages before training on three small shards, in `shards`, `index`, ... of one folder. Only to be read."""
    from commands import run_all

    return run_all(tmp_path_factory.mktemp("stages"))
