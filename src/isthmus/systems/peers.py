"""What nets and transformers' classes are given and give, for systems to compare the two."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from isthmus.batch import Batch, Visuals
from isthmus.data.record import Example
from isthmus.net import Net
from isthmus.nn.text_tower import TextConfig


def inputs(example: Example, token: int | None) -> dict[str, Tensor]:
    """Ids with the image token ``token`` in a picture's places, and pixels."""
    name = "encoder" if "encoder" in example.streams else "lm"
    ids = list(example.streams[name].ids)
    for place in example.places:
        assert token is not None
        ids[place.start : place.start + place.length] = [token] * place.length
    found = of_text(ids)
    if example.pixels:
        pixels = _decoded(example)
        found["pixel_values"] = pad_sequence(pixels, batch_first=True) if example.sizes else torch.stack(pixels)
    if example.sizes:
        found["image_sizes"] = torch.tensor(example.sizes)
    if "qformer" in example.streams:
        beside = torch.tensor([example.streams["qformer"].ids])
        found |= {"qformer_input_ids": beside, "qformer_attention_mask": torch.ones_like(beside)}
    return found


def of_text(ids: list[int]) -> dict[str, Tensor]:
    """One row without padding."""
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def logits(peer: nn.Module, given: Mapping[str, Tensor], example: Example) -> Tensor:
    """(T, V) of the ``lm`` or ``decoder`` stream."""
    more = {}
    if "decoder" in example.streams:
        more["decoder_input_ids"] = torch.tensor([example.streams["decoder"].ids])
    return peer(**given, **more).logits[0].float()


def vectors(net: Net, batch: Batch) -> list[Tensor]:
    """Of each pair both embeddings in a row; of a text alone its own."""
    (tokens,) = batch.text.values()
    texts = net.embed_texts(tokens)
    if not batch.visuals:
        return list(texts.float())
    return list(torch.cat([net.embed_images(pictures(batch)).flatten(1), texts], dim=1).float())


def pictures(batch: Batch) -> Tensor:
    """(B, 3, H, W): the picture of each row."""

    def first_frames(group: Visuals) -> Tensor:
        assert group.pixels is not None  # examples are made of pictures
        return group.pixels[:, 0]

    return torch.stack(batch.per_row(first_frames, "a pair"))


def pixels_of(example: Example) -> Tensor:
    """(n, 3, H, W)"""
    return torch.stack(_decoded(example))


def _decoded(example: Example) -> list[Tensor]:
    made: list[Tensor] = []
    for image, make in zip(example.visuals, example.pixels, strict=True):
        pixels = make(image)
        assert isinstance(pixels, Tensor)  # no cache of features is in use
        made.append(pixels)
    return made


def text_ids(text: TextConfig, theirs: Any, example: Example) -> Tensor:
    """(1, T) as the folder has them, where writing it moved end-of-text to another id; a tower that is read at its last
    place always gets its full context. ``text`` and ``theirs`` are both sides' configurations of the tower."""
    (stream,) = example.streams.values()
    ids = list(stream.ids)
    if text.pool == "last":
        return torch.tensor([ids + [text.pad_id] * (theirs.max_position_embeddings - len(ids))])
    if text.pool == "eot":
        swap = {text.eot_id: theirs.eos_token_id, theirs.eos_token_id: text.eot_id}
        ids = [swap.get(i, i) for i in ids]
    return torch.tensor([ids])


def vector(found: Mapping[str, Tensor]) -> Tensor:
    """What a tower's class projects, or where it has no projection what it pools."""
    names = ("image_embeds", "text_embeds", "pooler_output")
    return next(found[name] for name in names if name in found)[0].float()


def before_norm(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(P, D) what the last block of a tower's class hands to its norm for one picture; its output is normed."""
    inputs: list[Tensor] = []
    norm = next(module for name, module in tower.named_modules() if name.endswith("post_layernorm"))
    hook = norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        tower(pixel_values=pixels)
    finally:
        hook.remove()
    return inputs[0][0]
