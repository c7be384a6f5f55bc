"""The bare language model as a net that sees batches."""

import pytest
import torch

from isthmus.batch import Batch, Tokens
from isthmus.config import plain
from isthmus.errors import ConfigError
from isthmus.language import Decoding
from isthmus.models.lm import BareLM, LmConfig

CONFIG = {
    "language": {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
}


def batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(31, (3, 9), generator=g)
    tokens = Tokens(ids=ids, lengths=torch.tensor([9, 4, 6]), labels=ids.clone())
    assert tokens.labels is not None
    tokens.labels[~tokens.mask] = -100
    return Batch(ids=("a", "b", "c"), sources=("t",) * 3, text={"lm": tokens})


def test_loss_is_a_token_term_that_adds_up_over_any_split() -> None:
    torch.manual_seed(0)
    net, whole = BareLM.from_config(CONFIG), batch()
    term = net.loss(whole)["lm"]
    parts = [net.loss(part)["lm"] for part in whole.split(3)]
    assert term.scope == "token"
    assert term.count == whole.supervised() == sum(p.count for p in parts) == 16
    assert term.total.item() == pytest.approx(sum(p.total.item() for p in parts), abs=1e-4)
    assert net.score(whole).sum().item() == pytest.approx(-term.total.item(), abs=1e-4)
    assert term.mean.item() == pytest.approx(term.total.item() / 16)


def test_generate_and_config_round_trip() -> None:
    net = BareLM.from_config(CONFIG)
    assert [len(row) for row in net.generate(batch(), Decoding(max_new_tokens=3))] == [3, 3, 3]
    assert BareLM.from_config(plain(net.config)).config == net.config
    assert net.unreachable() == ()
    with pytest.raises(ConfigError, match="unknown key 'langage'; did you mean 'language'"):
        BareLM.from_config({"langage": {}})


def test_building_on_the_meta_device_gives_the_tiny_preset_its_size() -> None:
    with torch.device("meta"):
        net = BareLM(LmConfig.tiny(vocab_size=2048))
    assert sum(p.numel() for p in net.parameters()) == 2048 * 192 + 5 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 192
