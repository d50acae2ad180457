"""One cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest
from helpers.slurm import Cluster, two_nodes


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_nodes(tmp_path_factory.mktemp("slurm")) as found:
        yield found
