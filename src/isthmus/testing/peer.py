"""A folder of ours as transformers opens it, held against the model it was written from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.checkpoint import read_json
from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.interop.hf_peer import Library, open_class
from isthmus.model import Model
from isthmus.testing import probe


@dataclass(frozen=True, slots=True)
class Comparison:
    """``name`` of the class; the largest difference of outputs and what is allowed; ``tokens`` of ``of`` equal."""

    name: str
    difference: float
    tolerance: float
    tokens: int = 0
    of: int = 0


@torch.inference_mode()
def compare(model: Model, folder: Path) -> Comparison:
    """Outputs and greedy tokens of the library's own class over ``folder`` and of ``model``.

    Raises CheckpointError when the library misses a tensor or finds one too many.
    """
    peer = open_class(folder)
    token = read_json(folder / "config.json").get("image_token_index")
    prompts = probe.prompts(model, probe.WORDS, (1, 2, 3))
    worst, largest, equal, of = 0.0, 1.0, 0, 0
    for example in prompts:
        complete = probe.answered(model, example, [5, 6]) if "encoder" in example.streams else example
        (ours,) = probe.outputs(model, collate([complete]))
        theirs = model.system.peer_outputs(model, peer, complete, token)
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


def _written(model: Model, peer: Library, example: Example, token: int | None) -> list[int]:
    decoding = probe.greedy(model)
    inputs = model.system.peer_inputs(model, example, token)
    never = (*decoding.forbidden_ids, *model.system.never(model.net), *(() if token is None else (token,)))
    found = peer.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        suppress_tokens=list(never),
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )[0].tolist()
    if "encoder" in example.streams:
        return found[1:]
    prompt = inputs["input_ids"].shape[1]
    return found[prompt:] if len(found) > decoding.max_new_tokens else found
