"""LoRA adapters of peft, merged by peft into the weights they belong to (Hu et al. 2021, eq. 3, and its variants).

What an adapter says is honoured exactly or refused by name: ranks and scales per layer, rsLoRA, DoRA, biases, whole
trained modules, PiSSA and OLoRA, whose start takes the adapter out of the base, are peft's own arithmetic.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from isthmus import load_report, mapped
from isthmus.checkpoint import read_json
from isthmus.errors import CheckpointError, MissingExtraError
from isthmus.interop.archives import read_archive, tensors_of
from isthmus.load_report import Account

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")
"""Starts that leave the base as it is, and two that change it in a way that follows from the base alone. What starts
from data or chance (CorDA, LoftQ, LoRA-GA, PiSSA by a random decomposition) cannot be taken out of it again."""
_BOOKKEEPING = {
    *("peft_type", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
    *("auto_mapping", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
"""Fields that say nothing of what is merged; those of a start count only with that start."""
_MERGED = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "bias", "fan_in_fan_out", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "lora_bias", "target_parameters", "trainable_token_indices", "ensure_weight_tying"),
}

_LAYOUTS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Names of modules in adapters of a LLaVA, by version of the library, and here or in its language model alone."""


def adapter_file(folder: Path) -> Path | None:
    """The weights of the adapter in a folder, if it holds one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def base_named(folder: Path) -> Path | None:
    """The base that the adapter in ``folder`` names, where that is a folder here: as it says, within, or beside."""
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named = values.get("base_model_name_or_path")
    places = (Path(named), folder / named, folder.parent / named) if isinstance(named, str) and named else ()
    return next((place for place in places if place.is_dir()), None)


def merge_adapter(lm: nn.Module, folder: Path, account: Account | None = None) -> None:
    """Merges the adapter in ``folder`` into ``lm``, a model of transformers, in place; without an adapter, nothing.

    Raises CheckpointError for an adapter that cannot be merged exactly, lacks a tensor, or belongs to another model;
    MissingExtraError without peft.
    """
    file = adapter_file(folder)
    if file is None:
        return
    values = _mergeable(folder)
    stored = tensors_of(read_archive(file, account), file)
    state, values = _named_as_in(lm, stored, values, folder)
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError:
        raise MissingExtraError(
            f"{folder} is a LoRA adapter; merging one needs peft: pip install 'isthmus[lora]'"
        ) from None
    named = dict(lm.named_modules())
    _demand_plain_head(named, [_module(key) for key in state if ".token_adapter." in key], folder)
    touched = [named[name] for name in {_module(key) for key in state} & set(named)]
    load_report.converted(account, [p for module in touched for p in module.parameters()])
    if not values.get("ensure_weight_tying"):
        _untie(lm, [named[name] for name in {_module(key) for key in state if ".lora_" in key} & set(named)])
    # Weights may be pages of a file, of its dtype too, and peft adds in place.
    for parameter in (p for module in touched for p in module.parameters()):
        parameter.data = parameter.data.to(torch.float32, copy=True)
    try:
        with mapped.solid(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft to its developers; what does not fit is an error below
            settings: dict[str, Any] = {k: v for k, v in values.items() if k in _MERGED and v is not None}
            config = LoraConfig(**settings, inference_mode=True)  # it checks them itself
            model: Any = get_peft_model(lm, config)  # type: ignore[arg-type]  # any module will do, whose rest it hands on
            result = set_peft_model_state_dict(model, state)
            _fits(result, file, state)
            model.merge_and_unload()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{folder}: peft cannot merge this adapter into its base model: {' '.join(str(error).split())[:300]}"
        ) from error


def _demand_plain_head(named: Mapping[str, nn.Module], tables: list[str], folder: Path) -> None:
    """Raises CheckpointError for trained tokens of a table that a head with biases shares: peft (0.21) runs such a head
    without its biases, and merges it with them."""
    shared = {id(named[name]._parameters.get("weight")) for name in tables if name in named}
    for name, module in named.items():
        if id(module._parameters.get("weight")) in shared and module._parameters.get("bias") is not None:
            raise CheckpointError(
                f"{folder}: its trained tokens are shared by {name}, which has biases. peft leaves these out while it "
                "trains and takes them in when it merges, so the merged model would not be the one that was trained."
            )


def _untie(lm: nn.Module, changed: list[nn.Module]) -> None:
    """Gives modules a weight of their own where another shares it: peft adds to what this one computes alone, and
    merged into a shared table the other would compute otherwise too."""
    owners = Counter(id(weight) for module in lm.modules() for weight in module._parameters.values())
    for module in changed:
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] > 1:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


class _Result(Protocol):
    missing_keys: list[str]
    unexpected_keys: list[str]


def _fits(result: _Result, file: Path, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for tensors of an adapter that its base has no place for, and places left empty."""
    marks = ["lora_", ".modules_to_save."]
    if not any(".token_adapter." in name for name in state):  # those of a tied head are the embedding's
        marks.append(".trainable_tokens_delta")
    missing, strange = [k for k in result.missing_keys if any(m in k for m in marks)], result.unexpected_keys
    for what, names in (("lacks", missing), ("holds tensors without a place in its base model:", strange)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{file}: the adapter {what} {names[0]!r}{more}. Is it this base's?")


def _mergeable(folder: Path) -> dict[str, object]:
    """adapter_config.json. Raises CheckpointError, naming the field, for what would not be merged exactly."""
    values, where = read_json(folder / CONFIG), f"{folder}/{CONFIG}"
    if values.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{where}: peft_type {values['peft_type']!r} is not merged here, only LORA.")
    start = values.get("init_lora_weights", True)
    if start not in _STARTS or (isinstance(start, int) and not isinstance(start, bool)):
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} changed the base model when training began, in a way that does not "
            "follow from it: merged into the base named, the adapter would give other outputs. Convert it to plain "
            "LoRA when it is saved (peft: save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for name, value in values.items():
        if name not in _BOOKKEEPING | _MERGED and value not in (None, False, [], {}, ""):
            raise CheckpointError(f"{where}: {name} {value!r} is not known here, so the adapter is not merged.")
    return values


def _named_as_in(
    lm: nn.Module, stored: Mapping[str, Tensor], values: dict[str, object], folder: Path
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The adapter's tensors and configuration in the names of the modules of ``lm``; both as they are where they fit.

    An adapter of a LLaVA names its modules as the version it was made with, and may be given its language model alone.
    """
    modules = {name for name, _ in lm.named_modules()}
    prefix = "base_model.model."
    bare = {name.removeprefix(prefix).replace(".default.", "."): tensor for name, tensor in stored.items()}
    targets = sorted({_module(name) for name in bare if ".lora_" in name})
    if not values.get("target_modules") and not values.get("target_parameters"):
        values = {**values, "target_modules": targets}  # what peft would fill in by the kind of model
    if all(_module(name) in modules for name in bare):
        return {f"{prefix}{name}": tensor for name, tensor in bare.items()}, values
    renamed = {_renamed(name, modules): tensor for name, tensor in bare.items()}
    by_module = {field: _numbers(values, field) for field in ("rank_pattern", "alpha_pattern")}
    named = [name for numbers in by_module.values() for name in numbers]
    named += [n for n in map(values.get, ("target_modules", "exclude_modules")) if isinstance(n, str)]
    if any(re.search(r"[^\w.\-]", pattern) for pattern in named if pattern != "all-linear"):
        raise CheckpointError(
            f"{folder}/{CONFIG} names modules by patterns ({named[0]!r}) in another layout than its base model's; "
            "save the adapter anew with this version of transformers."
        )
    patterns = {
        field: {_renamed(f"{name}.weight", modules).removesuffix(".weight"): value for name, value in numbers.items()}
        for field, numbers in by_module.items()
        if numbers
    }
    targets = sorted({_module(name) for name in renamed if ".lora_" in name})
    names = {"target_modules": targets, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}, {**values, **patterns, **names}


def _numbers(values: Mapping[str, object], field: str) -> Mapping[str, float]:
    """By module or pattern of modules, where the field is there."""
    return cast("Mapping[str, float]", values.get(field) or {})


def _renamed(name: str, modules: set[str]) -> str:
    found = (new + name.removeprefix(old) for old, new in _LAYOUTS if name.startswith(old))
    return name if _module(name) in modules else next((n for n in found if _module(n) in modules), name)


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to, ``base_model.model.`` or not."""
    name = name.removeprefix("base_model.model.")
    for inside in (".lora_", ".token_adapter."):
        if inside in name:
            return name.partition(inside)[0]
    return name.rpartition(".")[0].removesuffix(".base_layer")
