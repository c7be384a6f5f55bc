"""From a recipe to the things it names: tokenizer, net with its parts' weights, image transform, processors.

One source of truth per fact: the vocabulary size and end-of-text id come from the tokenizer, the vision encoder's
and LM's configurations from the parts, the number of visual tokens from the connector.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from isthmus.config import plain
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.images import ImageTransform
from isthmus.data.interleave import NEW_TOKENS
from isthmus.data.mix import Source
from isthmus.data.processor import (
    ContrastiveProcessor,
    Processor,
    SpliceProcessor,
    TextProcessor,
    processor_from_dict,
)
from isthmus.data.sources import open_source
from isthmus.data.text import render
from isthmus.data.tokenizer import END, Tokenizer
from isthmus.data.wordpiece import load_wordpiece, train_wordpiece
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.model import Model, load
from isthmus.models import model_class
from isthmus.recipes.schema import Recipe, StageSpec, TokenizerSpec

PARTS = {
    "clip": ("init",),
    "lm": ("init",),
    "llava": ("vision", "language", "init"),
    "flamingo": ("vision", "language", "init"),
    "blip2": ("vision", "language", "bert", "init"),
}
"""What a model may be built from. ``init`` is a whole model of the same kind to go on from."""


@dataclass(frozen=True)
class Built:
    """A net ready for a stage, with what its processors are made of.

    ``others`` are further tokenizers by name. ``memory`` holds tensors under the net's names that a stage without
    their part has no use for: the language model's while there is none, a half that was dropped.
    """

    net: Any
    tokenizer: Tokenizer
    image: ImageTransform | None
    recipe: Recipe
    others: Mapping[str, Tokenizer] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def enter(self, stage: StageSpec) -> "Built":
        """The same, as ``stage`` begins. A stage that changes the configuration gets a net made anew, in which every
        tensor that the run has known keeps its value. Raises ConfigError where one would have another shape."""
        before = plain(self.net.config)
        config = merged(before, stage.config)
        if config == before:
            return self
        memory = {**self.memory, **self.net.state_dict()}
        net = fresh(self.recipe, config)
        recall(net, memory, f"stage {stage.name!r}")
        return replace(self, net=net, memory=memory)

    def processor(self, stage: StageSpec) -> Processor:
        """The processor of one stage: this system's, with the stage's template, image mode and length."""
        if self.recipe.model == "blip2":
            from isthmus.recipes.blip2 import make_processor  # it builds on this module

            image = self._image(stage)
            assert image is not None
            return make_processor(self, image, stage)
        return _processor(self.recipe.model, self.net, self.tokenizer, self._image(stage), stage)

    def _image(self, stage: StageSpec) -> ImageTransform | None:
        pinpoints, mode = getattr(self.net.config, "pinpoints", ()), stage.image_mode
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

        A training row's ``max_length`` is no limit of a prompt: that is the language model's context.
        """
        stage = stage or self.recipe.stages[-1]
        if self.recipe.model in ("lm", "llava", "flamingo") and self.net.language.context:
            stage = stage.model_copy(update={"max_length": None})
        return Model(self.net, self.processor(stage), prompts=self.recipe.prompts)


def build(recipe: Recipe) -> Built:
    """Everything a recipe names, freshly initialised from its seed or taken from its parts.

    Raises ConfigError for parts that do not belong to this kind of model, and whatever loading a part raises.
    """
    check_parts(recipe)
    if recipe.model == "blip2":
        from isthmus.recipes.blip2 import build_blip2  # it builds on this module

        return build_blip2(recipe)
    parts = {name: load(path) for name, path in recipe.parts.items()}
    tokenizer = _tokenizer(recipe, parts)
    net = fresh(recipe, _config(recipe, parts, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # rows of new tokens are drawn around the part's own
        _take_weights(net, parts)
    return Built(net, tokenizer, image_of(recipe, parts, net), recipe)


def fresh(recipe: Recipe, config: Mapping[str, Any]) -> Any:
    """A net of this configuration, initialised from the recipe's seed; the random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return model_class(recipe.model).from_config(config)


@torch.no_grad()
def recall(net: Any, memory: Mapping[str, Tensor], where: str) -> None:
    """Give the net's tensors the values known under their names. Raises ConfigError when a shape differs."""
    for name, tensor in net.state_dict().items():
        known = memory.get(name)
        if known is None:
            continue
        if known.shape != tensor.shape:
            raise ConfigError(
                f"{name} would get the shape {tuple(tensor.shape)} in {where}, but has {tuple(known.shape)}."
            )
        tensor.copy_(known)


def check_parts(recipe: Recipe) -> None:
    """Raises ConfigError for a part that this kind of model is not built from."""
    for name in recipe.parts:
        if name not in PARTS[recipe.model]:
            raise ConfigError(f"A {recipe.model} recipe has no part {name!r}; {nearest(name, PARTS[recipe.model])}")


def preset_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration of a recipe that names a published size, without opening its parts or tokenizer."""
    own = dict(recipe.config)
    return merged(_preset(recipe.model, own.pop("preset")), own)


def _tokenizer(recipe: Recipe, parts: Mapping[str, Model]) -> Tokenizer:
    for name in ("init", "language"):
        if name in parts:
            if recipe.tokenizer is not None:
                raise ConfigError(f"The tokenizer comes with the part {name!r}; take `tokenizer` out of the recipe.")
            own = parts[name].processor.tokenizer
            return own.with_tokens(*NEW_TOKENS) if recipe.model == "flamingo" else own
    if recipe.tokenizer is None:
        raise ConfigError(f"A {recipe.model} recipe without a part that has one needs a `tokenizer`.")
    made = make_tokenizer(recipe.tokenizer)
    return made.with_tokens(*NEW_TOKENS) if recipe.model == "flamingo" else made


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


def _config(recipe: Recipe, parts: Mapping[str, Model], tokenizer: Tokenizer) -> dict[str, Any]:
    own = dict(recipe.config)
    if "init" in parts:
        if own:
            raise ConfigError("The configuration comes with the part 'init'; take `config` out of the recipe.")
        if parts["init"].kind != recipe.model:
            raise ConfigError(f"The part 'init' is a {parts['init'].kind} model, the recipe trains a {recipe.model}.")
        return plain(parts["init"].net.config)
    preset = own.pop("preset", None)
    if preset is not None:
        own = merged(_preset(recipe.model, preset), own)
    if recipe.model == "clip":
        facts = {"vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        return merged(own, {"text": facts})
    if recipe.model == "lm":
        facts = {
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
        return merged(own, {"language": facts})
    for name in ("vision", "language"):
        if name in parts:
            config = plain(parts[name].net.config)
            if name not in config:
                raise ConfigError(f"The part {name!r} is a {parts[name].kind} model, which has no {name} in it.")
            own[name] = config[name]
        elif name not in own:
            raise ConfigError(f"A {recipe.model} recipe needs the part {name!r}: a model folder under `parts`.")
    if recipe.model == "flamingo":
        own |= {name: tokenizer.id_of(token) for name, token in zip(("end_id", "image_id"), NEW_TOKENS, strict=True)}
    return own


def _preset(kind: str, name: str) -> dict[str, Any]:
    config = model_class(kind).CONFIG
    make = getattr(config, name, None) if not name.startswith("_") else None
    if make is None or name in {"from_dict", "to_dict"}:
        known = [n for n, v in vars(config).items() if isinstance(v, classmethod) and n != "from_dict" and n[0] != "_"]
        raise ConfigError(f"There is no {kind} preset {name!r}; {nearest(name, known)}")
    return plain(make())


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` laid on top, mappings merged all the way down."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        out[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out


def _take_weights(net: Any, parts: Mapping[str, Model]) -> None:
    if "init" in parts:
        net.load_state_dict(parts["init"].net.state_dict())
    for name in ("vision", "language"):
        if name not in parts:
            continue
        if name == "language" and hasattr(net.language, "new_rows"):
            net.language.lm.load_state_dict(parts[name].net.language.lm.state_dict())
            net.language.start_new_rows()
        else:
            getattr(net, name).load_state_dict(getattr(parts[name].net, name).state_dict())


def image_of(recipe: Recipe, parts: Mapping[str, Model], net: Any) -> ImageTransform | None:
    """The transform of the part that brings the encoder, else CLIP's, changed by the recipe's ``image``."""
    for name in ("init", "vision"):
        if name in parts:
            inherited = parts[name].processor.image
            return ImageTransform.from_dict(inherited.to_dict() | (recipe.image or {})) if inherited else None
    vision = getattr(net.config, "vision", None)
    if vision is None:
        return None
    return ImageTransform.from_dict(ImageTransform.clip(vision.image_size).to_dict() | (recipe.image or {}))


def _processor(kind: str, net: Any, tokenizer: Tokenizer, image: ImageTransform | None, stage: StageSpec) -> Processor:
    if stage.processor and kind != "flamingo":
        raise ConfigError(f"Stage {stage.name!r}: the processor of a {kind} stage has no options; take them out.")
    if kind == "lm":
        length = stage.max_length or net.language.context
        return TextProcessor(tokenizer, template=stage.template or "document", max_length=length)
    assert image is not None  # every other kind has a vision encoder
    if kind == "flamingo":
        if image.mode == "aspect":
            image = replace(image, patch=net.config.vision.patch_size)
        length = stage.max_length or net.language.context or 2048
        options = {"template": stage.template or "paper", **stage.processor}
        return processor_from_dict(
            {"kind": "interleave", "image": image.to_dict(), "max_length": length} | options, tokenizer
        )
    if kind == "clip":
        if stage.template is not None:
            raise ConfigError(f"Stage {stage.name!r}: a clip stage has no chat template; take `template` out.")
        return ContrastiveProcessor(tokenizer, image=image, context=stage.max_length or net.config.text.context)
    return SpliceProcessor(
        tokenizer,
        image=image,
        template=stage.template or "vicuna_v1",
        max_length=stage.max_length or net.language.context,
        num_tokens=net.num_tokens(image.size, image.size),
    )
