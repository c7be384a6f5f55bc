"""An answer run once more in one pass: what each token attended to, and how near the choice was."""

from typing import TYPE_CHECKING

import torch

from isthmus.batch import CAUSAL
from isthmus.data.attention import Attention, with_answer
from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.errors import CapabilityError, ConfigError
from isthmus.language import Decoding

if TYPE_CHECKING:
    from isthmus.model import Model
    from isthmus.net import Net


def attention_of(model: "Model[Net]", prompt: Example, answer: list[int]) -> Attention:
    """What ``model`` attended to for each token of the ``answer`` that it gave to ``prompt``."""
    tokenizer = model.processor.tokenizer
    batch = collate([with_answer(prompt, answer)]).to(model.device)
    grids = {}
    for group in batch.visuals:
        assert group.pixels is not None  # collate decodes
        grids |= dict.fromkeys(group.index.tolist(), model.net.grid(*group.pixels.shape[-2:]))
    start = len(prompt.streams[CAUSAL].ids) - 1  # the position before a token is the one that chose it
    maps = [m[:, start : start + len(answer)].cpu() for m in model.net.attention(batch)[0]]
    return Attention(
        text=tokenizer.decode(answer).strip(),
        tokens=tuple(tokenizer.decode([i]) for i in answer),
        maps=tuple(m.unflatten(-1, grids[n]) for n, m in enumerate(maps)),
    )


def check_gaps(model: "Model[Net]", settings: Decoding) -> None:
    """Raises ConfigError for any but plain greedy decoding, CapabilityError for a model without a causal LM."""
    greedy = Decoding()
    for name in ("min_new_tokens", "temperature", "num_beams", "repetition_penalty", "no_repeat_ngram"):
        if getattr(settings, name) != getattr(greedy, name):
            raise ConfigError(f"Gaps of the two best tokens are those of plain greedy decoding; leave {name} out.")
    model.need("answer")
    if model.net.prompt_stream != CAUSAL:
        raise CapabilityError("Gaps between the two best tokens need a causal language model.")


def gap_of(model: "Model[Net]", prompt: Example, answer: list[int], settings: Decoding) -> float:
    """The smallest distance (in logits) of the two best tokens at any step of the ``answer`` to ``prompt``."""
    batch = collate([with_answer(prompt, answer)]).to(model.device)
    start = len(prompt.streams[CAUSAL].ids) - 1
    steps = model.net.logits(batch)[0, start:][: settings.max_new_tokens].float()
    steps[:, list(settings.forbidden_ids)] = -torch.inf
    best = steps.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())
