"""Text to token ids and back, over the ``tokenizers`` library.

A tokenizer never adds special tokens by itself and never reads them out of a user's text: somebody who writes
``</s>`` in a question gets the four characters, not the end of the conversation. Chat templates, which do need an
end-of-sequence token in the middle of a string, write :data:`END` instead; it becomes the end-of-sequence id exactly
as the library itself would split the string there, dummy spaces included.
"""

import json
import re
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from isthmus.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from isthmus.file_type import but_is, start_of

END = "\U0010fffd"
"""Stands for the end-of-sequence token inside a template: the last private-use character of Unicode."""

PLACE = "\U0010fffc"
"""Stands for a picture among text that is tokenised as one."""

FIRST_STAND_IN = 0x10FF00
"""From here to :data:`PLACE` each character may stand for a special token inside a checkpoint's own chat template."""

RESERVED = re.compile(f"[{chr(FIRST_STAND_IN)}-{END}]")
"""What no user's text may hold."""

CHAT_TEMPLATE = "chat_template.jinja"
"""The file of a checkpoint's own chat template beside its tokenizer's, as transformers names it."""

CONFIG = "tokenizer_config.json"

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
"""Special tokens of a tokenizer trained here, ids 0 to 3. Contrastive towers use bos and eos as start and end of
text: one scheme for all models."""


BEGINS = "begins_with"
"""In a saved :data:`CONFIG`: the tokens that begin a text, where they are not the named ``bos_token`` alone."""

WHOLE = "reads_around_pictures"
"""There too: true where text around pictures is tokenised as one, or a picture's token where it takes space in."""


class Tokenizer:
    """A ``tokenizers`` tokenizer with its special ids. ``bos_id`` is none for families without one (Qwen).

    ``begin_ids`` are what every text begins with: the named beginning of sequence, or what ``begins`` says. Many
    families name a token there and put nothing in front (GPT-2, SmolLM), some put another one (XGLM) or two (GLM-4).
    ``chat_template`` is the checkpoint's own, in Jinja, and is saved with the tokenizer. ``whole``: text around
    pictures is tokenised as one (see :meth:`around_pictures`), not piece by piece; a picture takes the white space
    around it as the token ``picture`` does, where that is one that takes some.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos: str,
        bos: str | None = None,
        pad: str | None = None,
        unk: str | None = None,
        begins: Sequence[str] | None = None,
        chat_template: str | None = None,
        whole: bool = False,
        picture: str | None = None,
    ) -> None:
        """Raises ConfigError when a named special token is not in the vocabulary."""
        self.backend = backend
        self.specials = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
        self._eos, self.eos_id = eos, self._id_of(eos)
        self.bos_id = None if bos is None else self._id_of(bos)
        self.pad_id = self._id_of(pad or unk or eos)
        named = () if bos is None else (bos,)
        self.begins = named if begins is None else tuple(begins)
        self.begin_ids = tuple(self._id_of(token) for token in self.begins)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        # The encoder is a copy in which no special token is recognised; END and PLACE have ids past the vocabulary, and
        # take the white space around them as the tokens do that they stand for.
        self._encoder = tokenizers.Tokenizer.from_str(backend.to_str())
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self._encoder.encode_special_tokens = True
        self._encoder.add_tokens([self._standing(char, token) for char, token in ((END, eos), (PLACE, picture))])
        self.place_id = self._encoder.token_to_id(PLACE)
        self.chat_template, self.whole, self.picture = chat_template, whole, picture
        self._stand_ins: dict[str, str] = {}
        self._real = {self._encoder.token_to_id(END): self.eos_id}

    def _id_of(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ConfigError(
                f"tokenizer: the special token {token!r} is not in its vocabulary; name one that is, or add it"
            )
        return number

    def with_tokens(self, *tokens: str) -> "Tokenizer":
        """A tokenizer that has these special tokens too, after its vocabulary in this order where they are new."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
        return self.over(backend)

    def over(self, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """Another backend with the special tokens and the beginning of this tokenizer."""
        return self._made(backend, self.begins)

    def beginning(self, *tokens: str) -> "Tokenizer":
        """A tokenizer like this one that begins a text with these tokens, or without any with nothing."""
        return self._made(self.backend, tokens)

    def _made(self, backend: tokenizers.Tokenizer, begins: Sequence[str], picture: str | None = None) -> "Tokenizer":
        return Tokenizer(
            backend,
            eos=self._eos,
            bos=self.specials["bos_token"],
            pad=self.specials["pad_token"],
            unk=self.specials["unk_token"],
            begins=begins,
            chat_template=self.chat_template,
            whole=self.whole,
            picture=self.picture if picture is None else picture,
        )

    def around_pictures(self, picture: str | None = None, *beside: str) -> "Tokenizer":
        """A tokenizer that reads the text before and after a picture as one, as transformers does: a dummy space that
        belongs to the front of a text does not come again after a picture, and the token ``picture`` takes the white
        space around it, as may those ``beside`` it. This one where that is no difference."""
        added = self.added_tokens()
        own = [added[token] for token in (picture, *beside) if token in added]
        if any(token.lstrip or token.rstrip for token in own):
            found = self._made(self.backend, self.begins, picture)
            found.whole = True
            return found
        if self.encode(f"a{PLACE}a") == [*(one := self.encode("a")), self.place_id, *one]:
            return self
        found = copy(self)
        found.whole = True
        return found

    def with_chat_template(self, text: str) -> "Tokenizer":
        """A tokenizer like this one that carries a checkpoint's own chat template."""
        found = copy(self)
        found.chat_template = text
        return found

    def added_tokens(self) -> dict[str, AddedToken]:
        """The tokens beside the learnt vocabulary by their text, special ones and others."""
        return {token.content: token for token in self.backend.get_added_tokens_decoder().values()}

    def stand_in(self, token: str) -> str:
        """The character that stands for a special token inside a template, and takes the white space around it as the
        token does. Raises ConfigError for more different ones than there are characters."""
        if token not in self._stand_ins:
            char = chr(FIRST_STAND_IN + len(self._stand_ins))
            if char >= PLACE:
                raise ConfigError(f"a chat template uses more than {len(self._stand_ins)} different special tokens")
            self._encoder.add_tokens([self._standing(char, token)])
            self._real[self._encoder.token_to_id(char)] = self._id_of(token)
            self._stand_ins[token] = char
        return self._stand_ins[token]

    def _standing(self, char: str, token: str | None) -> AddedToken:
        """A character that stands for a token."""
        own = self.added_tokens().get(token or "")
        strips = {} if own is None else {"lstrip": own.lstrip, "rstrip": own.rstrip}
        return AddedToken(char, special=False, normalized=False, **strips)

    def id_of(self, token: str) -> int:
        """The id of a special token. Raises ConfigError when it is not in the vocabulary."""
        return self._id_of(token)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added. Raises DataError on text that is not valid Unicode."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of ``text`` and the characters [start, end) each came from. Raises DataError as :meth:`encode`."""
        check_text(text)
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return [self._real.get(i, i) for i in encoding.ids], encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; special tokens left out unless ``skip_special`` is false."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entries of ``ids``, for showing a sample token by token."""
        return [self.backend.id_to_token(i) or f"<{i}>" for i in ids]

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer loads the folder too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_text(content, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """File name -> content of a saved tokenizer."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        } | {k: v for k, v in self.specials.items() if v is not None}
        if self.begins != tuple(t for t in [self.specials["bos_token"]] if t is not None):
            config[BEGINS] = list(self.begins)
        if self.whole:
            config[WHOLE] = self.picture or True
        chat = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template}
        return chat | {
            "tokenizer.json": self.backend.to_str(),
            CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """A tokenizer saved by isthmus or by transformers. Reads the disk only; runs no code from the folder.

        Raises CheckpointError when there is none or it names no end-of-sequence token, MissingExtraError when its
        file needs a library that is not installed.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            return cls._load_through_transformers(folder)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception:  # the library raises bare Exception on a damaged file
            raise CheckpointError(
                f"{file} is not a tokenizer the tokenizers library can read{but_is(start_of(file), 'copy it again')}"
            ) from None
        names = _special_names(folder)
        if names.get("eos_token") is None:
            raise CheckpointError(
                f"{folder} names no eos_token in tokenizer_config.json or special_tokens_map.json; add it there"
            )
        around = _saved_whole(folder)
        return cls(
            backend,
            eos=names["eos_token"],
            bos=names.get("bos_token"),
            pad=names.get("pad_token"),
            unk=names.get("unk_token"),
            begins=_saved_begins(folder),
            whole=bool(around),
            picture=around if isinstance(around, str) else None,
            chat_template=_chat_template(folder),
        )

    @classmethod
    def _load_through_transformers(cls, folder: Path) -> "Tokenizer":
        """For folders that hold only tokenizer.model, or vocabulary and merges."""
        known = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
        if not any((folder / name).is_file() for name in known):
            raise CheckpointError(
                f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); "
                "copy the tokenizer's files there"
            )
        from transformers import AutoTokenizer

        try:
            peer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ImportError:
            raise MissingExtraError(
                f"reading the tokenizer of {folder} needs the package sentencepiece; "
                "install it, or save the tokenizer as tokenizer.json"
            ) from None
        except Exception as error:
            raise CheckpointError(
                f"transformers cannot load the tokenizer of {folder} ({type(error).__name__}); "
                "save it as tokenizer.json"
            ) from error
        if getattr(peer, "backend_tokenizer", None) is None or peer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer of {folder} has no fast form or no eos_token; save it as tokenizer.json"
            )
        return cls(
            peer.backend_tokenizer, eos=peer.eos_token, bos=peer.bos_token, pad=peer.pad_token, unk=peer.unk_token
        )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 4096, *, min_frequency: int = 2, whole: Sequence[str] = ()
    ) -> "Tokenizer":
        """Byte-level BPE of at most ``vocab_size`` ids (at least 260: the specials and the 256 bytes).

        Every text can be written with it, so ``<unk>`` never occurs. Strings in ``whole`` are one token each, wherever
        they stand, over the bounds of words. The result depends only on the texts and these.
        """
        specials = [PAD, BOS, EOS, UNK]
        smallest = len(specials) + 256 + len(whole)
        if vocab_size < smallest:
            raise ConfigError(
                f"tokenizer: vocab_size must be at least {smallest} (specials, bytes, whole strings), not {vocab_size}"
            )
        if "" in whole or len(set(whole)) != len(whole):
            raise ConfigError(f"tokenizer: whole takes different strings, none of them empty, not {list(whole)}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            (part for text in texts for part in _between(check_text(text), whole)),
            trainers.BpeTrainer(
                vocab_size=vocab_size - len(whole),
                min_frequency=min_frequency,
                special_tokens=specials,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        backend.add_tokens([AddedToken(text, normalized=False) for text in whole])
        # For transformers' sake: its users expect the beginning-of-sequence token to come by itself.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        return cls(backend, eos=EOS, bos=BOS, pad=PAD, unk=UNK)


def _between(text: str, whole: Sequence[str]) -> list[str]:
    """What of ``text`` is left around the strings that are tokens already."""
    return re.split("|".join(map(re.escape, whole)), text) if whole else [text]


def check_text(text: str) -> str:
    """``text`` itself. Raises DataError when it holds half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"bad text: character {error.start} is half a surrogate pair (U+{ord(text[error.start]):04X}); "
            "decode the text as UTF-8 again"
        ) from None
    return text


def _saved_begins(folder: Path) -> list[str] | None:
    """What a saved tokenizer says of its beginning; none where it says nothing. Raises CheckpointError."""
    found = _saved(folder, BEGINS)
    if found is None or (isinstance(found, list) and all(isinstance(token, str) for token in found)):
        return found
    raise CheckpointError(f"{folder / CONFIG}: {BEGINS} must be a list of tokens, not {found!r}")


def _saved_whole(folder: Path) -> bool | str:
    """Whether a saved tokenizer reads the text around pictures as one, or the token of a picture that takes white space
    in. Raises CheckpointError."""
    found = _saved(folder, WHOLE)
    if found is None or isinstance(found, bool | str):
        return found or False
    raise CheckpointError(f"{folder / CONFIG}: {WHOLE} must be true, false or a token, not {found!r}")


def _saved(folder: Path, name: str) -> object:
    file = folder / CONFIG
    return json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None


def _chat_template(folder: Path) -> str | None:
    file = folder / CHAT_TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _special_names(folder: Path) -> dict[str, str]:
    """Special token names from the two files a Hugging Face folder may keep them in."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / CONFIG):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise CheckpointError(f"{file} is not valid JSON; copy it again") from None
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = content.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[name] = value
    return names
