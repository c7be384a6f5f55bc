"""One server for all tests of this folder that do not need one of their own."""

import pytest

from tests.serving.helpers import on_port


@pytest.fixture(scope="session")
def served():
    with on_port() as found:
        yield found
