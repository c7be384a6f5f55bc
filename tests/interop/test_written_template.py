"""Chat templates that are written for transformers make of any conversation what ours make of it, id by id."""

import json
import os
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, PreTrainedTokenizerFast

import isthmus
from isthmus.data.blip2 import PromptProcessor
from isthmus.data.chat import OWN, ChatForm, Pieces, chosen
from isthmus.data.images import ImageTransform, as_image, open_image
from isthmus.data.processors import with_template
from isthmus.data.record import Image, Part, Record, Text
from isthmus.data.text import TEMPLATES, Template, encode, render
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, ConfigError, DataError
from isthmus.interop.convert import write_model
from isthmus.interop.written_template import blip2_template, chat_template, own_chat_template, template_named
from isthmus.testing import probe
from tests.data.test_chat import KINDS, ODD, SPECIALS, THINKS
from tests.interop import tiny_models
from tests.interop.test_own_template import llava

SHOWN = {"type": "image"}
THOUGHT = "<think>\nIt has six faces.\n</think>\n\nA cube."
Said = Sequence[tuple[str, Any]]

SHAPES: dict[str, Said] = {
    "a question": [("user", "What is it?")],
    "a question in parts": [("user", ["What ", "is it?"])],
    "a picture": [("user", [SHOWN, "What is it?"])],
    "a picture after the question": [("user", ["What is it?", SHOWN])],
    "a picture within it": [("user", ["What is ", SHOWN, "  that? "])],
    "two pictures": [("user", [SHOWN, SHOWN, "Which is red?"])],
    "three pictures": [("user", [SHOWN, " one\u3000", SHOWN, "two", SHOWN, " ", "\n"])],
    "a picture alone": [("user", [SHOWN])],
    "a system text": [("system", "Be brief."), ("user", [SHOWN, "What is it?"])],
    "an empty system text": [("system", ""), ("user", "What is it?")],
    "two turns": [("user", [SHOWN, "What is it?"]), ("assistant", "A cube."), ("user", "And red?")],
    "four turns": [
        ("system", ["Be ", "brief."]),
        *[("user", [SHOWN, "One?"]), ("assistant", ["On", "e."])],
        *[("user", "Two?"), ("assistant", "Two.")],
        *[("user", [SHOWN, SHOWN, "Three?"]), ("assistant", "Three.")],
        ("user", ["Four?", SHOWN]),
    ],
    "white space": [("user", "  What?\n"), ("assistant", " Red.\n \n"), ("user", "\n And now? ")],
    "white space beside a picture": [("user", [" ", SHOWN, "\n What? \n"]), ("assistant", "\nRed."), ("user", "Now?")],
    "odd letters": [
        ("system", "{{ 'a' }} {% if %}"),
        ("user", [SHOWN, 'It\'s "\\n" {} <b> é 東 🙂?']),
        ("assistant", "'{}' \\ %}"),
        ("user", "{# no #}"),
    ],
    "two questions in a row": [("user", "What is it?"), ("user", [SHOWN, "And now?"])],
    "two answers in a row": [("user", "What?"), ("assistant", "A cube."), ("assistant", " Red."), ("user", "Why?")],
    "a system text later": [
        ("system", "Be brief."),
        *[("user", "What?"), ("assistant", "A cube."), ("system", " Please."), ("user", [SHOWN, "And now?"])],
    ],
    "a thought": [("user", [SHOWN, "What?"]), ("assistant", THOUGHT), ("user", "And now?")],
    "thoughts": [
        *[("system", "Be brief. /no_think"), ("user", [SHOWN, "What?"]), ("assistant", THOUGHT)],
        *[("user", [SHOWN, SHOWN, "/think Both?"]), ("assistant", ["<think>Of", " two.</think>", "Both."])],
        ("user", ["Why?", SHOWN]),
    ],
    "a thought alone": [("user", "What?"), ("assistant", "<think>\n\n</think>\n\n"), ("user", "And now?")],
    "a user's thought": [("user", [SHOWN, "</think>What?"]), ("assistant", "A cube."), ("user", "<think>Now?")],
}
LAST = ("assistant", "It's a cube.")
ALONE = "a picture alone"
"""As a prompt it is no conversation here, and a turn there."""
CASES: list[tuple[Said, bool]] = [(said, True) for name, said in SHAPES.items() if name != ALONE]
CASES += [([*said, LAST], False) for said in SHAPES.values()]
CASES += [([*SHAPES["a picture"], ("assistant", THOUGHT)], False)]


def messages(said: Said) -> list[dict[str, Any]]:
    def content(given: Any) -> Any:
        return given if isinstance(given, str) else [{"type": "text", "text": p} if p != SHOWN else p for p in given]

    return [{"role": role, "content": content(given)} for role, given in said]


def record(said: Said, picture: Image | None = None) -> Record:
    shown = picture or as_image("never-opened.png")
    parts: list[Part] = []
    for role, given in said:
        for piece in [given] if isinstance(given, str) else given:
            parts.append(shown if piece == SHOWN else Text(piece, role=role, learn=role == "assistant"))  # type: ignore[arg-type]
    return Record("r", tuple(parts))


@cache
def words() -> Tokenizer:
    told = ["a red cube, a blue ring: user assistant what is it? think"] * 3
    return Tokenizer.train(told, 300).with_tokens(*SPECIALS, "<image>")


@dataclass(frozen=True)
class Compared:
    """How many conversations both sides made the same of, and how many ours refused."""

    alike: int
    refused: int


def compared(tokenizer: Tokenizer, template: str, form: str | Template, switches: Mapping[str, Any]) -> Compared:
    """Ours and the written template on every shape, as prompts and with an answer."""
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.specials)
    how = {"chat_template": template, "return_dict": False, **switches}
    alike = refused = 0
    for said, prompt in CASES:
        try:
            encoded = encode(rendered := render(record(said), form, prompt=prompt), tokenizer)
        except (DataError, ConfigError):
            refused += 1
            continue
        ids = list(encoded.ids)
        for mark in reversed(encoded.marks):
            ids.insert(mark, tokenizer.id_of("<image>"))
        begin = () if rendered.begun else tokenizer.begin_ids  # else the tokenizer adds it
        theirs = [*begin, *peer.apply_chat_template(messages(said), add_generation_prompt=prompt, **how)]
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.decode(theirs, skip_special=False), said
        assert ids == theirs, said
        alike += 1
    return Compared(alike, refused)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("plain", "document")])
def test_ours_by_name(name: str) -> None:
    found = compared(words(), str(chat_template(name)), name, {})
    assert found == Compared(len(CASES), 0)


def test_a_picture_without_a_word_is_a_turn_there_and_the_export_says_so(tmp_path: Path) -> None:
    done = write_model(tiny_models.llava(), tmp_path / "hf", "hf", lossy=True)
    assert any("says nothing" in note for note in done.notes)
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=words().backend, **words().specials)
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    told = peer.apply_chat_template(messages(SHAPES[ALONE]), chat_template=chat_template("vicuna_bare"), **how)
    assert told == "USER: <image> ASSISTANT:"
    assert str(render(record(SHAPES[ALONE]), "vicuna_bare", prompt=True)) == "<image>"


def test_what_is_no_conversation_is_lost_by_name(tmp_path: Path) -> None:
    """It has no chat template, and a folder without one is asked in Vicuna's words."""
    model = tiny_models.llava(template="document")
    with pytest.raises(CheckpointError, match="'document', which is no conversation: such a model gets 'vicuna_v1'"):
        write_model(model, tmp_path / "hf", "hf")
    write_model(model, tmp_path / "hf", "hf", lossy=True)
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert isthmus.load(tmp_path / "hf").processor.template == "vicuna_v1"


def test_captions() -> None:
    found = compared(words(), str(chat_template("plain")), "plain", {})
    assert found.alike >= len(SHAPES) + 10
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=words().backend, **words().specials)
    with pytest.raises(Exception, match="takes one caption"):
        peer.apply_chat_template(messages([*SHAPES["two turns"], LAST]), chat_template=chat_template("plain"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_models_own(kind: str) -> None:
    form = ChatForm(words().with_chat_template(KINDS[kind]))
    written = own_chat_template(form)
    found = compared(words(), written, form, {})
    assert found.alike >= 20
    assert found.refused <= 10 + 8 * (kind == "gemma")  # which has no system text
    assert own_chat_template(ChatForm(words().with_chat_template(written))) == written
    again = ChatForm(words().with_chat_template(written))
    assert (again.bare, again.headed, again.stop) == (form.bare, form.headed, form.stop)
    assert compared(words(), written, again, {}) == found  # as it is read again


@pytest.mark.parametrize("before", ["\n", "  \n", " ", "\n\n"])
def test_what_a_template_writes_first_stays(before: str) -> None:
    """A newline after a block goes, and so does white space before a block at a line's beginning."""
    for text in (f"{before}{KINDS['chatml']}", f"{before}Hi. {KINDS['chatml']}"):
        form = ChatForm(words().with_chat_template(text))
        assert compared(words(), own_chat_template(form), form, {}).alike > 20
        for template in ("chat:day=Monday", "chat:day=Monday,night=Sunday"):
            named = text + "{{ '' if day is defined and night is defined }}"
            form = ChatForm(chosen(template, words().with_chat_template(named))[1])
            assert compared(words(), own_chat_template(form), form, {}).alike > 20


def test_a_template_that_takes_the_messages_first_gets_turns() -> None:
    """What it sets at its beginning is no switch."""
    text = "{% set rest = messages %}" + KINDS["chatml"].replace("in messages", "in rest")
    form = ChatForm(words().with_chat_template(text))
    assert compared(words(), own_chat_template(form), form, {}).alike > 20


@pytest.mark.parametrize("refusal", ["{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}", ""])
def test_contents_that_must_be_parts_stay_parts(refusal: str) -> None:
    """Without a refusal such a template leaves out a text."""
    text = (
        f"{{% for m in messages %}}{refusal}"
        "{{ '<|im_start|>' + m.role + '\\n' }}{% for p in m.content %}{{ p.text | trim }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    form = ChatForm(words().with_chat_template(text))
    assert isinstance(form.bare, Pieces)
    assert compared(words(), own_chat_template(form), form, {}).alike > 20


def test_what_else_stands_in_a_message_reaches_the_template() -> None:
    text = "{% for m in messages %}{{ m.get('tag', '') }}{% endfor %}" + KINDS["chatml"]
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=words().backend, **words().specials)
    tagged = [{**m, "tag": str(n)} for n, m in enumerate(messages(SHAPES["a system text later"]))]
    written = own_chat_template(ChatForm(words().with_chat_template(text)))
    told = peer.apply_chat_template(tagged, chat_template=written, tokenize=False)
    assert told.startswith("3124<|im_start|>system\nBe brief. Please.")


@pytest.mark.parametrize("why", ODD)
def test_what_cannot_be_cut_is_not_written(why: str) -> None:
    with pytest.raises(CheckpointError, match=f"no place for pictures that is known: .*{ODD[why][1]}"):
        own_chat_template(ChatForm(words().with_chat_template(ODD[why][0])))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{% set said = m.content | replace('blue', 'red') %}", "blue"),
        ("{% set said = m.content.partition('===')[0] %}", "==="),
        ("{% set said = m.content.removeprefix('/short') %}", "/short"),
        ("{% set said = m.content if m.content.find('!!') < 0 else '' %}", "!!"),
    ],
)
def test_a_template_that_looks_for_a_word_in_any_manner_is_met(text: str, word: str) -> None:
    """What was cut holds for contents without such a word alone."""
    template = KINDS["chatml"].replace("{% for m in messages %}", "{% for m in messages %}" + text)
    form = ChatForm(words().with_chat_template(template.replace("m.content + '<|im_end|>", "said + '<|im_end|>")))
    assert isinstance(form.bare, Pieces)
    said = [("user", f"{word} and more")]
    theirs = render(record(said), form, prompt=True)
    assert word not in str(theirs)
    with pytest.raises(DataError, match="makes something of its own"):
        render(record([*said, LAST]), form)


FOLDER = os.environ.get("ISTHMUS_TEMPLATES")
TOOL = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "published_templates.py"))
ROWS: list[dict[str, Any]] = json.loads(TOOL["TABLE"].read_text(encoding="utf-8"))


@pytest.mark.skipif(FOLDER is None, reason="ISTHMUS_TEMPLATES names no folder of published templates")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['slug']} {row.get('switches', '')}".strip())
def test_published_templates(row: dict[str, Any]) -> None:
    text = (Path(FOLDER or "") / f"{row['slug']}.jinja").read_text(encoding="utf-8")
    tokenizer = TOOL["_words"](row, text).with_tokens("<image>").with_chat_template(text)
    _, tokenizer = chosen(f"chat:{row['switches']}" if "switches" in row else OWN, tokenizer)
    form = ChatForm(tokenizer)
    if row["found"]["trained"] is not True:
        with pytest.raises(CheckpointError, match="no place for pictures"):
            own_chat_template(form)
        return
    written = own_chat_template(form)
    found = compared(tokenizer, written, form, {})
    assert found.alike >= 20
    again = ChatForm(tokenizer.with_chat_template(written))
    assert compared(tokenizer, written, again, {}) == found


@pytest.mark.parametrize("switch", ["", "enable_thinking=false"])
def test_transformers_asks_an_exported_llava_with_thoughts_as_we_do(switch: str, tmp_path: Path) -> None:
    """All of it: the folder by AutoProcessor, pictures opened and widened, thoughts of former answers left out."""
    write_model(tiny_models.lm(), tmp_path / "lm", "hf")
    thinks = THINKS.replace("<|im_start|>", "<pad>").replace("<|im_end|>", "<unk>")
    (tmp_path / "lm" / "chat_template.jinja").write_text(thinks)
    model, picture = llava(tmp_path / "lm"), probe.picture(1)
    if switch:
        model.processor = with_template(model.processor, f"chat:{switch}")
    write_model(model, tmp_path / "hf", "hf")
    theirs, again = AutoProcessor.from_pretrained(tmp_path / "hf"), isthmus.load(tmp_path / "hf")
    shown = {"type": "image", "image": open_image(picture.source)}
    alike = 0
    for said, prompt in CASES:
        told = messages(said)
        for message in told:
            if not isinstance(message["content"], str):
                message["content"] = [shown if part == SHOWN else part for part in message["content"]]
        how: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": True, "return_dict": True}
        for opened in (model, again):
            try:
                asked = opened.processor.prompt if prompt else lambda r, p=opened.processor: p.example(r, 0)
                example = asked(record(said, picture))
            except DataError:
                assert not prompt
                continue
            ids = list(example.streams["lm"].ids)
            for place in example.places:
                ids[place.start : place.start + place.length] = [theirs.image_token_id] * place.length
            assert ids == list(theirs.apply_chat_template(told, **how)["input_ids"][0]), said
            alike += 1
    assert alike >= 70
    thought = again.processor.prompt(record(SHAPES["a thought"], picture)).streams["lm"].ids
    assert "six faces" not in model.processor.tokenizer.decode(thought)
    write_model(again, tmp_path / "twice", "hf")
    files = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("hf", "twice")]
    assert files[0] == files[1]
    for wanted in ("true", "false"):  # a switch is set in a folder that is read again, too
        set_so = with_template(again.processor, f"chat:enable_thinking={wanted}").prompt(record(SHAPES["a question"]))
        shown_ids = theirs.tokenizer.apply_chat_template(
            messages(SHAPES["a question"]),
            chat_template=thinks,
            add_generation_prompt=True,
            enable_thinking=wanted == "true",
            return_dict=False,
        )
        assert list(set_so.streams["lm"].ids) == shown_ids


def blip2(**options: Any) -> PromptProcessor:
    tokenizer = options.pop("tokenizer", words())
    return PromptProcessor(tokenizer, ImageTransform.clip(32), num_tokens=4, max_text=512, **options)


BLIP2: dict[str, dict[str, Any]] = {
    "questions": {"prompt": "a photo of", "end": "newline"},
    "questions as they are": {"question": "{}", "clean": False},
    "captions without words before them": {"question": "Q: {} 'A'", "prompt": ""},
    "an encoder-decoder": {"start_id": 0},
}


@pytest.mark.parametrize("kind", [*BLIP2, "chat", "chat as it is", "chat with thoughts"])
def test_blip2(kind: str) -> None:
    if kind.startswith("chat"):
        tokenizer = words().with_chat_template(THINKS if kind == "chat with thoughts" else KINDS["chatml"])
        prompt_text = "a photo of" if kind == "chat" else ""
        processor = blip2(tokenizer=tokenizer, template=OWN, clean=kind != "chat as it is", prompt=prompt_text)
    else:
        processor = blip2(**BLIP2[kind])
    written = blip2_template(processor)
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=words().backend, **words().specials)
    more: list[tuple[Said, bool]] = [
        (SHAPES[ALONE], True),
        ([("user", [SHOWN]), ("assistant", " A red (cube). Yes!")], False),
        ([("user", [SHOWN]), ("assistant", "A cube."), ("user", "Red?")], True),
        ([("user", [SHOWN, "word " * 60])], True),
        ([("user", ""), LAST], False),
    ]
    alike = 0
    for said, prompt in [*CASES, *more]:
        try:
            rendered = processor._said(record(said), prompt=prompt)[0]
        except DataError:
            continue
        if "start_id" in BLIP2.get(kind, {}) and not prompt:
            continue  # what is learnt is the decoder's
        theirs = peer.apply_chat_template(
            messages(said), chat_template=written, add_generation_prompt=prompt, return_dict=False
        )
        begin = () if processor.template else processor.tokenizer.begin_ids  # else the tokenizer adds it
        assert [*begin, *theirs] == encode(rendered, processor.tokenizer).ids, said
        alike += 1
    assert alike >= 20


def test_folders_of_before_are_known() -> None:
    """Templates of names that were written otherwise."""
    plain = (
        "{%- for message in messages -%}{%- if message['content'] is not string -%}"
        "{%- for part in message['content'] -%}{%- if part['type'] in ('image', 'image_url') -%}<image>"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    )
    assert template_named(plain) == "plain"
    assert template_named("{{- '<s>' -}}" + plain) == "plain"
    assert template_named(plain.replace("image", "picture")) is None
