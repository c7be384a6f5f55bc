"""A folder of ours as transformers opens it, held against the model it was written from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isthmus.checkpoint import read_json
from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.interop.hf_peer import open_class
from isthmus.testing import probe

CLASSES = ("clip", "image_encoder", "text_encoder", "lm", "llava", "blip2", "flamingo")
"""Kinds of models that transformers has a class for."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``name`` of the class; the largest difference of outputs and what is allowed; ``tokens`` of ``of`` equal."""

    name: str
    difference: float
    tolerance: float
    tokens: int = 0
    of: int = 0


@torch.inference_mode()
def compare(model: Any, folder: Path) -> Comparison:
    """Outputs and greedy tokens of the library's own class over ``folder`` and of ``model``.

    Raises CheckpointError when the library misses a tensor or finds one too many.
    """
    peer = open_class(folder)
    token = read_json(folder / "config.json").get("image_token_index")
    asked = probe.prompts(model, probe.WORDS, (1, 2, 3))
    worst, largest, equal, of = 0.0, 1.0, 0, 0
    for example in asked:
        whole = probe.answered(model, example, [5, 6]) if "encoder" in example.streams else example
        (ours,) = probe.outputs(model, collate([whole]))
        theirs = _OUTPUTS[model.kind](model, peer, whole, token)
        worst = max(worst, float((ours - theirs[..., : ours.shape[-1]]).abs().max()))
        largest = max(largest, float(ours.abs().max()))
        if "generate" in model.capabilities and not probe.embeds(model):
            # What is the place of a picture there may be a row without meaning here: nobody says it.
            spare = [t for t in (token,) if t is not None and t < model.net.language.vocab_size]
            answer = probe.written(model, [example], forbidden=spare)[0]
            found = _written(model, peer, example, token)
            equal += sum(a == b for a, b in zip(answer, found, strict=False))
            of += len(answer)
    return Comparison(type(peer).__name__, worst, 1e-4 * largest, equal, of)


def _inputs(model: Any, example: Example, token: int | None) -> dict[str, Any]:
    """Their inputs: ids with the image token in a picture's places, and pixels."""
    name = "encoder" if "encoder" in example.streams else "lm"
    ids = list(example.streams[name].ids)
    for place in example.places if model.kind != "flamingo" else ():  # there a tag stands for its picture already
        assert token is not None
        ids[place.start : place.start + place.length] = [token] * place.length
    found: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if model.kind == "flamingo":  # which picture a token sees, one column per picture
        seen = torch.tensor([example.streams[name].seen])
        found["image_attention_mask"] = torch.stack([seen == n + 1 for n in range(len(example.pixels))], -1).long()
        found["pixel_values"] = torch.stack([make() for make in example.pixels])[None]
    elif example.pixels:
        pixels = [make() for make in example.pixels]
        found["pixel_values"] = pad_sequence(pixels, batch_first=True) if example.sizes else torch.stack(pixels)
    if example.sizes:
        found["image_sizes"] = torch.tensor(example.sizes)
    if "qformer" in example.streams:
        beside = torch.tensor([example.streams["qformer"].ids])
        found |= {"qformer_input_ids": beside, "qformer_attention_mask": torch.ones_like(beside)}
    return found


def _tag(model: Any) -> int | None:
    """The id of a picture's tag, which a Flamingo never says."""
    return model.net.config.image_id if model.kind == "flamingo" else None


def _logits(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    more = {}
    if "decoder" in example.streams:
        more["decoder_input_ids"] = torch.tensor([example.streams["decoder"].ids])
    return peer(**_inputs(model, example, token), **more).logits[0].float()


def _written(model: Any, peer: Any, example: Example, token: int | None) -> list[int]:
    decoding = probe.greedy(model)
    inputs = _inputs(model, example, token)
    found = peer.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        suppress_tokens=[*decoding.forbidden_ids, *(t for t in (token, _tag(model)) if t is not None)],
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )[0].tolist()
    if "encoder" in example.streams:
        return found[1:]
    prompt = inputs["input_ids"].shape[1]
    return found[prompt:] if len(found) > decoding.max_new_tokens else found


def _vectors(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    """The embeddings as :func:`probe.outputs` puts them in a row."""
    del token
    ids, pixels = _text_ids(model, peer.config.text_config, example), torch.stack([make() for make in example.pixels])
    images = peer.get_image_features(pixel_values=pixels)
    texts = peer.get_text_features(input_ids=ids)
    rows = [getattr(part, "pooler_output", part) for part in (images, texts)]
    return torch.cat([row.flatten(1) for row in rows], dim=1)[0].float()


def _image_vector(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    del model, token
    return _vector(peer(pixel_values=torch.stack([make() for make in example.pixels])))


def _text_vector(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    del token
    return _vector(peer(input_ids=_text_ids(model, peer.config, example)))


def _vector(found: Any) -> Tensor:
    """What the class projects, or where it has no projection what it pools."""
    names = ("image_embeds", "text_embeds", "pooler_output")
    return next(found[name] for name in names if name in found)[0].float()


def _text_ids(model: Any, theirs: Any, example: Example) -> Tensor:
    """(1, T) as the folder has them, where writing it moved end-of-text to another id; a tower that is read at its last
    place always gets its whole context."""
    (stream,) = example.streams.values()
    ids, text = list(stream.ids), model.net.config.text
    if text.pool == "last":
        return torch.tensor([ids + [text.pad_id] * (theirs.max_position_embeddings - len(ids))])
    if text.pool == "eot":
        swap = {text.eot_id: theirs.eos_token_id, theirs.eos_token_id: text.eot_id}
        ids = [swap.get(i, i) for i in ids]
    return torch.tensor([ids])


def _retrieval(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    """BLIP-2's pictures (one vector per query) and texts, unit vectors there, and the matching logits."""
    del token
    ids = torch.tensor([example.streams["qformer"].ids])
    pixels = torch.stack([make() for make in example.pixels])
    mask = torch.ones_like(ids)
    contrast = peer(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    matched = peer(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    parts = [contrast.image_embeds.flatten(1), contrast.text_embeds.flatten(1), matched.logits_per_image]
    return torch.cat(parts, dim=1)[0].float()


def _blip2(model: Any, peer: Any, example: Example, token: int | None) -> Tensor:
    if model.net.config.phase == "generate":
        return _logits(model, peer, example, token)
    return _retrieval(model, peer, example, token)


_OUTPUTS: dict[str, Callable[[Any, Any, Example, int | None], Tensor]] = {
    "clip": _vectors,
    "image_encoder": _image_vector,
    "text_encoder": _text_vector,
    "lm": _logits,
    "llava": _logits,
    "flamingo": _logits,
    "blip2": _blip2,
}
