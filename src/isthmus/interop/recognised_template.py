"""Which template of ours a folder's chat template is, by what it renders of known conversations, not by its source.

A template is rendered in Jinja's sandbox, as transformers does; nothing else of the folder is run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.checkpoint import read_json
from isthmus.data.chat import ChatForm, Pieces
from isthmus.data.images import as_image
from isthmus.data.record import Part, Record, Text
from isthmus.data.text import TEMPLATES, Grammar, render
from isthmus.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from isthmus.errors import CheckpointError, DataError
from isthmus.interop.hf_tokenizer import rendered
from isthmus.interop.written_template import template_named

_QUESTION, _ANSWER, _FURTHER, _SYSTEM = "Is it red?", "A cube.", "And this?", "Be brief."


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognisedTemplate:
    """``name``: ours that writes a question in the same way, none if no one does; ``further``: it writes further turns
    alike; ``system``: it writes a system's text alike, or refuses one; ``begins``: it writes the beginning of sequence
    itself."""

    name: str | None
    further: bool = True
    system: bool = True
    begins: bool = False


def recognise_template(text: str, tokenizer: Tokenizer, *, pictures: bool) -> RecognisedTemplate:
    """What of :data:`isthmus.data.text.TEMPLATES` a chat template in Jinja is."""
    if (own := template_named(text)) is not None:
        return RecognisedTemplate(name=own)
    render = _renderer(text, tokenizer, pictures)
    if (first := render(1)) is None:
        return RecognisedTemplate(name=None)
    bos = tokenizer.specials["bos_token"]
    begins = bool(bos) and first.startswith(str(bos))
    alike = [name for name in _conversations() if _ours(name, 1, pictures) == _bare(first, tokenizer)]
    three_turns = render(3)
    found = [n for n in alike if three_turns is not None and _ours(n, 3, pictures) == _bare(three_turns, tokenizer)]
    headed = render(1, system=True)
    same = [n for n in found if headed is None or _ours(n, 1, pictures, system=True) == _bare(headed, tokenizer)]
    if found or alike:
        name = (same or found or alike)[0]
        return RecognisedTemplate(name=name, further=bool(found), system=bool(same), begins=begins)
    return RecognisedTemplate(name=None, begins=begins)


def places_pictures(text: str, tokenizer: Tokenizer) -> bool:
    """Can a chat template be cut into spans, and does ours show a turn's pictures, in front or among its text, as it
    does?"""
    form = ChatForm(tokenizer.with_chat_template(text))
    begin = "".join(tokenizer.begins)  # which a processor of pictures adds where the template does not write it
    if not isinstance(form.bare, Pieces) or not form.bare.open.startswith(begin):
        return False
    names = {name: token for name, token in tokenizer.specials.items() if token}
    picture, said = {"type": "image"}, {"type": "text", "text": _QUESTION}
    shown, question = as_image("probe.png"), Text(_QUESTION, role="user")  # never opened
    for order in ((0, 1), (0, 0, 1), (1, 0, 1)):
        theirs = rendered(text, [{"role": "user", "content": [(picture, said)[n] for n in order]}], names)
        try:
            ours = render(Record("probe", tuple((shown, question)[n] for n in order)), form, prompt=True)
        except DataError:  # it writes its marks where ours finds none
            return False
        if theirs != str(ours):
            return False
    return True


def chat_template_of(folder: Path) -> str:
    """The folder's chat template in Jinja, from a file of its own or within another; empty without one. Raises
    CheckpointError for one that is no text."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several by name
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
        if isinstance(found, Mapping):
            found = found.get("default")
        if found is not None and not isinstance(found, str):
            raise CheckpointError(f"{folder / name}: its chat_template is no text, but a {type(found).__name__}.")
        if found is not None:
            return found
    return ""


def _conversations() -> Sequence[str]:
    return [name for name, template in TEMPLATES.items() if isinstance(template, Grammar)]


def _ours(name: str, turns: int, pictures: bool, *, system: bool = False) -> str:
    first: tuple[Part, ...] = (Text(_QUESTION, role="user"),)
    if pictures:
        first = (as_image("probe.png"), *first)  # never opened
    if system:
        first = (Text(_SYSTEM, role="system"), *first)
    more = (Text(_ANSWER, role="assistant"), Text(_FURTHER, role="user"))
    return str(render(Record("probe", first + more * (turns > 1)), name, prompt=True))


def _renderer(text: str, tokenizer: Tokenizer, pictures: bool) -> Callable[..., str | None]:
    """What the template makes of the first ``turns`` of the probe; none where it makes nothing of it."""
    names = {name: token or "" for name, token in tokenizer.specials.items()}

    def render(turns: int, *, system: bool = False) -> str | None:
        said = (("user", _QUESTION), ("assistant", _ANSWER), ("user", _FURTHER))[:turns]
        said = (("system", _SYSTEM),) * system + said
        shown = [{"type": "image"}] if pictures else []
        parts = [
            {"role": role, "content": [*(shown if number == system else []), {"type": "text", "text": t}]}
            for number, (role, t) in enumerate(said)
        ]
        if pictures:
            return rendered(text, parts, names)
        plain = [{"role": role, "content": t} for role, t in said]
        return rendered(text, plain, names) or rendered(text, parts, names)

    return render


def _bare(text: str, tokenizer: Tokenizer) -> str:
    """Without the beginning of sequence, and its end as people write it."""
    bos, eos = tokenizer.specials["bos_token"], str(tokenizer.specials["eos_token"])
    return (text.removeprefix(bos) if bos else text).replace(eos, "</s>")
