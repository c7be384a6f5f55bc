"""The moving average of the weights: what it is, what is handed over, and that resuming keeps it to the bit."""

import pytest
import torch

from isthmus.errors import ConfigError
from isthmus.stage import Group, Stage, defining_keys, named_state
from isthmus.training import train
from isthmus.training.validation import Validation
from tests.training.toys import ToyLoader, ToyNet


def stage(**changes):
    return Stage(**{"name": "s", "train": (Group("connector.*", lr=1e-2),), "steps": 4, "save_every": 2} | changes)


def weight(net):
    return net.connector.weight.detach().clone()


def seen_at(folder, steps):
    """The weight after each number of steps, without averaging; the rate must not depend on the budget."""
    found = []
    for count in steps:
        net = ToyNet()
        train(net, ToyLoader(), stage(steps=count, decay="constant"), folder / str(count), progress=False)
        found.append(weight(net))
    return found


def test_the_average_is_handed_over_and_validated(tmp_path):
    one, two, three = seen_at(tmp_path, (1, 2, 3))
    wanted = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
    net, looked = ToyNet(), []
    validation = Validation(every=2, measure=lambda: looked.append(weight(net)) or {"loss": 1.0})
    train(
        net,
        ToyLoader(),
        stage(steps=3, decay="constant", ema=0.75),
        tmp_path / "run",
        progress=False,
        validation=validation,
    )
    torch.testing.assert_close(weight(net), wanted)
    assert torch.equal(looked[0], weight(ToyNet()))
    torch.testing.assert_close(looked[1], 0.75 * one + 0.25 * two)
    assert torch.equal(looked[2], weight(net))


def test_a_resumed_run_averages_on(tmp_path):
    whole = ToyNet()
    train(whole, ToyLoader(), stage(ema=0.9), tmp_path / "whole", progress=False)

    class Breaks(ToyLoader):
        def steps(self, start):
            for number, item in enumerate(super().steps(start)):
                if number == 3:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        train(ToyNet(), Breaks(), stage(ema=0.9), tmp_path / "parts", progress=False)
    again = ToyNet()
    assert train(again, ToyLoader(), stage(ema=0.9), tmp_path / "parts", progress=False).resumed == 2
    assert all(torch.equal(t, named_state(again)[n]) for n, t in named_state(whole).items())
    finished = ToyNet()
    train(finished, ToyLoader(), stage(ema=0.9), tmp_path / "whole", progress=False)
    assert torch.equal(weight(finished), weight(whole))


@pytest.mark.parametrize("decay", [0, 1, 1.5])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match=r"ema .* must be between 0 and 1"):
        stage(ema=decay)


def test_a_stage_without_it_is_as_before():
    assert "ema" not in defining_keys(stage().to_dict())
    assert stage().fingerprint() != stage(ema=0.9).fingerprint()
