"""The table of checkpoint formats: which code writes a kind of model in one, and which opens its files and folders.

Reading and writing one origin's checkpoints stand in one file; to add a format is that file and an entry here. What
such a checkpoint leaves out (a tokenizer, the frozen LM of OpenFlamingo, the base of a LoRA) is named by the user
through :class:`Given`; an error says which argument is due, and one that nothing needs is an error too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TypeAlias, cast

from torch import Tensor

from isthmus.data.images import Crop
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, tensors_of, unwrapped
from isthmus.interop.given import Given, Opened

FileReader: TypeAlias = Callable[[Path, dict[str, Tensor], Given], Opened]
FolderReader: TypeAlias = Callable[[Path, Mapping[str, object] | None, Given], Opened | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One origin's form of models; functions are named ``module:function`` and imported when they are due.

    ``writers``: by the kind of model, (model, shard_bytes) -> :class:`isthmus.interop.export.Export`. ``crop``: where
    the centre of a picture begins in that code, see :class:`isthmus.data.images.ImageTransform`. ``file`` opens (path,
    tensors, given) of a single file in which a name begins with ``mark``; ``folder`` opens (folder, its config.json or
    none, given), or gives none for another's folder. Folders of no other format are transformers'.
    """

    writers: Mapping[str, str] = field(default_factory=dict)
    crop: Crop | None = None
    mark: str = ""
    file: str = ""
    folder: str = ""


FORMATS: Mapping[str, Format] = {
    "isthmus": Format(),
    "hf": Format(
        writers={
            "clip": "isthmus.interop.hf_clip:clip_export",
            "image_encoder": "isthmus.interop.hf_encoders:image_encoder_export",
            "text_encoder": "isthmus.interop.hf_encoders:text_encoder_export",
            "lm": "isthmus.interop.hf_language:lm_export",
            "llava": "isthmus.interop.hf_llava:llava_export",
            "flamingo": "isthmus.interop.hf_idefics:idefics_export",
            "blip2": "isthmus.interop.hf_blip2:blip2_export",
        },
        crop="floor",
    ),
    "openai": Format(
        writers={"clip": "isthmus.interop.openai:openai_export"},
        crop="round",
        mark="visual.conv1.weight",
        file="isthmus.interop.openai:open_openai",
    ),
    "open_clip": Format(
        writers={"clip": "isthmus.interop.open_clip:open_clip_export"},
        crop="round",
        mark="visual.trunk.",
        file="isthmus.interop.open_clip:open_bare_weights",
        folder="isthmus.interop.open_clip:open_clip_folder",
    ),
    "original": Format(
        writers={"llava": "isthmus.interop.original_llava:original_llava_export"},
        crop="floor",
        folder="isthmus.interop.original_llava:open_original_llava",
    ),
    "lavis": Format(
        writers={"blip2": "isthmus.interop.lavis:lavis_export"},
        mark="Qformer.",
        file="isthmus.interop.lavis:open_lavis",
    ),
    "open_flamingo": Format(
        writers={"flamingo": "isthmus.interop.open_flamingo:open_flamingo_export"},
        crop="round",
        mark="perceiver.",
        file="isthmus.interop.open_flamingo:open_trained",
    ),
}


def writers(kind: str) -> dict[str, str]:
    """Format -> ``module:function`` that writes this kind of model; every kind can be written as our own besides."""
    return {name: form.writers[kind] for name, form in FORMATS.items() if kind in form.writers}


def named(target: str) -> Callable[..., object]:
    """The function that ``module:function`` names; the table says which form it has."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def open_file(path: Path, given: Given) -> Opened:
    """A single file of weights, known by the names in it.

    Raises CheckpointError: another kind of file, or something that must be given.
    """
    state = unwrapped(read_archive(path, given.account))
    for form in FORMATS.values():
        if form.mark and any(name.startswith(form.mark) for name in state):
            return cast(FileReader, named(form.file))(path, tensors_of(state, path), given)
    near = ", ".join(list(state)[:3])
    raise CheckpointError(f"{path} holds weights of no known layout (it begins with {near}).")


def open_folder(folder: Path, config: Mapping[str, object] | None, given: Given) -> Opened | None:
    """A folder of one of the formats; none for transformers' and what is no model. ``config``: its config.json."""
    for form in FORMATS.values():
        if form.folder:
            opened = cast(FolderReader, named(form.folder))(folder, config, given)
            if opened is not None:
                return opened
    return None
