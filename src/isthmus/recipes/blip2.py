"""From a BLIP-2 recipe to its net: two tokenizers, an encoder and an LM from parts, BERT for the Q-Former's start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.config import plain
from isthmus.data.blip2 import PairProcessor, PromptProcessor
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import cls_id
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.hf_bert import read_bert_folder
from isthmus.interop.hf_language import read_seq2seq_folder
from isthmus.language import T5_LIKE, Seq2SeqLM
from isthmus.model import load
from isthmus.models.blip2 import Blip2
from isthmus.recipes.build import Built, fresh, image_of, make_tokenizer, merged, preset_config, recall
from isthmus.recipes.schema import Recipe, StageSpec


@dataclass(frozen=True)
class _Parts:
    """What the recipe's parts bring: pieces of configuration, tensors under the net's names, tokenizers, transform."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    qformer: Tokenizer | None = None
    images: dict[str, Any] = field(default_factory=dict)


def build_blip2(recipe: Recipe) -> Built:
    """The net as its first stage begins. Later stages may change the configuration (see Built.enter).

    Raises ConfigError for parts that do not fit together, CheckpointError for one that lacks a tensor.
    """
    parts = _init(recipe) if "init" in recipe.parts else _gathered(recipe)
    tokenizer = parts.tokenizer or parts.qformer
    if tokenizer is None:
        raise ConfigError("A blip2 recipe needs a `tokenizer` for the Q-Former: WordPiece, or BERT's folder.")
    config = merged(parts.config, recipe.stages[0].config)
    net = fresh(recipe, config)
    recall(net, parts.tensors, "a part")
    for part in ("vision", "language"):
        lost = [n for n in net.state_dict() if n.startswith(f"{part}.") and n not in parts.tensors]
        if part in recipe.parts and lost:
            raise CheckpointError(
                f"The part {recipe.parts[part]} has no {lost[0]!r} (and {len(lost) - 1} more like it)."
            )
    others = {} if parts.qformer is None else {"qformer": parts.qformer}
    return Built(net, tokenizer, image_of(recipe, parts.images, net), recipe, others=others, memory=parts.tensors)


def make_processor(built: Built, image: ImageTransform, stage: StageSpec) -> Processor:
    """The processor of the phase the net is in. Raises ConfigError for an option it does not have."""
    net: Blip2 = built.net
    if stage.template is not None:
        raise ConfigError(f"Stage {stage.name!r}: a blip2 stage has no chat template; see `processor`.")
    options: dict[str, Any] = {} if stage.max_length is None else {"max_text": stage.max_length}
    options |= stage.processor
    try:
        if net.config.phase == "represent":
            return PairProcessor(built.others["qformer"], image, **options)
        if isinstance(net.language, Seq2SeqLM):
            options["start_id"] = net.language.start_id
        return PromptProcessor(
            built.tokenizer,
            image,
            num_tokens=net.num_tokens(image.size, image.size),
            qformer=built.others["qformer"] if net.config.instruct else None,
            **options,
        )
    except TypeError as error:
        raise ConfigError(
            f"Stage {stage.name!r}: unknown processor option among {sorted(options)} ({error})."
        ) from None
    except KeyError:
        raise ConfigError("The Q-Former reads text in this stage: give the recipe a `tokenizer` for it.") from None


def _init(recipe: Recipe) -> _Parts:
    """Everything from a finished BLIP-2."""
    model = load(recipe.parts["init"])
    if model.kind != "blip2":
        raise ConfigError(f"The part 'init' is a {model.kind} model, the recipe trains a blip2.")
    if recipe.config or recipe.tokenizer is not None:
        raise ConfigError("Configuration and tokenizers come with the part 'init'; take `config` and `tokenizer` out.")
    own = model.processor.tokenizer
    reads = model.net.config.phase == "represent"
    found: Mapping[str, Tokenizer] = getattr(model.processor, "others", {})
    return _Parts(
        config=plain(model.net.config),
        tensors=model.net.state_dict(),
        tokenizer=None if reads else own,
        qformer=own if reads else found.get("qformer"),
        images={"init": model},
    )


def _gathered(recipe: Recipe) -> _Parts:
    config = preset_config(recipe) if "preset" in recipe.config else dict(recipe.config)
    tensors: dict[str, Tensor] = {}
    images: dict[str, Any] = {}
    tokenizer = None
    if "vision" in recipe.parts:
        model = images["vision"] = load(recipe.parts["vision"])
        if not hasattr(model.net, "vision"):
            raise ConfigError(f"The part 'vision' is a {model.kind} model, which has no vision encoder in it.")
        config["vision"] = _cut(config.get("vision"), plain(model.net.config)["vision"])
        tensors |= {f"vision.{n}": t for n, t in model.net.vision.state_dict().items()}
    elif "vision" not in config:
        raise ConfigError("A blip2 recipe needs the part 'vision': a folder with a vision encoder, such as a CLIP.")
    if "language" in recipe.parts:
        language, state, tokenizer = _language(recipe.parts["language"])
        config["language"] = language
        tensors |= {f"language.{n}": t for n, t in state.items()}
    qformer = None if recipe.tokenizer is None else make_tokenizer(recipe.tokenizer)
    facts: dict[str, Any] = {"vision_width": config["vision"]["width"]}
    if qformer is not None:
        cls_id(qformer)  # refuses a tokenizer that is not the Q-Former's
        facts |= {"vocab_size": qformer.vocab_size, "dec_id": qformer.bos_id}
    config["qformer"] = merged(config.get("qformer", {}), facts)
    if "bert" in recipe.parts:
        width = config["qformer"].get("layers", 12)
        tensors |= read_bert_folder(Path(recipe.parts["bert"]), layers=width, rows=facts.get("vocab_size", 30_523))
    return _Parts(config=config, tensors=tensors, tokenizer=tokenizer, qformer=qformer, images=images)


def _cut(own: Mapping[str, Any] | None, theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoder to build: the part's, or the recipe's own (a published size) where it is the part's without its last
    blocks and norm. Raises ConfigError where the two differ in more than that."""
    if own is None:
        return theirs
    free = ("layers", "post_norm", "pool")
    wrong = [k for k in theirs if k not in free and own.get(k) != theirs[k]]
    if wrong or own["layers"] > theirs["layers"]:
        name = (wrong or ["layers"])[0]
        raise ConfigError(
            f"The part 'vision' has {name} {theirs[name]}, the recipe's configuration {own.get(name)}: they do not fit."
        )
    return own


def _language(path: str) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
    """Configuration, tensors and tokenizer of an LM: a model folder of ours, or a transformers folder, T5 included."""
    file = Path(path) / "config.json"
    if file.is_file() and read_json(file).get("model_type") in T5_LIKE:
        config, state = read_seq2seq_folder(path)
        return config, {f"lm.{n}": t for n, t in state.items()}, Tokenizer.load(path)
    model = load(path)
    config = plain(model.net.config)
    if "language" not in config:
        raise ConfigError(f"The part 'language' is a {model.kind} model, which has no language in it.")
    return config["language"], model.net.language.state_dict(), model.processor.tokenizer


def on_meta(recipe: Recipe) -> Any:
    """The net of a published size as its first stage begins, without values."""
    with torch.device("meta"):
        return Blip2.from_config(merged(preset_config(recipe), recipe.stages[0].config))
