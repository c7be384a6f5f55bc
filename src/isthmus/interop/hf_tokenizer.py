"""The tokenizer of a transformers folder as AutoTokenizer makes it, and what it puts in front of a text.

Which special tokens a text gets stands in a class's code, in ``tokenizer.json`` or in ``tokenizer_config.json``, and
classes rebuild what the file holds; so nothing is guessed from names: a text is encoded with and without them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import tokenizers

from isthmus.checkpoint import read_json
from isthmus.data.clip_tokenizer import SIGLIP, clip_tokenizer, load_tokenizer
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, DataError
from isthmus.language.chat_template import render_chat

_PROBE = "a photo of two cats"


class FastTokenizer(Protocol):
    """What is read of transformers' own tokenizers; ``bos_token`` and its like by name."""

    backend_tokenizer: tokenizers.Tokenizer
    chat_template: str | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]: ...


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of any folder, beginning a text as transformers' own call does; no code of the folder is run.

    CLIP's own where vocabulary and merges stand alone, SigLIP's with its cleaning. Raises CheckpointError (DataError
    for a damaged table of merges), MissingExtraError where a file needs a library that is not installed.
    """
    folder = Path(folder)
    has_file, file = (folder / "tokenizer.json").is_file(), folder / "tokenizer_config.json"
    if not has_file and (own := clip_tokenizer(folder)) is not None:
        return own
    named = str(read_json(file).get("tokenizer_class")) if file.is_file() else ""
    if named.removesuffix("Fast") != SIGLIP and (peer := auto_tokenizer(folder)) is not None:
        return from_peer(peer, folder)
    tokenizer = load_tokenizer(folder)
    if named.removesuffix("Fast") == SIGLIP:
        return tokenizer.beginning()  # its class, which needs a library, adds an end by code, whatever its file says
    added = tokenizer.backend.encode(_PROBE, add_special_tokens=True).ids
    return _begun(tokenizer, added, tokenizer.backend.encode(_PROBE, add_special_tokens=False).ids, folder)


def auto_tokenizer(folder: Path) -> FastTokenizer | None:
    """transformers' own tokenizer of a folder; none where it has no fast one, or refuses."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            peer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # of many kinds; what is wrong with the files is said by who reads them next
        return None
    return fast(peer)


def fast(peer: object) -> FastTokenizer | None:
    """A tokenizer of transformers, where it is one of the fast ones."""
    return None if getattr(peer, "backend_tokenizer", None) is None else cast(FastTokenizer, peer)


def from_peer(peer: FastTokenizer, folder: Path) -> Tokenizer:
    """Our tokenizer of transformers' fast one, beginning a text as it does. Raises CheckpointError for one without an
    end of sequence."""
    vocabulary = peer.backend_tokenizer
    names = {n: getattr(peer, f"{n}_token") for n in ("bos", "eos", "pad", "unk")}
    known = {n: token for n, token in names.items() if token is not None and vocabulary.token_to_id(token) is not None}
    if "eos" not in known:
        raise CheckpointError(f"{folder} names no eos_token in tokenizer_config.json; add it there")
    with quiet():
        added, bare = (peer(_PROBE, add_special_tokens=how)["input_ids"] for how in (True, False))
    return _begun(Tokenizer(vocabulary, **known), added, bare, folder)


def _begun(tokenizer: Tokenizer, added: list[int], bare: list[int], folder: Path) -> Tokenizer:
    """The tokenizer with what stands before ``bare``, the text alone, in ``added``."""
    for start in range(len(added) - len(bare) + 1):
        if added[start : start + len(bare)] == bare:
            return tokenizer.beginning(*(str(tokenizer.backend.id_to_token(i)) for i in added[:start]))
    raise CheckpointError(
        f"{folder}: its tokenizer makes {added} of {_PROBE!r} with special tokens and {bare} without, which is no text "
        "with tokens around it; such a tokenizer is not read here"
    )


def rendered(template: str, messages: Sequence[Mapping[str, object]], names: Mapping[str, str]) -> str | None:
    """What transformers makes of a conversation by a chat template, up to the answer; none where the template refuses
    it or is no Jinja."""
    try:
        with quiet():
            return render_chat(template, messages, names, prompt=True)
    except DataError:  # whatever a template raises; the caller says what follows
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bar and advice off for a while."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
