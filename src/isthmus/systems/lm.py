"""A language model on its own as a system: its vocabulary comes from the tokenizer that is made first."""

from isthmus.config import merged
from isthmus.data.chat import default_template
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor, TextProcessor
from isthmus.errors import ConfigError
from isthmus.models.lm import BareLM
from isthmus.systems.base import Parts, StageOptions, System, Tokenizers, vocabulary


class LmSystem(System[BareLM]):
    """What LLaVA, Flamingo and BLIP-2 take as their ``language``."""

    kind = "lm"
    title = "Language model"
    pipeline = "text-generation"
    net = BareLM
    parts = ("init",)
    compute_rule = True

    def capabilities(self, net: BareLM) -> tuple[str, ...]:
        return ("generate", "answer", "chat", "score")

    def configuration(self, own: dict[str, object], parts: Parts, tokenizers: Tokenizers) -> dict[str, object]:
        return merged(own, {"language": vocabulary(tokenizers.main)})

    def processor(
        self, net: BareLM, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        self.no_options(stage)
        if image is not None:
            raise ConfigError("A language model on its own reads no pictures; take `image` out of the recipe.")
        length = stage.max_length or net.language.context or 2048
        return TextProcessor(
            tokenizers.main, template=stage.template or default_template(tokenizers.main, "document"), max_length=length
        )
