"""A chat template is told by what it renders, and a conversation begins once."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer

import isthmus
from isthmus.data.images import open_image
from isthmus.data.processor import TextProcessor
from isthmus.data.record import Record, Role, Text
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.errors import IsthmusWarning
from isthmus.interop.convert import write_model
from isthmus.interop.recognised_template import chat_template_of, recognise_template
from isthmus.interop.written_template import chat_template
from isthmus.model import Model
from isthmus.testing import probe
from tests.data.helpers import llama_like
from tests.interop import tiny_models
from tests.narrow import there

UPPER = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' if m['role'] != 'system' else '' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def spelt(name: str) -> str:
    """A template of ours in other words: one loop, by an inline condition, nothing of ours in it."""
    grammar = TEMPLATES[name]
    assert isinstance(grammar, Grammar)
    head = grammar.head.replace("{}", grammar.system) if grammar.system else ""
    opening, closing = (json.dumps(part) for part in grammar.user.split("{}"))
    ends = json.dumps(grammar.after.replace("\U0010fffd", "")) + " + eos_token"
    after = ends if grammar.between is None else f"({json.dumps(grammar.between)} if not loop.last else {ends})"
    said = "(m.content if m.content is string else m.content | map(attribute='text') | select('string') | join(''))"
    count = "(m.content | selectattr('type', 'equalto', 'image') | list | length)"
    seen = f"('' if m.content is string else '<image>\\n' * {count})"
    return (
        f"{{{{ {json.dumps(head)} }}}}{{% for m in messages %}}{{{{ ({opening} + {seen} + {said} + {closing}) if "
        f"m.role == 'user' else {json.dumps(grammar.before)} + {said} + {after} }}}}{{% endfor %}}"
    )


@pytest.mark.parametrize("name", [n for n, t in TEMPLATES.items() if isinstance(t, Grammar)])
def test_a_template_is_told_by_what_it_renders(name: str) -> None:
    words = tiny_models.tokenizer()
    for pictures in (True, False):
        told = recognise_template(spelt(name), words, pictures=pictures)
        assert (told.name, told.further, told.begins) == (name, True, False)
        assert recognise_template("{{ bos_token }}" + spelt(name), words, pictures=pictures).begins
    assert recognise_template(str(chat_template(name)), words, pictures=True).name == name


def test_what_only_looks_like_a_template_is_none(tmp_path: Path) -> None:
    words = tiny_models.tokenizer()
    for text in ("USER: {{ messages }}", "[INST] curious human USER:", "{{ raise_exception('no') }}", "{% broken"):
        assert recognise_template(text, words, pictures=True).name is None
    once = recognise_template("{{ 'USER: <image>\\nIs it red? ASSISTANT:' }}", words, pictures=True)
    assert (once.name, once.further) == ("vicuna_bare", False)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]})
    )
    assert chat_template_of(tmp_path) == "b"


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_llava_is_asked_as_its_processor_asks(file: str, begins: bool, tmp_path: Path) -> None:
    model, folder = tiny_models.llava(), tmp_path / "m"
    write_model(model, folder, "hf")
    (folder / "chat_template.jinja").unlink()
    text = ("{{ bos_token }}" if begins else "") + UPPER
    (folder / file).write_text(json.dumps({"chat_template": text}) if file.endswith("json") else text)
    processor, picture = AutoProcessor.from_pretrained(folder), probe.picture(1)
    turns: list[tuple[Role, str]] = [("user", "A cube?"), ("assistant", "two"), ("user", "a ring?")]
    messages: list[dict[str, Any]] = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
    messages[0]["content"].insert(0, {"type": "image", "image": open_image(picture.source)})
    theirs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    opened = isthmus.load(folder)
    example = opened.processor.prompt(Record("r", (picture, *(Text(t, role=r) for r, t in turns))))
    (token,) = opened.forbidden
    ids = list(example.streams["lm"].ids)
    for place in example.places:
        ids[place.start : place.start + place.length] = [token] * place.length
    assert ids == list(theirs["input_ids"][0])
    assert ids.count(there(opened.processor.tokenizer.bos_id)) == 1


def test_an_lm_whose_template_writes_the_beginning_begins_once(tmp_path: Path) -> None:
    write_model(tiny_models.lm(template="vicuna_bare"), tmp_path / "m", "hf")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ bos_token }}" + str(chat_template("vicuna_bare")))
    words = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs = words.apply_chat_template([{"role": "user", "content": "a cube?"}], add_generation_prompt=True)
    ids = isthmus.load(tmp_path / "m").processor.prompt(Record("r", (Text("a cube?", role="user"),))).streams["lm"].ids
    assert ids == list(theirs["input_ids"])


def test_further_turns_that_are_written_otherwise_are_told(tmp_path: Path) -> None:
    write_model(tiny_models.llava(), tmp_path / "m", "hf")
    (tmp_path / "m" / "chat_template.jinja").write_text(spelt("vicuna_bare").replace("eos_token", "'<end>'"))
    with pytest.warns(IsthmusWarning, match="writes a first question as vicuna_bare does and further turns otherwise"):
        isthmus.load(tmp_path / "m")


VICUNA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% set rest = messages[1:] %}"
    "{% else %}{{ head }}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("pieces", [False, True])
def test_a_template_that_is_ours_but_for_its_head_is_kept(pieces: bool, tmp_path: Path) -> None:
    """A system's text is followed by two line breaks; and where the template writes the beginning itself, a Llama
    tokenizer puts no dummy space behind it."""
    grammar = TEMPLATES["vicuna_v1"]
    assert isinstance(grammar, Grammar)
    model = tiny_models.lm()
    if pieces:
        model = Model(model.net, TextProcessor(llama_like(legacy=False), template="vicuna_v1", max_length=256))
    write_model(model, tmp_path / "m", "hf")
    head = json.dumps(grammar.system + " ")
    (tmp_path / "m" / "chat_template.jinja").write_text(f"{{% set head = {head} %}}{VICUNA}")
    words, opened = AutoTokenizer.from_pretrained(tmp_path / "m"), isthmus.load(tmp_path / "m")
    for said in ([("user", "a cube?")], [("system", "Be brief."), ("user", "a cube?")]):
        messages = [{"role": role, "content": text} for role, text in said]
        theirs = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        record = Record("r", tuple(Text(text, role=role) for role, text in said))  # type: ignore[arg-type]
        assert list(opened.processor.prompt(record).streams["lm"].ids) == list(theirs)
