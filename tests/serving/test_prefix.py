"""Prompts that begin alike: what is taken over, that it changes nothing, and how much is kept."""

from dataclasses import replace

import pytest
import torch

from isthmus.data.collate import collate
from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from isthmus.language import Decoder, Decoding, LanguageModel, Prompt
from isthmus.language.seq2seq import Source
from isthmus.serving.prefix import Remembering
from tests.interop import tiny_models
from tests.models.redrawn import redraw
from tests.models.tiny_flamingo import LANGUAGES
from tests.serving.helpers import picture

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
    assert small.taken == 10
    small.read(row(found, list(range(3, 13))))
    assert small.taken == 10  # long gone


@torch.inference_mode()
def test_a_conversation_that_goes_on_keeps_one_prompt():
    found, ids = language("llama"), list(range(3, 20))
    kept = Remembering(found, 10**9)
    for more in ([], [21, 22, 23], [24, 25]):
        ids = [*ids, *more]
        kept.read(row(found, ids))
    assert len(kept._kept) == 1
    assert kept.taken == 17 + 20


def asked(model, *parts):
    """The prompt of a conversation, pictures by number."""
    shown = (as_image(picture(p)) if isinstance(p, int) else Text(p, role="user") for p in parts)
    example = model.processor.prompt(Record("r", tuple(shown)))
    prompt = model.net.prompt(collate([example]))
    if prompt.attended is None:
        return prompt
    # Each picture encoded alone, as the server keeps them: together the last digits may differ.
    alone = [asked(model, p, "x").attended.media for p in parts if isinstance(p, int)] if len(parts) > 2 else []
    return replace(prompt, attended=replace(prompt.attended, media=torch.cat(alone, dim=1))) if alone else prompt


@torch.inference_mode()
def test_a_flamingos_beginning_is_taken_over_with_the_pictures_it_sees():
    model = tiny_models.flamingo()
    found, kept = model.net.language, Remembering(model.net.language, 10**9)
    question = "how many red things are there beside the large blue cube?"
    first, other = asked(model, 1, question), asked(model, 2, question)
    prompts = [first, asked(model, 1, question, 2, "and here?"), asked(model, 2, question, 2, "and here?"), other]
    taken = []
    for prompt in prompts:
        before, read, whole = kept.taken, kept.read(prompt), found.read(prompt)
        taken.append(kept.taken - before)
        assert float((read.logits - whole.logits).abs().max()) < 1e-4
    half = int(first.lengths) // 2
    assert [n > half for n in taken] == [False, True, False, True]
    assert taken[2] == 0  # its first picture is another one
    assert float((found.read(first).logits - found.read(other).logits).abs().max()) > 1e-2
    assert texts(kept, prompts) == texts(found, prompts)


@torch.inference_mode()
def test_an_encoder_decoder_takes_over_whole_prompts_and_nothing_less():
    model = tiny_models.blip2({**tiny_models.T5, "vocab_size": tiny_models.ROWS})
    found, kept = model.net.language, Remembering(model.net.language, 10**9)
    first, other = asked(model, 1, "how many red things are there?"), asked(model, 1, "how many red things?")
    prompts = [first, other, first, first]
    assert texts(kept, prompts) == texts(found, prompts)
    assert kept.taken == 2 * int(first.lengths)
    one = Remembering(found, 10**9)
    one.read(first)
    source = kept.read(first).attended
    assert isinstance(source, Source)
    assert one.held > first.embeds.nbytes + 2 * sum(k.nbytes for k, _ in source.layers)
