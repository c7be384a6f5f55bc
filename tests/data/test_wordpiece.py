"""The Q-Former's vocabulary: trained here, and BERT's from a folder."""

import json

import pytest
from transformers import BertTokenizer

from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import cls_id, load_wordpiece, other_specials, train_wordpiece
from isthmus.errors import CheckpointError, ConfigError

TEXTS = ["a small red cube", "a big blue sphere left of a red ring", "two green cubes and a ring"] * 4
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "##s", "is", ",", "the"]


def test_a_trained_vocabulary_ends_in_dec_and_survives_saving(tmp_path) -> None:
    tokenizer = train_wordpiece(TEXTS, 100)
    assert tokenizer.bos_id == tokenizer.vocab_size - 1 == tokenizer.backend.token_to_id("[DEC]")
    assert tokenizer.vocab_size <= 100
    assert (tokenizer.pad_id, cls_id(tokenizer), tokenizer.eos_id) == (0, 2, 3)
    ids = tokenizer.encode("A small RED cube")
    assert tokenizer.decode(ids) == "a small red cube"
    assert set(ids).isdisjoint({tokenizer.bos_id, *other_specials(tokenizer)})
    assert tokenizer.encode("[DEC] red") != [tokenizer.bos_id, *tokenizer.encode("red")]  # users' text stays text
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("two cubes") == tokenizer.encode("two cubes")
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for _ in range(5):  # the library by itself numbers pieces differently in every run
        assert train_wordpiece(TEXTS, 100).backend.to_str() == tokenizer.backend.to_str()


def test_berts_folder_gets_dec_behind_its_vocabulary(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}), encoding="utf-8")
    tokenizer = load_wordpiece(tmp_path)
    assert tokenizer.bos_id == len(VOCAB) == tokenizer.vocab_size - 1
    peer = BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)}, do_lower_case=True)
    for text in ("The red cubes, a cube", "is it RED?"):
        assert tokenizer.encode(text) == peer(text, add_special_tokens=False)["input_ids"]
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    assert load_wordpiece(saved).bos_id == len(VOCAB)  # not added twice


def test_what_cannot_be_used_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no WordPiece tokenizer"):
        load_wordpiece(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has no \[CLS\]"):
        load_wordpiece(tmp_path)
    with pytest.raises(ConfigError, match="at least 64"):
        train_wordpiece(TEXTS, 10)
    with pytest.raises(ConfigError, match="needs a WordPiece tokenizer"):
        cls_id(Tokenizer.train(TEXTS, 300))
