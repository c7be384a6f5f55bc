"""Models of the Hugging Face hub by id and revision: the files a checkpoint is read from, and no others.

The network is used only when a revision is named: a mistyped path never becomes a download.
"""

import re
from pathlib import Path

from isthmus import checkpoint
from isthmus.errors import CheckpointError
from isthmus.pretrained import SCHEME, shipped

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
"""By preference: of the first kind that a repository has, all files are taken, and none of the others."""


def looks_like_id(path: str | Path) -> bool:
    """Is it written like ``owner/name``?"""
    return _ID.fullmatch(str(path)) is not None


def located(path: str | Path, revision: str | None) -> Path:
    """The folder or file on this machine; ``isthmus:NAME`` is a model that came with the package, and a hub id with a
    revision (branch, tag or commit) is fetched first.

    Raises CheckpointError: a revision of something local, no such name, id or revision, no access, no network.
    """
    if str(path).startswith(SCHEME):
        return shipped(str(path))
    if revision is None:
        return Path(path)
    if Path(path).exists():
        raise CheckpointError(f"{path} lies on this machine and has no revisions: leave revision out.")
    if not looks_like_id(path):
        raise CheckpointError(f"{path} is neither here nor an id of the hub, which is written owner/name.")
    return _fetched(str(path), revision)


def model_hash(place: Path | str) -> str:
    """sha256 that identifies a model's files: of our manifest, of another format's weights, or of a single file; empty
    where there are none. ``isthmus:NAME`` is the model that came with the package."""
    place = located(place, None)
    if place.is_file():
        return checkpoint.file_sha256(place)
    inner = place / "model" if (place / "model").is_dir() else place
    manifest = inner / checkpoint.MANIFEST
    found = (sorted(inner.glob(f"*{ending}")) for ending in (".safetensors", ".bin", ".pt", ".pth"))
    files = [manifest] if manifest.is_file() else next(filter(None, found), [])
    return " ".join(checkpoint.file_sha256(f) for f in files)


def _fetched(name: str, revision: str) -> Path:
    """The snapshot in the hub's own cache, shared with every other library. Code and other formats stay there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    inner = [f"*/{weights}" for weights in _WEIGHTS]  # other precisions and formats lie in folders of their own
    try:
        for weights in _WEIGHTS:
            wanted = [*_DESCRIPTIONS, weights]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=inner))
            if any(folder.glob(weights)):
                return folder
        raise CheckpointError(f"{name} at revision {revision} holds no weights: none of {', '.join(_WEIGHTS)}.")
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"The hub has {name}, but no revision {revision!r} of it.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"The hub has no model {name!r} that you may read; log in if it is private.") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"The hub cannot be reached, and {name} at revision {revision} was not fetched before. Check the network "
            "and HF_HUB_OFFLINE, or name a local folder."
        ) from error
    except (OSError, ValueError) as error:  # an error of the hub or the disk, or an id that the hub does not allow
        raise CheckpointError(f"{name} at revision {revision} could not be fetched: {error}") from error
