"""Every public name that a recipe can hold is taken, or refused in one sentence: none ends in a traceback."""

import json

import pytest

from isthmus.data.processor import TEMPLATES
from isthmus.data.record import Text
from isthmus.data.sources import DOCUMENTS, SOURCES, open_source
from isthmus.data.text import render
from isthmus.errors import ConfigError, IsthmusError
from isthmus.evaluation.rules import RULES, rule
from isthmus.recipes.build import build
from isthmus.recipes.schema import EvalSpec, parse_recipe
from isthmus.recipes.scoring import TASKS, make_task, needs
from isthmus.systems import SYSTEMS, system
from isthmus.systems.base import preset
from tests.data.helpers import assistant, record, user
from tests.miniature import TOKENIZER, tree

KINDS = [kind for kind in SYSTEMS if not kind.endswith("_encoder")]


def presets():
    for kind in KINDS:
        for name, value in vars(system(kind).net.CONFIG).items():
            if isinstance(value, classmethod) and name != "from_dict" and not name.startswith("_"):
                yield kind, name


@pytest.mark.parametrize(("kind", "name"), [*presets()])
def test_every_preset_is_a_configuration(kind, name):
    assert json.loads(json.dumps(preset(system(kind).net, name)))


@pytest.mark.parametrize("kind", [kind for kind, name in presets() if name == "tiny"])
def test_the_tiny_preset_is_built_with_the_recipes_tokenizer(kind):
    mine = tree("clip") | {"model": kind, "config": {"preset": "tiny"}, "tokenizer": TOKENIZER, "evaluate": []}
    built = build(parse_recipe(mine))
    assert built.tokenizer.vocab_size <= 2048
    assert sum(p.numel() for p in built.net.parameters()) > 1e5
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        build(parse_recipe(mine | {"config": {"preset": "tinny"}}))


@pytest.mark.parametrize("kind", [*SOURCES, *DOCUMENTS])
def test_every_source_without_its_options_says_so(kind):
    if kind == "scenes":
        assert len(open_source({"kind": kind, "form": "captions", "count": 2})) == 2
        return
    with pytest.raises(IsthmusError, match=r"needs the option|give either file"):
        open_source({"kind": kind})


@pytest.mark.parametrize("name", [name for name in TASKS if name != "llava-bench"])  # that one needs a judge
def test_every_task_is_made(name):
    form = "questions" if name not in ("caption", "retrieval", "matching", "matching-head", "zero-shot") else "captions"
    data = {"kind": "scenes", "form": form, "count": 3, "split": "test"}
    spec = EvalSpec(name=name, task=name, data=data, train=data | {"split": "train"})
    assert needs(spec)
    assert make_task(spec).kind


def test_every_template_and_rule_is_known():
    for template in set(TEMPLATES) - {"plain", "document"}:
        assert "q" in str(render(record(user("q"), assistant("a")), template))
    assert str(render(record(Text("a", learn=True)), "document")) == "a</s>"
    assert [rule(name).name for name in RULES] == list(RULES)
