"""What a step keeps for its backward pass, and what that computes: nothing for parts that are frozen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.stage import Group, apply_stage
from tests.models import tiny_blip2, tiny_flamingo, tiny_llava

NETS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": lambda: (tiny_llava.tiny(), tiny_llava.batch([tiny_llava.ROWS["one"], tiny_llava.ROWS["two"]])),
    "flamingo": lambda: (
        tiny_flamingo.tiny(),
        tiny_flamingo.batch([tiny_flamingo.ROWS["one"], tiny_flamingo.ROWS["two"]]),
    ),
    "blip2": lambda: (tiny_blip2.tiny("generate"), tiny_blip2.prompts([[5, 6, 7, 8], [9, 10, 11]], learn_from=1)),
}
ALIGN = ("connector.*",)


class Watch:
    """Inputs of the linear layers of a net by name, and the memory of all that autograd keeps."""

    def __init__(self, net: nn.Module) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.kept: dict[int, str] = {}
        self.inside: list[str] = []
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._noted(name))
            if name in ("vision", "connector", "language") or ".layers." in name:
                module.register_forward_pre_hook(lambda m, a, name=name: self.inside.append(name))
                module.register_forward_hook(lambda m, a, o: self.inside.pop() and None)

    def _noted(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[name] = args[0]

        return note

    def loss(self, net: Any, batch: Any) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            return sum(term.total for term in net.loss(batch).values())  # type: ignore[return-value]

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.kept.setdefault(tensor.untyped_storage().data_ptr(), ".".join(self.inside))
        return tensor


def prepared(name: str, *train: str) -> tuple[Any, Watch, torch.Tensor]:
    net, batch = NETS[name]()
    apply_stage(net, tuple(Group(pattern, lr=1.0) for pattern in train))
    watch = Watch(net)
    return net, watch, watch.loss(net, batch)


@pytest.mark.parametrize("name", NETS)
def test_frozen_parts_get_no_gradient_and_the_encoder_keeps_nothing(name: str) -> None:
    net, watch, loss = prepared(name, *ALIGN)
    assert not [place for place in watch.kept.values() if place.startswith("vision")]
    loss.backward()
    open_ = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n for n, p in net.named_parameters() if p.grad is not None} == open_
    assert all(n.startswith("connector.") for n in open_)


@pytest.mark.parametrize("name", ["llava", "flamingo"])  # a Llama; OPT's ReLU keeps what the next layer reads
def test_frozen_layers_keep_no_inputs_for_gradients_that_nobody_takes(name: str) -> None:
    def kept_inputs(*train: str) -> set[str]:
        _, watch, _ = prepared(name, *train)
        return {
            place
            for place, x in watch.inputs.items()
            if place.startswith("language.")
            and not place.endswith("o_proj")  # what attention made, which its own gradient needs
            and x.untyped_storage().data_ptr() in watch.kept
        }

    assert kept_inputs(*ALIGN) == set()
    if name == "llava":  # what the test would see otherwise
        assert len(kept_inputs("language.*")) > 4


def test_nothing_is_kept_before_the_first_open_layer() -> None:
    net, watch, loss = prepared("llava", "language.lm.model.layers.1.*")
    assert {place for place in watch.kept.values() if "layers.0" in place or "vision" in place} == set()
    assert any("layers.1" in place for place in watch.kept.values())
    seen: list[int] = []
    net.language.lm.model.layers[0].register_full_backward_hook(lambda *_: seen.append(0))
    loss.backward()
    assert not seen
    assert {n.split(".layers.")[1][0] for n, p in net.named_parameters() if p.grad is not None} == {"1"}
