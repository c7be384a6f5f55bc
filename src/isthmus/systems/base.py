"""System: what is to be known about one kind of model beside its net, with defaults for a vision encoder, a connector
and a language model that takes visual tokens in its sequence.

A recipe's ``model`` names a system; ``isthmus train`` gets from it tokenizers, configuration, weights and processors,
``isthmus.load`` for the net's class and the processor, and the commands for what such a model can do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from isthmus.batch import Batch
from isthmus.config import plain, section
from isthmus.data.chat import default_template
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor, SpliceProcessor, shape_name
from isthmus.data.processors import processor_from_dict
from isthmus.data.record import Example
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, ConfigError, nearest
from isthmus.interop import formats
from isthmus.net import Net
from isthmus.stage import named_state
from isthmus.systems import peers

WRITES = {"generate": "generate", "caption": "generate", "answer": "generate", "chat": "generate", "score": "score"}
"""What a model that writes about pictures can do, each with the net's method that it takes."""


N = TypeVar("N", bound=Net)
OfNet = TypeVar("OfNet", bound=Net, covariant=True)

Parts = Mapping[str, object]
"""What a recipe's ``parts`` name, opened: as a rule models, which :func:`model_of` gives."""


class HasNet(Protocol[OfNet]):
    """What is held against transformers' class: :class:`isthmus.model.Model` is one."""

    @property
    def net(self) -> OfNet: ...


class PartModel(HasNet[OfNet], Protocol[OfNet]):
    """A model as a part of another."""

    @property
    def kind(self) -> str: ...
    @property
    def processor(self) -> Processor: ...


class StageOptions(Protocol):
    """What a recipe's stage says about its processor."""

    @property
    def name(self) -> str: ...
    @property
    def template(self) -> str | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def processor(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class Tokenizers:
    """``main`` is the net's own, ``others`` are further ones by name (BLIP-2's Q-Former has its own vocabulary)."""

    main: Tokenizer
    others: Mapping[str, Tokenizer] = field(default_factory=dict)


class System(Generic[N]):
    """One kind of model, of nets of the class N. Override what differs; the defaults are those of LLaVA."""

    kind: ClassVar[str]
    """One word for it in tables and messages."""
    title: ClassVar[str] = "Model"
    """How a model card calls it."""
    pipeline: ClassVar[str] = "image-text-to-text"
    """The hub's name of what it does."""
    net: ClassVar[type[Net]]
    """Its net, a class of :class:`isthmus.net.Net`."""
    parts: ClassVar[tuple[str, ...]] = ("vision", "language", "init")
    """What a recipe may build it from. ``init`` is a finished model of this kind to go on from."""
    new_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that the language model's vocabulary gets in addition."""
    clips: ClassVar[bool] = False
    """Whether it takes a clip as one visual."""
    compute_rule: ClassVar[bool] = False
    """Whether its size and its tokens are held against the compute-optimal rule for language models."""

    @property
    def exporters(self) -> Mapping[str, str]:
        """Format of ``isthmus convert`` -> ``module:function`` that writes it; every kind can be written as our own."""
        return formats.writers(self.kind)

    def __init__(self, name: str = "") -> None:
        self.name = name or self.kind
        """What stands after ``model:`` in a recipe and in a model folder: the kind, or where a user's class is."""

    def capabilities(self, net: N) -> tuple[str, ...]:
        """What a model of this net can do, as :class:`isthmus.model.Model` calls its methods: of WRITES what the net
        has the method for."""
        return tuple(name for name, method in WRITES.items() if gives(net, method))

    # From a recipe to a net

    def open_part(self, name: str, path: str, load: Callable[[str], PartModel[Net]]) -> object:
        """The part ``name`` of a recipe; as a rule a model."""
        del name
        return load(path)

    def tokenizers(self, parts: Parts, make: Callable[[], Tokenizer] | None) -> Tokenizers:
        """From the part that brings one, else ``make``, which makes what the recipe describes. Raises ConfigError when
        there is none, or one too many."""
        for name in ("init", "language"):
            if name in parts:
                if make is not None:
                    raise ConfigError(
                        f"The tokenizer comes with the part {name!r}; take `tokenizer` out of the recipe."
                    )
                return Tokenizers(self._extended(model_of(parts, name).processor.tokenizer))
        if make is None:
            raise ConfigError(f"A {self.kind} recipe without a part that has one needs a `tokenizer`.")
        return Tokenizers(self._extended(make()))

    def _extended(self, tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer.with_tokens(*self.new_tokens) if self.new_tokens else tokenizer

    def configuration(self, own: dict[str, object], parts: Parts, tokenizers: Tokenizers) -> dict[str, object]:
        """The net's configuration from the recipe's ``own`` and the parts; the vocabulary of a language model that is
        made from nothing is the tokenizer's. Raises ConfigError for a part that lacks what is wanted of it."""
        for name in self._pieces:
            if name in parts:
                own[name] = piece_of(name, model_of(parts, name))
            elif name not in own:
                hint = "" if self.name == self.kind else f" A system without {name} leaves it out of its `parts`."
                raise ConfigError(f"A {self.kind} recipe needs the part {name!r}: a model folder under `parts`.{hint}")
        if "language" in self._pieces and "language" not in parts and not self.new_tokens:
            # New tokens have rows of their own, beside the vocabulary.
            own["language"] = vocabulary(tokenizers.main) | section(own, "language")
        return own

    @property
    def _pieces(self) -> tuple[str, ...]:
        """Those of the parts that the net has under the same name."""
        return tuple(name for name in ("vision", "language") if name in self.parts)

    def take(self, net: N, parts: Parts) -> Mapping[str, Tensor]:
        """Put the parts' weights into a fresh net. Tensors that it has no place for as yet are returned, under the
        names that they will have; random numbers come from the recipe's seed.

        With FSDP2 all processes but the first call it for a net whose parameters have no values (meta): copying into
        them does nothing there, and they cannot be read as numbers (:mod:`isthmus.mapped`)."""
        if "init" in parts:
            net.load_state_dict(self.begun(parts).net.state_dict())
        for name in self._pieces:
            if name in parts:
                getattr(net, name).load_state_dict(getattr(model_of(parts, name).net, name).state_dict())
        return {}

    def begun(self, parts: Parts) -> PartModel[N]:
        """The part ``init``: a model of this kind to go on from."""
        return cast(PartModel[N], parts["init"])

    # From records to the net

    def processor(self, net: N, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions) -> Processor:
        """The processor of one stage. Raises ConfigError for an option that it does not have."""
        self.no_options(stage)
        if image is None:
            raise ConfigError(
                f"A {self.kind} reads pictures, and nothing says how large: give image.size in the recipe, the pixels "
                "of a side. (Its net may say it: image_size.)"
            )
        if image.mode == "aspect" and image.patch == 1 and net.tap is not None:
            image = replace(image, patch=net.tap.vision.patch_size)
        counts = {shape_name(shape): net.num_tokens(*shape) for shape in image.shapes}
        return SpliceProcessor(
            tokenizers.main,
            image=image,
            template=stage.template or default_template(tokenizers.main, "vicuna_v1"),
            max_length=stage.max_length or net.language.context or 2048,
            num_tokens=counts if image.mode == "aspect" else next(iter(counts.values())),
        )

    def no_options(self, stage: StageOptions) -> None:
        """Raises ConfigError when the stage gives options of a processor."""
        if stage.processor:
            raise ConfigError(
                f"Stage {stage.name!r}: the processor of a {self.kind} stage has no options; take them out."
            )

    def prompt_limit(self, net: N) -> int | None:
        """Most tokens of a prompt, where a training row's ``max_length`` is none of it: the language model's context.
        None: the stage's length holds for both."""
        return None if net.part("language") is None else net.language.context

    def open_processor(
        self, described: dict[str, object], tokenizer: Tokenizer | None, others: Mapping[str, Tokenizer]
    ) -> Processor:
        """The processor that a model folder describes. Raises ConfigError for an unknown kind or option."""
        return processor_from_dict(described, tokenizer, others)

    # What contracts compare: batch and single, with cache and without, ours and transformers' class

    def outputs(self, net: N, batch: Batch) -> list[Tensor]:
        """Per row what the net makes of it without any cache: logits (T, V) at its real tokens, or of a net that embeds
        one vector of all that it gives. Raises CapabilityError for a net that gives neither."""
        if {"embed_images", "embed_texts"} <= set(self.capabilities(net)):
            return peers.vectors(net, batch)
        if not gives(net, "logits"):
            raise CapabilityError(f"A {self.kind} gives no logits (logits(batch)), so there is nothing to compare.")
        stream = batch.text["decoder" if "decoder" in batch.text else "lm"]
        rows = zip(net.logits(batch), stream.lengths.tolist(), strict=True)
        return [row[:length].float() for row, length in rows]

    def never(self, net: N) -> tuple[int, ...]:
        """Ids that the net itself holds back while it writes."""
        del net
        return ()

    def peer_inputs(self, model: HasNet[N], example: Example, token: int | None) -> dict[str, Tensor]:
        """What transformers' class reads for an example; ``token`` is its placeholder of a picture."""
        del model
        return peers.inputs(example, token)

    def peer_outputs(self, model: HasNet[N], peer: Any, example: Example, token: int | None) -> Tensor:
        """What transformers' class makes of an example, as :meth:`outputs` has it for ours."""
        return peers.logits(peer, self.peer_inputs(model, example, token), example)


def gives(net: Net, method: str) -> bool:
    """Has the net this method, which not every one has?"""
    return callable(getattr(net, method, None))


def vocabulary(tokenizer: Tokenizer) -> dict[str, object]:
    """What a language model's configuration says of its vocabulary."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def model_of(parts: Parts, name: str) -> PartModel[Net]:
    """The part of this name, which is a model."""
    return cast(PartModel[Net], parts[name])


def piece_of(name: str, part: PartModel[Net]) -> dict[str, object]:
    """The configuration of a part's encoder or language model. Raises ConfigError for a part without one."""
    config = plain(part.net.config)
    if name not in config:
        raise ConfigError(f"The part {name!r} is a {part.kind} model, which has no {name} in it.")
    return section(config, name)


def preset(net: type[Net], name: str) -> dict[str, object]:
    """The configuration of a published size. Raises ConfigError for an unknown one."""
    config = net.CONFIG
    known = [n for n, v in vars(config).items() if isinstance(v, classmethod) and n != "from_dict" and n[0] != "_"]
    if name not in known:
        raise ConfigError(f"There is no {net.KIND} preset {name!r}; {nearest(name, known)}")
    return plain(getattr(config, name)())


@torch.no_grad()
def recall(net: nn.Module, memory: Mapping[str, Tensor], where: str) -> None:
    """Give the net's tensors the values known under their names. Raises ConfigError when a shape differs."""
    for name, tensor in named_state(net).items():
        known = memory.get(name)
        if known is None:
            continue
        if known.shape != tensor.shape:
            raise ConfigError(
                f"{name} would get the shape {tuple(tensor.shape)} in {where}, but has {tuple(known.shape)}."
            )
        tensor.copy_(known)
