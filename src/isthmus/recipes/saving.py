"""A trained net as a model folder: complete, or as adapters with a named base."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from isthmus import adapters, checkpoint, mapped
from isthmus.adapter_folder import Base
from isthmus.config import plain
from isthmus.interop.hub import model_hash
from isthmus.model import Model
from isthmus.recipes.build import Built, fresh
from isthmus.recipes.schema import Recipe, StageSpec
from isthmus.stage import named_state
from isthmus.weights import load_into


def recipe_file(recipe: Recipe) -> dict[str, str]:
    """The recipe as the file that a model folder keeps it in."""
    return {"recipe.yaml": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)}


def save_model(
    built: Built,
    folder: Path,
    *,
    stage: StageSpec | None = None,
    extra: Mapping[str, checkpoint.Content] | None = None,
    replace: bool = False,
) -> Path:
    """Write the net as ``stage`` (the last by default) leaves it.

    The base of adapters is the part ``init``; where there is none, or a stage changed its configuration, the model
    without its adapters is written beside, as ``<folder>-base``.
    """
    model = built.model(stage)
    if adapters.adapted(built.net):
        model.base = _base(built, model, folder.with_name(f"{folder.name}-base"))
    return model.save(folder, extra=extra, replace=replace)


def _base(built: Built, model: Model, beside: Path) -> Base:
    if built.begun:
        return Base(built.begun, model_hash(built.begun), tuple(sorted(built.opened)))
    with mapped.hollow():
        net = fresh(built.recipe, plain(built.net.config))
        state = {name: t for name, t in named_state(built.net).items() if adapters.MARK not in name}
        load_into(net, state, "the model without its adapters")
    Model(net, model.processor, prompts=model.prompts, kind=model.system).save(beside, replace=True)
    return Base(str(beside), model_hash(beside))
