"""Configurations of the language models that several systems start from: the published ones, and a tiny one."""


def tiny_llama(vocab_size: int, *, layers: int = 5, heads: int = 6) -> dict[str, object]:
    """A Llama of ours, 192 wide, that two CPU cores train in minutes."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


def vicuna(size: str, vocab_size: int = 32000, *, version: float) -> dict[str, object]:
    """``7b`` or ``13b``. Vicuna 1.x is a fine-tuned Llama, Vicuna 1.5 a fine-tuned Llama 2 of the longer context."""
    width, hidden, layers, heads = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[size]
    second = version >= 1.5
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rms_norm_eps": 1e-5 if second else 1e-6,
        "max_position_embeddings": 4096 if second else 2048,
        "tie_word_embeddings": False,
    }


def opt(size: str) -> dict[str, object]:
    """``2.7b`` or ``6.7b`` (Zhang et al. 2022, 2205.01068): 32 layers of 32 heads, vocabulary 50,272."""
    width = {"2.7b": 2560, "6.7b": 4096}[size]
    return {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }


def flan_t5(size: str) -> dict[str, object]:
    """``xl`` or ``xxl`` (Chung et al. 2022, 2210.11416): 24 + 24 layers, untied head.

    The activation is the exact GELU, as BLIP-2's code sets it; transformers' default is the tanh form.
    """
    width, hidden, heads = {"xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}[size]
    return {
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": hidden,
        "num_layers": 24,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
    }
