"""Tokenizers of drawn folders: byte-level BPE, or pieces with a dummy space as Llama's; and BERT's for a Q-Former."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import train_wordpiece
from isthmus.interop.hf_files import swapped

WORDS = (
    "a red cube and two large blue rings beside the small green ball; what is it? Question: Short answer: a photo of"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM's and Qwen's form, without a system text of its own."""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""That of transformers' LLaVA 1.5 folders."""
_TURNS = ["<|im_start|>", "<|im_end|>"]


def tokenizer(
    dice: random.Random,
    folder: Path,
    *,
    begin: bool,
    end: bool = False,
    pieces: str = "",
    chat: bool = False,
    further: tuple[str, ...] = (),
) -> Any:
    """A tokenizer in the folder that names its special tokens; ``begin`` and ``end`` come by themselves.

    ``pieces``: as Llama's, with a dummy space in ``each`` text between special tokens or in the ``first`` alone; empty
    for byte-level BPE. ``chat``: with a chat template of its own.
    """
    trained = _pieces(pieces == "first") if pieces else Tokenizer.train([WORDS] * 3, dice.choice((300, 340)))
    if end:  # CLIP takes an end-of-text of id 2 for another rule
        trained = swapped(trained, trained.eos_id, trained.vocab_size - 1)
    backend = trained.backend
    frame = ["<s>"] * begin + ["$A"] + ["</s>"] * end
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=frame, pair=[*frame, "$B"], special_tokens=ids)
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if begin or dice.random() < 0.5:  # named is not added
        named["bos_token"] = "<s>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{k: v for k, v in named.items() if backend.token_to_id(v) is not None}
    )
    if added := [*further, *(_TURNS if chat else ())]:
        made.add_special_tokens({"additional_special_tokens": added})
    if chat:
        template = "{{ bos_token }}" * (begin and dice.random() < 0.5) + CHATML
        made.chat_template = MISTRAL if begin and dice.random() < 0.4 else template
    made.save_pretrained(folder)
    return made


def _pieces(first: bool) -> Tokenizer:
    """Bytes where a letter is unknown, ``▁`` for spaces and before every text, as Llama 2's tokenizer.json has it; or
    before the first, as transformers makes it anew unless it is told to be ``legacy``."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, min_frequency=2)
    backend.train_from_iterator(WORDS.split(), trainer)
    tree = json.loads(backend.to_str())
    learnt = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    entries = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    tree["model"]["vocab"] = {entry: number for number, entry in enumerate(entries)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    backend.add_special_tokens(specials)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, eos="</s>", bos="<s>", pad="<pad>", unk="<unk>")


def bert(folder: Path) -> Any:
    """BERT's tokenizer in the folder, small, with the ``[DEC]`` that BLIP-2's has."""
    made = transformers.BertTokenizer(vocab=train_wordpiece([WORDS] * 3, 120).backend.get_vocab())
    made.add_special_tokens({"bos_token": "[DEC]"})
    made.save_pretrained(folder)
    return made
