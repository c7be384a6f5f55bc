"""Ids that a folder holds more than once, compared with each other: image, end, beginning and padding.

A model and a tokenizer that do not belong together load without a sound and answer nonsense. That they do is shown by
the same ids in the files of configuration, tokenizer, decoding and processor.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from isthmus.checkpoint import read_json
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, ConfigError
from isthmus.language import library_config
from isthmus.nn.text_tower import TextConfig

_IMAGE = "<image>"


def must_agree(folder: Path, words: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raises CheckpointError, naming both, where two sources have different ids.

    ``rows`` is the length of the table of embeddings. An id beyond it, or the default of the model's class, was never
    set: the library writes its defaults into every file. Ends may be several: one source must have the tokenizer's own,
    and another may have special tokens alone (a chat model's end of turn). A beginning counts where texts get it.
    Padding may be ``<unk>`` or the end, as in many files without one.
    """
    special = {number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    named = {name: token and tokenizer.id_of(token) for name, token in tokenizer.specials.items()}
    own = {number for name, number in named.items() if name != "eos_token"}
    sources, unset = list(_sources(folder)), class_ids(folder)
    ends = {number for _, values in sources for number in _ids(values.get("eos_token_id"))}
    for where, values in sources:
        for role in ("bos", "pad", "eos"):
            mine = named[f"{role}_token"]
            if role == "bos" and mine not in tokenizer.begin_ids:
                continue  # nobody reads it: configurations are full of their class's default
            given = [i for i in _ids(values.get(f"{role}_token_id")) if 0 <= i < rows]
            if not given or mine is None or mine in given or given == unset[role]:
                continue
            if role == "eos" and mine in ends and set(given) <= special - own:
                continue
            if role == "pad" and set(given) <= {named["unk_token"], named["eos_token"]}:
                continue
            beside = "" if words == folder else f" in {words}"
            raise CheckpointError(
                f"{folder}: {where} has {role}_token_id {', '.join(map(str, given))} "
                f"({_token(tokenizer, given[0])}), the tokenizer{beside} has {tokenizer.specials[f'{role}_token']!r} "
                f"at {mine}: they do not belong together, or one of them is wrong. Correct the file that is."
            )


def must_agree_on_image(folder: Path, words: Path, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError, naming both, where the configuration has its image token at another id than the token
    that the processor writes (``image_token``, else ``<image>``) has in the tokenizer."""
    config = read_json(folder / "config.json")
    given = {config[name] for name in ("image_token_index", "image_token_id") if config.get(name) is not None}
    if len(given) > 1:
        raise CheckpointError(f"{folder}/config.json has two ids of its image token: {', '.join(map(str, given))}.")
    files = [words / "processor_config.json", words / "tokenizer_config.json", folder / "processor_config.json"]
    names = [read_json(file).get("image_token") for file in files if file.is_file()]
    name = next((n.get("content") if isinstance(n, Mapping) else n for n in names if n), _IMAGE)
    mine = tokenizer.backend.token_to_id(str(name))
    if given and mine is not None and mine not in given:
        (index,) = given
        raise CheckpointError(
            f"{folder}: config.json has its image token at {index} ({_token(tokenizer, index)}), the processor's "
            f"{name!r} is at {mine} in the tokenizer: pictures would be put where the model does not expect them. "
            "Correct the file that is wrong."
        )


def must_end_alike(folder: Path, words: Path, tokenizer: Tokenizer, text: TextConfig) -> None:
    """Raises CheckpointError, naming both, where a text tower reads its vector at another end of text than the
    tokenizer writes: it would be found nowhere, and each text's vector would be that of its first token."""
    if text.pool != "eot" or tokenizer.eos_id == text.eot_id:
        return
    beside = "" if words == folder else f" in {words}"
    raise CheckpointError(
        f"{folder}: config.json has the text's eos_token_id {text.eot_id} ({_token(tokenizer, text.eot_id)}), the "
        f"tokenizer{beside} has {tokenizer.specials['eos_token']!r} at {tokenizer.eos_id}: they do not belong "
        "together, or one of them is wrong. Correct the file that is."
    )


def _sources(folder: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    config = read_json(folder / "config.json")
    yield "config.json", config
    if isinstance(text := config.get("text_config"), Mapping):
        yield "config.json's text_config", text
    if (folder / "generation_config.json").is_file():
        yield "generation_config.json", read_json(folder / "generation_config.json")


def class_ids(folder: Path) -> dict[str, list[int]]:
    """The ids that the class of the language model has where nobody says any."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    model_type = str((text if isinstance(text, Mapping) else config).get("model_type", "llama"))
    model_type = model_type.removeprefix("llava_")  # as the original LLaVA's configuration calls its language model
    try:
        known = library_config({"model_type": model_type})
    except ConfigError:  # no causal LM, or one that its fields cannot do without
        known = None
    return {name: _ids(getattr(known, f"{name}_token_id", None)) for name in ("bos", "eos", "pad")}


def _ids(given: object) -> list[int]:
    """One id or several; what is no id is said by who uses it."""
    return [
        i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int) and not isinstance(i, bool)
    ]


def _token(tokenizer: Tokenizer, number: object) -> str:
    token = tokenizer.backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
    return "no token of the tokenizer's" if token is None else repr(token)
