"""Models that come with the package: one folder each beside this file, written by ``tools/pack_weights.py``."""

from pathlib import Path

from isthmus.errors import CheckpointError, nearest

SCHEME = "isthmus:"
FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The models that this installation holds, for example ``llava``."""
    return sorted(f.parent.name for f in FOLDER.glob("*/config.json"))


def shipped(name: str) -> Path:
    """The folder of ``isthmus:NAME``. Raises CheckpointError when this installation has no such model."""
    wanted, known = name.removeprefix(SCHEME), names()
    if wanted in known:
        return FOLDER / wanted
    if not known:
        raise CheckpointError(
            f"{name} is not there: this installation came without trained models. `isthmus demo` trains them; name "
            f"the folder, such as runs/demo/{wanted if wanted.isidentifier() else 'llava'}."
        )
    raise CheckpointError(f"{name} is no model of this installation; {nearest(wanted, known)}")
