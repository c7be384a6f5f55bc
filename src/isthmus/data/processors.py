"""All processors by kind, and the way back from what a model folder holds of one."""

from collections.abc import Callable, Mapping
from typing import Any

from isthmus.data import blip2
from isthmus.data.images import ImageTransform
from isthmus.data.interleave import InterleaveProcessor
from isthmus.data.processor import (
    ContrastiveProcessor,
    ImagesProcessor,
    Processor,
    SpliceProcessor,
    TextProcessor,
    TextsProcessor,
)
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import ConfigError, nearest

PROCESSORS: dict[str, Callable[..., Processor]] = {
    ContrastiveProcessor.kind: ContrastiveProcessor,
    TextsProcessor.kind: TextsProcessor,
    ImagesProcessor.kind: ImagesProcessor,
    SpliceProcessor.kind: SpliceProcessor,
    TextProcessor.kind: TextProcessor,
    InterleaveProcessor.kind: InterleaveProcessor,
    **blip2.PROCESSORS,
}


def processor_from_dict(
    values: dict[str, Any], tokenizer: Tokenizer | None, others: Mapping[str, Tokenizer] | None = None
) -> Processor:
    """The processor that ``to_dict`` described; ``others`` are its further tokenizers by option name. One of pictures
    alone has no tokenizer.

    Raises ConfigError for an unknown kind or option.
    """
    options: dict[str, Any] = {**values, **(others or {})}
    kind = str(options.pop("kind", ""))
    if kind not in PROCESSORS:
        raise ConfigError(f"processor: unknown kind {kind!r}; {nearest(kind, PROCESSORS)}")
    if "image" in options:
        options["image"] = ImageTransform.from_dict(options["image"])
    try:
        return PROCESSORS[kind](**options) if tokenizer is None else PROCESSORS[kind](tokenizer, **options)
    except TypeError:
        raise ConfigError(f"processor of kind {kind!r}: missing or unknown option among {sorted(options)}") from None
