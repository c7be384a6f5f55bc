"""Templates byte for byte, and labels that are exactly the answers, for three families of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from isthmus.batch import IGNORE
from isthmus.data.record import Text
from isthmus.data.text import TEMPLATES, encode, render
from isthmus.data.tokenizer import END, Tokenizer
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import assistant, byte_level, llama_like, picture, record, user
from tests.narrow import there

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
ONE = (user("q1"), assistant("a1"))
THREE = (*ONE, user("q2"), assistant("a2"), user("q3"), assistant("a3"))
TOKENIZERS = {"legacy": llama_like(legacy=True), "non-legacy": llama_like(legacy=False), "bytes": byte_level()}


def shown(template, *parts, prompt=False):
    return str(render(record(*parts), template, prompt=prompt))


@pytest.mark.parametrize(
    ("template", "system"), [("vicuna_v1", VICUNA + " "), ("llava_v1", LLAVA + " "), ("vicuna_bare", "")]
)
def test_conversations_byte_for_byte(template, system):
    assert shown(template, *ONE) == f"{system}USER: q1 ASSISTANT: a1</s>"
    three = f"{system}USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>USER: q3 ASSISTANT: a3</s>"
    assert shown(template, *THREE) == three
    assert shown(template, picture(), *ONE) == f"{system}USER: <image>\nq1 ASSISTANT: a1</s>"
    assert shown(template, picture(), *THREE) == three.replace("q1", "<image>\nq1")
    asked = f"{system}USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>USER: q3 ASSISTANT:"
    assert shown(template, *THREE, prompt=True) == asked
    assert shown(template, *THREE[:-1], prompt=True) == asked
    assert shown(template, picture(), user("q1"), prompt=True) == f"{system}USER: <image>\nq1 ASSISTANT:"


def test_pictures_keep_their_places_in_a_turn():
    red, blue = picture(), picture((0, 0, 200))
    two = render(record(user("this "), red, user(" or "), blue, user(" ?\n"), assistant("a")), "vicuna_bare")
    assert str(two) == "USER: this <image> or <image> ? ASSISTANT: a</s>"
    assert two.images == [red, blue]
    assert shown("vicuna_bare", user("q\n"), red, assistant("a")) == "USER: q\n<image> ASSISTANT: a</s>"
    assert shown("vicuna_bare", red, user(" "), blue, user("\nq"), blue, assistant("a")) == (
        "USER: <image>\n<image>\nq\n<image> ASSISTANT: a</s>"
    )
    assert shown("vicuna_bare", red, assistant("a")) == "USER: <image> ASSISTANT: a</s>"
    later = shown("vicuna_bare", red, *ONE, user("and "), blue, assistant("b"))
    assert later == "USER: <image>\nq1 ASSISTANT: a1</s>USER: and <image> ASSISTANT: b</s>"
    assert shown("vicuna_bare", user(" kept "), assistant(" a ")) == "USER:  kept  ASSISTANT:  a </s>"


def test_only_the_first_published_template_moves_a_picture():
    red, blue = picture(), picture((0, 0, 200))
    for template, turn in (("llava_v1", "<image>\nq"), ("vicuna_v1", "q\n<image>")):
        assert f"USER: {turn} ASSISTANT:" in shown(template, user("q\n"), red, assistant("a"))
        assert "USER: q\n<image> or <image> ASSISTANT:" in shown(
            template, user("q"), red, user(" or "), blue, prompt=True
        )


def test_a_system_text_replaces_the_templates():
    own = Text("Be brief.", role="system")
    assert shown("vicuna_v1", own, *ONE) == "Be brief. USER: q1 ASSISTANT: a1</s>"
    assert shown("vicuna_bare", own, *ONE) == "Be brief. USER: q1 ASSISTANT: a1</s>"


def test_plain_drops_the_human_and_ends_in_a_newline():
    assert shown("plain", picture(), user("describe"), assistant("a cat")) == "<image>a cat\n"
    assert shown("plain", picture(), Text("a cat", learn=True)) == "<image>a cat\n"
    assert shown("plain", picture(), user("describe"), assistant("a cat"), prompt=True) == "<image>"
    with pytest.raises(DataError, match=r"bad caption: .* takes one caption and the sample has 2"):
        shown("plain", picture(), user("q1"), assistant("a1"), user("q2"), assistant("a2"))


def test_running_text_is_a_document_in_every_conversation_template():
    parts = (Text("before "), picture(), Text(" after", learn=True))
    for template in ("document", "vicuna_v1", "vicuna_bare"):
        assert shown(template, *parts) == "before <image> after</s>"
        assert shown(template, *parts, prompt=True) == "before <image>"
    with pytest.raises(DataError, match="found a turn of the user"):
        shown("document", *ONE)


def test_records_that_do_not_fit():
    for parts, words in (
        ((user("q"),), "empty answer: the conversation ends with a question"),
        ((user("q"), assistant("  ")), "empty answer: turn 2"),
        ((assistant("a"), user("q"), assistant("a")), "turn 1 is the assistant's and should be the user's"),
        ((user("q"), picture(role="assistant"), assistant("a")), "picture stands in the assistant's turn"),
        ((user("q"), assistant("a" + END)), r"U\+10FFFD"),
        ((user("q"), Text((), role="assistant")), "has none"),
        ((Text("  ", learn=True),), "empty text: the document"),
    ):
        with pytest.raises(DataError, match=words):
            shown("vicuna_v1", *parts)
    with pytest.raises(DataError, match="empty answer: the caption"):
        shown("plain", picture(), Text(" ", learn=True))
    with pytest.raises(DataError, match="no question to answer"):
        shown("vicuna_v1", Text("s", role="system"), assistant("a"), prompt=True)
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        shown("vicuna_v2", *ONE)


def test_alternatives_are_drawn_apart():
    parts = (Text(("q1", "q2"), role="user"), Text(("a1", "a2", "a3"), role="assistant", learn=True))
    seen = {str(render(record(*parts), "vicuna_bare", draw=draw)) for draw in range(6)}
    assert len(seen) == 6
    assert shown("vicuna_bare", *parts) == "USER: q1 ASSISTANT: a1</s>"


def learnt_runs(encoded, tokenizer):
    """Decoded runs of neighbouring supervised tokens; every label equals its id."""
    runs, run = [], []
    for token, label in [*zip(encoded.ids, encoded.labels, strict=True), (None, IGNORE)]:
        if label == IGNORE:
            if run:
                runs.append(tokenizer.decode(run, skip_special=False))
            run = []
        else:
            assert label == token
            run.append(label)
    return runs


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize(
    "answers",
    [
        ("blue",),
        ("a small blue sphere", "no", "yes"),
        ("I say ASSISTANT: no USER: x",),
        ("</s>", "<s> ASSISTANT:"),
        ("grüße\n\n- 1", "x  y"),
    ],
)
def test_labels_are_exactly_the_answers_and_their_end(family, answers):
    tokenizer = TOKENIZERS[family]
    parts = [p for n, a in enumerate(answers) for p in (user(f"what is {n}? ASSISTANT: nothing</s>"), assistant(a))]
    encoded = encode(render(record(picture(), *parts), "vicuna_v1"), tokenizer)
    assert learnt_runs(encoded, tokenizer) == [f" {a}</s>" for a in answers]
    assert encoded.ids.count(there(tokenizer.bos_id)) == 1
    assert encoded.ids[0] == tokenizer.bos_id
    assert encoded.ids.count(tokenizer.eos_id) == len(answers)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_plain_labels_are_caption_and_newline_without_an_end(family):
    tokenizer = TOKENIZERS[family]
    encoded = encode(render(record(picture(), user("q"), assistant("The picture shows a cat")), "plain"), tokenizer)
    assert [run.strip(" ") for run in learnt_runs(encoded, tokenizer)] == ["The picture shows a cat\n"]
    assert encoded.marks == [1]
    assert encoded.labels[:1] == [IGNORE]
    assert all(label != IGNORE for label in encoded.labels[1:])
    assert tokenizer.eos_id not in encoded.ids


@pytest.mark.parametrize("family", TOKENIZERS)
def test_only_learnt_answers_are_supervised(family):
    tokenizer = TOKENIZERS[family]
    parts = (user("q1"), assistant("no", learn=False), user("q2"), assistant("yes"))
    assert learnt_runs(encode(render(record(*parts), "vicuna_v1"), tokenizer), tokenizer) == [" yes</s>"]
    prompt = encode(render(record(*parts), "vicuna_v1", prompt=True), tokenizer)
    assert set(prompt.labels) == {IGNORE}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_what_is_learnt_is_said_piece_by_piece_for_either_speaker(family):
    tokenizer = TOKENIZERS[family]
    parts = (
        Text("look.", role="user"),
        Text(" what is it? ", role="user", learn=True),
        picture(),
        Text("I think:", role="assistant"),
        Text(" a cat", role="assistant", learn=True),
    )
    encoded = encode(render(record(*parts), "vicuna_v1"), tokenizer)
    assert [run.strip() for run in learnt_runs(encoded, tokenizer)] == ["what is it?", "a cat</s>"]
    whole = render(record(user("look. what is it? "), picture(), assistant("I think: a cat")), "vicuna_v1")
    assert encoded.ids == encode(whole, tokenizer).ids


@pytest.mark.parametrize(("family", "after"), [("legacy", "▁"), ("non-legacy", "")])
def test_dummy_space_after_an_end_follows_the_tokenizer(family, after):
    tokenizer = TOKENIZERS[family]
    encoded = encode(render(record(*THREE), "vicuna_bare"), tokenizer)
    tokens = tokenizer.tokens(encoded.ids)
    second = tokens[tokens.index("</s>") + 1]
    assert second.startswith(f"{after}U" if after else "U")
    # The same ids as when the library itself splits the whole string at its own special token.
    assert encoded.ids[1:] == tokenizer.backend.encode(shown("vicuna_bare", *THREE), add_special_tokens=False).ids


@pytest.mark.parametrize("family", ["legacy", "non-legacy"])
def test_each_chunk_gets_its_dummy_space(family):
    tokenizer = TOKENIZERS[family]
    encoded = encode(render(record(picture(), *ONE), "vicuna_bare"), tokenizer)
    tokens = tokenizer.tokens(encoded.ids)
    assert tokens[encoded.marks[0] :][:2] == ["▁", "<0x0A>"]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_text_around_pictures_is_one_text_where_it_is_so_in_transformers(family, tmp_path):
    """The library itself splits the whole string at its ``<image>``, which is nobody's first word."""
    tokenizer = TOKENIZERS[family].with_tokens("<image>").around_pictures()
    assert tokenizer.whole == (family == "non-legacy")
    tokenizer.save(tmp_path)
    turns = (picture(), user("what is the red cube?"), assistant("a sphere"), picture(), user("and here?"))
    said = "USER: <image>\nwhat is the red cube? ASSISTANT: a sphere</s>USER: <image>\nand here? ASSISTANT: a cat</s>"
    image, theirs = tokenizer.id_of("<image>"), tokenizer.backend.encode(said, add_special_tokens=False).ids
    for read in (tokenizer, Tokenizer.load(tmp_path)):
        encoded = encode(render(record(*turns, assistant("a cat")), "vicuna_bare"), read)
        first, second = encoded.marks
        ids = [*encoded.ids[1:first], image, *encoded.ids[first:second], image, *encoded.ids[second:]]
        assert ids == theirs
        assert learnt_runs(encoded, tokenizer) == [" a sphere</s>", " a cat</s>"]


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("strips", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_token_that_takes_white_space_in_takes_it_as_the_library_does(family, strips, tmp_path):
    """The token of a picture, and the end of a turn; of the tokenizer as it is and of the one that was saved."""
    backend = TOKENIZERS[family].with_tokens("<image>").backend
    backend.add_special_tokens([AddedToken(token, normalized=False, **strips) for token in ("<image>", "</s>")])
    tokenizer = TOKENIZERS[family].over(backend).around_pictures("<image>")
    assert tokenizer.whole
    tokenizer.save(tmp_path)
    turns = (picture(), user("what? "), assistant("a sphere "), user(" and  here?"), picture(), assistant(" a cat"))
    said = "USER: <image>\nwhat? ASSISTANT: a sphere </s>USER: and  here?\n<image> ASSISTANT:  a cat</s>"
    image, theirs = tokenizer.id_of("<image>"), tokenizer.backend.encode(said, add_special_tokens=False).ids
    for read in (tokenizer, Tokenizer.load(tmp_path)):
        encoded = encode(render(record(*turns), "vicuna_bare"), read)
        first, second = encoded.marks
        assert [*encoded.ids[1:first], image, *encoded.ids[first:second], image, *encoded.ids[second:]] == theirs


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters=END), min_size=1, max_size=12).filter(
            lambda t: t.strip() and t == t.strip()
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["vicuna_v1", "vicuna_bare"]),
)
def test_any_answers_are_learnt_whole(answers, template):
    tokenizer = TOKENIZERS["bytes"]
    parts = [p for a in answers for p in (user("what?"), assistant(a))]
    encoded = encode(render(record(*parts), template), tokenizer)
    assert learnt_runs(encoded, tokenizer) == [f" {a}</s>" for a in answers]


def test_a_document_learns_across_its_pieces():
    tokenizer = TOKENIZERS["bytes"]
    parts = (Text("The picture"), Text(" shows a", learn=True), Text(" cat", learn=True))
    assert learnt_runs(encode(render(record(*parts), "document"), tokenizer), tokenizer) == [" shows a cat</s>"]
    parts = (Text("yes", learn=True), Text(" no"))
    assert learnt_runs(encode(render(record(*parts), "document"), tokenizer), tokenizer) == ["yes"]


def test_templates_are_the_written_ones():
    conversations = {"vicuna_v1", "llava_v1", "vicuna_bare", "llava_hf", "mistral_instruct"}
    assert set(TEMPLATES) == {"plain", "document", *conversations}


def test_transformers_llava_writes_spaces_between_turns_and_an_end():
    turns = (picture(), user("what?"), assistant("a cat"), user("where?"), assistant("here"))
    said = str(render(record(*turns), "llava_hf"))
    assert said == "USER: <image>\nwhat? ASSISTANT: a cat USER: where? ASSISTANT: here</s>"
    asked = str(render(record(*turns), "llava_hf", prompt=True))
    assert asked == "USER: <image>\nwhat? ASSISTANT: a cat USER: where? ASSISTANT:"


def test_mistral_s_grammar_is_the_published_one():
    turns = (picture(), user("what?"), assistant("a cat"), user("where?"), assistant("here"))
    said = str(render(record(*turns), "mistral_instruct"))
    assert said == "[INST] <image>\nwhat? [/INST] a cat </s>[INST] where? [/INST] here </s>"
    asked = str(render(record(*turns), "mistral_instruct", prompt=True))
    assert asked == "[INST] <image>\nwhat? [/INST] a cat </s>[INST] where? [/INST]"
