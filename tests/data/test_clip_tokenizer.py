"""CLIP's tokenizer against token ids made by open_clip (tools/write_open_clip_fixtures.py)."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from isthmus.data.clip_tokenizer import MERGES, ClipTokenizer, byte_symbols, clean, repair
from isthmus.errors import DataError

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "open_clip" / "tokenizer"
ROWS = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.load(FOLDER)


@pytest.mark.parametrize("row", ROWS, ids=[row["text"][:20] for row in ROWS])
def test_rows_equal_open_clip(tokenizer, row):
    assert tokenizer.row(row["text"]) == row["ids"]


def test_published_golden_rows(tokenizer):
    assert tokenizer.row("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.row("") == [49406, 49407]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (49406, 49407, 0, 49408)


def test_too_long_text_is_cut_before_its_end_or_refused(tokenizer):
    text = "a photo of a cat " * 40
    ids = tokenizer.row(text)
    assert len(ids) == 77
    assert ids[-1] == tokenizer.eos_id
    with pytest.raises(DataError, match="202 tokens, more than 77"):
        tokenizer.row(text, truncate=False)


def test_decode_gives_back_the_cleaned_text(tokenizer):
    for text in ("a photo of a cat", "café naïve são paulo", "😀🐱"):
        assert tokenizer.decode(tokenizer.row(text)) == text


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = ClipTokenizer.load(tmp_path)
    assert [again.row(row["text"]) for row in ROWS] == [row["ids"] for row in ROWS]


def test_openai_merge_file_has_a_header_and_more_merges_than_are_used(tmp_path):
    symbols = list(byte_symbols().values())
    pairs = list(itertools.islice(itertools.product(symbols, symbols), MERGES + 5))
    path = tmp_path / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#header", *(f"{a} {b}" for a, b in pairs)]))
    tokenizer = ClipTokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (49406, 49407, 49408)
    assert tokenizer.row("!") == [49406, 256, 49407]
    assert tokenizer.row('!"#') == [49406, 513, 258, 49407]


# No time of making in them: tests are named by their parameters, and every process must name them alike.
@pytest.mark.parametrize(
    "content", [b"not gzip", *(gzip.compress(table, mtime=0) for table in (b"#header\na b\n", b"#header\na b c\n"))]
)
def test_a_file_that_is_no_merge_table(tmp_path, content):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"merges\.txt\.gz"):
        ClipTokenizer.load(path)


def test_own_repair_covers_what_captions_meet():
    assert repair("“a” ‘b’ ﬁ ＡＢ　c\ufeff") == "\"a\" 'b' fi AB c"
    assert clean("  A &amp;amp; B\n&lt;C&gt; ") == "a & b <c>"
