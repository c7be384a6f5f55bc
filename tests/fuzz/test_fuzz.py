"""A small slice of the fuzz; `make test-slow` runs more of it, ``python -m tests.fuzz`` as much as wanted."""

from pathlib import Path

import pytest

from tests.fuzz.__main__ import trial
from tests.fuzz.peers import FAMILIES

SLICE = range(900, 900 + len(FAMILIES))
"""One folder of each family."""


@pytest.mark.parametrize("seed", [*SLICE, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1000, 1120))])
@pytest.mark.filterwarnings("ignore")
def test_a_drawn_folder_answers_here_as_there(seed: int, tmp_path: Path) -> None:
    drawn, found = trial(seed, tmp_path / "drawn")
    assert not found, f"seed {seed} ({drawn}): {'; '.join(found)}"
