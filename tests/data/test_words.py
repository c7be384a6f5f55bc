"""Answers in pieces: together what the tokenizer says, nothing taken back, stop texts never shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.words import Words, token_bytes
from tests.data.helpers import byte_level, llama_like
from tests.interop.tiny_models import words as wordpiece

TOKENIZERS = {"bytes": byte_level(), "pieces": llama_like(legacy=False), "legacy": llama_like(legacy=True)}
TEXTS = ["a red cube", "  zwei große Würfel 🧊🧊 \n", "日本語のテキスト", "", "\n\n x \n", "ab<|end|>cd"]


def said(tokenizer, ids, stops=(), strip=True):
    words, pieces = Words(tokenizer, stops, strip=strip), []
    for token in ids:
        pieces.append(words.push(token))
        if words.stopped:
            break
    return [*pieces, words.end()], words


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_together_are_the_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces, _ = said(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids).strip()
    assert "".join(said(tokenizer, ids, strip=False)[0]) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 300), max_size=24))
def test_any_tokens_give_what_decoding_gives(ids):
    for tokenizer in TOKENIZERS.values():
        known = [i for i in ids if i < tokenizer.vocab_size]
        assert "".join(said(tokenizer, known)[0]) == tokenizer.decode(known).strip()


def test_words_of_a_wordpiece_keep_their_spaces():
    tokenizer = wordpiece()
    ids = tokenizer.encode("a large blue ring, two")
    assert "".join(said(tokenizer, ids)[0]) == tokenizer.decode(ids).strip()


@pytest.mark.parametrize(
    ("stops", "left"),
    [(("cd",), "ab"), (("zz", "b"), "a"), (("abcdefg",), ""), (("efgx",), "abcdefg"), (("d", "bc"), "a")],
)
def test_a_stop_text_ends_the_answer_and_is_not_shown(stops, left):
    tokenizer = byte_level()
    ids = [tokenizer.backend.token_to_id(c) for c in "abcdefg"]
    pieces, words = said(tokenizer, ids, stops)
    assert "".join(pieces) == left
    assert words.stopped == (left != "abcdefg")


def test_a_token_stands_for_its_bytes():
    for name, tokenizer in TOKENIZERS.items():
        ids = tokenizer.encode("ein Würfel 🧊")
        joined = b"".join(token_bytes(tokenizer, i) for i in ids).decode()
        assert joined.strip() == "ein Würfel 🧊", name
