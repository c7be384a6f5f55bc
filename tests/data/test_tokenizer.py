"""Tokenizer: user text is never read as a special token, saved folders load here and in transformers."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from isthmus.data.tokenizer import END, Tokenizer
from isthmus.errors import CheckpointError, ConfigError, DataError

TEXTS = ["a photo of a red cube", "USER: what is it? ASSISTANT: a blue sphere", "grüße, naïve café"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


def test_special_ids_come_first(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert 260 < tokenizer.vocab_size <= 320
    assert Tokenizer.train(TEXTS, 320).files() == tokenizer.files()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(lambda t: END not in t))
def test_any_text_survives(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)
    assert len(ids) == len(offsets)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)


@pytest.mark.parametrize("spelt", ["<s>", "</s>", "<pad>", "<unk>", "a</s>b", "<s><s></s>"])
def test_specials_spelt_by_a_user_are_text(tokenizer, spelt):
    ids = tokenizer.encode(spelt)
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode(ids) == spelt


def test_the_template_mark_is_the_end_of_sequence(tokenizer):
    ids = tokenizer.encode(f"a red{END}cube</s>")
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids, skip_special=False) == "a red</s>cube</s>"
    assert tokenizer.decode(ids) == "a redcube</s>"
    assert tokenizer.tokens([2]) == ["</s>"]


def test_half_a_surrogate_pair_is_a_data_error(tokenizer):
    with pytest.raises(DataError, match=r"character 2 is half a surrogate pair \(U\+D83D\)"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(DataError, match="surrogate"):
        Tokenizer.train(["\ud83d"], 300)


def test_saved_folder_loads_here_and_in_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.files() == tokenizer.files()
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    peer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert peer(TEXTS[0])["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(TEXTS[0])]
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (1, 2, 0)


def test_whole_strings_are_one_token_each_and_the_rest_is_as_before(tmp_path):
    texts = [f"USER: {text} ASSISTANT: {text}" for text in TEXTS]
    own = Tokenizer.train(texts, 320, whole=["USER:", " ASSISTANT:"])
    spoken = "USER: is it? ASSISTANT: USER"
    tokens = own.tokens(own.encode(spoken))
    assert tokens[0] == "USER:"
    assert tokens.count(" ASSISTANT:") == 1
    assert "USER" not in tokens  # what stands only within whole strings was not merged for itself
    assert own.decode(own.encode(spoken)) == spoken
    _, offsets = own.encode_with_offsets(spoken)
    assert offsets[0] == (0, 5)
    assert [end for _, end in offsets[:-1]] == [start for start, _ in offsets[1:]]
    assert own.vocab_size <= 320
    own.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(spoken) == own.encode(spoken)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert peer(spoken).input_ids[1:] == own.encode(spoken)


@pytest.mark.parametrize("whole", [["USER:", "USER:"], [""]])
def test_whole_strings_are_different_and_not_empty(whole):
    with pytest.raises(ConfigError, match="whole takes different strings"):
        Tokenizer.train(TEXTS, 320, whole=whole)


def test_padding_and_truncation_saved_by_others_are_ignored(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_special_names_as_transformers_writes_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, 2, 2)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no eos_token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    assert Tokenizer.load(tmp_path).pad_id == 3
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_folder_with_vocabulary_and_merges_only(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == backend.encode(TEXTS[0]).ids
    assert loaded.eos_id == 0


def test_folders_that_cannot_be_loaded(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="at least 260"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(ConfigError, match="'<end>' is not in its vocabulary"):
        Tokenizer(tokenizer.backend, eos="<end>")
