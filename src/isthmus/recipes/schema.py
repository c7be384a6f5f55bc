"""What a recipe may say: a strict schema, read from YAML, changed by ``key=value`` on the command line.

An unknown key is an error that names the nearest known one. ``{DATA}`` and other capitalised names in braces are
filled from ``DATA=...`` overrides, so a committed recipe never holds anybody's path.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.errors import ConfigError, nearest

Kind = Literal["clip", "lm", "llava"]


class Strict(BaseModel):
    """Base of all recipe parts: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupSpec(Strict):
    """One line of a stage's ``train`` list: the first pattern that matches a parameter's name sets its rate."""

    pattern: str
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class StageSpec(Strict):
    """One stage: what it reads, what it trains, for how many steps. What ``train`` does not name is frozen."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    data: list[dict[str, Any]] = Field(min_length=1)
    train: list[GroupSpec] = Field(min_length=1)
    steps: int = Field(gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, gt=0)
    warmup: float = Field(default=0.03, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = Field(default=0.0, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    template: str | None = None
    image_mode: Literal["square", "pad", "squash"] | None = None
    max_length: int | None = Field(default=None, gt=0)
    log_every: int = Field(default=10, gt=0)
    save_every: int = Field(default=100, gt=0)

    @model_validator(mode="after")
    def _one_batch_rule(self) -> "StageSpec":
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError("give exactly one of batch_size (rows) and batch_tokens (padded tokens)")
        return self


class TokenizerSpec(Strict):
    """Either a ``folder`` with a tokenizer in it, or a vocabulary to train on the texts of ``data``."""

    folder: str | None = None
    vocab_size: int = Field(default=2048, gt=260)
    data: list[dict[str, Any]] = Field(default_factory=list)
    samples: int = Field(default=20_000, gt=0)

    @model_validator(mode="after")
    def _folder_or_data(self) -> "TokenizerSpec":
        if (self.folder is None) == (not self.data):
            raise ValueError("give either folder (an existing tokenizer) or data (texts to train one on)")
        return self


class EvalSpec(Strict):
    """One scoring task of the finished model; ``data`` is a source, the rest are the task's own options."""

    name: str
    task: str
    data: dict[str, Any]
    prior: dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(Strict):
    """A model, its parts, its stages and how it is scored: everything a run needs to be repeated."""

    model: Kind
    about: str = ""
    seed: int = 0
    threads: int | None = Field(default=None, gt=0)
    variables: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    parts: dict[str, str] = Field(default_factory=dict)
    image: dict[str, Any] | None = None
    tokenizer: TokenizerSpec | None = None
    prompts: dict[str, str] = Field(default_factory=dict)
    stages: list[StageSpec] = Field(min_length=1)
    evaluate: list[EvalSpec] = Field(default_factory=list)

    @field_validator("stages")
    @classmethod
    def _unique_names(cls, stages: list[StageSpec]) -> list[StageSpec]:
        names = [s.name for s in stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        return stages


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("isthmus.recipes") / "library"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe ``name`` (a shipped name or a YAML file) with ``key=value`` overrides, checked.

    Raises ConfigError: no such recipe, bad YAML, an unknown key (the nearest is named), an unset ``{VARIABLE}``.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ConfigError(f"No recipe file {path}. Shipped recipes go by name: {', '.join(shipped())}.")
        text = path.read_text(encoding="utf-8")
    elif str(name) in shipped():
        text = (resources.files("isthmus.recipes") / "library" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"No shipped recipe {str(name)!r}; {nearest(str(name), shipped())} A file ends in .yaml.")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe {name} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"Recipe {name} must be a mapping of keys, got {type(tree).__name__}.")
    variables: dict[str, str] = {}
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep:
            raise ConfigError(f"Override {override!r} is not key=value, for example stages.align.steps=100.")
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            variables[key] = value
        else:
            _set(tree, key, yaml.safe_load(value), where=str(name))
    for key in variables.keys() - _mentioned(tree):
        raise ConfigError(f"Recipe {name} does not use {{{key}}}; {nearest(key, _mentioned(tree))}")
    return parse_recipe(_fill(tree, variables, tree.get("variables") or {}, str(name)), where=str(name))


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A checked Recipe from plain mappings; raises ConfigError in words."""
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for fault in error.errors()[:5]:
        place = ".".join(str(p) for p in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            key = str(fault["loc"][-1])
            lines.append(f"unknown key {place!r}; {nearest(key, _fields_at(fault['loc'][:-1]))}")
        else:
            lines.append(f"{place}: {fault['msg'].removeprefix('Value error, ')}")
    return f"Recipe {where} does not fit: " + "; ".join(lines)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the schema class that stands at a location of the error."""
    nested: dict[str, type[BaseModel]] = {
        "stages": StageSpec, "train": GroupSpec, "tokenizer": TokenizerSpec, "evaluate": EvalSpec}
    kind: type[BaseModel] = Recipe
    for step in loc:
        if isinstance(step, str):
            kind = nested.get(step, kind)
    return list(kind.model_fields)


def _set(tree: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set a dotted key; a list is entered by number or by the ``name`` of its member."""
    steps = key.split(".")
    node: Any = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            names = [str(m.get("name")) if isinstance(m, dict) else "" for m in node]
            if step.isdigit() and int(step) < len(node):
                index = int(step)
            elif step in names:
                index = names.index(step)
            else:
                known = [n for n in names if n] or [str(i) for i in range(len(node))]
                raise ConfigError(f"Recipe {where} has no {'.'.join(steps[: depth + 1])!r}; {nearest(step, known)}")
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[step] = value
            elif not isinstance(node.get(step), dict | list):
                node[step] = {}
            node = node[step]
        else:
            raise ConfigError(f"Recipe {where}: {'.'.join(steps[:depth])!r} is a value and has no {step!r} in it.")


_VARIABLE = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")


def _mentioned(tree: Any) -> set[str]:
    if isinstance(tree, str):
        return set(_VARIABLE.findall(tree))
    members = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return set().union(*(_mentioned(m) for m in members)) if members else set()


def _fill(tree: Any, variables: Mapping[str, str], about: Mapping[str, str], where: str) -> Any:
    if isinstance(tree, str):
        for name in _VARIABLE.findall(tree):
            if name not in variables:
                what = f" ({about[name]})" if name in about else ""
                raise ConfigError(f"Recipe {where} needs {name}{what}: add {name}=PATH to the command.")
        return _VARIABLE.sub(lambda m: variables[m.group(1)], tree)
    if isinstance(tree, dict):
        return {k: _fill(v, variables, about, where) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_fill(v, variables, about, where) for v in tree]
    return tree
