"""InterleaveProcessor: prompts byte for byte, labels span by span, windows, clips, and which picture a token sees."""

import json

import pytest
from PIL import Image as PilImage

from isthmus.batch import IGNORE
from isthmus.data.collate import collate
from isthmus.data.images import ImageTransform, as_image
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor, hateful_memes
from isthmus.data.processors import processor_from_dict
from isthmus.data.record import Text
from isthmus.data.video import MadeFrames, as_video
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import assistant, byte_level, picture, record, user
from tests.narrow import there

TOKENIZER = byte_level().with_tokens(*NEW_TOKENS)
IMAGE = ImageTransform.clip(8)
END, TAG = TOKENIZER.id_of("<|endofchunk|>"), TOKENIZER.id_of("<image>")


def processor(**options) -> InterleaveProcessor:
    return InterleaveProcessor(TOKENIZER, IMAGE, **options)


def written(example) -> str:
    return TOKENIZER.decode(example.streams["lm"].ids, skip_special=False)


def learnt(example) -> str:
    return TOKENIZER.decode([x for x in example.streams["lm"].labels if x != IGNORE], skip_special=False)


SHOTS = (picture(role="user"), user("what is it?"), assistant("a cat"), picture(role="user"), user("what is it?"))
CAPTIONS = (picture(), assistant("a cat"), picture())


def test_new_tokens_follow_the_vocabulary_and_are_never_read_from_text():
    assert (byte_level().vocab_size, byte_level().vocab_size + 1) == (END, TAG)
    ids = TOKENIZER.encode("<image>a<|endofchunk|>")
    assert TAG not in ids
    assert END not in ids
    assert TOKENIZER.decode([TAG, *TOKENIZER.encode("a cat"), END]) == "a cat"


@pytest.mark.parametrize(
    ("template", "parts", "expected"),
    [
        (
            "paper",
            SHOTS,
            "<image>Question: what is it? Answer: a cat<|endofchunk|><image>Question: what is it? Answer:",
        ),
        ("paper", CAPTIONS, "<image>Output: a cat<|endofchunk|><image>Output:"),
        (
            "open_flamingo",
            SHOTS,
            "<image>Question:what is it? Short answer:a cat<|endofchunk|>\n<image>Question:what is it? Short answer:",
        ),
        ("open_flamingo", CAPTIONS, "<image>Output:a cat<|endofchunk|>\n<image>Output:"),
        (
            "paper",
            (*hateful_memes(picture(), "a cat", "no"), *hateful_memes(picture(), "yes")),
            '<image>is an image with written: "a cat" on it. Is it hateful? Answer: no<|endofchunk|>'
            '<image>is an image with written: "yes" on it. Is it hateful? Answer:',
        ),
        (
            "paper",
            (user("what?"), assistant("a cat"), user("how many?"), assistant("2"), picture(), user("what?")),
            "Question: what? Answer: a cat<|endofchunk|>Question: how many? Answer: 2<|endofchunk|>"
            "<image>Question: what? Answer:",
        ),
        ("paper", (picture(role="text"),), "<image>"),
        (
            "paper",
            (user("is "), picture(), user(" like "), picture(), user("?")),
            "Question: is <image> like <image>? Answer:",
        ),
    ],
)
def test_prompts_byte_for_byte(template, parts, expected):
    example = processor(template=template).prompt(record(*parts))
    assert written(example) == f"<s>{expected}"
    assert example.streams["lm"].labels is None
    assert len(example.places) == len(example.pixels) == expected.count("<image>")
    assert [example.streams["lm"].ids[p.start] for p in example.places] == [TAG] * len(example.places)


def test_a_tokenizer_that_begins_with_nothing_gives_open_flamingos_rows():
    """<image>{caption}<|endofchunk|>{eos} of its LAION, and its shots: GPT-NeoX's tokenizer adds no beginning."""
    bare = InterleaveProcessor(TOKENIZER.beginning(), IMAGE, template="open_flamingo")
    pair = bare.example(record(picture(role="text"), Text("a cat", learn=True)))
    assert written(pair) == "<image>a cat<|endofchunk|></s>"
    assert learnt(pair) == "a cat<|endofchunk|></s>"
    assert written(bare.prompt(record(*CAPTIONS))) == "<image>Output:a cat<|endofchunk|>\n<image>Output:"


def test_a_pair_and_its_labels():
    pair = record(picture(role="text"), Text(("a cat", "a red cube"), learn=True))
    example = processor().example(pair, 1)
    assert written(example) == "<s><image>a red cube<|endofchunk|></s>"
    assert learnt(example) == "a red cube<|endofchunk|></s>"
    assert example.streams["lm"].media_index == [0] + [1] * (len(example.streams["lm"].ids) - 1)
    spaced = [written(processor(space=0.5).example(pair, draw))[10:11] == " " for draw in range(40)]
    assert 8 < sum(spaced) < 32


PAGE = record(
    Text("the picture shows", learn=True),
    picture(role="text"),
    Text(" a cat \n", learn=True),
    picture((0, 200, 0), role="text"),
    Text("a small blue sphere", learn=True),
)


def test_a_page_ends_a_chunk_before_each_picture_and_at_its_end():
    example = processor().example(PAGE)
    text = "the picture shows<|endofchunk|><image>a cat<|endofchunk|><image>a small blue sphere<|endofchunk|></s>"
    assert written(example) == f"<s>{text}"
    assert learnt(example) == text.replace("<image>", "")
    assert learnt(processor(blind=False).example(PAGE)) == text[text.index("<image>") :].replace("<image>", "")
    span = example.streams["lm"]
    assert span.media_index == [sum(i == TAG for i in span.ids[: n + 1]) for n in range(len(span.ids))]
    side_by_side = record(picture(role="text"), picture(role="text"), Text("a cat", learn=True))
    assert written(processor().example(side_by_side)) == "<s><image><image>a cat<|endofchunk|></s>"


def test_the_next_picture_is_seen_by_half_of_the_pages_only():
    rows = [there(processor(p_next=0.5).example(PAGE, draw).streams["lm"].media_index) for draw in range(40)]
    ahead = [row for row in rows if row[0] == 1]
    assert 8 < len(ahead) < 32
    assert ahead[0][-1] == 0
    ids = processor().example(PAGE).streams["lm"].ids
    assert [s for s, i in zip(ahead[0], ids, strict=True) if i == TAG] == [1, 2]
    pair = record(picture(role="text"), Text("a cat", learn=True))
    seen = [there(processor(p_next=1.0).example(pair, d).streams["lm"].media_index) for d in range(5)]
    assert all(row[-1] == 1 for row in seen)
    assert there(processor(p_next=1.0).prompt(PAGE).streams["lm"].media_index)[0] == 0


def test_a_long_page_is_read_through_windows():
    parts = []
    for n in range(9):
        parts += [picture((20 * n, 0, 0), role="text"), Text(f"the red cube {n} yes no", learn=True)]
    whole = processor(max_length=999, max_images=99).example(record(*parts)).streams["lm"]
    starts = set()
    for draw in range(30):
        example = processor(max_length=40, max_images=2).example(record(*parts), draw)
        span = example.streams["lm"]
        assert len(span.ids) <= 40
        assert span.ids.count(TAG) == len(example.places) == len(example.visuals) <= 2
        start = next(s for s in range(len(whole.ids)) if whole.ids[s : s + len(span.ids)] == span.ids)
        starts.add(start)
        tags = [n for n, i in enumerate(span.ids) if i == TAG]
        assert [p.start for p in example.places] == tags
        first = whole.ids[:start].count(TAG)
        assert [v.content_key() for v in example.visuals] == [
            parts[2 * (first + k)].content_key() for k in range(len(tags))
        ]
        assert there(span.media_index)[-1] == len(tags)
    assert len(starts) > 10


@pytest.mark.parametrize("blind", [True, False])
def test_a_window_of_a_page_with_a_picture_holds_one(blind):
    """And behind it, where only that is learnt, a token to learn; all places that do so are drawn."""
    text = Text("the red cube yes no " * 20, learn=True)
    page = record(text, picture(role="text"), picture(role="text"), text)
    windows = processor(max_length=40, max_images=1, blind=blind)
    places = set()
    for draw in range(400):
        example = windows.example(page, draw)
        ids = example.streams["lm"].ids
        assert len(example.visuals) == len(example.places) == ids.count(TAG) == 1
        assert blind or learnt(example)
        assert ids == windows.example(page, draw).streams["lm"].ids
        places.add(example.places[0].start)
    # Cut before the second, the first has nothing behind it: text before it must stand at the window's second token.
    assert places == ({0, *range(2, 40)} if blind else {0})


def test_windows_at_a_pages_ends_hold_its_picture():
    text = Text("the red cube yes no " * 20, learn=True)
    for parts in ((picture(role="text"), text), (text, picture(role="text"), Text("a", learn=True))):
        for draw in range(20):
            (place,) = processor(max_length=40).example(record(*parts), draw).places
            assert 0 <= place.start < 40
    with pytest.raises(DataError, match="nothing learnt"):
        processor(max_length=40, blind=False).example(record(text, picture(role="text"), Text("a" * 50)))


def test_windows_of_text_alone_are_drawn_from_all_places():
    page = record(Text(" ".join(f"{n} yes no" for n in range(60)), learn=True))
    found = {tuple(processor(max_length=40).example(page, draw).streams["lm"].ids) for draw in range(60)}
    assert len(found) > 10
    assert all(TAG not in ids for ids in found)


def test_a_conversation_learns_answers_and_keeps_its_beginning():
    talk = record(picture(), user("what?"), assistant("a cat"), user("how many?"), assistant("yes no " * 30))
    example = processor(max_length=64).example(talk)
    assert learnt(processor(max_length=999).example(talk)) == f" a cat<|endofchunk|> {'yes no ' * 30}<|endofchunk|></s>"
    assert len(example.streams["lm"].ids) == 64
    assert written(example).startswith(
        "<s><image>Question: what? Answer: a cat<|endofchunk|>Question: how many? Answer: yes"
    )
    with pytest.raises(DataError, match="nothing learnt"):
        processor(max_length=8).example(talk)
    with pytest.raises(DataError, match="prompt too long"):
        processor(max_length=8).prompt(talk)


def test_the_prompt_is_what_the_example_begins_with():
    for template in ("paper", "open_flamingo"):
        asked = record(*SHOTS, assistant("a red cube"))
        prompt = processor(template=template).prompt(asked).streams["lm"].ids
        assert processor(template=template).example(asked).streams["lm"].ids[: len(prompt)] == prompt


def test_a_batch_of_pictures_of_any_shape_and_clips():
    keeping = InterleaveProcessor(TOKENIZER, ImageTransform(size=12, mode="aspect", patch=4))
    frames = [PilImage.new("RGB", (12, 12), (i * 60, 0, 0)) for i in range(3)]
    wide = PilImage.new("RGB", (30, 10))
    rows = [
        record(as_image(wide), user("what?"), assistant("yes")),
        record(as_video(frames), user("what?"), assistant("no")),
        record(picture(), as_image(wide), user("what?"), assistant("no")),
    ]
    batch = collate([keeping.example(r) for r in rows])
    shapes = {tuple(there(g.pixels).shape): g.index.tolist() for g in batch.visuals}
    assert shapes == {(2, 1, 3, 4, 12): [0, 3], (1, 3, 3, 12, 12): [1], (1, 1, 3, 12, 12): [2]}
    assert batch.text["lm"].media_index is not None
    assert there(batch.select([2]).text["lm"].media_index).max() == 2


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((user("what?"),), "ends with a turn of the user"),
        ((picture(), user("what?"), assistant(" ")), "empty answer"),
        ((user("what?"), picture(role="assistant"), assistant("a")), "a picture stands in the assistant's turn"),
        ((picture(role="text"), Text(" ", learn=True)), "empty text"),
        ((picture(), user("what?"), assistant("yes", learn=False)), "nothing learnt"),
        ((as_video(MadeFrames([])), user("what?"), assistant("yes")), "0 frames"),
    ],
)
def test_bad_records_are_explained(parts, words):
    with pytest.raises(DataError, match=words):
        collate([processor().example(record(*parts))])


def test_options_are_checked_and_survive_json():
    for options, words in (
        ({"template": "papper"}, "did you mean 'paper'"),
        ({"max_length": 1}, "at least 2"),
        ({"p_next": 2}, "p_next is a share"),
    ):
        with pytest.raises(ConfigError, match=words):
            processor(**options)
    with pytest.raises(ConfigError, match="endofchunk"):
        InterleaveProcessor(byte_level(), IMAGE)
    one = processor(template="open_flamingo", p_next=0.5, space=0.25, blind=False, max_length=99, max_images=3)
    again = processor_from_dict(json.loads(json.dumps(one.to_dict())), TOKENIZER)
    assert again.to_dict() == one.to_dict()
