"""A comparison as a recipe: arms with the same vision encoder, language model, data, order, budget and questions.

    kind: compare
    parts: {vision: runs/demo/clip, language: runs/demo/lm}     shared by all arms
    budget: {samples: 24000}                                    of every arm: rows read, or {flops: 2e14}
    stages: [{name: describe, share: 0.4, data: ..., ...}]      the work, shared by all arms
    arms:
      - {name: llava, model: llava, config: ..., stages: {describe: {template: plain, train: ...}}}
      - {name: llava-linear, like: llava, config: {projector: linear}}

An arm says which of the shared stages it goes through, in its own order, and what is its own in each; a stage of its
own stands among them. Shares of an arm are parts of its total budget, so an arm without a stage spends as much on the
others. ``like`` starts from another arm; a stage set to null is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from isthmus.config import merged
from isthmus.errors import ConfigError, nearest
from isthmus.recipes.schema import EvalSpec, Recipe, Strict, SystemName, checked, parse_recipe

UNMEASURED = 1_000_000
"""Steps of a stage whose budget in operations has not been turned into steps."""
_NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Budget(Strict):
    """What every arm may spend: rows read in training (``samples``), or floating-point operations (``flops``)."""

    samples: int | None = Field(default=None, gt=0)
    flops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.samples is None) == (self.flops is None):
            raise ValueError("give exactly one of samples (rows read) and flops")
        return self

    def __str__(self) -> str:
        return f"{self.samples:,} rows read" if self.samples is not None else f"{self.flops:.3g} FLOPs of training"


class Arm(Strict):
    """One contestant: a model, and what is its own beside the shared. ``redraw`` names parts whose weights are drawn
    anew from the seed, so that only their shape is kept. ``shots``: each question is put again after so many
    examples. Of another arm's, ``about`` and ``shots`` are not taken over."""

    name: str = Field(pattern=_NAME)
    about: str = ""
    like: str | None = None
    model: SystemName | None = None
    config: dict[str, object] = Field(default_factory=dict)
    parts: dict[str, str] = Field(default_factory=dict)
    redraw: list[str] = Field(default_factory=list)
    image: dict[str, object] | None = None
    tokenizer: dict[str, object] | None = None
    prompts: dict[str, str] = Field(default_factory=dict)
    stages: dict[str, dict[str, object] | None] = Field(default_factory=dict)
    shots: list[int] = Field(default_factory=list)


class Statement(Strict):
    """Something said of the arms, put to the test: each of ``arms`` is held against the first one. ``by_size`` also
    draws their scores over the parameters trained."""

    text: str
    by_size: bool = False
    arms: list[str] = Field(min_length=2)


@dataclass(frozen=True, slots=True)
class _Share:
    """A stage that an arm goes through, its part of the budget (of the sum over stages), and what the recipe says."""

    name: str
    share: float
    tree: Mapping[str, object]


class Comparison(Strict):
    """See the head of this file. Every arm is trained once per seed, and scored on the tasks of ``evaluate``."""

    kind: Literal["compare"]
    about: str = ""
    seeds: list[int] = Field(default=[0], min_length=1)
    threads: int | None = Field(default=None, gt=0)
    variables: dict[str, str] = Field(default_factory=dict)
    parts: dict[str, str] = Field(default_factory=dict)
    budget: Budget
    stages: list[dict[str, object]] = Field(default_factory=list)
    evaluate: list[EvalSpec] = Field(min_length=1)
    arms: list[Arm] = Field(min_length=2)
    statements: list[Statement] = Field(default_factory=list)

    @field_validator("arms")
    @classmethod
    def _names_differ(cls, arms: list[Arm]) -> list[Arm]:
        names = [arm.name for arm in arms]
        if len(set(names)) != len(names):
            raise ValueError(f"the names of arms must differ, got {names}")
        return arms

    @field_validator("evaluate")
    @classmethod
    def _finished_models_only(cls, specs: list[EvalSpec]) -> list[EvalSpec]:
        for spec in specs:
            if spec.stage is not None:
                raise ValueError(f"{spec.name!r}: arms are scored when they are finished; take `stage` out")
        return specs

    @model_validator(mode="after")
    def _names_exist(self) -> "Comparison":
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            if arm.like is not None and arm.like not in names[: names.index(arm.name)]:
                raise ValueError(f"arm {arm.name!r}: no arm {arm.like!r} before it; {nearest(arm.like, names)}")
        for statement in self.statements:
            for name in statement.arms:
                if name not in names:
                    raise ValueError(f"statement {statement.text!r}: no arm {name!r}; {nearest(name, names)}")
        return self

    def arm(self, name: str) -> Arm:
        """The arm as it is written. Raises ConfigError for an unknown name."""
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise ConfigError(f"The comparison has no arm {name!r}; {nearest(name, found)}")
        return found[name]

    def resolved(self, name: str) -> Arm:
        """The arm with everything that it takes from those it is like."""
        arm = self.arm(name)
        if arm.like is None:
            return arm
        base = self.resolved(arm.like).model_dump(exclude_unset=True, exclude={"about", "shots"})
        own = arm.model_dump(exclude_unset=True, exclude={"like"})
        return Arm.model_validate(merged(base, own))

    def recipe(self, name: str, seed: int, *, steps: Mapping[str, int] | None = None) -> Recipe:
        """The arm as an ordinary recipe. ``steps`` by stage is what a budget in operations has come to.

        Raises ConfigError in words: an arm without a model, a stage that is neither shared nor complete, an unknown
        key.
        """
        arm = self.resolved(name)
        where = f"of arm {name!r}"
        stages = self._stages(arm, where)
        if steps is None:
            steps = self._steps(stages, where)
        tree: dict[str, object] = {
            "model": arm.model,
            "seed": seed,
            "threads": self.threads,
            "config": arm.config,
            "parts": self.parts | arm.parts,
            "image": arm.image,
            "tokenizer": arm.tokenizer,
            "prompts": arm.prompts,
            "stages": [{**s.tree, "steps": steps[s.name]} for s in stages],
        }
        if arm.model is None:
            raise ConfigError(f"Recipe {where} has no model: name one, or another arm under `like`.")
        return parse_recipe({k: v for k, v in tree.items() if v is not None}, where=where)

    def shares(self, name: str) -> dict[str, float]:
        """Stage -> its part of the arm's budget; together 1."""
        stages = self._stages(self.resolved(name), f"of arm {name!r}")
        total = sum(s.share for s in stages)
        return {s.name: s.share / total for s in stages}

    def _stages(self, arm: Arm, where: str) -> list[_Share]:
        """The stages the arm goes through, what is shared and what is its own put together."""
        shared = {str(s.get("name")): s for s in self.stages}
        found = []
        for name, own in arm.stages.items():
            if own is None:
                continue
            stage = merged(shared.get(name, {}), own) | {"name": name}
            if "data" not in stage:
                raise ConfigError(f"Recipe {where}: stage {name!r} has no data; {nearest(name, shared)}")
            for key in ("steps", "samples"):
                if key in stage:
                    raise ConfigError(f"Recipe {where}: stage {name!r} gets its {key} from the budget; give a `share`.")
            share = stage.pop("share", 1.0)
            if not isinstance(share, int | float) or share <= 0:
                raise ConfigError(f"Recipe {where}: the share of stage {name!r} must be above 0, not {share!r}.")
            found.append(_Share(name, share, stage))
        if not found:
            raise ConfigError(f"Recipe {where} goes through no stage; known: {', '.join(shared)}.")
        return found

    def _steps(self, stages: Sequence[_Share], where: str) -> dict[str, int]:
        """Steps by stage of a budget in samples; of one in operations, which must be measured first, a stand-in."""
        if self.budget.samples is None:
            return {s.name: UNMEASURED for s in stages}
        total = sum(s.share for s in stages)
        ends = [0, *accumulate(s.share / total * self.budget.samples for s in stages)]
        return {
            s.name: max(1, round(end / rows) - round(start / rows))
            for s, (start, end), rows in zip(stages, pairwise(ends), (_rows(s, where) for s in stages), strict=True)
        }


def _rows(stage: _Share, where: str) -> int:
    """Rows of one step."""
    data = stage.tree["data"]
    entries = [entry for entry in data if isinstance(entry, Mapping)] if isinstance(data, Sequence) else []
    rows = stage.tree.get("batch_size") or sum(entry.get("batch_size", 0) for entry in entries)
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"Recipe {where}: a budget in samples needs the batch_size of stage {stage.name!r}.")
    return rows


def parse_comparison(tree: Mapping[str, object], where: str = "comparison") -> Comparison:
    """A checked Comparison, every arm's recipe among it; raises ConfigError in words."""
    nested = {"arms": Arm, "statements": Statement, "evaluate": EvalSpec, "budget": Budget}
    found = checked(Comparison, tree, where, nested)
    for arm in found.arms:
        found.recipe(arm.name, found.seeds[0])
    return found
