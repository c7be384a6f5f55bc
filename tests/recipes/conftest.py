"""The story's models with a Flamingo and a BLIP-2 of the same encoder and LM."""

import pytest


@pytest.fixture(scope="session")
def rivals(story, tmp_path_factory):
    """Folders of finished runs by name. Tests must not write into them."""
    from isthmus.recipes.run import train
    from isthmus.recipes.schema import parse_recipe
    from tests.recipes.test_blip2 import tree as blip2_tree
    from tests.recipes.test_flamingo import recipe as flamingo_recipe

    folder = tmp_path_factory.mktemp("rivals")
    train(flamingo_recipe(story), folder / "flamingo", progress=False)
    train(parse_recipe(blip2_tree(story)), folder / "blip2", progress=False)
    return {name: story / name for name in ("clip", "lm", "llava")} | {n: folder / n for n in ("flamingo", "blip2")}
