from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Rank processes, kept for the session."""
    made = Ranks()
    yield made
    made.close()


@pytest.fixture
def on_ranks(ranks: Ranks) -> Callable[..., list[Any]]:
    """Call it with (world_size, function, *args, limit_s=60): runs a module-level function on every rank."""
    return ranks.run
