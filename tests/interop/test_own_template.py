"""A folder's own chat template from opening to training, saving and the way back to transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import isthmus
from isthmus.batch import IGNORE
from isthmus.cli import chat
from isthmus.data.chat import OWN
from isthmus.data.images import open_image
from isthmus.data.processor import SpliceProcessor
from isthmus.data.record import Record, Text
from isthmus.errors import ConfigError, DataError, IsthmusWarning
from isthmus.interop.convert import write_model
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.recipes.schema import StageSpec
from isthmus.systems import system
from isthmus.systems.base import Tokenizers
from isthmus.testing import probe
from isthmus.testing.contracts import verify
from tests.interop import tiny_models

CHATML = (
    "{% for m in messages %}{{ '<pad>' + m.role + '\\n' + m.content + '<unk>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<pad>assistant\\n' }}{% endif %}"
)
"""ChatML with two special tokens that the tiny vocabulary has."""
TURNS = [("system", "Be brief."), ("user", "a cube?"), ("assistant", "two"), ("user", "a ring?")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tiny_models.lm(), tmp_path / "lm", "hf")
    (tmp_path / "lm" / "chat_template.jinja").write_text(CHATML)
    return tmp_path / "lm"


def test_an_lm_answers_in_its_own_template(folder: Path, capsys: Any) -> None:
    model, words = isthmus.load(folder), AutoTokenizer.from_pretrained(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    asked = words.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    stops = [words.eos_token_id, words.unk_token_id]
    with torch.inference_mode():
        how: dict[str, Any] = {
            "eos_token_id": stops,
            "suppress_tokens": [0, 1],
            "attention_mask": torch.ones_like(asked),
        }
        ids = theirs.generate(asked, max_new_tokens=8, do_sample=False, **how)
    said = words.decode(ids[0, asked.shape[1] :], skip_special_tokens=True).strip()
    assert model.chat(MESSAGES, max_new_tokens=8) == said
    assert words.unk_token_id in model.processor.stop_ids  # the end of its turn
    chat.run(str(folder), "a cube?", [], max_new_tokens=4, temperature=0.0)
    one = model.chat([{"role": "user", "content": "a cube?"}], max_new_tokens=4)
    assert " ".join(capsys.readouterr().out.split()) == " ".join(one.split())
    assert all(score < 0 for score in model.score([Text("a cube?", role="user")], ["red", "blue"]))


_SIZES = {k: v for k, v in tiny_models.LLAMA.items() if k != "model_type"}
FAMILIES: dict[str, dict[str, Any]] = {
    kind: {"model_type": kind, **_SIZES, **more}
    for kind, more in {
        "llama": {},
        "mistral": {"sliding_window": None},
        "qwen2": {},
        "qwen3": {"head_dim": 8},
        "gemma": {"head_dim": 8},
        "phi3": {"pad_token_id": 0},
        "olmo2": {"pad_token_id": 0},
    }.items()
}
FAMILIES["gpt_neox"] = tiny_models.NEOX


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_transformers_own_in_eight_families(family: str, tmp_path: Path) -> None:
    write_model(tiny_models.lm(FAMILIES[family]), tmp_path / "lm", "hf")
    (tmp_path / "lm" / "chat_template.jinja").write_text(CHATML)
    model, words = isthmus.load(tmp_path / "lm"), AutoTokenizer.from_pretrained(tmp_path / "lm")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    never, stops = model.ended(Decoding()).forbidden_ids, model.ended(Decoding()).stop_ids
    how: dict[str, Any] = {"suppress_tokens": list(never), "eos_token_id": list(stops), "do_sample": False}
    for messages in (MESSAGES[1:2], MESSAGES):
        asked = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            ids = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, **how)
        said = words.decode(ids[0, asked.shape[1] :], skip_special_tokens=True).strip()
        assert model.chat(messages, max_new_tokens=12) == said


BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Near one of ours, and no special token in front."""


@pytest.mark.parametrize("template", [CHATML, BARE, "{{ bos_token }}" + BARE, None])
def test_a_conversation_begins_as_its_template_says_not_as_texts_do(folder: Path, template: str | None) -> None:
    """The tokenizer puts <s> before a text; transformers puts nothing there that the template does not write."""
    if template is None:  # as we export it
        write_model(tiny_models.lm(), folder / "again", "hf")
        folder = folder / "again"
    else:
        (folder / "chat_template.jinja").write_text(template)
    words = AutoTokenizer.from_pretrained(folder)
    assert words("a cube?")["input_ids"][0] == words.bos_token_id
    theirs = words.apply_chat_template(MESSAGES[1:2], add_generation_prompt=True, return_dict=False)
    asked = Record("r", (Text("a cube?", role="user"),))
    assert list(isthmus.load(folder).processor.prompt(asked).streams["lm"].ids) == theirs
    assert (theirs[0] == words.bos_token_id) == (template not in (CHATML, BARE))


def test_verify_holds_the_end_of_a_turn(folder: Path) -> None:
    model = isthmus.load(folder)
    assert [row.verdict for row in verify(model, only=["turns end"])] == ["pass"]
    model.processor.stop_ids = ()  # type: ignore[attr-defined]
    (row,) = verify(model, only=["turns end"])
    assert (row.verdict, row.difference) == ("FAIL", 1.0)


def test_the_template_goes_with_the_model(folder: Path, tmp_path: Path) -> None:
    model = isthmus.load(folder)
    isthmus.load(model.save(tmp_path / "own")).chat(MESSAGES, max_new_tokens=2)
    write_model(isthmus.load(tmp_path / "own"), tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == CHATML
    record = Record("r", tuple(Text(text, role=role) for role, text in TURNS))  # type: ignore[arg-type]
    prompts = [isthmus.load(f).processor.prompt(record).streams["lm"].ids for f in (folder, tmp_path / "own")]
    assert prompts[0] == prompts[1] == isthmus.load(tmp_path / "hf").processor.prompt(record).streams["lm"].ids


def llava(folder: Path) -> Model:
    """A LLaVA whose tokenizer carries the template, with the processor of a stage that names none."""
    base, words = tiny_models.llava(), isthmus.load(folder).processor.tokenizer
    stage = StageSpec.model_validate(
        {"name": "align", "data": [{}], "steps": 1, "batch_size": 1, "train": [{"pattern": "connector.*", "lr": 1.0}]}
    )
    processor = system("llava").processor(base.net, Tokenizers(words), base.processor.image, stage)
    assert isinstance(processor, SpliceProcessor)
    assert processor.template == OWN
    return Model(base.net, processor)


def test_a_llava_over_it_takes_it_and_transformers_asks_alike(folder: Path, tmp_path: Path) -> None:
    model, picture = llava(folder), probe.picture(1)
    write_model(model, tmp_path / "hf", "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    messages: list[dict[str, Any]] = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in TURNS]
    messages[1]["content"].insert(0, {"type": "image", "image": open_image(picture.source)})
    theirs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    turns = [Text(text, role=role) for role, text in TURNS]  # type: ignore[arg-type]
    parts = (turns[0], picture, *turns[1:])
    for opened in (model, isthmus.load(tmp_path / "hf")):
        example = opened.processor.prompt(Record("r", parts))
        ids = list(example.streams["lm"].ids)
        for place in example.places:
            ids[place.start : place.start + place.length] = [processor.image_token_id] * place.length
        assert ids == list(theirs["input_ids"][0])


def bridged(kind: str, folder: Path, **options: Any) -> Model:
    """A BLIP-2 or Flamingo whose language model's tokenizer carries the template, with the processor of a stage."""
    words = isthmus.load(folder).processor.tokenizer
    base = tiny_models.blip2() if kind == "blip2" else tiny_models.flamingo()
    own = system(kind)
    given = {"data": [{}], "steps": 1, "batch_size": 1, "train": [{"pattern": "connector.*", "lr": 1.0}], **options}
    stage = StageSpec.model_validate({"name": "generate", **given})
    return Model(base.net, own.processor(base.net, Tokenizers(own._extended(words)), base.processor.image, stage))


@pytest.mark.parametrize("kind", ["blip2", "flamingo"])
def test_blip2_and_flamingo_over_it_take_it_too(kind: str, folder: Path, tmp_path: Path) -> None:
    """In a prompt's ids stand those of transformers, but for the picture; what is learnt is an answer and its end."""
    model, picture = bridged(kind, folder), probe.picture(1)
    assert model.processor.template == OWN
    words = AutoTokenizer.from_pretrained(folder)
    theirs = words.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    texts = [Text(text, role=role) for role, text in TURNS]  # type: ignore[arg-type]
    blind = model.processor.prompt(Record("r", tuple(texts)))
    assert list(blind.streams["lm"].ids) == theirs
    prompt = model.processor.prompt(Record("r", (texts[0], picture, *texts[1:])))
    (place,), ids = prompt.places, list(prompt.streams["lm"].ids)
    rest = ids[: place.start] + ids[place.start + place.length :]
    if kind == "blip2":
        assert (place.start, rest) == (0, theirs)
    else:  # the picture stands in its turn, on a line of its own
        marked = [*MESSAGES[:1], {"role": "user", "content": "\na cube?"}, *MESSAGES[2:]]
        assert rest == words.apply_chat_template(marked, add_generation_prompt=True, return_dict=False)
    span = model.processor.example(Record("r", (picture, texts[1], Text("two", role="assistant", learn=True))), 0)
    learnt = [label for label in span.streams["lm"].labels or () if label != IGNORE]
    assert words.decode(learnt) == "two<unk>"
    assert words.unk_token_id in model.ended(Decoding()).stop_ids
    assert [row.verdict for row in verify(model, only=["turns end", "batch = single"])] == ["pass", "pass"]
    again = isthmus.load(model.save(tmp_path / "own"))
    messages: list[dict[str, Any]] = [*MESSAGES[:1], {"role": "user", "content": [{"type": "text", "text": "a cube?"}]}]
    messages[1]["content"].insert(0, {"type": "image", "image": open_image(picture.source)})
    assert again.chat(messages, max_new_tokens=4) == model.chat(messages, max_new_tokens=4)
    assert all(score < 0 for score in again.score([picture, texts[1]], ["red", "blue"]))
    assert model.provenance([Record("r", (picture, texts[1]))], {})["template"] == OWN


def test_a_stage_may_ask_otherwise(folder: Path) -> None:
    asked = Record("r", (Text("a cube?", role="user"),))
    own = bridged("blip2", folder, processor={"question": "Question: {} Answer:"})
    assert own.processor.template is None
    words = own.processor.tokenizer
    assert "Question: a cube? Answer:" in words.decode(own.processor.prompt(asked).streams["lm"].ids)
    assert bridged("flamingo", folder, template="paper").processor.template == "paper"
    with pytest.raises(ConfigError, match="take one of them out"):
        bridged("blip2", folder, template="chat", processor={"question": "{}"})
    with pytest.raises(ConfigError, match="in the words of `question`; not in 'vicuna_v1'"):
        bridged("blip2", folder, template="vicuna_v1")
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    refused = bridged("flamingo", folder).processor
    with pytest.raises(ConfigError, match="cannot be trained with"):
        refused.example(Record("r", (*asked.parts, Text("two", role="assistant", learn=True))), 0)


def test_an_lm_without_a_template_says_how_to_choose_one(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"--template NAME: vicuna_v1"):
        isthmus.load(folder).chat(MESSAGES)
    isthmus.load(folder, template="vicuna_bare").chat(MESSAGES, max_new_tokens=2)
    (folder / "mine.jinja").write_text(CHATML)
    model = isthmus.load(folder, template=str(folder / "mine.jinja"))
    assert model.processor.tokenizer.chat_template == CHATML
    errors = {"vicuna_bar": "did you mean", "chat": "carries no chat template", "no.jinja": "cannot read"}
    for wrong, said in errors.items():
        with pytest.raises(ConfigError, match=said):
            isthmus.load(folder, template=wrong)


def test_a_llava_whose_template_cannot_be_cut_is_told(folder: Path, tmp_path: Path) -> None:
    write_model(llava(folder), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.warns(IsthmusWarning, match="none that is known here"):
        isthmus.load(tmp_path / "hf")
