"""Recipes: strict keys with the nearest named, overrides by path and by name, variables from the command line."""

import pytest
import yaml

from isthmus.errors import CheckpointError, ConfigError, DataError
from isthmus.recipes.build import build, make_tokenizer
from isthmus.recipes.schema import TokenizerSpec, parse_recipe, read_recipe, shipped

STAGE = {
    "name": "align",
    "data": [{"kind": "scenes", "form": "captions"}],
    "steps": 10,
    "batch_size": 4,
    "train": [{"pattern": "connector.*", "lr": 1e-3}],
}
TREE = {"model": "llava", "stages": [STAGE]}


def write(tmp_path, tree):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("path", "key", "near"),
    [((), "stagess", "stages"), (("stages", 0), "step", "steps"), (("stages", 0, "train", 0), "patern", "pattern")],
)
def test_unknown_key_names_the_nearest(tmp_path, path, key, near):
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    node = tree
    for step in path:
        node = node[step]
    node[key] = 1
    with pytest.raises(ConfigError, match=f"{key}.*did you mean '{near}'"):
        read_recipe(write(tmp_path, tree))


def test_overrides_reach_lists_by_name_and_by_number(tmp_path):
    path = write(tmp_path, TREE)
    recipe = read_recipe(path, ["stages.align.steps=77", "stages.0.train.0.lr=5e-4", "seed=3"])
    assert (recipe.stages[0].stage.steps, recipe.stages[0].stage.train[0].lr, recipe.seed) == (77, 5e-4, 3)
    with pytest.raises(ConfigError, match="did you mean 'align'"):
        read_recipe(path, ["stages.alin.steps=7"])


def test_a_variable_must_be_given_and_is_explained(tmp_path):
    tree = TREE | {"parts": {"vision": "{DATA}/clip"}, "variables": {"DATA": "the folder of easy-VQA"}}
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError, match=r"needs DATA \(the folder of easy-VQA\): add DATA=PATH"):
        read_recipe(path)
    assert read_recipe(path, ["DATA=/x"]).parts["vision"] == "/x/clip"
    with pytest.raises(ConfigError, match=r"does not use \{DATTA\}.*DATA"):
        read_recipe(path, ["DATA=/x", "DATTA=/y"])


@pytest.mark.parametrize("change", [{"batch_tokens": 5}, {"steps": 0}, {"train": []}, {"name": "Bad Name"}])
def test_values_are_checked(change):
    with pytest.raises(ConfigError):
        parse_recipe(TREE | {"stages": [STAGE | change]})


def test_a_rate_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TREE).replace("lr: 0.001", "lr: 1e-3"))
    assert read_recipe(path).stages[0].stage.train[0].lr == 1e-3


def test_equal_stage_names_are_refused():
    with pytest.raises(ConfigError, match="differ"):
        parse_recipe(TREE | {"stages": [STAGE, STAGE]})


def test_a_recipe_that_is_no_mapping_is_named():
    with pytest.raises(ConfigError, match="must be a mapping of keys; it is a list"):
        parse_recipe([TREE])  # type: ignore[arg-type]


def test_missing_recipe_names_the_nearest(tmp_path):
    (tmp_path / "cards.yaml").touch()
    with pytest.raises(ConfigError, match=r"No recipe file .*card\.yaml; did you mean '.*cards\.yaml'\?$"):
        read_recipe(tmp_path / "card.yaml")
    with pytest.raises(ConfigError, match=shipped()[0]):
        read_recipe(shipped()[0] + "x")


def test_bad_yaml_is_one_sentence(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(path)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_parses(name):
    assert read_recipe(name, to_show=True).stages


def test_a_tokenizer_is_trained_on_what_can_be_read(tmp_path):
    rows = ["image,caption", *(f"{n}.png,a thing called {n}" for n in range(30)), "x.png,"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    data: dict[str, object] = {"kind": "csv", "file": str(tmp_path / "pairs.csv")}
    made = make_tokenizer(TokenizerSpec(vocab_size=300, data=[data]))
    assert len(made.encode(" thing")) == 1
    (tmp_path / "pairs.csv").write_text("image,caption\nx.png,\n")
    with pytest.raises(DataError, match=r"no sample of 'csv:pairs' gives a text to train on: empty text"):
        make_tokenizer(TokenizerSpec(vocab_size=300, data=[data]))


@pytest.mark.parametrize("other", [{"folder": "x"}, {"kind": "wordpiece", "data": [{"kind": "scenes"}]}])
def test_whole_strings_belong_to_a_vocabulary_of_our_own(other):
    with pytest.raises(ValueError, match="whole belongs to a byte-level BPE vocabulary"):
        TokenizerSpec(whole=["USER:"], **other)


def test_the_tokenizers_of_shipped_recipes_can_be_trained():
    """Their texts fit their template, a few of each source at least."""
    specs = {name: read_recipe(name, to_show=True).tokenizer for name in shipped()}
    embedded = {n: s for n, s in specs.items() if s and s.data and all(d["kind"] == "scenes" for d in s.data)}
    assert len(embedded) >= 4
    for spec in embedded.values():
        few = [{**source, "count": 60} for source in spec.data]
        make_tokenizer(spec.model_copy(update={"samples": 20, "data": few, "vocab_size": 400}))


FAULTS = {
    "a rate beside the stages": ({"lr": 1e-3}, "'lr'; it belongs into an entry of a stage's `train`"),
    "steps beside the stages": ({"steps": 3}, "'steps'; it belongs into `stages`"),
    "evaluation within a stage": ({"stages": [STAGE | {"evaluate": []}]}, "it belongs into the top of the file"),
    "one stage without its dash": ({"stages": STAGE}, "stages: should be a list"),
    "one source without its dash": ({"stages": [STAGE | {"data": {"kind": "csv"}}]}, "begin each entry with"),
    "a tokenizer by its path": ({"tokenizer": "words"}, "tokenizer: should be a mapping of keys, and is 'words'"),
    "a model in capitals": ({"model": "LLaVA"}, "did you mean 'llava'"),
    "no model": ({"model": ...}, "model: it is missing"),
    "a budget misspelt": (
        {"stages": [{("stepps" if k == "steps" else k): v for k, v in STAGE.items()}]},
        "unknown key 'stepps'; did you mean 'steps'",
    ),
    "a stage's name misspelt": (
        {"stages": [{("nam" if k == "name" else k): v for k, v in STAGE.items()}]},
        "unknown key 'nam'; did you mean 'name'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_itself(fault):
    changes, said = FAULTS[fault]
    with pytest.raises(ConfigError) as error:
        parse_recipe({key: value for key, value in (TREE | changes).items() if value is not ...})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", "<!DOCTYPE html><html>: 404: x</html>", "is not YAML, but an HTML page"),
        ("a.yaml", "", "it is empty"),
        ("a.json", "{}", "is no recipe: a recipe is a file that ends in .yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_recipe(tmp_path / name)


def test_a_part_that_is_not_there_says_how_to_name_one():
    with pytest.raises(ConfigError, match="leaves its part 'init' to you: give INIT=FOLDER"):
        build(read_recipe("finetune-llava", to_show=True))
    with pytest.raises(CheckpointError, match=r"no such file or folder\. Name yours with parts.language=FOLDER"):
        build(read_recipe("llava-smollm2", ["parts.language=nowhere"]))


@pytest.mark.parametrize(("name", "place"), [("finetune-llava", 0), ("finetune-blip2", 0)])
def test_another_rank_of_a_shipped_adapter_takes_alpha_along(name, place):
    """Else what is learnt would count more, the smaller the rank."""
    for changes, rank in (([], None), ([f"stages.tune.train.{place}.lora.rank=4"], 4)):
        lora = read_recipe(name, changes, to_show=True).stages[0].stage.train[place].lora
        assert lora is not None
        assert lora.scale == 2 * (rank or lora.rank)
