"""The edge to transformers that all its language models share: configurations, attention, the class in its wrapper."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isthmus.errors import ConfigError, DataError, nearest
from isthmus.nn.attention import kernel_precision
from isthmus.products import small_products

SDPA = "isthmus_sdpa"
"""The library's SDPA, on a CPU in the precision of :func:`isthmus.nn.attention.kernel_precision`."""

LibraryConfig = Mapping[str, Any]
"""A configuration of the library's, by its own fields: ``{"model_type": "llama", ...}``."""

LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"})
"""Older spellings of the rotary settings that the library still translates, in code that all its models share."""

_UNDECLARED = re.compile(
    r"""kwargs(?:\.(?:pop|get|setdefault)\(|\[)\s*"(\w+)"|getattr\((?:self\.)?config,\s*"(\w+)\""""
)
"""How a class of the library reads a field of a config.json that its configuration does not declare."""

_BOOK_KEEPING = frozenset(
    {
        *("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "num_labels"),
        *("problem_type", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"),
    }
)


class LibraryLM(nn.Module):
    """A language model of transformers as ``.lm``, its class and keys untouched: what both families share."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm: Any = lm  # of a class of the library's, each with attributes of its own
        # A folder's own decoding defaults (stop ids, temperature) must not slip under an explicit Decoding.
        self.lm.generation_config = GenerationConfig()

    @property
    def width(self) -> int:
        """D: width of the input embeddings, and so of visual tokens (OPT-350m's blocks are wider)."""
        return self.lm.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.lm.get_input_embeddings().weight.shape[0]

    def embed(self, ids: Int[Tensor, "*places"]) -> Float[Tensor, "*places D"]:
        """(B, T) token ids -> (B, T, D). Raises DataError for an id outside the vocabulary."""
        low, high = (int(v) for v in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the LM's vocabulary of "
                f"{self.vocab_size}: the tokenizer does not belong to this LM."
            )
        return self.lm.get_input_embeddings()(ids)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    with kernel_precision(query, key, value) as cast, small_products() as backward_too:
        mask = cast(mask) if mask is not None and mask.is_floating_point() else mask
        y, weights = sdpa_attention_forward(module, cast(query), cast(key), cast(value), mask, **rest)
        backward_too(y)
    return y.to(query.dtype), weights


AttentionInterface.register(SDPA, _attend)
AttentionMaskInterface.register(SDPA, sdpa_mask)


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, nets are built without drawing weights, whose memory nobody touches: for nets that are filled next."""
    with no_init_weights():
        yield


def vocabulary_tables(language: LibraryLM) -> tuple[str, ...]:
    """Names in the state dict of an LM of ours of the tensors with one row per token: embedding and head."""
    ends = (language.lm.get_input_embeddings(), language.lm.get_output_embeddings())
    rows = len(ends[0].weight)
    tables = {id(p) for end in ends if end is not None for p in end.parameters() if len(p) == rows}
    return tuple(name for name, value in language.state_dict(keep_vars=True).items() if id(value) in tables)


def library_config(config: LibraryConfig, known: Sequence[str] = ()) -> PreTrainedConfig:
    """The transformers configuration that ``config`` describes, checked field by field. Raises ConfigError.

    ``known`` are the model types that will do, all causal LMs by default.
    """
    model_type = str(config.get("model_type", ""))
    known = known or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # names alone: the classes would all be imported
    if model_type not in known:
        raise ConfigError(
            f"language.model_type {model_type!r} is not an LM of transformers that can stand here; "
            + (
                "it is a model of another kind, not a misspelt one"
                if model_type in CONFIG_MAPPING
                else nearest(model_type, known)
            )
        )
    config_class = CONFIG_MAPPING[model_type]
    fields = _fields(config_class)
    for name in config:
        if name not in fields:
            raise ConfigError(f"language.{name} is not a field of a {model_type} LM; {nearest(name, fields)}")
    try:
        return config_class(**{name: value for name, value in config.items() if name != "model_type"})
    except Exception as error:  # the library validates with exception classes of its own
        raise ConfigError(
            f"transformers refuses this {model_type} configuration: " + " ".join(str(error).split())
        ) from error


def known_fields(config: LibraryConfig) -> dict[str, object]:
    """A config.json reduced to what :func:`library_config` takes: the library's own fields, nothing that runs code.

    Dropped are book-keeping (versions, class names, dtype), private fields and names the library itself ignores.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        return dict(config)
    keep = _fields(CONFIG_MAPPING[model_type]) - _BOOK_KEEPING
    kept: dict[str, object] = {n: value for n, value in config.items() if n in keep and not n.startswith("_")}
    return kept | {"model_type": model_type}


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return (
        {f.name for f in dataclasses.fields(config_class)}
        | set(config_class.attribute_map)
        | LEGACY_FIELDS
        | _undeclared(config_class)
        | {"model_type"}
    )


@cache
def _undeclared(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Fields of which the library's code for such a model speaks although its configuration does not declare them:
    older spellings (``n_embed``, ``sliding_window_pattern``), and what its layers look for (``head_dim``). Without them
    another model would be built, or none. The code is read, not run."""
    own = Path(inspect.getfile(config_class))
    layers = own.with_name(own.name.replace("configuration_", "modeling_"))
    code = "".join(file.read_text(encoding="utf-8") for file in (own, layers) if file.is_file())
    found = {name for names in _UNDECLARED.findall(code) for name in names if name and not name.startswith("_")}
    return frozenset(found - _BOOK_KEEPING)
