"""Low-rank adapters on a net's linear layers, by peft: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA
(Liu et al. 2024) and QLoRA (:mod:`isthmus.quantised`).

What a net carries stands in its layers alone: which of them are adapted, with what rank and scale, is read there.
The layer underneath keeps its tensors, and with :func:`isthmus.stage.canonical` their names.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from isthmus import mapped
from isthmus.config import strict
from isthmus.errors import CheckpointError, ConfigError, MissingExtraError, StageError, nearest
from isthmus.quantised import BITS, Linear, is_quantised

MARK = ".lora_"
"""What the names of an adapter's tensors hold, after the name of their layer."""

LR = 2e-4
"""Peak rate of adapters whose pattern gives none: that of the original LLaVA's LoRA recipe."""

_NAME = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters of one pattern: a linear layer W computes ``W + s B A``, A (rank, in), B (out, rank), B zero at first.

    ``s`` is alpha / rank, or with ``rslora`` alpha / sqrt(rank); ``alpha`` is twice the rank unless given. ``dropout``
    is on what A reads. ``targets`` are ends of layers' names (``q_proj``); without any, every linear layer is adapted
    but an output head over the vocabulary. ``dora`` trains the magnitude of each row apart. With ``bits``, 4, every
    linear layer that the pattern catches and no pattern opens is held in 4 bits, adapted or not, but output heads.

    Raises ConfigError.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    bits: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"lora: rank is {self.rank!r}, and an adapter of no rank trains nothing: give 1 or more.")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"lora: alpha is {self.alpha!r}; it scales what is learnt and must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        if self.bits not in (None, BITS):
            raise ConfigError(f"lora: bits is {self.bits!r}; give 4 (QLoRA), or leave it out for the base as it is.")

    @property
    def scale(self) -> float:
        """alpha, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    @property
    def signature(self) -> tuple[int, float, bool, bool, int | None]:
        """What two adapters on one layer must have in common."""
        return self.rank, self.scale, self.rslora, self.dora, self.bits

    @property
    def settings(self) -> str:
        words = [f"rank {self.rank}, alpha {self.scale:g}", *(n for n in ("rslora", "dora") if getattr(self, n))]
        return ", ".join([*words, *([f"over {self.bits} bits"] if self.bits else [])])


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, an adapter's or its own, by its canonical name."""
    return name.partition(MARK)[0] if MARK in name else name.rpartition(".")[0]


class AdaptedLayer(Protocol):
    """What is used of peft's layer over a linear one; its settings are by the adapter's name."""

    r: Mapping[str, int]
    lora_alpha: Mapping[str, float]
    lora_dropout: nn.ModuleDict
    use_rslora: Mapping[str, bool]
    use_dora: Mapping[str, bool]

    def get_base_layer(self) -> nn.Linear: ...
    def merge(self, safe_merge: bool = False) -> None: ...


def adapted(net: nn.Module) -> dict[str, AdaptedLayer]:
    """The net's adapted layers by name: peft's modules. Empty for a net without adapters."""
    names = dict.fromkeys(name.partition(MARK)[0] for name, _ in net.named_parameters() if MARK in name)
    return {name: cast(AdaptedLayer, net.get_submodule(name)) for name in names}


def adapter_tensors(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters under their names in the net."""
    return {name: p for name, p in net.named_parameters() if MARK in name}


def described(net: nn.Module) -> dict[str, Lora]:
    """What each adapted layer was given; its ``targets`` are left empty."""
    return {
        name: Lora(
            rank=int(layer.r[_NAME]),
            alpha=float(layer.lora_alpha[_NAME]),
            dropout=float(getattr(layer.lora_dropout[_NAME], "p", 0.0)),  # peft has an Identity for none
            rslora=bool(layer.use_rslora[_NAME]),
            dora=bool(layer.use_dora[_NAME]),
            bits=BITS if is_quantised(layer.get_base_layer().weight) else None,
        )
        for name, layer in adapted(net).items()
    }


# ------------------------------------------------------------------------------------------------ which layers


def plan(net: nn.Module, patterns: Sequence[tuple[str, Lora | None]], unreachable: set[str]) -> dict[str, int]:
    """Layer -> number of the pattern that adapts it. The first match wins, and a pattern without a Lora takes a layer
    by its weight. Layers whose weight the objective cannot reach get none.

    Raises StageError for a pattern or a target that catches no linear layer, and for a layer with tied weights.
    """
    if all(lora is None for _, lora in patterns):
        return {}
    heads = _output_heads(net)
    found: dict[str, int] = {}
    caught: dict[int, list[str]] = defaultdict(list)
    for name, layer in _linear_layers(net).items():
        matching = [(i, *p) for i, p in enumerate(patterns) if fnmatchcase(f"{name}.weight", p[0])]
        for index, _, _ in matching:
            caught[index].append(name)
        for index, pattern, lora in matching:
            if lora is not None and not _targeted(name, layer, lora, heads):
                continue
            if lora is not None and f"{name}.weight" not in unreachable:
                _untied(net, name, layer, pattern)
                found[name] = index
            break
    for index, (pattern, lora) in enumerate(patterns):
        if lora is not None:
            _caught(pattern, lora, caught[index], [n for n, i in found.items() if i == index], net)
    return found


def in_four_bits(net: nn.Module, patterns: Sequence[tuple[str, Lora | None]]) -> list[str]:
    """The layers that the patterns hold in 4 bits: those that one with ``bits`` catches, unless another pattern adapts
    or opens them, they are output heads without an adapter, or share their weight with another."""
    heads, found = _output_heads(net), []
    for name, layer in _linear_layers(net).items() if any(lora and lora.bits for _, lora in patterns) else ():
        matching = [lora for pattern, lora in patterns if fnmatchcase(f"{name}.weight", pattern)]
        takers = [lora for lora in matching if lora is None or _targeted(name, layer, lora, heads)]
        left = [lora for lora in matching if tuple(layer.weight.shape) not in heads and not _sharing(net, layer)]
        lora = (takers or left or [None])[0]
        if lora is not None and lora.bits:
            found.append(name)
    return found


def _caught(pattern: str, lora: Lora, caught: Sequence[str], taken: Sequence[str], net: nn.Module) -> None:
    """Raises StageError where a pattern adapts nothing, or one of its targets is no layer's name."""
    ends = sorted({name.rpartition(".")[2] for name in caught})
    for target in lora.targets:
        if not any(_ends(name, target) for name in caught):
            raise StageError(
                f"Pattern {pattern!r}: lora target {target!r} is the name of no linear layer there; "
                f"{nearest(target, ends or ['(there is none)'], many=3)}"
            )
    if not caught:
        near = nearest(pattern, sorted({f"{n.partition('.')[0]}.*" for n in _linear_layers(net)}), many=3)
        raise StageError(
            f"Pattern {pattern!r} catches no linear layer, so there is nothing to put an adapter on; {near}"
        )
    if not taken:
        raise StageError(
            f"Pattern {pattern!r} adapts no layer: what it catches ({', '.join(caught[:3])}) is taken by earlier "
            "patterns, is out of the objective's reach, or is the output head, which wants to be named in targets."
        )


def _linear_layers(net: nn.Module) -> dict[str, Linear]:
    """Linear layers by the names that they have without adapters; GPT-2's Conv1D is one."""
    found: dict[str, Linear] = {}
    for name, module in net.named_modules():
        if MARK not in name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            found[name.removesuffix(".base_layer")] = cast(Linear, module)
    return found


def _output_heads(net: nn.Module) -> set[tuple[int, ...]]:
    """Shapes of the tables of words: a linear layer of such a shape makes logits over a vocabulary."""
    return {tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Embedding)}


def _targeted(name: str, layer: Linear, lora: Lora, heads: set[tuple[int, ...]]) -> bool:
    if not lora.targets:
        return tuple(layer.weight.shape) not in heads
    return any(_ends(name, target) for target in lora.targets)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _untied(net: nn.Module, name: str, layer: Linear, pattern: str) -> None:
    if sharing := _sharing(net, layer):
        raise StageError(
            f"Pattern {pattern!r}: {name} has its weight in common with {', '.join(sharing)} (tied weights), so an "
            "adapter could not be merged into it. Take it out of the pattern or the targets."
        )


def _sharing(net: nn.Module, layer: Linear) -> list[str]:
    """The names of the layer's weight, where it has several."""
    found = [n for n, p in net.named_parameters(remove_duplicate=False) if p is layer.weight]
    return found if len(found) > 1 else []


# ------------------------------------------------------------------------------------------- putting them on


def attach(net: nn.Module, wanted: Mapping[str, Lora], *, seed: int = 0) -> None:
    """Give the layers their adapters, drawn from ``seed``; a layer that has one keeps it.

    Where one was put on, every other parameter is frozen afterwards. Raises StageError where a layer has another
    adapter already, or rsLoRA or DoRA is on some layers alone, MissingExtraError without peft.
    """
    here = described(net)
    for name, lora in wanted.items():
        now = here.get(name)
        if now is not None and now.signature != lora.signature:
            raise StageError(
                f"{name} has an adapter from an earlier stage ({now.settings}), and this one needs another "
                f"({lora.settings}). One layer has one adapter: give both the same."
            )
    flags = {(lora.rslora, lora.dora) for lora in (*here.values(), *wanted.values())}
    if len(flags) > 1:
        raise StageError(
            "rslora and dora hold for all adapters of a model (PEFT's layout has one flag): set them alike."
        )
    groups: dict[tuple[Lora, bool], list[str]] = defaultdict(list)
    for name, lora in wanted.items():
        if name not in here:
            groups[lora, not isinstance(net.get_submodule(name), nn.Linear)].append(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for (lora, turned), names in groups.items():
            _inject(net, lora, names, turned=turned)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Put adapters like those of ``old``, with other values, on the layers of ``new`` that have the same names."""
    layers = _linear_layers(new)
    attach(new, {name: lora for name, lora in described(old).items() if name in layers})


def _inject(net: nn.Module, lora: Lora, names: Sequence[str], *, turned: bool) -> None:
    """One call of peft. ``turned`` are layers that keep their weight as (in, out)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("lora in a stage needs peft: pip install 'isthmus[lora]'") from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,  # type: ignore[arg-type]  # an int by its annotation, a factor in its use
        lora_dropout=lora.dropout,
        target_modules="|".join(name.replace(".", r"\.") for name in names),  # as a pattern it must fit a full name
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=turned,
    )
    model: Any = net  # no module has this, which peft reads
    model.is_loaded_in_4bit = any(is_quantised(model.get_submodule(name).weight) for name in names)
    with mapped.solid(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft to its developers
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    del model.is_loaded_in_4bit
    missing = set(names) - adapted(net).keys()
    if missing:
        raise StageError(f"peft put no adapter on {', '.join(sorted(missing)[:3])}: it does not know such a layer.")


def merge(net: nn.Module) -> int:
    """Add every adapter to the layer underneath and take it off; how many there were.

    Raises CheckpointError over quantised weights, where the sum could not be kept, and for an adapter with NaN.
    """
    layers = adapted(net)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if is_quantised(weight):
            raise CheckpointError(
                f"The weight of {name} is quantised ({weight.dtype}): with an adapter added to it, it would be rounded "
                "again and answer otherwise. Open the adapters over their base as it is stored, unquantised=True (on "
                "the command line --unquantised), and merge there; what the rounding had changed goes, so score anew."
            )
    for name, layer in layers.items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"The adapter of {name} cannot be merged: {error}") from error
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, layer.get_base_layer())
    return len(layers)


# ------------------------------------------------------------------------------------------------ PEFT's files


def to_peft(net: nn.Module, base: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """adapter_config.json and adapter_model.safetensors as PEFT writes them, with the names of this net's layers."""
    from peft import LoraConfig

    found = described(net)
    first = next(iter(found.values()))
    ranks = {name: lora.rank for name, lora in found.items() if lora.rank != first.rank}
    alphas = {name: lora.scale for name, lora in found.items() if lora.scale != first.scale}
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.scale,  # type: ignore[arg-type]
        lora_dropout=first.dropout,
        target_modules=sorted(found),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=first.rslora,
        use_dora=first.dora,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    values: dict[str, object] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    tensors = {f"{_PREFIX}{name.replace(f'.{_NAME}', '')}": t for name, t in adapter_tensors(net).items()}
    return values, tensors


@dataclass(frozen=True, kw_only=True)
class _PeftConfig:
    """What is read of adapter_config.json as :func:`to_peft` gives it."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None


def from_peft(net: nn.Module, values: Mapping[str, object], tensors: Mapping[str, Tensor], where: str) -> None:
    """Put on what :func:`to_peft` gave. Raises CheckpointError for a layer that the net has not, a tensor too many or
    too few, or settings of another kind."""
    try:
        known = {f.name: values[f.name] for f in fields(_PeftConfig) if f.name in values}
        config = strict(_PeftConfig, known, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    wanted = {
        name: Lora(
            rank=ranks.get(name, config.r),
            alpha=alphas.get(name, config.lora_alpha),
            dropout=config.lora_dropout,
            rslora=config.use_rslora,
            dora=config.use_dora,
        )
        for name in config.target_modules
    }
    strange = sorted(wanted.keys() - _linear_layers(net).keys())
    if strange:
        raise CheckpointError(f"{where}: its base model has no linear layer {strange[0]!r}.")
    attach(net, wanted)
    places = adapter_tensors(net)
    given = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    for name, place in places.items():
        tensor = given.pop(name.replace(f".{_NAME}", ""), None)
        if tensor is None or tensor.shape != place.shape:
            raise CheckpointError(f"{where} lacks {name!r} of shape {tuple(place.shape)}.")
        place.data.copy_(tensor)
    if given:
        raise CheckpointError(f"{where} holds {next(iter(given))!r}, which no adapted layer has.")


def summary(net: nn.Module) -> str:
    """The net's adapters in a line; empty without any."""
    found = list(described(net).values())
    if not found:
        return ""
    ranks = ", ".join(str(rank) for rank in sorted({lora.rank for lora in found}))
    name = "DoRA" if found[0].dora else "rsLoRA" if found[0].rslora else "LoRA"
    numbers = sum(tensor.numel() for tensor in adapter_tensors(net).values())
    return f"{name} of rank {ranks} on {len(found)} layers, {numbers:,} numbers"
