"""Parts that a model folder takes from model folders beside it, so that models with one frozen encoder hold it once.

    pretrained/clip/model.safetensors        vision.*, text.*, heads.*
    pretrained/lm/model.safetensors          language.*
    pretrained/flamingo/model.safetensors    connector.*, xattn.*, what is new in language.*
    pretrained/flamingo/config.json          "borrowed": {"vision": {"folder": "clip", "sha256": ...},
                                                          "language.lm": {"folder": "lm", "sha256": ...}}

The sha256 is that of the other folder's model.safetensors. A model that was opened so is saved whole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus import checkpoint
from isthmus.errors import CheckpointError
from isthmus.load_report import Account

if TYPE_CHECKING:
    from isthmus.model import FolderConfig

FILE = "model.safetensors"


def weights(file: Path, config: "FolderConfig", account: Account | None = None) -> dict[str, Tensor]:
    """The tensors of a model folder's ``file``, and those that its ``config`` takes from folders beside it.

    Raises CheckpointError where another folder is not there, is none beside this one, or holds another file.
    """
    found, folder = checkpoint.load_tensors(file, account), file.parent
    for part, place in config.get("borrowed", {}).items():
        other = Path(place["folder"])
        if len(other.parts) != 1 or other.is_absolute() or other.name in ("", ".."):
            raise CheckpointError(f"{folder} takes its {part} from {str(other)!r}, which is no folder beside it.")
        theirs = folder.absolute().parent / other / FILE
        if not theirs.is_file():
            raise CheckpointError(
                f"{folder} takes its {part} from {theirs}, which is not there. Copy that folder too, or write a "
                "complete model from where they lie together: isthmus.load(FOLDER).save(ANOTHER)."
            )
        if checkpoint.file_sha256(theirs) != place["sha256"]:
            raise CheckpointError(
                f"{theirs} is not the file that {folder} takes its {part} from: it has another sha256. Bring back the "
                "one that came with it."
            )
        found |= _part(checkpoint.load_tensors(theirs, account), part)
    return found


def shared(
    own: Mapping[str, Tensor], others: Sequence[Path], parts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """What is left of a model's tensors when each of ``parts`` that one of the model folders ``others`` holds too,
    equal in every number, is taken from there; and what config.json says of it."""
    left, borrowed = dict(own), {}
    for part in parts:
        mine = _part(own, part)
        for folder in others:
            theirs = _part(checkpoint.load_tensors(folder / FILE), part)
            if mine and mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine):
                borrowed[part] = {"folder": folder.name, "sha256": checkpoint.file_sha256(folder / FILE)}
                left = {name: tensor for name, tensor in left.items() if name not in mine}
                break
    return left, borrowed


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
