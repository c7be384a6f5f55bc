"""Tiny tokenizers and pictures that several data tests share."""

import io
import tarfile
from pathlib import Path

import tokenizers
from PIL import Image as PilImage
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from isthmus.data.images import BytesImage, FileImage
from isthmus.data.record import Image, Part, Record, Text
from isthmus.data.tokenizer import Tokenizer
from tests.narrow import must_be

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: what is the red cube?",
    "ASSISTANT: a small blue sphere",
    "The picture shows a cat",
    "yes no",
] * 4


def llama_like(*, legacy: bool) -> Tokenizer:
    """A SentencePiece-like BPE with byte fallback: ``legacy`` puts the dummy space before every piece between special
    tokens, the other form only at the front of the string."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.pre_tokenizer = None  # type: ignore[assignment]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(backend, bos="<s>", eos="</s>", unk="<unk>")


def byte_level() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


def png(colour: tuple[int, int, int] = (200, 0, 0), size: tuple[int, int] = (6, 6)) -> bytes:
    buffer = io.BytesIO()
    PilImage.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(colour: tuple[int, int, int] = (200, 0, 0), **options) -> Image:
    return Image(BytesImage(png(colour), "picture"), **options)


def text_of(part: Part) -> str | tuple[str, ...]:
    """The text of a part that is one."""
    return must_be(Text, part).text


def pixel(image: PilImage.Image, place: tuple[int, int]) -> tuple[int, ...]:
    """A pixel of a picture with several channels."""
    return must_be(tuple, image.getpixel(place))


def file_of(image: Image) -> Path:
    """The file that a picture has of its own."""
    return must_be(FileImage, image.source).path


def user(text: str) -> Text:
    return Text(text, role="user")


def assistant(text: str, learn: bool = True) -> Text:
    return Text(text, role="assistant", learn=learn)


def record(*parts: Part, id: str = "r") -> Record:
    return Record(id, parts, "test")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path
