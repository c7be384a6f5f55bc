"""What a model reads: a prompt in words, a candidate after it in full, and the beginning that candidates share."""

from collections.abc import Iterable, Sequence

from isthmus.batch import IGNORE
from isthmus.data.chat import OWN
from isthmus.data.processor import Processor, SpliceProcessor
from isthmus.data.record import Example, Record
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import ConfigError, DataError

CAPTION_REQUEST = "Provide a brief description of the given image."
"""One of LLaVA's requests for brief descriptions (2304.08485, appendix)."""


def must_be_records(records: Iterable[object] | Record, method: str) -> None:
    """Raises ConfigError for anything but several Records."""
    if isinstance(records, Record | str) or not all(isinstance(record, Record) for record in records):
        raise ConfigError(f"{method} takes a list of Records; for one picture and one question there is answer().")


def published_request(processor: object) -> dict[str, str]:
    """The prompt of task ``caption`` of a LLaVA whose folder names none: it was trained to converse, and without
    a user's turn its template would write neither the system's sentence nor the speakers."""
    if not isinstance(processor, SpliceProcessor):
        return {}
    talks = processor.template == OWN or isinstance(TEMPLATES[processor.template], Grammar)
    return {"caption": CAPTION_REQUEST} if talks else {}


def scored(processor: Processor, record: Record, candidate: str) -> Example:
    """A record that ends with a candidate answer, for its score: not cut, and with the pictures that a prompt may have.

    Raises DataError, naming the candidate, when it does not fit: cut off, it would score as another text.
    """
    example = processor.uncut().scored(record)
    limit: int = getattr(processor, processor.limits[0])
    for name, span in example.streams.items():
        places = sum(p.length for p in example.places if p.stream == name) if processor.text_limit else 0
        tokens = len(span.ids) - places
        if name == "qformer" or tokens <= limit:  # the Q-Former's question has a limit of its own
            continue
        prompt = next((i for i, w in enumerate(span.labels or ()) if w != IGNORE), len(span.ids)) - places
        shown = f"{record.id} ({candidate if len(candidate) <= 40 else candidate[:40] + '…'!r})"
        if prompt >= limit:
            raise DataError(
                f"prompt too long: it takes {prompt} tokens and the model reads {limit}, which leaves no room for "
                f"{shown}; shorten the prompt"
            )
        raise DataError(
            f"{shown} is too long: after the prompt's {prompt} tokens it takes {tokens - prompt} and the model reads "
            f"{limit} in all; shorten it"
        )
    return example


def words(prompt: Example, tokenizer: Tokenizer) -> str:
    """A prompt as the model reads it, special tokens and all, with ``<image>`` where a visual stands."""
    name, span = next(iter(prompt.streams.items()))
    said, start = "", 0
    for place in prompt.places:
        if place.stream == name:
            said += tokenizer.decode(span.ids[start : place.start], skip_special=False) + "<image>"
            start = place.start + place.length
    return said + tokenizer.decode(span.ids[start:], skip_special=False)


def listed_texts(texts: str | Sequence[str], what: str) -> Sequence[str]:
    """The texts, a bare one as a list of it rather than of its letters. Raises ConfigError when there are none."""
    if len(texts) == 0:
        raise ConfigError(f"no {what}: give a list of at least one.")
    return [texts] if isinstance(texts, str) else texts
