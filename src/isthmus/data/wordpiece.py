"""WordPiece, the Q-Former's side of text: BERT's vocabulary from a folder, or a small one trained here.

``[CLS]`` begins a text that is read, ``[DEC]`` one that is written, ``[SEP]`` ends both. ``[DEC]`` is the tokenizer's
beginning-of-sequence token and the first id past the vocabulary (30,522 with BERT's).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from isthmus.data.tokenizer import Tokenizer, check_text
from isthmus.errors import CheckpointError, ConfigError

PAD, UNK, CLS, SEP, MASK, DEC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"
BERTS = (PAD, UNK, CLS, SEP, MASK)
SMALLEST = 64


def train_wordpiece(texts: Iterable[str], vocab_size: int = 2048, *, min_frequency: int = 2) -> Tokenizer:
    """A lower-casing WordPiece vocabulary of at most ``vocab_size`` ids, ``[DEC]`` included and last.

    The result depends only on the texts. Raises ConfigError for a vocabulary too small to spell anything.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"tokenizer: a WordPiece vocabulary needs at least {SMALLEST} ids, not {vocab_size}")
    read = [check_text(text) for text in texts]
    backend = _backend(models.WordPiece(unk_token=UNK), lower=True)
    letters = sorted({c for text in read for c in backend.normalizer.normalize_str(text) if not c.isspace()})
    # The library numbers letters in the order of a hash map, another one in each run, and breaks ties by number. As
    # "special" tokens they are numbered first and always alike; the vocabulary is then taken over without that mark.
    backend.train_from_iterator(
        read,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=min_frequency,
            special_tokens=[*BERTS, *letters, *(f"##{c}" for c in letters)],
            show_progress=False,
        ),
    )
    finished = _backend(models.WordPiece(vocab=backend.get_vocab(), unk_token=UNK), lower=True)
    finished.add_special_tokens(list(BERTS))
    return _finished(finished)


def load_wordpiece(folder: str | Path) -> Tokenizer:
    """BERT's tokenizer from a folder with tokenizer.json or vocab.txt; ``[DEC]`` is added where it is missing.

    Raises CheckpointError when there is none, or when it lacks one of BERT's special tokens.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # the library raises bare Exception on a damaged file
            raise CheckpointError(f"{folder}/tokenizer.json cannot be read; copy it again") from None
    elif (folder / "vocab.txt").is_file():
        backend = _backend(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=UNK), lower=_lowers(folder))
        backend.add_special_tokens([t for t in BERTS if backend.token_to_id(t) is not None])
    else:
        raise CheckpointError(
            f"{folder} holds no WordPiece tokenizer (tokenizer.json or vocab.txt); name BERT's folder, for example a "
            "copy of bert-base-uncased"
        )
    for token in (PAD, UNK, CLS, SEP):
        if backend.token_to_id(token) is None:
            raise CheckpointError(f"the tokenizer in {folder} has no {token}; the Q-Former reads with BERT's")
    return _finished(backend)


def cls_id(tokenizer: Tokenizer) -> int:
    """The id of ``[CLS]``. Raises ConfigError for a tokenizer that is not the Q-Former's."""
    found = tokenizer.backend.token_to_id(CLS)
    if found is None or tokenizer.bos_id is None or tokenizer.backend.token_to_id(DEC) != tokenizer.bos_id:
        raise ConfigError(
            "the Q-Former's text side needs a WordPiece tokenizer with [CLS], [SEP] and [DEC]: train one with "
            "`kind: wordpiece` in `tokenizer`, or name BERT's folder there"
        )
    return found


def other_specials(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that are never written: [CLS], [MASK] and [UNK]."""
    ids = (tokenizer.backend.token_to_id(token) for token in (CLS, MASK, UNK))
    return tuple(i for i in ids if i is not None)


def _backend(model: models.WordPiece, *, lower: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _finished(backend: tokenizers.Tokenizer) -> Tokenizer:
    if backend.token_to_id(DEC) is None:
        backend.add_special_tokens([DEC])
    return Tokenizer(backend, eos=SEP, bos=DEC, pad=PAD, unk=UNK)


def _lowers(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return bool(json.loads(file.read_text(encoding="utf-8")).get("do_lower_case", True)) if file.is_file() else True
