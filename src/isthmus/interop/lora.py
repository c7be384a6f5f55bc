"""LoRA adapters of peft, merged into the weights they belong to: W + B A · alpha / r (Hu et al. 2021, eq. 3)."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, tensors_of

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def merged_state(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """``state`` (a language model's, under transformers' names) with the adapter in ``folder``; without one, itself.

    Raises CheckpointError for an adapter that is not plain LoRA, lacks a half, or belongs to another model.
    """
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        return dict(state)
    values = read_json(folder / "adapter_config.json")
    for name, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False)):
        if values.get(name, plain) != plain:
            raise CheckpointError(f"{folder}/adapter_config.json: {name} {values[name]!r} is not merged here.")
    if values.get("rank_pattern") or values.get("alpha_pattern") or values.get("modules_to_save"):
        raise CheckpointError(f"{folder}/adapter_config.json: ranks per layer and further modules are not merged here.")
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(read_archive(file), file).items():
        bare, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        halves.setdefault(f"{bare.removesuffix('.default')}.weight", {})[half.removesuffix(".default")] = tensor
    merged = dict(state)
    for name, pair in halves.items():
        if set(pair) != {"A", "B"} or name not in merged:
            raise CheckpointError(
                f"{file}: the adapter of {name!r} lacks a half, or its base model has no such weight."
            )
        a, b = pair["A"].float(), pair["B"].float()
        if (len(b), a.shape[1]) != tuple(merged[name].shape) or len(a) != rank:
            raise CheckpointError(f"{file}: the adapter of {name!r} has another shape than the base model's weight.")
        merged[name] = (merged[name].float() + scale * torch.matmul(b, a)).to(merged[name].dtype)
    return merged
