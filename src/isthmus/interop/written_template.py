"""Chat templates in Jinja that a folder for transformers is written with: one of ours by name, a language model's own
with pictures in its turns, BLIP-2's words.

All begin alike: ``messages`` becomes what :mod:`isthmus.data.text` makes of a conversation, one system text in front,
what one speaker says in a row one turn, each content one text, with ``<image>`` where its pictures stand. What follows
reads nothing else; a language model's own template follows as it is, so that whatever it makes of a text is made there.
"""

import hashlib
import json
import re

from isthmus.data.blip2 import MOST_WORDS, PromptProcessor
from isthmus.data.chat import SWITCHES, ChatForm, form_of
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.data.tokenizer import END, Tokenizer
from isthmus.errors import CheckpointError

_TEXT = "part['text']"

_PARTS = (
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string"
    " else message['content'] or [] -%}"
)
_PLACED = (
    "{%- if part['type'] in ('image', 'image_url') -%}{%- set said.shown = said.shown + 1 -%}"
    "{%- set said.text = said.text + ('\\n' if said.text[-1:].strip() else '') + '<image>' -%}"
    "{%- elif part['type'] == 'text' and said.spoken -%}{%- set said.text = said.text + part['text'] -%}"
    "{%- elif part['type'] == 'text' and part['text'].strip() -%}{%- set said.spoken = true -%}"
    "{%- set said.text = said.text + ('\\n' if said.text else '') + part['text'].lstrip() -%}{%- endif -%}"
)
"""A turn with pictures: they stand where they stood, and the text is stripped."""
_FIRST = (
    "{%- if said.shown == 1 -%}{%- set said.text = said.plain.strip() -%}"
    "{%- set said.text = '<image>' + ('\\n' if said.text else '') + said.text -%}{%- endif -%}"
)


def _turns(pictures: str = "placed", *, text: str = _TEXT, parts: bool = False) -> str:
    """The beginning of a template. ``pictures`` are ``placed`` where they stand, a turn's only one put ``first``, or
    ``left out``; ``speechless`` leaves out turns that hold nothing else, too. ``text`` is what becomes of a part's, and
    with ``parts`` a content stays a list of one. ``isthmus.asked``: the user says something."""
    shown, spoken = pictures in ("placed", "first"), pictures == "speechless"
    content = "said.text.rstrip() if said.shown else said.plain" if shown else "said.plain"
    kept = "[{'type': 'text', 'text': content}]" if parts else "content"
    return (
        "{%- set isthmus = namespace(head={'role': 'system', 'content': []}, turns=[], messages=[], asked=false) -%}"
        "{%- for message in messages -%}"
        + _PARTS
        + "{%- set parts = parts | selectattr('type', 'equalto', 'text') | list -%}" * spoken
        + "{%- if message['role'] == 'system' -%}"
        "{%- set isthmus.head = dict(isthmus.head, **dict(message, content=isthmus.head['content'] + parts)) -%}"
        + "{%- elif parts == [] -%}"
        * spoken
        + "{%- elif isthmus.turns and message['role'] == isthmus.turns[-1]['role']"
        " and message['role'] in ('user', 'assistant') -%}"
        "{%- set more = dict(message, content=isthmus.turns[-1]['content'] + parts) -%}"
        "{%- set isthmus.turns = isthmus.turns[:-1] + [dict(isthmus.turns[-1], **more)] -%}"
        "{%- else -%}{%- set isthmus.turns = isthmus.turns + [dict(message, content=parts)] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for turn in [isthmus.head] + isthmus.turns -%}"
        "{%- set said = namespace(plain='', text='', spoken=false, shown=0) -%}"
        "{%- for part in turn['content'] -%}"
        f"{{%- if part['type'] == 'text' -%}}{{%- set said.plain = said.plain + ({text}) -%}}"
        "{%- if turn['role'] == 'user' -%}{%- set isthmus.asked = true -%}{%- endif -%}{%- endif -%}"
        + _PLACED * shown
        + "{%- endfor -%}"
        + _FIRST * (pictures == "first")
        + f"{{%- set content = {content} -%}}{{%- if content or not loop.first -%}}"
        f"{{%- set isthmus.messages = isthmus.messages + [dict(turn, content={kept})] -%}}"
        "{%- endif -%}{%- endfor -%}{%- set messages = isthmus.messages -%}"
    )


def chat_template(name: str) -> str | None:
    """One of :data:`isthmus.data.text.TEMPLATES` in Jinja for the messages form; none where it has no conversation.

    Beginning-of-sequence is not in it (see :func:`begun`): twice would be once too often.
    """
    if name not in TEMPLATES or name == "document":
        return None
    if name == "plain":
        return _PLAIN
    grammar = TEMPLATES[name]
    assert isinstance(grammar, Grammar)  # those that are no grammar are answered above
    said, told = "message['content']", "messages[0]['content']"
    head = _sum(*grammar.head.partition("{}"), said=told)
    otherwise = json_of(grammar.head.replace("{}", grammar.system) if grammar.system else "")
    asked, closing = grammar.user.split("{}")
    after = grammar.after.partition(END)
    answer = f"{{{{- {_sum(grammar.before, '{}', *after, said=said)} -}}}}"
    if grammar.between is not None:
        further = f"{{{{- {_sum(grammar.before, '{}', grammar.between, said=said)} -}}}}"
        answer = f"{{%- if loop.last -%}}{answer}{{%- else -%}}{further}{{%- endif -%}}"
    return (
        _turns("first" if grammar.first else "placed")
        + "{%- set headed = messages and messages[0]['role'] == 'system' -%}"
        f"{{{{- ({head}) if headed else {otherwise} -}}}}"
        "{%- for message in messages if message['role'] != 'system' -%}{%- if message['role'] == 'user' -%}"
        f"{{{{- {_sum(asked, '{}', said=said)} -}}}}"
        f"{{%- if not loop.last or add_generation_prompt -%}}{{{{- {json_of(closing)} -}}}}{{%- endif -%}}"
        f"{{%- else -%}}{answer}{{%- endif -%}}{{%- endfor -%}}"
    )


_PLAIN = (
    "{%- set isthmus = namespace(said=[]) -%}{%- for message in messages -%}"
    + _PARTS
    + "{%- for part in parts -%}{%- if part['type'] in ('image', 'image_url') -%}<image>"
    "{%- elif part['type'] == 'text' and message['role'] == 'assistant' -%}"
    "{%- set isthmus.said = isthmus.said + [part['text']] -%}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    "{%- if isthmus.said and not add_generation_prompt -%}{%- if isthmus.said | length > 1 -%}"
    "{{- raise_exception('the template plain takes one caption') -}}{%- endif -%}"
    "{{- isthmus.said[0] + '\\n' -}}{%- endif -%}"
)


def begun(template: str | None, tokenizer: Tokenizer) -> str | None:
    """A chat template that writes what every text begins with itself, as those of language models do: who reads one
    lets the tokenizer add nothing. A processor of pictures does let it add something, so theirs do not."""
    return f"{{{{- {json_of(''.join(tokenizer.begins))} -}}}}{template}" if template and tokenizer.begins else template


_BEGUN = re.compile(r"\{\{- (?:'[^'{}]*'|\"[^\"{}]*\") -\}\}(?=\{%- )")


def template_named(text: str) -> str | None:
    """The name of the template whose Jinja this is, or was in folders of before; none for another one."""
    bare = _BEGUN.sub("", text.strip(), count=1) if _BEGUN.match(text.strip()) else text.strip()
    before = _BEFORE.get(hashlib.sha256(bare.encode()).hexdigest()[:16])
    return before or next((name for name in TEMPLATES if bare == chat_template(name)), None)


_BEFORE = {
    "5eef3bdc7f3f1b75": "plain",
    "6fc59640449817fc": "vicuna_v1",
    "e7af040701241d67": "vicuna_v1",
    "8de6ed762af116fd": "llava_v1",
    "af0b8c4279be1eb4": "llava_v1",
    "ce8c61cb8d6e3856": "vicuna_bare",
    "671c9af3d9ed0151": "vicuna_bare",
    "1a44c6bb7f1d815a": "llava_hf",
    "189d85fa3037f029": "llava_hf",
    "0335aae80e32b80b": "mistral_instruct",
    "cb08bda22dd788c3": "mistral_instruct",
}
"""Names by the beginning of the sha256 of Jinja that folders of before hold."""


def own_chat_template(form: ChatForm) -> str:
    """A language model's own template behind turns with pictures in them.

    Raises CheckpointError for a template that could not be cut: a folder with it would be asked otherwise once it is
    read again.
    """
    if isinstance(form.bare, str):
        raise CheckpointError(
            f"the language model's own chat template has no place for pictures that is known: {form.bare}"
        )
    begin = _turns("placed", parts=form.takes_parts()).removesuffix("-%}") + "%}"
    return form.template if begin in form.template else _behind(begin, form)


def _behind(begin: str, form: ChatForm) -> str:
    """The form's template behind ``begin``, which ends in a block that leaves white space after it, its switches
    before."""
    switches = re.match(SWITCHES, form.template)
    assert switches is not None  # it fits nothing, too
    rest = form.template[switches.end() :]
    # A newline after a block goes: one more where the text began with one, or with a block on a line of its own.
    return f"{switches[0]}{begin}" + ("\n" if not switches[0] and rest[:1].isspace() else "") + rest


def blip2_template(processor: PromptProcessor) -> str:
    """BLIP-2's words in Jinja, or its language model's own template; pictures apart, for its processor puts them in
    front."""
    said = "message['content']"
    caption = f"{said}.strip()"
    if processor.clean:
        spaced = "".join(f".replace({json_of(mark)}, ' ')" for mark in _MARKS)
        caption = f"({said}.lower(){spaced}.split()[:{MOST_WORDS}] | join(' '))"
    end = json_of("\n") if processor.end == "newline" else "eos_token"
    ends = "" if processor.start_id is not None else f" + ({end} if loop.last else '')"  # an encoder reads no answer
    gap = json_of(" " if processor.prompt_text else "")
    begun = "" if processor.template is None else "".join(processor.tokenizer.begins)  # else the tokenizer adds it
    captioned = (
        f"{{{{- {json_of(begun + processor.prompt_text)} -}}}}{{%- if not add_generation_prompt -%}}"
        "{%- for message in messages if message['role'] == 'assistant' -%}"
        f"{{{{- {gap} + {caption}{ends} -}}}}{{%- endfor -%}}{{%- endif -%}}"
    )
    if processor.template is not None:
        form = form_of(processor.template, processor.tokenizer)
        assert isinstance(form, ChatForm)  # no other is BLIP-2's
        text = f"{_cleaned(_TEXT)} if turn['role'] == 'user' else {_TEXT}" if processor.clean else _TEXT
        begin = _turns("left out", text=text, parts=form.takes_parts())
        chosen = f"{begin}{{%- if not isthmus.asked -%}}{captioned}{{%- else %}}"
        return _behind(chosen, form).removesuffix("\n") + "{%+ endif %}"  # a last newline goes
    before, after = map(json_of, processor.question.split("{}"))
    asked = _cleaned(said) if processor.clean else f"{said}.strip()"
    more = "{%- set said.text = said.text + (' ' if said.text else '') + "
    return (
        _turns("speechless") + f"{{%- if not isthmus.asked -%}}{captioned}{{%- else -%}}"
        "{%- set said = namespace(text='') -%}{%- for message in messages if message['role'] != 'system' -%}"
        f"{{%- if message['role'] == 'user' -%}}{more}{before} + {asked} + {after} -%}}"
        f"{{%- elif not (loop.last and add_generation_prompt) -%}}{more}{said}.strip(){ends} -%}}{{%- endif -%}}"
        "{%- endfor -%}{{- said.text -}}{%- endif -%}"
    )


_MARKS = '.!"()*#:;~'


def _cleaned(said: str) -> str:
    """:func:`isthmus.data.blip2.clean_question` of an expression."""
    gone = "".join(f".replace({json_of(mark)}, '')" for mark in _MARKS)
    return f"({said}.lower(){gone}.rstrip(' ').split(' ')[:{MOST_WORDS}] | join(' '))"


def json_of(text: str) -> str:
    """As a Jinja string, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _sum(*texts: str, said: str) -> str:
    """A Jinja sum of texts, of what is ``said`` (``{}``), and of the end of sequence."""
    names = {"{}": said, END: "eos_token"}
    return " + ".join(names.get(text) or json_of(text) for text in texts if text)
