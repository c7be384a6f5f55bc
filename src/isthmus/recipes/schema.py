"""What a recipe may say: a strict schema, read from YAML, changed by ``key=value`` on the command line.

An unknown key is an error that names the nearest known one. ``{DATA}`` and other capitalised names in braces are
filled from ``DATA=...`` overrides, so a committed recipe never holds anybody's path.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from isthmus.config import strict
from isthmus.data.augment import Augment
from isthmus.data.images import Mode
from isthmus.errors import ConfigError, misspelt, nearest
from isthmus.file_type import but_is, file_type
from isthmus.recipes.filling import demand, fill, mentioned, set_key
from isthmus.stage import Group, Stage
from isthmus.systems import SYSTEMS, system
from isthmus.training.parallel import DDP, Parallel
from isthmus.user_code import is_user_code, pin, pinned_in

_STAGE_KEYS = frozenset(f.name for f in fields(Stage))


def _trained(kind: str) -> str:
    if is_user_code(kind):
        return pin(kind)
    known = [name for name in SYSTEMS if system(name).parts]
    if kind not in known:
        raise ValueError(
            f"unknown kind of model {kind!r}; {nearest(kind, known)} Your own is named path/file.py:MySystem"
        )
    return kind


SystemName = Annotated[str, AfterValidator(_trained)]
"""A system that a recipe can train: one of ours, or a user's class, which is pinned to what its file says now."""


class _Yaml(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as everyone means it (YAML 1.1 wants 1.0e-3)."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Yaml)


class Strict(BaseModel):
    """Base of all recipe parts: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class FeatureCacheSpec(Strict):
    """Keeps what a frozen vision encoder makes of each picture, ``gib`` GiB at most, in ``folder`` (by default in the
    run's own): worth it where pictures come back."""

    folder: str | None = None
    gib: float = Field(default=4.0, gt=0)


class KeepBestSpec(Strict):
    """The model of the best validation is kept: ``metric`` is ``loss`` or ``TASK.NAME`` (``vqa.accuracy``).
    After ``patience`` validations without a better one the stage ends."""

    metric: str
    patience: int | None = Field(default=None, gt=0)


class ValidateSpec(Strict):
    """Every so many steps, at the beginning and at the end: the loss on held-out rows (``data``, sources like a
    stage's) and the scores of ``tasks``, names of the recipe's ``evaluate``, each on its first ``rows`` samples."""

    every: int = Field(gt=0)
    data: list[dict[str, object]] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    rows: int = Field(default=256, gt=0)
    keep_best: KeepBestSpec | None = None

    @model_validator(mode="after")
    def _measures(self) -> "ValidateSpec":
        if not self.data and not self.tasks:
            raise ValueError("give data (held-out rows, for the loss), tasks (names of `evaluate`), or both")
        if self.keep_best is not None:
            known = [*(["loss"] if self.data else []), *(f"{task}.…" for task in self.tasks)]
            metric = self.keep_best.metric
            if metric not in known and not any(metric.startswith(f"{task}.") for task in self.tasks):
                raise ValueError(f"the metric {metric!r} of keep_best is given by no task; {nearest(metric, known)}")
        return self


class StageSpec(Strict):
    """One stage of a recipe: what it reads and how, beside the keys of :class:`isthmus.stage.Stage`.

    In the YAML the keys of both stand side by side (``name``, ``steps``, ``train``, ``data``, ``batch_size``, …). When
    each entry of ``data`` has a ``batch_size`` of its own, every step reads that many samples of every source, and the
    sources' mean losses add up with their ``loss_weight`` (default 1); with ``pass_tokens``, what a pass costs beside
    its tokens, their rows share passes where that is cheaper. ``config`` changes the model's configuration from this
    stage on (BLIP-2's phases); ``processor`` are options of this system's processor; ``augment`` crops and flips the
    pictures; ``feature_cache`` encodes each of them once; ``validate`` measures on the way and keeps the best.
    ``bad_samples`` is the fraction of samples that may be quarantined before the run stops.
    """

    stage: Stage
    data: list[dict[str, object]] = Field(min_length=1)
    batch_size: int | None = Field(default=None, gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, gt=0)
    pass_tokens: int | None = Field(default=None, gt=0)
    bad_samples: float = Field(default=0.01, ge=0, le=1)
    template: str | None = None
    image_mode: Mode | None = None
    max_length: int | None = Field(default=None, gt=0)
    augment: Augment | None = None
    feature_cache: FeatureCacheSpec | None = None
    validate_: ValidateSpec | None = Field(default=None, alias="validate")
    config: dict[str, object] = Field(default_factory=dict)
    processor: dict[str, object] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def joint(self) -> bool:
        """Does every step read a batch of every source?"""
        return any("batch_size" in entry or "loss_weight" in entry for entry in self.data)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, tree: object) -> object:
        if not isinstance(tree, dict) or "stage" in tree:
            return tree
        own = {k: v for k, v in tree.items() if k in _STAGE_KEYS}
        rest = {k: v for k, v in tree.items() if k not in _STAGE_KEYS}
        where = f"stage {tree.get('name', '?')!r}"
        try:
            return rest | {"stage": strict(Stage, own, where)}
        except ConfigError:
            known = _fields_at((), StageSpec, {})
            unknown = [str(key) for key in rest if key not in known]
            if not unknown:  # a misspelt key explains what is missing, so it is named first
                raise
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}") from None

    @field_validator("augment", mode="before")
    @classmethod
    def _augment(cls, value: object) -> object:
        return strict(Augment, value, "augment") if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_batch_rule(self) -> "StageSpec":
        if self.joint:
            if not all(isinstance(size := e.get("batch_size"), int) and size > 0 for e in self.data):
                raise ValueError("one entry of data weighs its loss, so every entry needs a batch_size (rows a step)")
            if self.batch_size is not None or self.batch_tokens is not None or any("weight" in e for e in self.data):
                raise ValueError(
                    "the entries of data have batch sizes of their own: take batch_size and batch_tokens out of the "
                    "stage, and weight out of the entries"
                )
            if self.pass_tokens is not None and self.accumulate > 1:
                raise ValueError("the rows of a step are split by accumulate or by pass_tokens: take one of them out")
        elif self.pass_tokens is not None:
            raise ValueError("pass_tokens is for stages whose entries of data have batch sizes of their own")
        elif (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError("give exactly one of batch_size (rows) and batch_tokens (padded tokens)")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"the stage name {self.name!r} becomes a folder: use a-z, 0-9, - and _")
        if self.augment is not None and self.feature_cache is not None:
            raise ValueError("augmented pictures differ at every visit: take out augment or feature_cache")
        if not self.stage.train:
            raise ValueError("train is empty, so nothing would learn; give a list of pattern and lr")
        return self


class TokenizerSpec(Strict):
    """Either a ``folder`` with a tokenizer in it, or a vocabulary to train on the texts of ``data``.

    The texts are rendered in ``template``, so that the template's own words become tokens too. ``kind`` is byte-level
    BPE, or WordPiece with BERT's special tokens for a Q-Former. ``whole`` are strings that BPE makes one token each,
    such as the template's names of the speakers.
    """

    kind: Literal["bpe", "wordpiece"] = "bpe"
    folder: str | None = None
    vocab_size: int = Field(default=2048, gt=260)
    data: list[dict[str, object]] = Field(default_factory=list)
    samples: int = Field(default=20_000, gt=0)
    template: str = "document"
    whole: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _folder_or_data(self) -> "TokenizerSpec":
        if (self.folder is None) == (not self.data):
            raise ValueError("give either folder (an existing tokenizer) or data (texts to train one on)")
        if self.whole and (self.folder is not None or self.kind == "wordpiece"):
            raise ValueError("whole belongs to a byte-level BPE vocabulary that is trained here; take it out")
        return self


class EvalSpec(Strict):
    """One scoring task of the finished model on the source ``data``.

    ``train`` is a source of training data: its answers give the prior of ``vqa``, its pictures fit the
    ``linear-probe``. ``options`` are the task's own. ``stage`` scores the model as that stage left it. ``bad_samples``
    is the fraction of samples that may be unreadable before the evaluation stops.
    """

    name: str
    stage: str | None = None
    task: str
    data: Mapping[str, object]
    train: Mapping[str, object] | None = None
    options: Mapping[str, object] = Field(default_factory=dict)
    bad_samples: float = Field(default=0.01, ge=0, le=1)


class Recipe(Strict):
    """A model, its parts, its stages and how it is scored: everything a run needs to be repeated."""

    model: SystemName
    about: str = ""
    seed: int = 0
    threads: int | None = Field(default=None, gt=0)
    parallel: Parallel = DDP
    variables: dict[str, str] = Field(default_factory=dict)
    config: dict[str, object] = Field(default_factory=dict)
    parts: dict[str, str] = Field(default_factory=dict)
    image: dict[str, object] | None = None
    tokenizer: TokenizerSpec | None = None
    prompts: dict[str, str] = Field(default_factory=dict)
    stages: list[StageSpec] = Field(min_length=1)
    evaluate: list[EvalSpec] = Field(default_factory=list)
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)

    @field_validator("parallel", mode="before")
    @classmethod
    def _parallel(cls, value: object) -> object:
        """``parallel: fsdp`` is short for ``parallel: {engine: fsdp}``."""
        value = {"engine": value} if isinstance(value, str) else value
        return strict(Parallel, value, "parallel") if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _stages_exist(self) -> "Recipe":
        names = [s.name for s in self.stages]
        for spec in self.evaluate:
            if spec.stage is not None and spec.stage not in names:
                raise ValueError(f"evaluate {spec.name!r}: no stage {spec.stage!r}; {nearest(spec.stage, names)}")
        tasks = [spec.name for spec in self.evaluate]
        for stage in self.stages:
            for task in stage.validate_.tasks if stage.validate_ is not None else ():
                if task not in tasks:
                    known = nearest(task, tasks) if tasks else "the recipe has no `evaluate`"
                    raise ValueError(f"stage {stage.name!r} validates by {task!r}, which is no evaluation; {known}")
        return self

    @field_validator("stages")
    @classmethod
    def _unique_names(cls, stages: list[StageSpec]) -> list[StageSpec]:
        names = [s.name for s in stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        return stages


_SHELVES = {"library": ("recipes/library", "demo/library"), "comparisons": ("comparison/library",)}
"""The package's folders of recipes: those to train, and those of ``isthmus compare``."""


def shipped(shelf: str = "library") -> list[str]:
    """Names of the recipes inside the package; on the shelf ``comparisons`` those of ``isthmus compare``."""
    return sorted(_on(shelf))


def _on(shelf: str) -> dict[str, Traversable]:
    """Name -> file of the recipes on a shelf."""
    files = [file for folder in _SHELVES[shelf] for file in (resources.files("isthmus") / folder).iterdir()]
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def read_recipe(name: str | Path, overrides: Sequence[str] = (), *, to_show: bool = False) -> Recipe:
    """The recipe ``name`` (a shipped name or a YAML file) with ``key=value`` overrides, checked.

    ``to_show`` leaves variables that were not given as they stand: what a recipe would do is known without them.
    Raises ConfigError: no such recipe, bad YAML, an unknown key (the nearest is named), an unset ``{VARIABLE}``.
    """
    tree = read_tree(name, overrides, to_show=to_show)
    if tree.get("kind") == "compare":
        raise ConfigError(f"{name} compares several models: run `isthmus compare {name}`.")
    return parse_recipe(tree, where=str(name))


def read_tree(name: str | Path, overrides: Sequence[str] = (), *, to_show: bool = False) -> dict[str, object]:
    """What the recipe ``name`` says, overrides and variables put in, its keys not checked yet."""
    path = Path(name)
    beside = path.parent if path.suffix in {".yaml", ".yml"} else None
    # Before overrides, whose names of code are relative to the working folder.
    tree: dict[str, object] = pinned_in(_as_written(str(name), path), beside)
    variables: dict[str, str] = {}
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep:
            raise ConfigError(f"Override {override!r} is not key=value, for example stages.align.steps=100.")
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            variables[key] = value
        else:
            set_key(
                tree,
                key,
                pinned_in(option_value(value, f"Override {override!r}"), key=key.rpartition(".")[2]),
                where=str(name),
            )
    for key in variables.keys() - mentioned(tree):
        raise ConfigError(f"Recipe {name} does not use {{{key}}}; {nearest(key, mentioned(tree))}")
    if not to_show:
        about = tree.get("variables")
        demand(tree, variables, about if isinstance(about, Mapping) else {}, str(name))
    return pinned_in({key: fill(value, variables) for key, value in tree.items()}, beside)


def _as_written(name: str, path: Path) -> dict[str, object]:
    """The mapping in a recipe file, or in the shipped one of this name. Raises ConfigError."""
    found = {**_on("comparisons"), **_on("library")}
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            if near := misspelt(path):
                raise ConfigError(f"No recipe file {path}{near}")
            raise ConfigError(f"No recipe file {path}. Shipped recipes go by name: {', '.join(shipped())}.")
        tree = read_yaml(path)
    elif name in found:
        tree = yaml_value(found[name].read_text(encoding="utf-8"), name)
    else:
        if path.exists():
            raise ConfigError(f"{path} is no recipe: a recipe is a file that ends in .yaml.")
        raise ConfigError(f"No shipped recipe {name!r}; {nearest(name, shipped())} (A file ends in .yaml.)")
    if not isinstance(tree, dict):
        got = "it is empty" if tree is None else f"it is a {type(tree).__name__}"
        raise ConfigError(f"Recipe {name} must be a mapping of keys; {got}.")
    return tree


def read_yaml(path: Path) -> object:
    """What a YAML file says. Raises ConfigError when it cannot be read or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {why}{misspelt(path) or '.'}") from None
    return yaml_value(text, str(path))


def yaml_value(text: str, what: str) -> object:
    """The value of a YAML text. Raises ConfigError naming ``what``, line and column in one sentence."""
    try:
        return _load_yaml(text)
    except yaml.YAMLError as error:
        if file_type(text.encode()):
            raise ConfigError(f"{what} is not YAML{but_is(text.encode(), '')}.") from None
        fault = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            fault = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}."
        raise ConfigError(f"{what} is not valid YAML: {fault}") from None


def option_value(text: str, what: str) -> object:
    """The value after ``key=`` on the command line, which is YAML too: so a text with its marks wants quotes."""
    try:
        return yaml_value(text, what)
    except ConfigError as error:
        raise ConfigError(f"{error} A text with such marks wants quotes of its own: '\"{text}\"'.") from None


def parse_recipe(tree: Mapping[str, object], where: str = "recipe") -> Recipe:
    """A checked Recipe from plain mappings; raises ConfigError in words."""
    return checked(Recipe, tree, where, _NESTED)


_NESTED: dict[str, type[BaseModel]] = {
    "stages": StageSpec,
    "tokenizer": TokenizerSpec,
    "evaluate": EvalSpec,
    "feature_cache": FeatureCacheSpec,
    "validate": ValidateSpec,
    "keep_best": KeepBestSpec,
}


M = TypeVar("M", bound=BaseModel)


def checked(schema: type[M], tree: Mapping[str, object], where: str, nested: Mapping[str, type[BaseModel]]) -> M:
    """``tree`` as a ``schema``, whose keys in ``nested`` hold those. Raises ConfigError in words, the nearest key named
    for an unknown one."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"Recipe {where} must be a mapping of keys; it is a {type(tree).__name__}.")
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(
            _explain(
                error, where, lambda loc: _fields_at(loc, schema, nested), lambda key: _elsewhere(key, schema, nested)
            )
        ) from None


def _explain(
    error: ValidationError,
    where: str,
    known: Callable[[tuple[int | str, ...]], list[str]],
    elsewhere: Callable[[str], str],
) -> str:
    lines = []
    for fault in error.errors()[:5]:
        place = ".".join(str(p) for p in fault["loc"] if p != "stage") or "recipe"
        if fault["type"] == "extra_forbidden":
            key = str(fault["loc"][-1])
            lines.append(f"unknown key {place!r}; {elsewhere(key) or nearest(key, known(fault['loc'][:-1]))}")
        else:
            lines.append(f"{place}: {_said(fault)}")
    return f"Recipe {where} does not fit: " + "; ".join(lines)


def _said(fault: ErrorDetails) -> str:
    """What pydantic found, in words of YAML."""
    found, plain = type(fault["input"]).__name__, {"list_type": "a list", "dict_type": "a mapping of keys"}
    if fault["type"] == "missing":
        return "it is missing"
    if (wanted := plain.get(fault["type"].replace("model_type", "dict_type"))) is not None:
        how = '; begin each entry with "- "' if found == "dict" else ""
        return f"should be {wanted}, and is {fault['input']!r:.60} ({found}){how}"
    return fault["msg"].removeprefix("Value error, ")


def _elsewhere(key: str, schema: type[BaseModel], nested: Mapping[str, type[BaseModel]]) -> str:
    """Where in such a file this very key belongs; empty where it is no key of any part."""
    places = {"the top of the file": schema, **{f"`{name}`": part for name, part in nested.items()}}
    found = [place for place, part in places.items() if key in _fields_at((), part, {})]
    if "stages" in nested and key in {f.name for f in fields(Group)}:
        found.append("an entry of a stage's `train`")
    return f"it belongs into {' or '.join(found)}" if found else ""


def _fields_at(loc: tuple[int | str, ...], schema: type[BaseModel], nested: Mapping[str, type[BaseModel]]) -> list[str]:
    """Keys that the schema knows at a location of the error."""
    for step in loc:
        if isinstance(step, str):
            schema = nested.get(step, schema)
    own = [f.alias or name for name, f in schema.model_fields.items() if name != "stage"]
    return own + sorted(_STAGE_KEYS) if schema is StageSpec else own
