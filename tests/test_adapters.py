"""Adapters: which layers get one, what stays frozen, PEFT's files read by peft itself, merging, and what is refused."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus import adapter_folder, adapters
from isthmus.adapters import Lora
from isthmus.errors import CheckpointError, ConfigError, StageError
from isthmus.stage import Group, Stage, apply_stage, canonical, defining_keys, named_state
from isthmus.training import train
from isthmus.training.proof import frozen_tensors
from tests.narrow import must_be
from tests.training.toys import ToyLoader, ToyNet


def groups(**lora):
    return (Group("connector.*", lora=Lora(**{"rank": 2, **lora})), Group("language.norm.*", lr=1e-3))


class TwoLayers(nn.Module):
    """Two linear layers and a head over a vocabulary."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.body = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, x):
        return self.head(self.body["fc"](self.body["q_proj"](x)))


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_adapters_train_and_the_layers_below_stay_bit_identical(tmp_path, kind):
    net = ToyNet()
    before = {n: t.clone() for n, t in named_state(net).items()}
    stage = Stage(name="tune", train=groups(**kind), steps=3)
    result = train(net, ToyLoader(), stage, tmp_path, progress=False)
    after = named_state(net)
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("language.norm."))
    moved = {n for n, t in adapters.adapter_tensors(net).items() if bool((t != 0).any())}
    assert moved == set(adapters.adapter_tensors(net)) != set()  # B began as zero
    assert not torch.equal(before["language.norm.weight"], after["language.norm.weight"])
    (row,) = [r for r in result.table.rows if r.part == "connector"]
    assert row.adapters == row.trained == sum(t.numel() for t in adapters.adapter_tensors(net).values())
    assert result.table.assigned.keys().isdisjoint(n for n in before if n.startswith("connector."))


def test_a_resumed_run_ends_with_the_same_adapters(tmp_path):
    whole, parts = ToyNet(), ToyNet()
    stage = Stage(name="tune", train=groups(dropout=0.2), steps=4, save_every=2)
    train(whole, ToyLoader(), stage, tmp_path / "whole", progress=False)

    class Breaks(ToyLoader):
        def steps(self, start):
            for number, item in enumerate(super().steps(start)):
                if number == 3:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        train(parts, Breaks(), stage, tmp_path / "parts", progress=False)
    again = ToyNet()
    assert train(again, ToyLoader(), stage, tmp_path / "parts", progress=False).resumed == 2
    assert all(torch.equal(t, named_state(again)[n]) for n, t in named_state(whole).items())


def test_the_first_pattern_wins_and_the_output_head_is_left_out():
    net = TwoLayers()
    table = apply_stage(net, (Group("*.q_proj.*", lr=1.0), Group("*", lora=Lora(rank=2)), Group("words.*", lr=1.0)))
    assert set(adapters.adapted(net)) == {"body.fc"}
    assert {n for n in table.assigned if adapters.MARK not in n} == {
        *("body.q_proj.weight", "body.q_proj.bias", "words.weight"),
    }
    named = TwoLayers()
    apply_stage(named, (Group("*", lora=Lora(rank=2, targets=("head", "q_proj"))),))
    assert set(adapters.adapted(named)) == {"body.q_proj", "head"}


def test_the_seed_draws_the_adapters_and_frozen_names_stay():
    one, two, other = TwoLayers(), TwoLayers(), TwoLayers()
    names = set(frozen_tensors(TwoLayers().requires_grad_(False)))
    state = torch.get_rng_state()
    for net, seed in ((one, 1), (two, 1), (other, 2)):
        apply_stage(net, (Group("body.*", lora=Lora(rank=2)),), seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    drawn = [adapters.adapter_tensors(net)["body.fc.lora_A.default.weight"] for net in (one, two, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    one.requires_grad_(False)
    assert {n for n in frozen_tensors(one) if adapters.MARK not in n} == names
    assert canonical("body.fc.base_layer.weight") == "body.fc.weight"


def trained_layers(**lora):
    """A net whose adapters hold random numbers, the same whatever was drawn before."""
    torch.manual_seed(0)
    net = TwoLayers()
    apply_stage(net, (Group("*.fc.*", lora=Lora(rank=3, alpha=5, **lora)), Group("body.*", lora=Lora(rank=2, **lora))))
    for tensor in adapters.adapter_tensors(net).values():
        tensor.data.normal_()
    return net.eval()


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_peft_itself_opens_what_is_written(tmp_path, kind):
    peft = pytest.importorskip("peft")
    net = trained_layers(**kind)
    values, tensors = adapters.to_peft(net, "base")
    bare = TwoLayers()
    bare.load_state_dict({n: t for n, t in named_state(net).items() if adapters.MARK not in n})
    x = torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {k: v for k, v in values.items() if k not in ("peft_type", "auto_mapping", "peft_version")}
        model = peft.get_peft_model(bare, peft.LoraConfig(**fields))
        peft.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(model(x), net(x))
    again = TwoLayers()
    again.load_state_dict({n: t for n, t in named_state(net).items() if adapters.MARK not in n})
    adapters.from_peft(again, values, tensors, "folder")
    assert torch.equal(again.eval()(x), net(x))
    assert adapters.described(again) == adapters.described(net)
    with pytest.raises(CheckpointError, match=r"folder\.r: expected int, found str 'eight'"):
        adapters.from_peft(TwoLayers(), {**values, "r": "eight"}, tensors, "folder")


def test_layers_with_a_turned_weight_are_adapted_and_merged():
    net = nn.ModuleDict({"c_attn": Conv1D(12, 8)})
    apply_stage(net, (Group("*", lora=Lora(rank=2)),))
    for tensor in adapters.adapter_tensors(net).values():
        tensor.data.normal_()
    x = torch.randn(4, 8)
    before = net["c_attn"](x)
    adapters.merge(net)
    torch.testing.assert_close(net["c_attn"](x), before)
    assert isinstance(net["c_attn"], Conv1D)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_merged_it_computes_the_same_and_is_a_plain_net(kind):
    net = trained_layers(**kind)
    x = torch.randn(4, 8)
    before = net(x)
    assert adapters.merge(net) == 2
    torch.testing.assert_close(net(x), before)
    assert net.state_dict().keys() == TwoLayers().state_dict().keys()
    assert adapters.summary(net) == ""


def test_a_merge_over_quantised_weights_is_refused():
    net = trained_layers()
    must_be(nn.Linear, net.body["fc"].base_layer).weight = nn.Parameter(
        torch.zeros(8, 8, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(CheckpointError, match=r"The weight of body\.fc is quantised \(torch\.int8\)"):
        adapters.merge(net)


@pytest.mark.parametrize(
    ("patterns", "fault"),
    [
        ((Group("words.*", lora=Lora()),), r"'words\.\*' catches no linear layer.*body\.\*"),
        ((Group("body.*", lora=Lora(targets=("q_prj",))),), "'q_prj' is the name of no linear layer there.*q_proj"),
        ((Group("head.*", lora=Lora()),), "adapts no layer.*named in targets"),
        ((Group("*", lr=1.0), Group("body.*", lora=Lora())), "adapts no layer"),
        ((Group("body.q*", lora=Lora(dora=True)), Group("body.*", lora=Lora())), "hold for all adapters"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns, fault):
    with pytest.raises(StageError, match=fault):
        apply_stage(TwoLayers(), patterns)


def test_tied_weights_and_other_ranks_are_refused():
    net = TwoLayers()
    net.head.weight = net.words.weight
    with pytest.raises(StageError, match="in common with"):
        apply_stage(net, (Group("*", lora=Lora(targets=("head",))),))
    net = trained_layers()
    with pytest.raises(StageError, match=r"an adapter from an earlier stage \(rank 3, alpha 5\)"):
        apply_stage(net, (Group("body.*", lora=Lora(rank=2)),))


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": True}, {"alpha": 0}, {"dropout": 1.0}])
def test_values_that_do_not_fit(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Lora(**bad)


def test_a_stage_without_adapters_keeps_its_fingerprint():
    stage = Stage(name="s", train=(Group("connector.*", lr=1e-3),), steps=3)
    assert defining_keys(stage.to_dict())["train"] == [{"pattern": "connector.*", "lr": 1e-3, "weight_decay": 0.0}]
    assert Group("x", lora=Lora()).lr == adapters.LR
    with pytest.raises(ConfigError, match="missing 'lr'"):
        Group("x")


def opened_over(path: str, base: Path | None = None) -> None:
    of_base: adapter_folder.OfBase = {"path": path, "beside": "", "sha256": "ab" * 32}
    never = lambda place: pytest.fail("it was opened")  # noqa: E731
    adapter_folder.opened(Path("runs/tuned"), of_base, {}, {}, base=base, unquantised=False, load=never)


def test_a_base_of_another_release_is_refused_with_what_to_do(tmp_path):
    """No option opens adapters over other weights, so the refusal says so and names the two ways that there are."""
    with pytest.raises(CheckpointError) as refused:
        opened_over("isthmus:clip")
    for said in (
        "is not the base that runs/tuned was trained on: that has sha256 abababababab…, and this has sha256 ",
        "no option opens them over another base",
        "isthmus:clip comes with isthmus, and with another release come other files",
        "`isthmus convert runs/tuned FOLDER --to isthmus --merge`",
        "or train them again on this one.",
    ):
        assert said in str(refused.value)
    (tmp_path / "model.safetensors").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"right one with base=… \(--base\), it was isthmus:clip; or train"):
        opened_over("isthmus:clip", base=tmp_path)
    with pytest.raises(CheckpointError, match=r"was isthmus:gone; or train"):  # which this installation has not
        opened_over("isthmus:gone", base=tmp_path)
