import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.record import Image, Record, Text
from isthmus.errors import DataError
from isthmus.evaluation.turns import last_turn, partners, prompt, texts_of, turns, with_pictures_of, without_picture
from tests.evaluation.fakes import Word, question

CONVERSATION = Record(
    id="c",
    parts=(
        Text("You are helpful.", role="system"),
        Image(Word("cat")),
        Text("What is it?", role="user"),
        Text("A cat.", role="assistant", learn=True),
        Text("And then", role="user"),
        Image(Word("dog")),
        Text("what?", role="user"),
        Text(("A dog.", "A hound."), role="assistant", learn=True),
    ),
)


def test_every_turn_is_found_with_its_own_question():
    assert [(t.question, t.answers) for t in turns(CONVERSATION)] == [
        ("What is it?", ("A cat.",)),
        ("And then what?", ("A dog.", "A hound.")),
    ]


def test_the_prompt_ends_with_the_question_and_keeps_earlier_answers():
    assert prompt(CONVERSATION).parts == CONVERSATION.parts[:-1]


def test_given_answers_take_the_place_of_the_record_s_own():
    assert last_turn(question(0, "cat", answers=["cat", "kitty"])).answers == ("cat", "kitty")


def test_what_meta_lists_is_a_list():
    record = question(0, "cat", answers=["cat", 9], kinds=7)
    assert texts_of(record, "answers") == ("cat", "9")
    assert texts_of(record, "choices") == ()
    with pytest.raises(DataError, match=r"'q0' has 7 as 'kinds'.*a list of texts"):
        texts_of(record, "kinds")


@pytest.mark.parametrize("parts", [(), (Text("Hello?", role="user"),), (Text(" ", role="assistant", learn=True),)])
def test_a_record_without_an_answer_is_refused_by_name(parts):
    with pytest.raises(DataError, match="'lost'"):
        last_turn(Record(id="lost", parts=parts))


def test_blind_and_shuffled_keep_every_word():
    other = question(7, "horse")
    assert without_picture(CONVERSATION).parts == CONVERSATION.texts
    shuffled = with_pictures_of(CONVERSATION, other)
    assert shuffled.texts == CONVERSATION.texts
    assert [p.source for p in shuffled.images] == [Word("horse", 7)] * 2
    assert shuffled.id == CONVERSATION.id


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=40), st.integers(0, 5))
def test_partners_never_share_a_picture(keys, seed):
    if len(set(keys)) == 1:
        with pytest.raises(DataError, match="two different pictures"):
            partners(keys, seed)
        return
    found = partners(keys, seed)
    assert all(keys[i] != keys[j] for i, j in enumerate(found))
    assert found == partners(keys, seed)
    if 2 * max(map(keys.count, keys)) <= len(keys):
        assert sorted(found) == list(range(len(keys)))
