"""All processors by kind, and the way back from what a model folder holds of one."""

from collections.abc import Callable, Mapping
from pathlib import Path

from isthmus.data import blip2
from isthmus.data.chat import OWN
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


def with_template(processor: Processor, template: str) -> Processor:
    """The processor with another template: a name, ``chat``, or a file in Jinja, which is the tokenizer's from then on.

    Raises ConfigError for a processor without templates, an unknown name, or a file that is not there.
    """
    described = processor.to_dict()
    if "template" not in described:
        raise ConfigError(f"A processor of kind {described.get('kind')!r} has no template: leave template out.")
    tokenizer, file = processor.tokenizer, Path(template)
    if file.suffix in (".jinja", ".jinja2", ".j2"):
        try:
            tokenizer, template = tokenizer.with_chat_template(file.read_text(encoding="utf-8-sig")), OWN
        except (OSError, ValueError) as error:
            raise ConfigError(f"template: cannot read {file} ({type(error).__name__}).") from error
    return processor_from_dict({**described, "template": template}, tokenizer, processor.others)


def processor_from_dict(
    values: Mapping[str, object], tokenizer: Tokenizer | None, others: Mapping[str, Tokenizer] | None = None
) -> Processor:
    """The processor that ``to_dict`` described; ``others`` are its further tokenizers by option name. One of pictures
    alone has no tokenizer.

    Raises ConfigError for an unknown kind or option.
    """
    options: dict[str, object] = {**values, **(others or {})}
    kind = str(options.pop("kind", ""))
    if kind not in PROCESSORS:
        raise ConfigError(f"processor: unknown kind {kind!r}; {nearest(kind, PROCESSORS)}")
    if "image" in options:
        options["image"] = ImageTransform.from_dict(options["image"])
    try:
        return PROCESSORS[kind](**options) if tokenizer is None else PROCESSORS[kind](tokenizer, **options)
    except TypeError:
        raise ConfigError(f"processor of kind {kind!r}: missing or unknown option among {sorted(options)}") from None
