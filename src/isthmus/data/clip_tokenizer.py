"""CLIP's tokenizer: lower-cased byte-level BPE with an end-of-word mark, 49,408 ids (Radford et al. 2021, sec. 2.4).

The merge table is not part of this package: it is read from a checkpoint folder (``vocab.json`` and ``merges.txt``)
or from OpenAI's ``bpe_simple_vocab_16e6.txt.gz``.
"""

import gzip
import html
import json
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from isthmus.checkpoint import read_json
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import DataError

START, END = "<|startoftext|>", "<|endoftext|>"
IDS = 49_408
MERGES = 48_894
"""Merges in use; OpenAI's file holds more."""

SIGLIP = "SiglipTokenizer"
"""The class whose cleaning is code; SigLIP 2's has a normalizer of its own and keeps punctuation."""

_WORD_END = "</w>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(Tokenizer):
    """Text as OpenAI's and open_clip's weights saw it: repaired, unescaped, lower-cased, then cut into pieces.

    transformers' fast CLIP tokenizer cleans less (no entities, ligatures or curly quotes); a folder that holds its
    ``tokenizer.json`` is read by that file, so that it answers as it does there (see :func:`load_tokenizer`).
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """``merges`` in order of rank. Raises DataError when the specials are not in ``vocab``."""
        for special in (START, END):
            if special not in vocab:
                raise DataError(f"the vocabulary has no {special}; is it CLIP's?")
        self._vocab, self._merges = dict(vocab), list(merges)
        self._pieces = {number: piece for piece, number in self._vocab.items()}
        self._bytes = {symbol: byte for byte, symbol in byte_symbols().items()}
        bpe = tokenizers.Tokenizer(models.BPE(vocab=self._vocab, merges=self._merges, end_of_word_suffix=_WORD_END))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [  # type: ignore[assignment]
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.add_special_tokens([START, END])
        super().__init__(bpe, eos=END, bos=START, unk=END)
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id = 0  # what OpenAI's rows are filled with; a causal tower never attends there

    @classmethod
    def load(cls, folder: str | Path) -> "ClipTokenizer":
        """From a folder with ``vocab.json`` and ``merges.txt``, or from OpenAI's gzipped merges. Raises DataError."""
        path = Path(folder)
        try:
            if path.is_dir():
                vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
                return cls(vocab, _merges((path / "merges.txt").read_text(encoding="utf-8")))
            with gzip.open(path, "rt", encoding="utf-8") as file:
                merges = _merges(file.read())[:MERGES]
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"cannot read CLIP's merge table from {path}: {error}.") from error
        if len(merges) < MERGES:
            raise DataError(f"{path} holds {len(merges)} merges; CLIP's table has {MERGES}.")
        return cls(_legacy_vocab(merges), merges)

    def files(self) -> dict[str, str]:
        """``vocab.json`` and ``merges.txt``, as transformers names them, and the configuration it wants beside."""
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        names = {"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END}
        return {
            "vocab.json": json.dumps(self._vocab, ensure_ascii=False),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(names | {"pad_token": END}, indent=2) + "\n",
        }

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the pieces, nothing added; the offsets are those in the cleaned text."""
        return super().encode_with_offsets(clean(text))

    def row(self, text: str, *, context: int = 77, truncate: bool = True) -> list[int]:
        """What CLIP reads: start, pieces, end, not padded. Raises DataError for more than ``context`` ids unless
        ``truncate``, which keeps the first ``context`` and makes the last of them end-of-text.
        """
        assert self.bos_id is not None  # CLIP's vocabulary has one
        ids = [self.bos_id, *self.encode(text), self.eos_id]
        if len(ids) > context:
            if not truncate:
                raise DataError(f"the text has {len(ids)} tokens, more than {context}: {text[:60]!r}…")
            ids = [*ids[: context - 1], self.eos_id]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The cleaned text, words separated by single spaces; unknown ids are left out, and so are start and end
        unless ``skip_special`` is false.
        """
        left_out = (self.bos_id, self.eos_id) if skip_special else ()
        text = "".join(self._pieces.get(n, "") for n in ids if n not in left_out).replace(_WORD_END, " ")
        return bytes(self._bytes.get(symbol, 0x20) for symbol in text).decode("utf-8", errors="replace").strip()


def clip_tokenizer(folder: str | Path) -> ClipTokenizer | None:
    """CLIP's own tokenizer out of a folder that holds its table in any form; none where it holds another one.

    transformers' ``tokenizer.json`` has the table too, and cleans less than the text that CLIP's weights saw. Raises
    DataError for a damaged table.
    """
    folder = Path(folder)
    try:
        if not (folder / "tokenizer.json").is_file():
            vocab = folder / "vocab.json"
            own = vocab.is_file() and (folder / "merges.txt").is_file() and START in vocab.read_text(encoding="utf-8")
            return ClipTokenizer.load(folder) if own else None
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model") or {}
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or START not in vocab or model.get("end_of_word_suffix") != _WORD_END:
            return None
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return ClipTokenizer(vocab, [(first, second) for first, second in pairs])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read CLIP's merge table from {folder}: {error}.") from error


def is_published(tokenizer: Tokenizer) -> bool:
    """Has it the ids that OpenAI's and open_clip's code is bound to: 49,408, start and end of text the last two?"""
    ends = [tokenizer.backend.token_to_id(token) for token in (START, END)]
    return tokenizer.vocab_size == IDS and ends == [tokenizer.bos_id, tokenizer.eos_id] == [IDS - 2, IDS - 1]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of any folder: CLIP's own where its vocabulary and merges stand alone, else as transformers
    would read it, SigLIP's with its cleaning. Raises CheckpointError (or DataError for a damaged table).
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and (own := clip_tokenizer(folder)) is not None:
        return own
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    tokenizer = Tokenizer.load(folder)
    siglip = str(config.get("tokenizer_class")).removesuffix("Fast") == SIGLIP
    return canonical(tokenizer, lower=config.get("do_lower_case", True)) if siglip else tokenizer


def canonical(tokenizer: Tokenizer, *, lower: bool = True, underscore: str = "") -> Tokenizer:
    """The tokenizer with SigLIP's cleaning in front, which its published files leave to code: lower case, no
    punctuation, single spaces. Kept as normalizers, so that it stays with the tokenizer wherever it is saved.

    ``underscore`` is what becomes of ``_``: it goes in transformers, and is a space in open_clip.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower else []
    steps += [normalizers.Replace("_", underscore)] if underscore else []
    steps += [normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    steps += [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return tokenizer.over(backend)


def clean(text: str) -> str:
    """Repaired, HTML-unescaped twice, white space collapsed, lower-cased."""
    text = html.unescape(html.unescape(_REPAIR(text)))
    return " ".join(text.split()).lower()


def repair(text: str) -> str:
    """The part of ftfy's repair that ordinary captions meet: HTML entities, ligatures, full-width letters, curly
    quotes, control characters, one composed form (NFC). Text that was decoded with the wrong encoding is beyond it;
    where ftfy is installed it is used instead, as the published tokenizers do.
    """
    if "<" not in text:  # in what looks like HTML, entities are kept until the end
        text = html.unescape(html.unescape(text))
    return unicodedata.normalize("NFC", text.translate(_REPAIRS))


def byte_symbols() -> dict[int, str]:
    """The printable stand-in for each byte, in the order that numbers CLIP's first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _repairs() -> dict[int, str]:
    """Code point -> replacement, for ``str.translate``."""
    dropped = (*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    table = dict.fromkeys(dropped, "")
    table |= dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    table[0x3000] = " "
    for code in (*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0)):  # ligatures, full- and half-width forms
        plain = unicodedata.normalize("NFKC", chr(code))
        if plain != chr(code):
            table[code] = plain
    return table


def _merges(text: str) -> list[tuple[str, str]]:
    """The pairs of a merge file, whose first line is a header. Raises ValueError for a line that is no pair."""
    pairs = []
    for number, line in enumerate(text.rstrip("\n").split("\n")[1:], start=2):
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(f"line {number} is no merge of two pieces")
        pairs.append((pair[0], pair[1]))
    return pairs


def _legacy_vocab(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """OpenAI's numbering: bytes, bytes that end a word, merges by rank, start, end."""
    symbols = list(byte_symbols().values())
    pieces = [*symbols, *(symbol + _WORD_END for symbol in symbols), *(a + b for a, b in merges), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def _find_repair() -> Callable[[str], str]:
    try:
        from ftfy import fix_text  # type: ignore[import-not-found]
    except ImportError:
        return repair
    return fix_text


_REPAIRS = _repairs()
_REPAIR = _find_repair()
