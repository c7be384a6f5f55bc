"""The files beside the weights of a transformers folder: image processor, tokenizer, chat template, decoding.

Each says what our processor does, so that a prompt made by transformers has the ids, and a picture the pixels, that the
model was trained on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import processors
from torch import Tensor

from isthmus.checkpoint import Content, read_json
from isthmus.data.chat import FIRST, LAST, ChatForm, Pieces
from isthmus.data.clip_tokenizer import ClipTokenizer
from isthmus.data.images import ImageTransform
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.data.tokenizer import BEGINS, CHAT_TEMPLATE, END, WHOLE, Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.export import AnySource, common_dtype, must
from isthmus.language import Decoding

_PROCESSORS = {
    "square": "CLIPImageProcessor",
    "pad": "LlavaImageProcessor",
    "squash": "BlipImageProcessor",
    "anyres": "LlavaNextImageProcessor",
}
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""


def image_processor(transform: ImageTransform | None) -> dict[str, object]:
    """A preprocessor_config.json. Raises CheckpointError for a mode that no processor of transformers has."""
    must(transform is not None, "processor.image", None, "transformers", "an image transform")
    assert transform is not None
    must(transform.mode in _PROCESSORS, "processor.image.mode", transform.mode, "transformers", ", ".join(_PROCESSORS))
    side = {"height": transform.size, "width": transform.size}
    crops = transform.mode != "squash"
    return {
        "image_processor_type": _PROCESSORS[transform.mode],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": transform.size} if crops else side,
        "resample": RESAMPLE[transform.resample],
        **({"do_center_crop": True, "crop_size": side} if crops else {}),
        **({"do_pad": True} if transform.mode in ("pad", "anyres") else {}),
        **({"image_grid_pinpoints": [list(c) for c in transform.pinpoints]} if transform.pinpoints else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean or deviation of red, green and blue in a file; ImageTransform refuses another number of them."""
    return cast("tuple[float, float, float]", tuple(values))


def tokenizer_files(
    tokenizer: Tokenizer, *, begin: bool, end: bool, context: int | None, side: str = "right", **more: str
) -> dict[str, Content]:
    """tokenizer.json and its configuration; beginning- and end-of-sequence come by themselves where that is wanted.

    ``side`` is where batches are padded. CLIP's own tokenizer has its two files, and both ends anyway.
    """
    files = tokenizer.files()
    config = json.loads(files["tokenizer_config.json"])
    if not isinstance(tokenizer, ClipTokenizer):
        files["tokenizer.json"] = _framed(tokenizer, begin=begin, end=end).to_str()
    for own in (BEGINS, WHOLE):  # the frame says the one there, and the other is so there anyway
        config.pop(own, None)
    files.pop(CHAT_TEMPLATE, None)  # the model's own writer adds its template
    config |= {"padding_side": side, "model_max_length": context or int(1e30), **more}
    return {**files, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _framed(tokenizer: Tokenizer, *, begin: bool, end: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    first = list(tokenizer.begins) if begin else []
    last = [str(backend.id_to_token(tokenizer.eos_id))] if end else []
    frame = [*first, "$A", *last]
    specials = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
    backend.post_processor = processors.TemplateProcessing(single=frame, pair=[*frame, "$B"], special_tokens=specials)  # type: ignore[assignment]
    return backend


def swapped(tokenizer: Tokenizer, one: int, other: int) -> Tokenizer:
    """The tokenizer with two ids exchanged. Raises CheckpointError for a vocabulary without a table of names."""
    tree = json.loads(tokenizer.backend.to_str())
    vocab = tree["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise CheckpointError("the ids of this tokenizer cannot be exchanged: its vocabulary is not a table of names.")
    new = {one: other, other: one}
    tree["model"]["vocab"] = {token: new.get(number, number) for token, number in vocab.items()}
    for token in tree["added_tokens"]:
        token["id"] = new.get(token["id"], token["id"])
    tree["added_tokens"].sort(key=lambda token: token["id"])
    tree["post_processor"] = None  # it holds ids too; a new one is written with the folder
    return tokenizer.over(tokenizers.Tokenizer.from_str(json.dumps(tree)))


def generation_config(model: AnySource, *, forbidden: Sequence[int] = (), **more: object) -> dict[str, object]:
    """Greedy decoding that stops where our model stops and never says what it never says."""
    decoding = model.ended(Decoding())
    tokenizer = model.processor.tokenizer
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(decoding.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": sorted({*decoding.forbidden_ids, *forbidden}),
        "do_sample": False,
        "max_new_tokens": decoding.max_new_tokens,
        **more,
    }


def further_stops(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer besides end-of-sequence, by generation_config.json: a chat model's end of turn, say. Raises
    CheckpointError for what is no id."""
    file = folder / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CheckpointError(f"{file}: eos_token_id holds {number!r}, which is not a token id.")
    return tuple(sorted(set(ids) - {tokenizer.eos_id}))


# Chat templates.

_TEXT = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_PICTURES = (
    "{%- if message['content'] is not string -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{%- set seen.n = seen.n + 1 -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)


_MOVED = (
    "{%- set text = text | trim -%}{{- (['<image>'] * seen.n) | join('\\n') -}}"
    "{%- if text -%}{{- '\\n' -}}{%- endif -%}"
)
_PLACED = (
    "{%- set turn = namespace(text='', spoken=false) -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}"
    "{%- set turn.text = turn.text + ('' if turn.text[-1:] in ' \\n\\t\\r' else '\\n') + '<image>' -%}"
    "{%- elif part['type'] == 'text' and (turn.spoken or part['text'] | trim) -%}"
    "{%- set turn.text = turn.text + ('\\n' if turn.text and not turn.spoken else '')"
    " + (part['text'] if turn.spoken else part['text'].lstrip()) -%}{%- set turn.spoken = true -%}"
    "{%- endif -%}{%- endfor -%}{%- set text = turn.text.rstrip() -%}"
)


def chat_template(name: str, *, first: bool = False) -> str | None:
    """One of :data:`isthmus.data.text.TEMPLATES` in Jinja for the messages form; none where it has no conversation.

    Beginning-of-sequence is not in it (see :func:`begun`): twice would be once too often. ``first``:
    the form of folders written before pictures kept their places.
    """
    if name not in TEMPLATES or name == "document":
        return None
    if name == "plain":
        return (
            "{%- for message in messages -%}{%- if message['content'] is not string -%}"
            "{%- for part in message['content'] -%}{%- if part['type'] in ('image', 'image_url') -%}<image>"
            "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
        )
    grammar = TEMPLATES[name]
    assert isinstance(grammar, Grammar)  # those that are no grammar are answered above
    one = f"{{%- if seen.n == 1 -%}}{_MOVED}{{%- else -%}}{_PLACED}{{%- endif -%}}"
    pictures = _MOVED if first else one if grammar.first else _PLACED
    opening = json.dumps(grammar.head.replace("{}", grammar.system) if grammar.system else "")
    system = _sum({"{}": "own.seen"}, *grammar.head.partition("{}"))
    asked, closing = map(_quoted, grammar.user.split("{}"))
    names = {"{}": "text", END: "eos_token"}
    answer = f"{{{{- {_sum(names, grammar.before, '{}', *grammar.after.partition(END))} -}}}}"
    if grammar.between is not None:
        further = f"{{{{- {_sum(names, grammar.before, '{}', grammar.between)} -}}}}"
        answer = f"{{%- if loop.last -%}}{answer}{{%- else -%}}{further}{{%- endif -%}}"
    return (
        f"{_TEXT}{{%- set own = namespace(system={opening}, seen='') -%}}"
        "{%- for message in messages if message['role'] == 'system' -%}"
        "{%- set own.seen = own.seen + said(message['content']) -%}{%- endfor -%}"
        f"{{%- if own.seen -%}}{{%- set own.system = {system} -%}}{{%- endif -%}}{{{{- own.system -}}}}"
        "{%- for message in messages if message['role'] != 'system' -%}{%- set text = said(message['content']) -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- {asked} -}}}}{{%- set seen = namespace(n=0) -%}}"
        + _PICTURES
        + f"{{%- if seen.n -%}}{pictures}{{%- endif -%}}"
        f"{{{{- text -}}}}{{%- if not loop.last or add_generation_prompt -%}}{{{{- {closing} -}}}}{{%- endif -%}}"
        f"{{%- else -%}}{answer}{{%- endif -%}}{{%- endfor -%}}"
    )


def begun(template: str | None, tokenizer: Tokenizer) -> str | None:
    """A chat template that writes what every text begins with itself, as those of language models do: who reads one
    lets the tokenizer add nothing. A processor of pictures does let it add something, so theirs do not."""
    return f"{{{{- {_quoted(''.join(tokenizer.begins))} -}}}}{template}" if template and tokenizer.begins else template


_BEGUN = re.compile(r"\{\{- '[^'{}]*' -\}\}(?=\{%- macro said|\{%- for message)")


def own_chat_template(form: ChatForm) -> str:
    """A language model's own template with pictures in its turns: the same pieces around them, in Jinja for the
    messages form. Raises CheckpointError where it could not be cut."""
    bare, headed = form.bare, form.headed
    if isinstance(bare, str):
        raise CheckpointError(f"the language model's own chat template has no place for pictures that is known: {bare}")
    first = _trimmed("text", bare, FIRST)
    if isinstance(headed, Pieces) and _same_turns(headed, bare):
        if (own := _trimmed("text", headed, FIRST)) != first:
            first = f"{own} if own.seen else {first}"
        system = (
            f"{{{{- {json_of(headed.head)} + {_trimmed('own.seen', headed, 'system')} + {json_of(headed.open)} -}}}}"
        )
    else:
        why = headed if isinstance(headed, str) else "it writes turns otherwise after one"
        system = f"{{{{- raise_exception({json_of('no system text: ' + why)}) -}}}}"
    return (
        f"{_TEXT}{{%- set own = namespace(seen='') -%}}"
        "{%- for message in messages if message['role'] == 'system' -%}"
        "{%- set own.seen = own.seen + said(message['content']) -%}{%- endfor -%}"
        f"{{%- if own.seen -%}}{system}{{%- else -%}}{{{{- {json_of(bare.open)} -}}}}{{%- endif -%}}"
        "{%- for message in messages if message['role'] != 'system' -%}{%- set text = said(message['content']) -%}"
        "{%- if message['role'] == 'user' -%}{%- set seen = namespace(n=0) -%}"
        f"{_PICTURES}{{%- if seen.n -%}}{_PLACED}{{%- else -%}}"
        f"{{%- set text = ({first}) if loop.first else {_trimmed('text', bare, 'user')} -%}}"
        "{%- endif -%}{{- text -}}"
        f"{{%- if loop.revindex == 2 -%}}{{{{- {json_of(bare.before_last_answer)} -}}}}"
        f"{{%- elif not loop.last -%}}{{{{- {json_of(bare.before_answer)} -}}}}"
        f"{{%- elif add_generation_prompt -%}}{{{{- {json_of(bare.prompt)} -}}}}{{%- endif -%}}"
        f"{{%- elif loop.last -%}}{{{{- {_trimmed('text', bare, LAST)} + {json_of(bare.end)} -}}}}"
        f"{{%- else -%}}{{{{- {_trimmed('text', bare, 'assistant')} + {json_of(bare.next)} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def _same_turns(one: Pieces, other: Pieces) -> bool:
    """Do they write turns alike, whatever stands before them and becomes of the first question's white space?"""
    own = {"system", FIRST}
    trims = [{role: how for role, how in pieces.trims.items() if role not in own} for pieces in (one, other)]
    return trims[0] == trims[1] and replace(one, head=other.head, open=other.open, trims=other.trims) == other


def json_of(text: str) -> str:
    """As a Jinja string, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _trimmed(variable: str, pieces: Pieces, role: str) -> str:
    return variable + _IN_JINJA[pieces.trims.get(role, "as it is")]


_IN_JINJA = {
    "as it is": "",
    "stripped": ".strip()",
    "stripped on the left": ".lstrip()",
    "stripped on the right": ".rstrip()",
    "without line breaks around it": ".strip('\\n')",
    "without line breaks before it": ".lstrip('\\n')",
}
"""What :mod:`isthmus.data.chat` knows of a content's ends, as a method's call."""


def _quoted(text: str) -> str:
    """As a Jinja string."""
    return "'" + text.replace("\n", "\\n") + "'"


def _sum(variables: Mapping[str, str], *texts: str) -> str:
    """A Jinja sum of texts, by name where they are ``variables``."""
    return " + ".join(variables.get(text) or _quoted(text) for text in texts if text)


def template_named(text: str) -> str | None:
    """The name of the template whose Jinja this is; none for another one."""
    bare = _BEGUN.sub("", text.strip(), count=1) if _BEGUN.match(text.strip()) else text.strip()
    return next((name for name in TEMPLATES if bare in (chat_template(name), chat_template(name, first=True))), None)


def question_template(question: str, *, clean: bool) -> str:
    """BLIP-2's form of a question in Jinja, pictures apart (the processor puts them in front)."""
    before, after = (json.dumps(part) for part in question.split("{}", 1))
    tidy = "{%- set text = text | trim -%}"
    if clean:
        marks = "".join(f" | replace({json.dumps(mark)}, '')" for mark in '.!"()*#:;~')
        tidy = "{%- set text = (text | lower" + marks + ").rstrip(' ').split(' ')[:50] | join(' ') -%}"
    return (
        f"{_TEXT}{{%- for message in messages if message['role'] != 'system' -%}}"
        "{%- set text = said(message['content']) -%}{%- set gap = '' if loop.first else ' ' -%}"
        f"{{%- if message['role'] == 'user' -%}}{tidy}{{{{- gap + {before} + text + {after} -}}}}"
        "{%- else -%}{{- gap + text | trim -}}{%- endif -%}{%- endfor -%}"
    )


def with_dtype(described: Mapping[str, object], weights: Mapping[str, Tensor]) -> dict[str, object]:
    """With the dtype under the name that every version reads."""
    return {**described, "torch_dtype": common_dtype(list(weights.values()))}
