"""Prompts that begin alike: what is taken over, that it changes nothing, and how much is kept."""

import pytest
import torch

from isthmus.language import Decoder, Decoding, LanguageModel, Prompt
from isthmus.serving.prefix import Remembering
from tests.models.tiny_flamingo import LANGUAGES, redraw

MORE = {"mistral": {**LANGUAGES["llama"], "sliding_window": 6}, **LANGUAGES}


def language(name):
    torch.manual_seed(0)
    found = LanguageModel.build({"model_type": name, **MORE[name]}).eval()
    redraw(found)
    return found


def row(found, ids):
    embeds = found.embed(torch.tensor([ids]))
    return Prompt(embeds, torch.tensor([len(ids)]))


def texts(steps, prompts):
    decoder, written = Decoder(steps), {}
    for prompt in prompts:  # each joins while the ones before are being written
        (number,) = decoder.add(prompt, Decoding(max_new_tokens=9))
        written[number] = []
        for new in decoder.step():
            written[new.row] += new.ids
    while decoder.rows:
        for new in decoder.step():
            written[new.row] += new.ids
    return list(written.values())


@pytest.mark.parametrize("name", MORE)
@torch.inference_mode()
def test_what_is_taken_over_changes_nothing(name):
    found = language(name)
    common = [int(i) for i in torch.randint(3, 50, (20,), generator=torch.Generator().manual_seed(1))]
    rows = [common, [*common, 7, 8, 9], [*common[:12], 30, 31], common, [5, 6, 7], [*common, 7, 8, 9, 10, 11]]
    prompts = [row(found, ids) for ids in rows]
    kept = Remembering(found, 10**9)
    assert texts(kept, prompts) == texts(found, prompts)
    assert kept.taken == 20 + 12 + 19 + 23
    for prompt in prompts:
        apart = kept.read(prompt).logits - found.read(prompt).logits
        assert float(apart.abs().max()) < 1e-4


@torch.inference_mode()
def test_what_is_kept_stays_within_its_bytes():
    found = language("llama")
    one = Remembering(found, 10**9)
    one.read(row(found, list(range(3, 13))))
    small = Remembering(found, 2 * one.held)
    for start in (3, 13, 23, 33):
        small.read(row(found, list(range(start, start + 10))))
        assert small.held <= 2 * one.held
    small.read(row(found, list(range(33, 43))))
    assert small.taken == 9
    small.read(row(found, list(range(3, 13))))
    assert small.taken == 9  # long gone


@torch.inference_mode()
def test_a_conversation_that_goes_on_keeps_one_prompt():
    found, ids = language("llama"), list(range(3, 20))
    kept = Remembering(found, 10**9)
    for more in ([], [21, 22, 23], [24, 25]):
        ids = [*ids, *more]
        kept.read(row(found, ids))
    assert len(kept._kept) == 1
    assert kept.taken == 17 + 20
