"""Stage: freezing and training as data.

A stage lists ``pattern -> rate`` over the canonical names of a net's parameters. Patterns are shell-style
(``vision.*``, ``*.ln_1.*``), ordered, and the first match wins; what no pattern names is frozen. Applying a
stage opens and freezes the parameters, sets train and eval modes, and answers with the table that is printed,
saved and later proven by the trainer.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal, NotRequired, Self, TypedDict, cast

from rich.table import Table
from torch import Tensor, nn

from isthmus import adapters, quantised
from isthmus.adapters import Lora
from isthmus.errors import ConfigError, StageError, nearest

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
"""Name components that wrappers (data parallel, compile, activation checkpointing, adapters) put into ours."""

BOOKKEEPING = ("log_every", "save_every", "keep_last", "keep_every", "nan_policy", "nan_limit")
"""Fields of a stage that do not change what is computed, so a run may go on with other values."""


class GroupFacts(TypedDict):
    """A :class:`Group` as data; in a :class:`TableFacts` with the number of ``tensors`` that it opens."""

    pattern: str
    lr: float
    weight_decay: float
    lora: NotRequired[dict[str, object]]
    tensors: NotRequired[int]


class RowFacts(TypedDict):
    """A :class:`TableRow` as data."""

    part: str
    parameters: int
    trained: int
    rates: list[float]
    unused: int
    adapters: int


class TableFacts(TypedDict):
    """A :class:`StageTable` as data."""

    rows: list[RowFacts]
    parameters: int
    trained: int
    groups: list[GroupFacts]
    unused: list[str]


@dataclass(frozen=True, slots=True)
class Group:
    """The parameters whose canonical name matches ``pattern`` train at peak rate ``lr``.

    ``weight_decay`` is decoupled (AdamW) and applies to tensors of two or more dimensions only: gains, biases,
    class tokens and temperatures are never decayed (CLIP, section 2.5).

    With ``lora`` the linear layers among them get adapters, which train at ``lr`` (2e-4 unless given) while the layers
    themselves stay frozen; what else the pattern matches is left to later patterns.
    """

    pattern: str
    lr: float = cast(float, None)  # left out it is the adapters' default, and an error without adapters
    weight_decay: float = 0.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            if self.lora is None:
                raise ConfigError(f"pattern {self.pattern!r} of train: missing 'lr', the peak rate.")
            object.__setattr__(self, "lr", adapters.LR)
        for name in ("lr", "weight_decay"):
            _number(f"{name} of pattern {self.pattern!r}", getattr(self, name), low=0.0)

    def to_dict(self) -> GroupFacts:
        """The group as data; adapters only where it has some."""
        facts: GroupFacts = {"pattern": self.pattern, "lr": self.lr, "weight_decay": self.weight_decay}
        if self.lora is not None:
            facts["lora"] = _used(asdict(self.lora))
        return facts


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training. The budget is ``steps`` or ``samples``, exactly one of them; never a time.

    ``warmup`` below 1 is a fraction of the budget, from 1 on a count in the budget's unit; ``floor`` is the fraction
    of the peak rate at which the decay ends. ``clip_norm`` bounds the global gradient norm (none: no
    clipping). ``nan_policy`` ``"skip"`` passes over at most ``nan_limit`` non-finite steps in a row.
    Of the checkpoints, written every ``save_every`` steps, the newest ``keep_last`` stay, and those of every
    ``keep_every``-th step.
    ``precision`` ``"auto"`` is bf16 autocast where that is the quicker on this machine, else fp32.
    ``frozen_dtype`` ``"bf16"`` halves the memory of frozen matrices whose values are of bf16 anyway, as most published
    ones are; it needs bf16 autocast. ``ema`` (0.999, say) hands over, and validates, a moving average of the trained
    weights with that decay.

    Raises ConfigError for values that do not fit.
    """

    name: str
    train: tuple[Group, ...]
    steps: int | None = None
    samples: int | None = None
    warmup: float = 0.0
    decay: Literal["cosine", "constant", "linear"] = "cosine"
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    ema: float | None = None
    log_every: int = 1
    save_every: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    nan_policy: Literal["stop", "skip"] = "stop"
    nan_limit: int = 3

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if (self.steps is None) == (self.samples is None):
            raise ConfigError(f"{where}: the budget is either `steps` or `samples`; give exactly one of them.")
        for name in ("steps", "samples", "log_every", "save_every", "keep_last", "keep_every", "nan_limit"):
            value = getattr(self, name)
            if value is not None:
                _number(f"{where}: {name}", value, low=1, integer=True)
        for name, allowed in (
            ("decay", ("cosine", "constant", "linear")),
            ("precision", ("auto", "fp32", "bf16")),
            ("frozen_dtype", ("fp32", "bf16")),
            ("nan_policy", ("stop", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{where}: {name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        _number(f"{where}: warmup", self.warmup, low=0)
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ConfigError(f"{where}: warmup {self.warmup} must be a fraction below 1 or a whole number from 1 on.")
        if self.warmup_count > self.budget:
            raise ConfigError(
                f"{where}: warmup {self.warmup:g} is longer than the budget of {self.budget}; make `warmup` smaller, "
                "or a fraction of the steps, such as 0.05."
            )
        _number(f"{where}: floor", self.floor, low=0.0, high=1.0)
        _number(f"{where}: eps", self.eps, low=0.0)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"{where}: betas {self.betas} must be two numbers in [0, 1).")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"{where}: ema {self.ema} must be between 0 and 1, such as 0.999; leave it out for none.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"{where}: clip_norm {self.clip_norm} must be positive; leave it empty for no clipping.")

    @property
    def budget(self) -> int:
        """The total budget, in steps or in samples."""
        return self.steps if self.steps is not None else self.samples or 0

    @property
    def warmup_count(self) -> int:
        """The warm-up in the budget's unit."""
        return int(self.warmup) if self.warmup >= 1 else round(self.warmup * self.budget)

    def to_dict(self) -> dict[str, object]:
        """The stage as JSON-able data."""
        return json.loads(json.dumps(asdict(self) | {"train": [group.to_dict() for group in self.train]}))

    def fingerprint(self) -> str:
        """sha256 over everything that changes the outcome; a run resumes only under the same fingerprint."""
        defining = defining_keys(self.to_dict())
        return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()


def defining_keys(stage: Mapping[str, object]) -> dict[str, object]:
    """The keys of a stage that change its outcome. One that came later counts only where it is used."""
    later = {"frozen_dtype": "fp32", "ema": None}
    kept = {k: v for k, v in stage.items() if k not in BOOKKEEPING and (k not in later or v != later[k])}
    groups = kept.get("train")
    return {**kept, "train": [_said(group) for group in groups]} if isinstance(groups, list) else kept


def _said(group: Mapping[str, object]) -> dict[str, object]:
    """A group's keys without those that came later and are not used."""
    own = {k: v for k, v in group.items() if k != "lora"}
    lora = group.get("lora")
    return {**own, "lora": _used(lora)} if isinstance(lora, Mapping) else own


def _used(lora: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in lora.items() if k != "bits" or v is not None}


@dataclass(frozen=True, slots=True)
class TableRow:
    """One part of the net (first component of the names): counts of numbers, the rates it trains at. ``adapters`` are
    those of ``parameters`` that adapters have."""

    part: str
    parameters: int
    trained: int
    rates: tuple[float, ...]
    unused: int
    adapters: int = 0


@dataclass(frozen=True, slots=True)
class StageTable:
    """What a stage opens. ``assigned`` maps each open parameter to the index of its group.

    ``unused`` names the parameters that a pattern matched but the objective cannot reach: they stay frozen.
    """

    groups: tuple[Group, ...]
    rows: tuple[TableRow, ...]
    assigned: Mapping[str, int]
    unused: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trained(self) -> int:
        return sum(row.trained for row in self.rows)

    def to_dict(self) -> TableFacts:
        """The same facts as JSON-able data."""
        return json.loads(
            json.dumps(
                {
                    "rows": [asdict(row) for row in self.rows],
                    "parameters": self.parameters,
                    "trained": self.trained,
                    "groups": [
                        {**group.to_dict(), "tensors": sum(i == n for i in self.assigned.values())}
                        for n, group in enumerate(self.groups)
                    ],
                    "unused": list(self.unused),
                }
            )
        )

    def render(self, title: str = "") -> Table:
        """The table for the console."""
        table = Table(title=title or None)
        table.add_column("part")
        for column in ("parameters", "trained", "rate"):
            table.add_column(column, justify="right")
        for row in self.rows:
            rates = ", ".join(f"{rate:g}" for rate in row.rates) or "frozen"
            table.add_row(row.part, f"{row.parameters:,}", f"{row.trained:,}", rates)
        table.add_section()
        table.add_row("all", f"{self.parameters:,}", f"{self.trained:,}", "")
        notes = []
        if held := sum(row.adapters for row in self.rows):
            notes.append(f"{held:,} numbers are adapters'")
        if self.unused:
            numbers = sum(row.unused for row in self.rows)
            notes.append(f"{len(self.unused)} tensors ({numbers:,} numbers) are out of the objective's reach: unused")
        table.caption = "; ".join(notes) or None
        return table


def canonical(name: str) -> str:
    """A parameter's name without the prefixes of wrappers: ``module.vision.x`` is ``vision.x``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under its first canonical name (a tied tensor has several)."""
    for name, parameter in net.named_parameters():
        yield canonical(name), parameter


def named_state(net: nn.Module) -> dict[str, Tensor]:
    """The net's state dict under canonical names."""
    return {canonical(name): tensor for name, tensor in net.state_dict().items()}


def attach_adapters(net: nn.Module, groups: Sequence[Group], *, seed: int = 0) -> dict[str, int]:
    """Put on the adapters that the groups name, drawn from ``seed``, where they are not there yet, over 4 bits where
    they say so; adapted layer -> index of its group. Raises StageError as :func:`isthmus.adapters.plan` and
    :func:`isthmus.adapters.attach`, and what :func:`isthmus.quantised.quantise` raises."""
    patterns = [(g.pattern, g.lora) for g in groups]
    layers = adapters.plan(net, patterns, _unreachable(net))
    adapted = adapters.adapted(net)
    quantised.quantise(net, [name for name in adapters.in_four_bits(net, patterns) if name not in adapted])
    adapters.attach(net, {n: lora for n, i in layers.items() if (lora := groups[i].lora) is not None}, seed=seed)
    return layers


def _unreachable(net: nn.Module) -> set[str]:
    return {canonical(name) for name in (net.unreachable() if isinstance(net, StagedNet) else ())}


def apply_stage(net: nn.Module, groups: Sequence[Group], *, seed: int = 0) -> StageTable:
    """Open what the groups name, freeze the rest, set the modes, and say what was done.

    Adapters that the groups name are put on where they are not there yet, drawn from ``seed``.
    Parameters that ``net.unreachable()`` names (a StagedNet has that method) stay frozen and are listed as unused.

    Raises StageError when a pattern matches nothing (near names are suggested), is wholly shadowed by earlier
    ones, names only unreachable parameters, or opens one name of a tied tensor and not the other.
    """
    layers = attach_adapters(net, groups, seed=seed)
    assigned, unused = _assigned(net, groups, layers)
    _demand_reach([group for index, group in enumerate(groups) if index not in assigned.values()])
    for name, parameter in named_parameters(net):
        if name in assigned and quantised.is_quantised(parameter):
            raise StageError(f"{name!r} is held in 4 bits since an earlier stage, and cannot be trained in full.")
        parameter.requires_grad_(name in assigned)
    set_modes(net)
    return StageTable(
        groups=tuple(groups), rows=_rows(net, groups, assigned, set(unused)), assigned=assigned, unused=tuple(unused)
    )


def opens(net: nn.Module, groups: Sequence[Group]) -> list[str]:
    """What the groups would open: parameters, and layers that get adapters. The net stays as it is, and may be without
    values. Raises StageError as :func:`apply_stage` does for its patterns."""
    layers = adapters.plan(net, [(g.pattern, g.lora) for g in groups], _unreachable(net))
    assigned, _ = _assigned(net, groups, layers)
    found = {*assigned.values(), *layers.values()}
    _demand_reach([group for index, group in enumerate(groups) if index not in found])
    return [*assigned, *layers]


def _assigned(net: nn.Module, groups: Sequence[Group], layers: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Parameter -> index of its group, and those that a group names and the objective cannot reach."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(canonical(name))
    chosen = _choose([name for tied in names.values() for name in tied], groups, layers)
    unreachable = _unreachable(net)
    assigned: dict[str, int] = {}
    unused: list[str] = []
    for name, parameter in named_parameters(net):
        tied = names[id(parameter)]
        index = _agreed(tied, chosen, groups)
        if index is None:
            continue
        if unreachable.isdisjoint(tied):
            assigned[name] = index
        else:
            unused.append(name)
    return assigned, unused


def _demand_reach(groups: Sequence[Group]) -> None:
    """Raises StageError for a group that opens nothing."""
    if groups:
        raise StageError(
            f"Pattern {groups[0].pattern!r} names only parameters that the objective cannot reach (for "
            "example blocks above the tapped layer): it would train nothing. Remove the pattern."
        )


class StagedNet(nn.Module):
    """A net that is frozen and opened by parts: ``train()`` reaches what is open alone (:func:`set_modes`), so that no
    dropout of a frozen encoder or language model starts anew."""

    def unreachable(self) -> tuple[str, ...]:
        """Parameters that the objective cannot reach: as a rule none."""
        return ()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            set_modes(self)
        return self


def set_modes(net: nn.Module) -> None:
    """Train mode where something below is open, eval mode elsewhere. A net that is no :class:`StagedNet` needs it again
    after any ``net.train()``.

    A module without parameters of its own (dropout) follows the module that holds it, so dropout inside a frozen
    block stays off.
    """

    def visit(module: nn.Module, inherited: bool) -> None:
        flags = [p.requires_grad for p in module.parameters()]
        # The attribute, not .train(): that call would go down the tree and undo the choice made for children.
        module.training = any(flags) if flags else inherited
        for child in module.children():
            visit(child, module.training)

    visit(net, False)


def _choose(names: Iterable[str], groups: Sequence[Group], layers: Mapping[str, int]) -> dict[str, int]:
    """Name -> index of the first group that matches; a group with adapters takes its ``layers`` and opens of them the
    adapters alone. Raises StageError for a pattern without effect."""
    names = list(names)
    chosen: dict[str, int] = {}
    if not groups:
        raise StageError("The stage names nothing to train. Give at least one pattern, for example 'connector.*'.")
    for index, group in enumerate(groups):
        if group.lora is not None:
            matched = [name for name in names if layers.get(adapters.layer_of(name)) == index]
        else:
            matched = [name for name in names if fnmatchcase(name, group.pattern)]
        if not matched:
            raise StageError(
                f"Pattern {group.pattern!r} matches no parameter of the net; "
                f"{nearest(group.pattern, _patterns(names), many=3)}"
            )
        taken = sorted({groups[chosen[name]].pattern for name in matched if name in chosen})
        if all(name in chosen for name in matched):
            raise StageError(
                f"Pattern {group.pattern!r} has no effect: everything it matches is already taken by "
                f"{', '.join(map(repr, taken))}. The first match wins, so put the narrower pattern first."
            )
        for name in matched:
            chosen.setdefault(name, index)
    return {name: i for name, i in chosen.items() if groups[i].lora is None or adapters.MARK in name}


def _agreed(tied: Sequence[str], chosen: Mapping[str, int], groups: Sequence[Group]) -> int | None:
    """The group of a tensor with one or several names; they must agree, as it is one tensor."""
    index = chosen.get(tied[0])
    for name in tied[1:]:
        if chosen.get(name) != index:
            said = ["frozen" if i is None else f"taken by {groups[i].pattern!r}" for i in (index, chosen.get(name))]
            raise StageError(
                f"{tied[0]!r} and {name!r} are one tensor (tied weights), but the first is {said[0]} and "
                f"the second {said[1]}. Name both in the same pattern, or neither."
            )
    return index


def _patterns(names: Iterable[str]) -> list[str]:
    """What a user may have meant: every parameter, and every module as ``module.*``."""
    found = set()
    for name in names:
        found.add(name)
        parts = name.split(".")
        found.update(".".join(parts[:n]) + ".*" for n in range(1, len(parts)))
    return sorted(found)


def _rows(
    net: nn.Module, groups: Sequence[Group], assigned: Mapping[str, int], unused: set[str]
) -> tuple[TableRow, ...]:
    sizes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, parameter in named_parameters(net):
        sizes[name.split(".")[0]].append((name, quantised.numel(parameter)))
    return tuple(
        TableRow(
            part=part,
            parameters=sum(n for _, n in members),
            trained=sum(n for name, n in members if name in assigned),
            rates=tuple(dict.fromkeys(groups[assigned[name]].lr for name, _ in members if name in assigned)),
            unused=sum(n for name, n in members if name in unused),
            adapters=sum(n for name, n in members if adapters.MARK in name),
        )
        for part, members in sizes.items()
    )


def _number(what: str, value: object, *, low: float, high: float | None = None, integer: bool = False) -> None:
    number = value if isinstance(value, int if integer else int | float) and not isinstance(value, bool) else None
    if number is None or number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{what} is {value!r}; it must be {'a whole' if integer else 'a'} number, {bounds}.")
