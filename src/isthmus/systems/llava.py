"""LLaVA as a system: an encoder and a language model from parts, projected patches among the words."""

from isthmus.models.llava import Llava
from isthmus.systems.base import System


class LlavaSystem(System[Llava]):
    """2304.08485, 2310.03744."""

    kind = "llava"
    title = "LLaVA"
    net = Llava

    def capabilities(self, net: Llava) -> tuple[str, ...]:
        return (*super().capabilities(net), "attend")
