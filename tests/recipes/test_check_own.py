"""The preflight finds what is wrong with code of the user's own: connectors and nets with one fault each."""

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.recipes.check import check
from isthmus.recipes.schema import parse_recipe
from isthmus.user_code import pinned_in
from tests.cli.test_cli import run
from tests.miniature import tree

CODE = '''
import torch
from torch import nn

from isthmus.batch import Term
from isthmus.models.clip import Clip
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.net import Net
from isthmus.nn.connectors.pooling import AveragePool
from isthmus.systems.clip import ClipSystem
from isthmus.systems.base import System
from isthmus.systems.llava import LlavaSystem


class Lies(AveragePool):
    def num_tokens(self, frames, grid):
        return super().num_tokens(frames, grid) + 1


class OverTheBatch(AveragePool):
    def forward(self, features, text=None):
        return super().forward(features - features.mean(0, keepdim=True))


class Noise(AveragePool):
    def forward(self, features, text=None):
        return super().forward(features + 0.3 * torch.randn_like(features))


class Halves(AveragePool):
    def forward(self, features, text=None):
        return super().forward(features)[::2]


class Blind(AveragePool):
    def forward(self, features, text=None):
        return super().forward(torch.ones_like(features))


class Aside(AveragePool):
    """Centres what it reads on a running mean that is a plain tensor."""

    center = 0.0

    def forward(self, features, text=None):
        if self.training:
            self.center = 0.5 * (self.center + features.detach().mean((0, 1, 2)))
        return super().forward(features - self.center)


class NotPersistent(AveragePool):
    def __init__(self, vision_width, out_width):
        super().__init__(vision_width, out_width)
        self.register_buffer("center", torch.zeros(vision_width), persistent=False)

    def forward(self, features, text=None):
        if self.training:
            self.center.lerp_(features.detach().mean((0, 1, 2)), 0.5)
        return super().forward(features - self.center)


class AheadNet(Llava):
    """Every token sees its whole row; padding is not seen."""

    KIND = "ahead"

    def logits(self, batch):
        embeds, lengths = self.embed_prompt(batch), batch.text["lm"].lengths
        real = torch.arange(embeds.shape[1]) < lengths[:, None]
        mask = torch.zeros(len(embeds), 1, embeds.shape[1], embeds.shape[1]).masked_fill(~real[:, None, None], -1e9)
        return self.language.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits


class ShiftedNet(Llava):
    KIND = "shifted"

    def loss(self, batch):
        labels = batch.text["lm"].labels
        total = nn.functional.cross_entropy(self.logits(batch).flatten(0, 1), labels.flatten(), reduction="sum")
        return {"lm": Term(total, int((labels != -100).sum()))}


class PaddingNet(Llava):
    KIND = "padding"

    def embed_prompt(self, batch):
        embeds = super().embed_prompt(batch)
        return embeds + embeds.mean(1, keepdim=True)


class MovingNet(Llava):
    KIND = "moving"

    def loss(self, batch):
        with torch.no_grad():
            self.vision.positions.mul_(0.99)
        return super().loss(batch)


class SigmoidNet(Clip):
    KIND = "sigmoid"
    gradient_cache = False

    def loss(self, batch):
        images, texts = (nn.functional.normalize(x, dim=-1) for x in self._embed(batch))
        logits = (2 * torch.eye(len(images)) - 1) * (self.heads.logit_scale.exp() * images @ texts.T - 5)
        return {"mine": Term(-nn.functional.logsigmoid(logits).sum(), len(images), scope="batch")}


class SilentNet(Net):
    """Learns, and gives nothing else."""

    KIND = "silent"
    CONFIG = LlavaConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.inner = config, Llava(config)

    @property
    def image_size(self):
        return self.config.vision.image_size

    def num_tokens(self, height, width, frames=1):
        return self.inner.num_tokens(height, width, frames)

    def unreachable(self):
        return tuple(f"inner.{name}" for name in self.inner.unreachable())

    def loss(self, batch):
        return self.inner.loss(batch)


class Silent(LlavaSystem):
    kind, net = "silent", SilentNet

    def capabilities(self, net):
        return System.capabilities(self, net)

    def take(self, net, parts):
        return super().take(net.inner, parts)

    def processor(self, net, tokenizers, image, stage):
        return super().processor(net.inner, tokenizers, image, stage)


class Ahead(LlavaSystem):
    kind, net = "ahead", AheadNet


class Shifted(LlavaSystem):
    kind, net = "shifted", ShiftedNet


class Padding(LlavaSystem):
    kind, net = "padding", PaddingNet


class Moving(LlavaSystem):
    kind, net = "moving", MovingNet


class Sigmoid(ClipSystem):
    kind, net = "sigmoid", SigmoidNet
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "faulty.py"
    file.write_text(CODE, encoding="utf-8")
    return file


def problems(recipe: dict[str, Any]) -> str:
    return " ".join(check(parse_recipe(pinned_in(recipe)), samples=0).problems)


def llava(story: Path, **changes: Any) -> dict[str, Any]:
    """The miniature recipe, its second stage alone."""
    own = tree("llava", story) | {"evaluate": []} | changes
    return own | {"stages": own["stages"][1:]}


@pytest.mark.parametrize(
    ("connector", "fault"),
    [
        ("Lies", "the connector's num_tokens says another number than it makes"),
        ("OverTheBatch", "fails the contract 'batch = single'"),
        ("Noise", "fails the contract 'again = before'"),
        ("Halves", "what the net made of 4 visuals is of 2"),
        ("Aside", "neither a parameter nor a persistent buffer"),
        ("NotPersistent", "neither a parameter nor a persistent buffer"),
    ],
)
def test_a_connector_with_a_fault_is_not_ready(story: Path, file: Path, connector: str, fault: str) -> None:
    assert fault in problems(llava(story, config={"projector": {"kind": f"{file}:{connector}"}}))


@pytest.mark.parametrize(
    ("system", "fault"),
    [
        ("Ahead", "fails the contract 'nothing looks ahead'"),
        ("Shifted", "fails the contract 'loss = logits'"),
        ("Padding", "fails the contract 'left = right padding'"),
        ("Moving", "The frozen tensor 'vision.positions' changed during the stage"),
    ],
)
def test_a_net_with_a_fault_is_not_ready(story: Path, file: Path, system: str, fault: str) -> None:
    assert fault in problems(llava(story, model=f"{file}:{system}"))


def test_a_net_that_does_not_look_is_told_of(story: Path, file: Path, monkeypatch: Any, capsys: Any) -> None:
    """It may be a gate that starts closed, so it is no problem yet."""
    own = file.with_name("blind.yaml")
    own.write_text(json.dumps(llava(story, config={"projector": {"kind": f"{file}:Blind"}})), encoding="utf-8")
    code, said, _ = run(monkeypatch, capsys, "check", own, "--json", file.with_name("facts.json"))
    assert code == 0
    assert "another picture changes nothing" in " ".join(said.split())
    assert "Contracts that hold before anything is learnt: again = before" in said
    assert json.loads(file.with_name("facts.json").read_text())["contracts"]["picture matters"] == "FAIL"


def test_samples_that_are_cut_are_counted(story: Path, file: Path, monkeypatch: Any, capsys: Any) -> None:
    """An arm of a comparison that reads less of its rows than the others is seen before it is trained."""
    whole = check(parse_recipe(llava(story)), samples=0).stages[0].sources[0]
    assert whole.cut == 0
    own, limit = llava(story), max(whole.lengths) - 1
    own["stages"][0]["max_length"] = limit
    short = file.with_name("short.yaml")
    short.write_text(json.dumps(own), encoding="utf-8")
    code, said, _ = run(monkeypatch, capsys, "check", short, "--json", file.with_name("short.json"))
    assert code == 0
    assert f"cut at {limit} (max_length)" in " ".join(said.split())
    (stage,) = json.loads(file.with_name("short.json").read_text())["stages"]
    assert 0 < stage["sources"][0]["cut"] <= whole.lengths.count(limit + 1)


def test_an_objective_of_ones_own_is_ready(file: Path) -> None:
    own = tree("clip") | {"model": f"{file}:Sigmoid", "evaluate": []}
    assert problems(own) == ""


def test_a_net_that_only_learns_is_ready(story: Path, file: Path) -> None:
    """What it does not give is not tried, and it says that it cannot do it."""
    own = llava(story, model=f"{file}:Silent")
    own["stages"][0]["train"] = [{"pattern": "inner.connector.*", "lr": 1e-3}]
    checked = check(parse_recipe(pinned_in(own)), samples=0)
    assert checked.problems == ()
    assert set(checked.contracts.values()) == {"n/a"}


def test_a_sound_connector_is_ready(story: Path) -> None:
    assert problems(llava(story, config={"projector": {"kind": "average_pool"}})) == ""
