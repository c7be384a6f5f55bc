"""A GGUF file as a language model: read through transformers, dequantised, tokenizer and chat template with it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch

from isthmus.data.processor import TextProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, IsthmusError, MissingExtraError
from isthmus.interop.folders import template_and_tokenizer
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_language import match_keys
from isthmus.interop.hf_tokenizer import fast, from_peer, open_tokenizer, quiet
from isthmus.language import known_fields
from isthmus.models.lm import BareLM, LmConfig
from isthmus.weights import load_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAGIC = b"GGUF"
_ONE_AT_A_TIME = Lock()


def is_gguf(path: Path) -> bool:
    """Told by its first bytes, not by its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def open_gguf(path: Path, given: Given) -> Opened:
    """The LM in a GGUF file, dequantised to the dtype asked for, float32 by default; ``tokenizer`` may be another one's
    folder.

    Raises MissingExtraError without the extra ``gguf``; CheckpointError for a file that is cut short or of an
    architecture that transformers does not read.
    """
    given.only("tokenizer", where=path)
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a GGUF file; reading one needs the extra gguf: pip install 'isthmus[gguf]' ({error.name} is "
            "missing)."
        ) from None
    dtype = given.dtype or torch.float32
    peer, words = _read(path, dtype)
    net = BareLM(LmConfig(language=known_fields(json.loads(peer.config.to_json_string()))))
    net.cast(dtype)  # before it is filled, so that the weights are taken as they are
    state = match_keys(net.language.lm, peer.state_dict(), where=str(path), account=given.account)
    load_into(net.language.lm, state, where=path, account=given.account)
    if given.tokenizer is not None:
        words = open_tokenizer(given.tokenizer)
    if words.vocab_size > net.language.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {words.vocab_size:,} tokens and the model {net.language.vocab_size:,} rows for "
            "them; they do not belong together."
        )
    text = words.chat_template or ""
    template, words = template_and_tokenizer(text, words, where=path, otherwise="document", pictures=False)
    return net, TextProcessor(words, template=template, max_length=net.language.context or 2048), ()


def _read(path: Path, dtype: torch.dtype) -> tuple["PreTrainedModel", Tokenizer]:
    """transformers' model, its weights of ``dtype``, and our tokenizer of the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, object] = {"gguf_file": path.name, "local_files_only": True}
    folder = path.parent
    with _named_errors(path), quiet(), _read_once(), _without_bar():
        words = fast(AutoTokenizer.from_pretrained(folder, **where))
        if words is None:
            raise CheckpointError(f"{path}: its tokenizer has no fast form; name another by tokenizer=FOLDER.")
        tokenizer = from_peer(words, path)
        if words.chat_template:
            tokenizer = tokenizer.with_chat_template(words.chat_template)
        plain = GgufConfig(dequantize=True)
        peer = AutoModelForCausalLM.from_pretrained(folder, quantization_config=plain, dtype=dtype, **where)
    return peer, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside, the header of a file is read once, of which transformers has gguf read every token for the tokenizer, the
    configuration and the weights each, and the table of tensors' names is made once instead of for each module."""
    import gguf

    with _ONE_AT_A_TIME:
        own = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
        gguf.__dict__.update({name: cache(function) for name, function in own.items()})
        try:
            yield
        finally:
            gguf.__dict__.update(own)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Inside :func:`_read_once`, no bar of the tensors that are dequantised: transformers' own switch does not reach
    it."""
    try:
        from transformers import modeling_gguf_pytorch_utils as reader
    except ImportError:  # it is to go once all architectures are read another way, which shows no bar
        yield
        return
    bar = reader.__dict__["tqdm"]
    reader.__dict__["tqdm"] = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.__dict__["tqdm"] = bar


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Whatever the libraries raise as one paragraph of ours."""
    import transformers

    try:
        yield
    except IsthmusError:
        raise
    except Exception as error:  # of many kinds, from numpy's to the library's own
        said = (str(error).strip().splitlines() or ["no more is said"])[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the GGUF file {path} "
            f"({path.stat().st_size:,} bytes): {type(error).__name__}: {said[:300]}. It may be cut short (compare its "
            "size with the publisher's), or of an architecture that transformers does not read from GGUF; then take "
            "the model's folder of safetensors."
        ) from error
