"""From a folder to a model: ours, or a checkpoint of another code base, told by its content."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

import torch

from isthmus import adapter_folder, borrowed, checkpoint
from isthmus.adapter_folder import Base, OfBase
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.processor import ImagesProcessor
from isthmus.data.processors import with_template
from isthmus.data.reading import published_request
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.hub import located
from isthmus.language import unfilled
from isthmus.load_report import Account, beside
from isthmus.model import FORMAT, FolderConfig, Model
from isthmus.net import Net
from isthmus.placement import device_of, dtype_of
from isthmus.products import multiply_quickly
from isthmus.systems import SYSTEMS, system
from isthmus.user_code import is_user_code, outermost, vetted
from isthmus.weights import load_into


class _Named(TypedDict, total=False):
    """What the user names beside a checkpoint; see :func:`load`."""

    vision: str | Path | None
    language: str | Path | None
    base: str | Path | None
    unquantised: bool | None
    tokenizer: str | Path | None
    activation: str | None
    head_width: int | None


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    base: str | Path | None = None,
    unquantised: bool = False,
    tokenizer: str | Path | None = None,
    activation: str | None = None,
    head_width: int | None = None,
    template: str | None = None,
    code: str | Path | Sequence[str | Path] = (),
) -> Model:
    """Open a model: a run folder, a model folder of ours, or a checkpoint of another code base.

    Those of transformers (CLIP, SigLIP and their towers, LLaVA, BLIP-2, InstructBLIP, causal LMs), open_clip, OpenAI,
    OpenFlamingo and the original LLaVA are recognised by their content, never by name. Loading is strict, runs no code
    of a checkpoint's and verifies the manifest of our own folders.

    Args:
        device: ``auto`` (a GPU where torch sees one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: casts the weights (:meth:`Model.cast`): ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit of a hub id ``owner/name``, which is then fetched; nothing else is.
        vision, language: models that a checkpoint was trained with and does not hold.
        base: the model that adapters of ours belong to, where it no longer lies where it was.
        unquantised: opens adapters that were trained over a base in 4 bits over the base as it is stored.
        tokenizer: a tokenizer's folder, or OpenAI's merge table, where a checkpoint comes without.
        activation: of a CLIP whose weights do not say it, ``quick_gelu`` or ``gelu``.
        head_width: of a CLIP whose weights do not say it and whose size is none that was published.
        template: the template of a model that talks, where that is to be otherwise than it says or it says nothing: a
        name
            among :data:`isthmus.data.text.TEMPLATES`, ``chat`` (the language model's own), or a file in Jinja.
        code: files with the user's own classes (a connector, a system), for a model whose own have moved or changed.
            Others are imported only as they were when the model was trained, and never from the model's folder.

    Raises CheckpointError: nothing there, damaged, unknown format, a weight missing or left over, or one of the
    arguments missing or of no use. Raises ConfigError for a device that is not there.
    """
    place, dtype = device_of(device), dtype_of(dtype)
    multiply_quickly(place)
    given = _Named(
        vision=vision,
        language=language,
        base=base,
        unquantised=unquantised or None,
        tokenizer=tokenizer,
        activation=activation,
        head_width=head_width,
    )
    model = _opened(located(path, revision), given, [code] if isinstance(code, str | Path) else code, Account(), dtype)
    if template is not None:
        model.processor = with_template(model.processor, template)
    return (model if dtype is None else model.cast(dtype)).to(place)


def _opened(
    folder: Path,
    given: _Named,
    code: Sequence[str | Path],
    account: Account,
    dtype: torch.dtype | None = None,
) -> Model:
    """The model, on the CPU and as it is stored, or of ``dtype`` where it is made on the way; with its report out of
    ``account``."""
    outer = outermost(folder)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    config = checkpoint.read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    ours = cast(FolderConfig, config) if config is not None and "format" in config else None
    if ours is not None:
        adapter_folder.check_useful(folder, ours, given)
    with unfilled():
        if ours is None:
            from isthmus.interop.foreign import open_foreign
            from isthmus.interop.given import Given

            named = Given(open=partial(_part, account), account=account, dtype=dtype, **given)
            net, processor, forbidden = open_foreign(folder, config, named)
            model = Model(net, processor, prompts=published_request(processor), forbidden=forbidden)
        else:
            on = partial(
                adapter_folder.opened,
                base=given.get("base"),
                unquantised=bool(given.get("unquantised")),
                load=lambda at: _opened(at, {}, code, account),
            )
            model = _own(folder, vetted(ours, outer, code), account, on)
        model.report = account.report()
    return model


def _part(account: Account, path: str | Path) -> Model:
    """A model that is named beside the one that ``account`` is kept for."""
    own = Account()
    model = _opened(located(path, None), {}, (), own)
    beside(account, own)
    return model


_On = Callable[[Path, OfBase, Mapping[str, object], Mapping[str, Path]], tuple[Net, Base]]


def _own(folder: Path, config: FolderConfig, account: Account, on: _On) -> Model:
    if config["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {config['format']!r}; this version reads {FORMAT!r}.")
    files = checkpoint.read_folder(folder)
    name = config.get("kind")
    if name not in SYSTEMS and not is_user_code(name):
        raise CheckpointError(f"{folder}: unknown kind of model {name!r}; known: {', '.join(SYSTEMS)}.")
    kind = system(name)
    base = None
    if "base" in config:
        net, base = on(folder, config["base"], config["config"], files)
    else:
        net = kind.net.from_config(config["config"])
        load_into(net, borrowed.weights(files[borrowed.FILE], config, account), folder, account)
    described = checkpoint.read_json(files["processor.json"])
    tokenizer = None if described.get("kind") == ImagesProcessor.kind else load_tokenizer(folder)
    others = {f.parent.name: Tokenizer.load(f.parent) for n, f in files.items() if n.endswith("/tokenizer.json")}
    processor = kind.open_processor(described, tokenizer, others)
    model = Model(net, processor, prompts=config.get("prompts"), forbidden=config.get("forbidden", ()), kind=kind)
    model.base = base
    return model
