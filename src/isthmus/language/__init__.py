"""Language models of transformers with one thin adapter: causal ones, T5's family, and how they write."""

from isthmus.uncollected import uncollected

with uncollected():  # transformers, and what it imports of torch
    from isthmus.language.causal import LanguageModel, nll
    from isthmus.language.decoder import Attended, Decoder, Logprob, Prompt, Read, Written
    from isthmus.language.decoding import Decoding, until_stop, write
    from isthmus.language.library import (
        LibraryConfig,
        LibraryLM,
        known_fields,
        library_config,
        unfilled,
        vocabulary_tables,
    )
    from isthmus.language.seq2seq import T5_LIKE, Language, Seq2SeqLM, build_language, safe_dtype
    from isthmus.language.window import Layers, Window

__all__ = [
    "T5_LIKE",
    "Attended",
    "Decoder",
    "Decoding",
    "Language",
    "LanguageModel",
    "Layers",
    "LibraryConfig",
    "LibraryLM",
    "Logprob",
    "Prompt",
    "Read",
    "Seq2SeqLM",
    "Window",
    "Written",
    "build_language",
    "known_fields",
    "library_config",
    "nll",
    "safe_dtype",
    "unfilled",
    "until_stop",
    "vocabulary_tables",
    "write",
]
