"""Where a model runs and in which numbers, by the words that a user writes."""

import torch

from isthmus.errors import ConfigError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("auto", "cpu", "cuda", "mps")


def device_of(name: str | torch.device) -> torch.device:
    """``auto`` is a GPU where torch sees one, else the CPU; ``cuda:1`` names one of several. Raises ConfigError for an
    unknown name and for a device that is not there."""
    name = str(name)
    device_type, _, number = name.partition(":")
    if device_type not in KINDS or (name != device_type and (device_type == "auto" or not number.isdecimal())):
        raise ConfigError(f"device {name!r}: {nearest(device_type, KINDS)}")
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(device_type)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = there[device_type] if device_type != "cuda" or torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        available = "torch sees none here" if not count else f"torch sees {count} here"
        raise ConfigError(f"There is no device {name}: {available}. Leave the device out, or take cpu.")
    return torch.device(name)


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype as it is, or by its name. Raises ConfigError for an unknown one."""
    if not isinstance(name, str):
        return name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: {nearest(name, DTYPES)}")
    return DTYPES[name]
