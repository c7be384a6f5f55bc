"""From a recipe to the things it names: tokenizers, net with its parts' weights, image transform, processors.

One source of truth per fact: the vocabulary size and end-of-text id come from the tokenizer, the vision encoder's
and LM's configurations from the parts, the number of visual tokens from the connector. What is a system's own stands
in :mod:`isthmus.systems`.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from isthmus import adapters, mapped, quantised
from isthmus.config import merged, plain
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.images import ImageTransform
from isthmus.data.mix import Source
from isthmus.data.processor import Processor
from isthmus.data.sources import open_source
from isthmus.data.text import render
from isthmus.data.tokenizer import END, Tokenizer
from isthmus.data.wordpiece import load_wordpiece, train_wordpiece
from isthmus.errors import CheckpointError, ConfigError, DataError, nearest
from isthmus.interop.hub import located
from isthmus.model import Model
from isthmus.net import Net
from isthmus.opening import load
from isthmus.processes import world_size
from isthmus.recipes.filling import VARIABLE
from isthmus.recipes.schema import Recipe, StageSpec, TokenizerSpec
from isthmus.stage import attach_adapters, named_state
from isthmus.systems import system
from isthmus.systems.base import System, Tokenizers, preset, recall


@dataclass(frozen=True)
class Built:
    """A net ready for a stage, with what its processors are made of.

    ``memory`` holds tensors under the net's names that a stage without their part has no use for: the language model's
    while there is none, a half that was dropped. ``begun`` is the part ``init`` while the net is that model with other
    values, ``opened`` are the tensors beside adapters that stages have trained so far.
    """

    net: Net
    tokenizers: Tokenizers
    image: ImageTransform | None
    recipe: Recipe
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    begun: str = ""
    opened: frozenset[str] = frozenset()
    aside: Path | None = None

    @property
    def system(self) -> System:
        return system(self.recipe.model)

    @property
    def tokenizer(self) -> Tokenizer:
        """The net's own."""
        return self.tokenizers.main

    def enter(self, stage: StageSpec) -> "Built":
        """The same, as ``stage`` begins. A stage that changes the configuration gets a net made anew, in which every
        tensor that the run has known keeps its value. Raises ConfigError where one would have another shape."""
        config = self._changed(stage)
        entered = self
        if config is not None:
            memory, where = self._remembered(), f"stage {stage.name!r}"

            def make() -> Net:
                net = fresh(self.recipe, config)
                recall(net, memory, where)
                return net

            net = make() if self.aside is None else mapped.made(make, self.aside)
            adapters.carry_over(self.net, net)
            recall(net, {name: tensor for name, tensor in memory.items() if adapters.MARK in name}, where)
            entered = replace(self, net=net, memory=memory, begun="")
        attach_adapters(entered.net, stage.stage.train, seed=self.recipe.seed)
        entered._demand_base(stage)
        return entered

    def foresee(self, stage: StageSpec) -> "Built":
        """The same as ``stage`` will begin with it, before the stages before it have trained: for its processor. Where
        the configuration changes the net has no values yet, and no adapters. Raises ConfigError as :meth:`enter` does
        for a shape."""
        config = self._changed(stage)
        if config is None:
            return self
        memory = self._remembered()
        with mapped.hollow():
            net = fresh(self.recipe, config)
        recall(net, memory, f"stage {stage.name!r}")
        return replace(self, net=net, memory=memory, begun="")

    def _changed(self, stage: StageSpec) -> dict[str, object] | None:
        """The configuration that the stage asks for; none where it is the net's."""
        before = plain(self.net.config)
        config = merged(before, stage.config)
        return None if config == before else config

    def _remembered(self) -> dict[str, Tensor]:
        return {**self.memory, **named_state(self.net)}

    def _demand_base(self, stage: StageSpec) -> None:
        """Raises ConfigError for layers in 4 bits whose weights no file of a base holds."""
        rounded = quantised.names(self.net)
        moved = [name for name in rounded if f"{name}.weight" in self.opened]
        if rounded and (moved or not self.begun):
            why = f"{moved[0]} was trained by an earlier stage" if moved else "the net is not the part `init` as it is"
            raise ConfigError(
                f"Stage {stage.name!r}: bits: 4 rounds weights that stay in their base, and {why}. Train in 4 bits "
                "from a finished model, parts.init=FOLDER, or take bits out."
            )

    def processor(self, stage: StageSpec) -> Processor:
        """The processor of one stage: this system's, with the stage's template, image mode and length."""
        return self.system.processor(self.net, self.tokenizers, self._image(stage), stage)

    def _image(self, stage: StageSpec) -> ImageTransform | None:
        pinpoints, mode = self.net.pinpoints, stage.image_mode
        if pinpoints and mode in (None, "anyres") and self.image is not None:
            return replace(self.image, mode="anyres", pinpoints=pinpoints)
        if pinpoints or mode == "anyres":
            raise ConfigError(
                f"Stage {stage.name!r}: image_mode {mode!r} and config.pinpoints {list(pinpoints)} do not go together: "
                "pictures are cut into tiles (anyres) where the configuration, or the stage's own, has pinpoints."
            )
        return self.image if mode is None or self.image is None else replace(self.image, mode=mode)

    def model(self, stage: StageSpec | None = None) -> Model:
        """The net as a Model that answers in the form ``stage`` (the last one by default) taught it.

        A training row's ``max_length`` is no limit of a prompt where the language model's context is known.
        """
        stage = stage or self.recipe.stages[-1]
        if self.system.prompt_limit(self.net):
            stage = stage.model_copy(update={"max_length": None})
        return Model(self.net, self.processor(stage), prompts=self.recipe.prompts, kind=self.system)


def build(recipe: Recipe, aside: Path | None = None) -> Built:
    """Everything a recipe names as its first stage begins, freshly initialised from its seed or taken from its parts.

    With ``aside``, a folder that all processes of the run share and call this with together, none of them holds the
    net: its weights, the bits of any other run's, are mapped from a file, and its parts' from theirs.

    Raises ConfigError for parts that do not belong to this kind of model, and whatever loading a part raises.
    """
    check_parts(recipe)
    kind, described = system(recipe.model), recipe.tokenizer
    with nullcontext() if aside is None else mapped.hollow():
        parts = {name: _part(kind, name, path) for name, path in recipe.parts.items()}
    init = _model_among(parts, "init")
    if init is not None and init.kind != kind.kind:
        raise ConfigError(f"The part 'init' is a {init.kind} model, the recipe trains a {kind.kind}.")
    tokenizers = kind.tokenizers(parts, None if described is None else lambda: make_tokenizer(described))
    config = merged(_config(recipe, parts, tokenizers), recipe.stages[0].config)
    memory: dict[str, Tensor] = {}

    def make() -> Net:
        net = fresh(recipe, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # rows of new tokens are drawn around the part's own
            memory.update(kind.take(net, parts))
        return net

    net = make() if aside is None else mapped.made(make, aside)
    begun = recipe.parts["init"] if init is not None and config == plain(init.net.config) else ""
    return Built(net, tokenizers, _image_of(recipe, parts, net), recipe, memory=memory, begun=begun, aside=aside)


def _model_among(parts: Mapping[str, object], name: str) -> Model | None:
    """The part of this name, where the recipe has it: ``init`` and ``vision`` are models, or a system's own that has a
    net, a processor and a kind as models do."""
    return cast(Model, parts[name]) if name in parts else None


def _part(kind: System, name: str, path: str) -> object:
    """A part, opened. Raises ConfigError for one that the recipe leaves to its user."""
    if variable := VARIABLE.fullmatch(path):
        raise ConfigError(f"The recipe leaves its part {name!r} to you: give {variable[1]}=FOLDER after its name.")
    try:
        return kind.open_part(name, path, _open)
    except CheckpointError as error:
        if located(path, None).exists():
            raise
        raise CheckpointError(f"The recipe's part {name!r}: {error} Name yours with parts.{name}=FOLDER.") from None


def _open(path: str) -> Model:
    """A part on the CPU, the adapters that it may carry merged."""
    model = load(path, device="cpu")
    for layer in adapters.adapted(model.net).values():
        if not quantised.is_quantised(layer.get_base_layer().weight):
            layer.get_base_layer().float()  # a hollow net takes weights in their file's dtype
    adapters.merge(model.net)
    return model


def on_meta(recipe: Recipe) -> Net:
    """The net of a published size as its first stage begins, without values; no part is opened."""
    own = dict(recipe.config)
    config = merged(preset(system(recipe.model).net, str(own.pop("preset"))), own)
    with torch.device("meta"):
        return system(recipe.model).net.from_config(merged(config, recipe.stages[0].config))


def fresh(recipe: Recipe, config: Mapping[str, object]) -> Net:
    """A net of this configuration, initialised from the recipe's seed; the random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return system(recipe.model).net.from_config(config)


def check_parts(recipe: Recipe) -> None:
    """Raises ConfigError for a part that this kind of model is not built from, and for a base in 4 bits where there can
    be none (MissingExtraError without bitsandbytes)."""
    kind = system(recipe.model)
    for name in recipe.parts:
        if name not in kind.parts:
            raise ConfigError(f"A {kind.kind} recipe has no part {name!r}; {nearest(name, kind.parts)}")
    if any(group.lora and group.lora.bits for stage in recipe.stages for group in stage.stage.train):
        if recipe.parallel.engine == "fsdp" and world_size() > 1:
            raise ConfigError("bits: 4 goes with parallel=ddp: FSDP's shards were not tried over weights in 4 bits.")
        quantised.demand()


def _config(recipe: Recipe, parts: Mapping[str, object], tokenizers: Tokenizers) -> dict[str, object]:
    own = dict(recipe.config)
    if (init := _model_among(parts, "init")) is not None:
        if own:
            raise ConfigError("The configuration comes with the part 'init'; take `config` out of the recipe.")
        return plain(init.net.config)
    kind, size = system(recipe.model), own.pop("preset", None)
    if size is not None:
        own = merged(preset(kind.net, str(size)), own)
    return kind.configuration(own, parts, tokenizers)


def make_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Load the named tokenizer, or train one of the kind on the texts of its sources."""
    pieces = spec.kind == "wordpiece"
    if spec.folder is not None:
        return load_wordpiece(spec.folder) if pieces else load_tokenizer(spec.folder)
    texts = _texts([open_source(s) for s in spec.data], spec)
    if pieces:
        return train_wordpiece(texts, spec.vocab_size)
    return Tokenizer.train(texts, spec.vocab_size, whole=spec.whole)


def _texts(sources: list[Source], spec: TokenizerSpec) -> Iterator[str]:
    """``spec.samples`` evenly spread records of each source, rendered as a model will read them. Bad samples are left
    out, as the stages leave them out and count them; DataError when a source has no other."""
    for source in sources:
        found, problem = 0, ""
        for index in range(0, len(source), max(1, len(source) // spec.samples)):
            try:
                chunks = render(source[index], spec.template, draw=index).chunks
            except DataError as error:
                problem = str(error)
                continue
            found += 1
            yield from (chunk.text.replace(END, "") for chunk in chunks)
        if not found:
            raise DataError(f"tokenizer: no sample of {source.name!r} gives a text to train on: {problem}")


def _image_of(recipe: Recipe, parts: Mapping[str, object], net: Net) -> ImageTransform | None:
    """The transform of the part that brings the encoder, else CLIP's for what the net reads, changed by the recipe's
    ``image``. Raises ConfigError for an ``image`` of a net that names no size of pictures, unless it gives one."""
    for name in ("init", "vision"):
        if (part := _model_among(parts, name)) is not None:
            inherited = part.processor.image
            return ImageTransform.from_dict(inherited.to_dict() | (recipe.image or {})) if inherited else None
    if not net.image_size and recipe.image is None:
        return None
    if not net.image_size and "size" not in (recipe.image or {}):
        raise ConfigError(
            f"The recipe's `image` says how pictures are read, and a {net.KIND} has no vision encoder that says how "
            "large: give the pixels of a side, image.size, or take `image` out. (A net of your own may say it: "
            "image_size.)"
        )
    return ImageTransform.from_dict(ImageTransform.clip(net.image_size or 1).to_dict() | (recipe.image or {}))
