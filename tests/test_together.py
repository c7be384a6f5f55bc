"""What prompts and candidates begin with is read once, and nothing else comes out."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image as PilImage

from isthmus.data.images import as_image
from isthmus.data.record import Image, Record, Text
from isthmus.data.shared import cut
from isthmus.model import Model
from tests.interop import tiny_models
from tests.models.tiny_blip2 import T5

MODELS: dict[str, Callable[[], Model]] = {
    "lm": tiny_models.lm,
    "llava": tiny_models.llava,
    "llava next": tiny_models.llava_next,
    "blip2": tiny_models.blip2,
    "flamingo": tiny_models.flamingo,
    "flamingo all": lambda: tiny_models.flamingo(media="all"),
    "idefics": tiny_models.idefics,
}
CALM: dict[str, Any] = {"max_new_tokens": 6}


def pictures(count: int) -> list[Image]:
    torch.manual_seed(0)
    return [as_image(PilImage.effect_noise((40 + 3 * n, 40), 90).convert("RGB").rotate(90 * n)) for n in range(count)]


def asked(name: str, *parts: Any) -> Record:
    return Record(name, tuple(Text(p, role="user") if isinstance(p, str) else p for p in parts))


def questions(model: Model) -> list[Record]:
    """Several about one picture, one about another, two about none."""
    words = ["what is it?", "is it red, or is it blue?", "how many?"]
    if model.processor.image is None:
        begin = "please say in a few words, as well as you can and without guessing, "
        return [asked(str(n), begin + text) for n, text in enumerate(words)]
    one, two = pictures(2)
    seen = [asked(f"a{n}", one, text) for n, text in enumerate(words)]
    return [*seen, asked("b", two, "what is it?"), asked("c", "what is red?"), asked("d", "what is blue?")]


def encoded(model: Model) -> list[int]:
    """How many pictures the encoder has seen, in each of its passes."""
    seen: list[int] = []
    if "vision" in model.net._modules:
        model.net.vision.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decoding", [CALM, {**CALM, "num_beams": 2}, {**CALM, "temperature": 1.5, "seed": 3}])
def test_answers_are_those_given_alone(name: str, decoding: dict) -> None:
    model = MODELS[name]()
    records = questions(model)
    alone = [model.generate([record], **decoding)[0] for record in records]
    assert model.generate(records, **decoding) == alone
    assert model.generate(records, batch_size=2, **decoding) == alone


@pytest.mark.parametrize("name", ["llava", "blip2", "flamingo"])
def test_a_picture_of_several_questions_is_encoded_once(name: str) -> None:
    model = MODELS[name]()
    seen = encoded(model)
    model.generate(questions(model), **CALM)
    assert sum(seen) == 2


def shots(count: int) -> list[Any]:
    """Finished turns that every question has before it."""
    turns: list[Any] = []
    for n, picture in enumerate(pictures(count)):
        turns += [picture, Text(f"what is {n}?", role="user"), Text(f"it is {n}.", role="assistant")]
    return turns


@pytest.mark.parametrize("name", ["llava", "flamingo", "flamingo all", "idefics"])
def test_shots_that_all_questions_share_are_read_once(name: str) -> None:
    model = MODELS[name]()
    before, own = shots(2), pictures(6)[2:]
    records = [asked(str(n), *before, picture, "what is it?") for n, picture in enumerate(own)]
    alone = [model.generate([record], **CALM)[0] for record in records]
    seen = encoded(model)
    assert model.generate(records, **CALM) == alone
    assert sum(seen) == 2 + 4


@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_candidates_are_scored_behind_one_reading(name: str) -> None:
    model = tiny_models.blip2({**T5, "vocab_size": tiny_models.ROWS}) if name == "t5" else MODELS[name]()
    sees = model.processor.image is not None
    parts = [*(pictures(1) if sees else []), Text("what is it?", role="user")]
    candidates = ["red", "a blue ball", "no", "two small red cubes"]
    alone = [model.score(parts, [c])[0] for c in candidates]
    seen = encoded(model)
    calls: list[int] = []
    hidden = model.net.language.lm.get_encoder() if name == "t5" else model.net.language.lm
    hidden.register_forward_hook(lambda *_: calls.append(0))
    assert model.score(parts, candidates) == pytest.approx(alone, abs=1e-4)
    assert (len(seen), len(calls)) == (int(sees), 1 if name == "t5" else 2)
    assert model.net.shares_beginning


def test_what_is_not_shared_is_not_cut() -> None:
    model = tiny_models.llava()
    one, two = pictures(2)

    def prompts(*records: Record) -> Sequence[Any]:
        return [model.processor.prompt(record) for record in records]

    assert cut(prompts(asked("a", one, "what?"))) is None
    assert cut(prompts(asked("a", "one?"), asked("b", "two?"))) is None  # too little to be worth it
    found = cut(prompts(asked("a", one, two, "what?"), asked("b", one, one, "what?")))
    assert found is not None
    assert [len(part.visuals) for part in (found.beginning, *found.endings)] == [1, 1, 1]
    same = cut(prompts(asked("a", one, "what?"), asked("b", one, "what?")))
    assert same is not None
    assert [len(e.streams["lm"].ids) for e in same.endings] == [1, 1]  # something is left to go on from
    instructed = tiny_models.blip2(instruct=True)  # its Q-Former reads the question beside the picture
    assert cut([instructed.processor.prompt(asked(t, one, t)) for t in ("what?", "how many?")]) is None
