"""Every public name that a recipe can hold is taken, or refused in one sentence: none ends in a traceback."""

import json
from dataclasses import fields
from functools import partial
from typing import Any, get_args, get_type_hints

import pytest
import torch

from isthmus.checkpoint import write_folder
from isthmus.data.images import Mode
from isthmus.data.processor import TEMPLATES
from isthmus.data.record import Text
from isthmus.data.sources import DOCUMENTS, SOURCES, open_source
from isthmus.data.text import render
from isthmus.errors import ConfigError, IsthmusError
from isthmus.evaluation.rules import RULES, rule
from isthmus.models.clip import Clip
from isthmus.nn.block import ACTIVATIONS
from isthmus.nn.connectors import CONNECTORS
from isthmus.recipes.build import build, make_tokenizer
from isthmus.recipes.schema import EvalSpec, TokenizerSpec, parse_recipe
from isthmus.recipes.scoring import TASKS, make_task, needs
from isthmus.stage import Stage
from isthmus.systems import SYSTEMS, system
from isthmus.systems.base import Tokenizers, preset
from isthmus.training.optim import lr_at
from tests.data.helpers import assistant, record, user
from tests.interop import tiny_models
from tests.miniature import TOKENIZER, tree
from tests.narrow import there

KINDS = [kind for kind in SYSTEMS if not kind.endswith("_encoder")]


def presets():
    for kind in KINDS:
        for name, value in vars(system(kind).net.CONFIG).items():
            if isinstance(value, classmethod) and name != "from_dict" and not name.startswith("_"):
                yield kind, name


@pytest.mark.parametrize(("kind", "name"), [*presets()])
def test_every_preset_is_a_configuration(kind, name):
    assert json.loads(json.dumps(preset(system(kind).net, name)))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer's folder, as a recipe names it."""
    spec: dict[str, Any] = TOKENIZER | {"samples": 10}
    made = make_tokenizer(TokenizerSpec(**spec))
    return str(write_folder(tmp_path_factory.mktemp("words") / "bpe", made.files()))


def built(kind, words, *, config=None, **changes):
    """A recipe of the tiny preset, built without values: names and shapes are tried, not numbers."""
    mine = tree("clip") | {"model": kind, "tokenizer": {"folder": words}, "evaluate": [], **changes}
    with torch.device("meta"):
        return build(parse_recipe(mine | {"config": {"preset": "tiny"} | (config or {})}))


@pytest.mark.parametrize("kind", [kind for kind, name in presets() if name == "tiny"])
def test_the_tiny_preset_is_built_with_the_recipes_tokenizer(kind, words):
    found = built(kind, words)
    assert found.tokenizer.vocab_size <= 2048
    assert sum(p.numel() for p in found.net.parameters()) > 1e5
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        built(kind, words, config={"preset": "tinny"})


PROJECTORS = {
    "linear": {},
    "mlp": {"depth": 3},
    "mlp3x_gelu": {},
    "resampler": {"layers": 1, "latents": 4, "heads": 2, "head_width": 8, "activation": "relu"},
    "qformer": {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48, "queries": 4, "dropout": 0.0},
    "pixel_shuffle": {"factor": 2, "depth": 1, "norm": False},
    "average_pool": {"factor": 2, "depth": 1},
    "attention_pool": {"queries": 4, "heads": 5},
}
TOKENS = {"linear": 16, "mlp": 16, "mlp3x_gelu": 16}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_connector_is_built_with_its_options(kind, words):
    assert set(PROJECTORS) - {"mlp3x_gelu"} == set(CONNECTORS)
    found = built("llava", words, config={"projector": {"kind": kind, **PROJECTORS[kind]}})
    assert found.net.num_tokens(64, 64) == TOKENS.get(kind, 4)
    with pytest.raises(ConfigError, match=f"projector {kind.replace('3x_gelu', '')}"):
        built("llava", words, config={"projector": {"kind": kind, "wdith": 2}})


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_image_mode_is_taken_or_refused_in_a_sentence(mode, words):
    found = built("llava", words)
    stage = found.recipe.stages[0].model_copy(update={"image_mode": mode})
    if mode == "anyres":
        with pytest.raises(ConfigError, match="do not go together"):
            found.processor(stage)
        tiled = built("llava", words, config={"pinpoints": [[64, 128], [128, 64]]})
        assert there(tiled.processor(stage).image).pinpoints == ((64, 128), (128, 64))
        return
    image = there(found.processor(stage).image)
    assert (image.mode, image.patch) == (mode, 16 if mode == "aspect" else 1)  # sides of whole patches


OPTIONS = {
    "blip2": {"max_text": 16, "clean": False},
    "blip2 generate": {
        "prompt": "a photo of",
        "question": "{}?",
        "end": "newline",
        "max_text": 16,
        "max_question": 20,
        "clean": False,
    },
    "flamingo": {"max_images": 2, "p_next": 0.5, "space": 0.5, "blind": False, "template": "open_flamingo"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_processor_option_is_taken(name):
    kind, _, phase = name.partition(" ")
    model = {"flamingo": tiny_models.flamingo, "blip2": partial(tiny_models.blip2, None)}[kind]()
    if phase:
        model = tiny_models.blip2()
    tokenizers = Tokenizers(model.processor.tokenizer, {"qformer": tiny_models.words()})
    stage = parse_recipe(tree("clip")).stages[0]

    def processor(options):
        with_options = stage.model_copy(update={"processor": options})
        return system(kind).processor(model.net, tokenizers, model.processor.image, with_options)

    described = processor(OPTIONS[name]).to_dict()
    assert {option: described[option] for option in OPTIONS[name]} == OPTIONS[name]
    with pytest.raises(ConfigError, match="option"):
        processor({"max_txt": 3})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_built(name, words):
    net = built("clip", words, config={"vision": {"activation": name}}).net
    assert isinstance(net, Clip)
    assert net.config.vision.activation == name


@pytest.mark.parametrize("kind", get_args(TokenizerSpec.model_fields["kind"].annotation))
def test_every_kind_of_tokenizer_is_trained(kind):
    made = make_tokenizer(TokenizerSpec(**TOKENIZER | {"samples": 10, "kind": kind}))
    assert made.decode(made.encode("red cube")).strip() == "red cube"


@pytest.mark.parametrize(
    ("field", "value"),
    [(f.name, v) for f in fields(Stage) for v in get_args(get_type_hints(Stage)[f.name]) if isinstance(v, str)],
)
def test_every_choice_of_a_stage_is_taken(field, value):
    mine = tree("clip")
    mine["stages"][0][field] = value
    stage = parse_recipe(mine).stages[0].stage
    assert getattr(stage, field) == value
    assert 0 < lr_at(stage, 1) <= 1
    mine["stages"][0][field] = value[:-1] + "x"
    with pytest.raises(ConfigError, match=f"did you mean '{value}'"):
        parse_recipe(mine)


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
