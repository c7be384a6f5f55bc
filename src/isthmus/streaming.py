"""An answer piece by piece while it is written."""

from collections.abc import Iterator

import torch

from isthmus.batch import Batch
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.words import Words
from isthmus.language import Decoder, Decoding
from isthmus.net import Net


def pieces(net: Net, tokenizer: Tokenizer, batch: Batch, decoding: Decoding) -> Iterator[str]:
    """The text of a batch of one row as it grows, complete characters only; all pieces together are the answer without
    the white space around it. A net that a Decoder cannot write with, and beams, give it in one piece."""
    words = Words(tokenizer)
    for ids in _ids(net, batch, decoding):
        if piece := "".join([words.push(token) for token in ids]):
            yield piece
    if piece := words.end():
        yield piece


def _ids(net: Net, batch: Batch, decoding: Decoding) -> Iterator[tuple[int, ...]]:
    if not net.continues_prompts:
        with torch.inference_mode():
            (ids,) = net.generate(batch, decoding)
        yield tuple(ids)
        return
    decoder = Decoder(net.language)
    with torch.inference_mode():
        prompt = net.prompt(batch)
    decoder.add(prompt, decoding)
    while decoder.rows:
        for new in decoder.step():
            yield new.ids
