"""Writes tests/fixtures/lavis with salesforce-lavis 1.0.2: what isthmus' BLIP-2 is held against, first stage.

Run in the peers' environment:  .venv-peers/bin/python tools/write_lavis_fixtures.py

A tiny random model with EVA's encoder: its tensors under LAVIS's names, pictures, texts of unlike length, and what
LAVIS's code makes of them: the three losses (with negatives that are said, not drawn), features, matching logits.
Weights are rounded to half precision before anything is computed, so that the small file holds them exactly.
"""

# Its libraries are in the peers' environment alone.
# pyright: reportMissingImports=false

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.modeling_utils
import transformers.pytorch_utils
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "lavis"
VISION = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}
QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
QUERIES, EMBED, DEC = 5, 8, 39
TEXTS = [[1, 7, 8, 9, 10, 2], [1, 11, 2], [1, 12, 13, 14, 2], [1, 9, 8, 7, 30, 31, 32, 2]]
LOWEST = torch.finfo(torch.float32).min
WRONG_IMAGE, WRONG_TEXT = [1, 2, 3, 0], [3, 0, 1, 2]


def open_lavis() -> tuple[Any, Any]:
    """LAVIS's first stage and EVA's encoder, without the rest of the package and all that it asks for."""
    found = importlib.util.find_spec("lavis")
    assert found is not None, "tools/peers.sh installs salesforce-lavis"
    assert found.submodule_search_locations is not None
    root = Path(found.submodule_search_locations[0])
    for name in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package

    def stub(name: str, **names: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(names)
        sys.modules[name] = module

    class BaseModel(nn.Module):
        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

    sys.modules["lavis.models"].BaseModel = BaseModel  # type: ignore[attr-defined]
    stub("lavis.common.dist_utils", download_cached_file=None)
    stub("lavis.common.utils", is_url=None)
    stub("lavis.common.logger", MetricLogger=None)
    stub("lavis.models.clip_vit", create_clip_vit_L=None)
    # One process: what all have is what this one has.
    stub(
        "lavis.models.base_model",
        BaseModel=BaseModel,
        all_gather_with_grad=lambda x: x,
        concat_all_gather=lambda x: x,
    )
    for name, value in {
        "apply_chunking_to_forward": transformers.pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": None,
        "find_pruneable_heads_and_indices": None,
    }.items():
        if not hasattr(transformers.modeling_utils, name):
            setattr(transformers.modeling_utils, name, value)
    from lavis.models import eva_vit
    from lavis.models.blip2_models import blip2_qformer

    return blip2_qformer, eva_vit


class Words:
    """What the model asks of its tokenizer: given ids in the place of texts."""

    bos_token_id, pad_token_id = DEC, 0

    def __len__(self) -> int:
        return QFORMER["vocab_size"]

    def __call__(self, texts: list[list[int]], *, max_length: int, **_: Any) -> Any:
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        found = types.SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())
        found.to = lambda _: found
        return found


def build() -> tuple[Any, Any]:
    module, eva = open_lavis()
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel, BertPreTrainedModel

    # Written for transformers 4, whose helpers these were; all weights are drawn below.
    BertPreTrainedModel.init_weights = lambda _: None
    BertPreTrainedModel.invert_attention_mask = lambda _, mask: (1.0 - mask[:, None, None].float()) * LOWEST
    BertPreTrainedModel.get_head_mask = lambda _, mask, layers: [None] * layers

    class Tiny(module.Blip2Qformer):
        @classmethod
        def init_tokenizer(cls) -> Words:
            return Words()

        @classmethod
        def init_Qformer(cls, num_query_token: int, vision_width: int, cross_attention_freq: int = 2) -> Any:
            config = BertConfig(**QFORMER)
            config.encoder_width, config.add_cross_attention = vision_width, True
            config.cross_attention_freq, config.query_length = cross_attention_freq, num_query_token
            net = BertLMHeadModel(config)
            net.cls.predictions.decoder.weight = net.bert.embeddings.word_embeddings.weight  # as transformers 4 tied it
            return net, nn.Parameter(torch.zeros(1, num_query_token, config.hidden_size))

        @classmethod
        def init_vision_encoder(cls, *_: Any) -> Any:
            norm = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
            encoder = eva.VisionTransformer(**VISION, qkv_bias=True, use_mean_pooling=False, norm_layer=norm)
            return encoder, nn.LayerNorm(VISION["embed_dim"])

    net = Tiny(num_query_token=QUERIES, embed_dim=EMBED, max_txt_len=max(map(len, TEXTS)))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn_like(parameter) * 0.25
            if name != "temp":
                parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half().float())
    return net.eval(), module


def main() -> None:
    torch.manual_seed(0)
    net, module = build()
    pixels = torch.randn(len(TEXTS), 3, VISION["img_size"], VISION["img_size"]).half().float()
    told = iter([*WRONG_IMAGE, *WRONG_TEXT])
    with (
        mock.patch.object(module.dist, "get_rank", return_value=0),
        mock.patch.object(torch, "multinomial", side_effect=lambda *_: torch.tensor([next(told)])),
        torch.no_grad(),
    ):
        losses = net({"image": pixels, "text_input": TEXTS})
        vision = net.ln_vision(net.visual_encoder(pixels))
        text = net.tokenizer(TEXTS, max_length=net.max_txt_len)
        expected = {
            "expected.vision": vision,
            "expected.images": net.forward_image(pixels)[0],
            "expected.texts": net.forward_text(text),
            "expected.matching": net.compute_itm(vision, text.input_ids, text.attention_mask),
            **{f"expected.{name}": getattr(losses, f"loss_{name}") for name in ("itc", "itm", "lm")},
        }
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    state["temp"] = net.temp.detach()
    FOLDER.mkdir(parents=True, exist_ok=True)
    contents = {"pixels": pixels.half(), **state, **expected}
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in contents.items()}, FOLDER / "first_stage.safetensors"
    )
    facts = {
        "vision": VISION,
        "qformer": QFORMER,
        "queries": QUERIES,
        "embed": EMBED,
        "dec": DEC,
        "texts": TEXTS,
        "wrong_image": WRONG_IMAGE,
        "wrong_text": WRONG_TEXT,
    }
    (FOLDER / "first_stage.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print({name: float(value) for name, value in expected.items() if value.ndim == 0})


if __name__ == "__main__":
    main()
