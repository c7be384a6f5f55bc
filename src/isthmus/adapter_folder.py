"""A model folder of adapters: PEFT's two files, what was trained beside them, and the base they belong to by content.

config.json                 as every model folder's, with ``base``: where the model was, the sha256 of its files, and
                            the layers of it that were in 4 bits, where some were
adapter_config.json         PEFT's, with the names of the net's own layers
adapter_model.safetensors   PEFT's
trained.safetensors         what stages opened beside the adapters, such as the connector; none where nothing was
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor

from isthmus import adapters, checkpoint, quantised
from isthmus.config import plain
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.hub import located, model_hash
from isthmus.net import Net
from isthmus.pretrained import SCHEME
from isthmus.stage import named_state
from isthmus.weights import state_tensors

if TYPE_CHECKING:
    from isthmus.model import FolderConfig, Model

_TRAINED = "trained.safetensors"


class OfBase(TypedDict):
    """What config.json says of the base: where it was, absolutely and from the folder, the sha256 of its files, and its
    layers that were in 4 bits."""

    path: str
    beside: str
    sha256: str
    quantised: NotRequired[list[str]]


@dataclass(frozen=True, slots=True)
class Base:
    """The model that adapters were put on: its place, the :func:`isthmus.interop.hub.model_hash` of it there, and the
    tensors of it that were trained without an adapter."""

    path: str
    sha256: str
    opened: tuple[str, ...] = ()


def weights(net: Net, base: Base | None, folder: Path) -> tuple[dict[str, checkpoint.Content], OfBase | None]:
    """The files of a net's weights, and what config.json says of their base. Raises ConfigError for adapters whose base
    is not known."""
    if not adapters.adapted(net):
        return {"model.safetensors": state_tensors(net)}, None
    if base is None:
        raise ConfigError("This model carries adapters, and it is not known on which base: merge them, then save it.")
    config, tensors = adapters.to_peft(net, base.path)
    files: dict[str, checkpoint.Content] = {"adapter_config.json": config, "adapter_model.safetensors": tensors}
    if base.opened:
        state = named_state(net)
        files[_TRAINED] = {name: state[name] for name in base.opened}
    of_base: OfBase = {"path": base.path, "beside": "", "sha256": base.sha256}
    if not base.path.startswith(SCHEME):
        absolute = os.path.abspath(base.path)
        of_base["path"], of_base["beside"] = absolute, os.path.relpath(absolute, folder.absolute())
    if rounded := quantised.names(net):
        of_base["quantised"] = rounded
    return files, of_base


def check_useful(folder: Path, config: "FolderConfig", given: Mapping[str, object]) -> None:
    """Raises CheckpointError for an argument of ``load`` that a model folder of ours has no use for."""
    base = config.get("base", {})
    useful = {"base": bool(base), "unquantised": "quantised" in base}
    for name, value in given.items():
        if value is not None and not useful.get(name):
            what = (
                "is a complete model of ours" if not base else "holds adapters that were trained over the base as it is"
            )
            raise CheckpointError(f"{folder} {what}, so it needs no {name}: leave it out.")


def opened(
    folder: Path,
    of_base: OfBase,
    config: Mapping[str, object],
    files: Mapping[str, Path],
    *,
    base: str | Path | None,
    unquantised: bool,
    load: "Callable[[Path], Model[Net]]",
) -> tuple[Net, Base]:
    """The net of the base with the folder's adapters on and its trained tensors in; ``config`` is the net's. ``base``
    is the place of the base, where it is another than the recorded one, and ``unquantised`` leaves the base as it is
    stored where the adapters were trained over 4 bits of it.

    Raises CheckpointError: no base there, another one by its content, or tensors that do not fit it; and what
    :func:`isthmus.quantised.quantise` raises.
    """
    place = _found(folder, of_base, base)
    if (sha256 := model_hash(place)) != of_base["sha256"]:
        raise CheckpointError(_another(place, folder, of_base, sha256, packaged=base is None))
    model = load(place)
    adapters.merge(model.net)
    if plain(model.net.config) != config:
        raise CheckpointError(f"{place} has another configuration than {folder} was trained with.")
    state = named_state(model.net)
    trained = checkpoint.load_tensors(files[_TRAINED]) if _TRAINED in files else {}
    with torch.no_grad():
        for name, tensor in trained.items():
            _must_fit(name, tensor, state, folder)
            state[name].copy_(tensor)
    if not unquantised:
        _round(model.net, of_base.get("quantised", ()), folder)
    file = files["adapter_model.safetensors"]
    values = checkpoint.read_json(files["adapter_config.json"])
    adapters.from_peft(model.net, values, checkpoint.load_tensors(file), str(file))
    return model.net, Base(str(place), of_base["sha256"], tuple(trained))


def _another(place: Path, folder: Path, of_base: OfBase, sha256: str, *, packaged: bool) -> str:
    """What to do where ``place`` holds another model than the base, which may be one of the package's."""
    holds = f"has sha256 {sha256[:12]}…" if sha256 else "holds no weights"
    name = of_base["path"]
    if packaged and name.startswith(SCHEME):
        advice = (
            f"{name} comes with isthmus, and with another release come other files of it: with the release that they "
            f"were trained with, `isthmus convert {folder} FOLDER --to isthmus --merge` writes a complete model, which "
            "opens without a base; or train them again on this one."
        )
    else:
        advice = (
            f"Give the place of the right one with base=… (--base), it was {name}; or train them again on this one."
        )
    return (
        f"{place} is not the base that {folder} was trained on: that has sha256 {of_base['sha256'][:12]}…, and this "
        f"{holds}. Adapters fit the weights that they were trained on and no others, so no option opens them over "
        f"another base. {advice}"
    )


def _round(net: Net, names: Sequence[str], folder: Path) -> None:
    strange = [name for name in names if f"{name}.weight" not in named_state(net)]
    if strange:
        raise CheckpointError(f"{folder}: its base has no layer {strange[0]!r} to hold in 4 bits.")
    quantised.quantise(
        net,
        names,
        instead=f"The adapters of {folder} were trained over one; they open over their base as it is stored with "
        "unquantised=True (--unquantised), and then answer a little otherwise.",
    )


def _must_fit(name: str, tensor: Tensor, state: Mapping[str, Tensor], folder: Path) -> None:
    if name not in state or state[name].shape != tensor.shape:
        raise CheckpointError(
            f"{folder}/{_TRAINED} holds {name} of shape {tuple(tensor.shape)}, which its base has not."
        )


def _found(folder: Path, of_base: OfBase, given: str | Path | None) -> Path:
    given = None if given is None else located(given, None)
    places = [given] if given is not None else [located(of_base["path"], None), folder / of_base["beside"]]
    for place in places:
        if place.exists():
            return place
    raise CheckpointError(
        f"{folder} holds adapters, and their base is not at {places[0]}: give its place with base=… (on the command "
        "line --base)."
    )
