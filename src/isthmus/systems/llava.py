"""LLaVA as a system: an encoder and a language model from parts, projected patches among the words."""

from typing import Any

from isthmus.models.llava import Llava
from isthmus.systems.base import System


class LlavaSystem(System):
    """2304.08485, 2310.03744."""

    kind = "llava"
    title = "LLaVA"
    net = Llava

    def capabilities(self, net: Any) -> tuple[str, ...]:
        return (*super().capabilities(net), "attend")
