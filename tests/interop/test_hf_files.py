"""transformers' own processors over our folders make the ids and pixels that our processors make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from isthmus.data.collate import collate
from isthmus.data.images import open_image
from isthmus.data.record import Record, Text
from isthmus.data.text import TEMPLATES, render
from isthmus.interop.convert import write_model
from isthmus.interop.hf_files import swapped
from isthmus.interop.written_template import chat_template, template_named
from isthmus.opening import load
from isthmus.testing import probe
from tests.interop import tiny_models


def theirs_and_ours(model: Any, folder: Path, text: str, messages: list[dict[str, Any]] | None) -> Any:
    """Their inputs for a question (or a caption) about picture 1, and our example with their image token in place."""
    write_model(model, folder, "hf", lossy=True)
    processor = AutoProcessor.from_pretrained(folder)
    record = probe.records(model, [text], [1])[0]
    image = open_image(record.images[0].source)
    if messages is None:
        return processor(text=[text], images=image, return_tensors="pt"), model.processor.example(record, 0)
    said = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = processor(text=said, images=image, return_tensors="pt")
    ours = model.processor.prompt(record)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for place in ours.places:
        ours.streams[place.stream].ids[place.start : place.start + place.length] = [token] * place.length
    return found, ours


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_llava(mode: str, tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "A large, blue cube?"}]
    found, ours = theirs_and_ours(
        tiny_models.llava(mode=mode), tmp_path / "m", "A large, blue cube", [{"role": "user", "content": content}]
    )
    assert found["input_ids"][0].tolist() == ours.streams["lm"].ids
    assert torch.equal(found["pixel_values"][0], ours.pixels[0](ours.visuals[0]))


@pytest.mark.parametrize("pictures", [(), (1,), (1, 2)])
@torch.no_grad()
def test_llava_by_placeholders_is_llava_by_places(pictures: tuple[int, ...], tmp_path: Path) -> None:
    """Two turns about no, one and two pictures: LlavaProcessor's ids and transformers' logits are ours."""
    model = tiny_models.llava()
    write_model(model, tmp_path / "m", "hf", lossy=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    visuals = [replace(probe.picture(n), role="user") for n in pictures]
    turns = [("user", "a cube?"), ("assistant", "two blue ones"), ("user", "and a ring?")]
    record = Record("r", (*visuals, *(Text(text, role=role) for role, text in turns)))  # type: ignore[arg-type]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"] = [{"type": "image"} for _ in pictures] + messages[0]["content"]
    said = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [open_image(v.source) for v in visuals] or None
    found = processor(text=said, images=images, return_tensors="pt")
    example, token = model.processor.prompt(record), theirs.config.image_token_id
    batch = collate([example])
    placed = batch.text["lm"].ids.clone()
    for place in example.places:
        placed[0, place.start : place.start + place.length] = token
    assert int((placed == token).sum()) == 16 * len(pictures)
    assert torch.equal(found["input_ids"], placed)
    ours = model.net.language.logits(model.net.embed_prompt(batch))
    torch.testing.assert_close(theirs(**found).logits[..., : ours.shape[-1]], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["blip2 opt", "blip2 t5", "instructblip"])
def test_blip2(name: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "A large, blue (cube)?"}]
    found, ours = theirs_and_ours(tiny_models.MODELS[name](), tmp_path / "m", "A large, blue (cube)", messages)
    streams = ours.streams
    assert found["input_ids"][0].tolist() == (streams.get("lm") or streams["encoder"]).ids
    assert torch.equal(found["pixel_values"][0], ours.pixels[0](ours.visuals[0]))
    if "qformer" in streams:
        assert found["qformer_input_ids"][0].tolist() == streams["qformer"].ids


@pytest.mark.parametrize("name", ["clip", "siglip", "blip2 represent"])
def test_pairs(name: str, tmp_path: Path) -> None:
    model = tiny_models.MODELS[name]()
    found, ours = theirs_and_ours(model, tmp_path / "m", "a large blue cube", None)
    (stream,) = ours.streams.values()
    moved = {2: model.processor.tokenizer.vocab_size - 1} if name == "clip" else {}  # end of text, renumbered
    assert found["input_ids"][0].tolist() == [moved.get(i, i) for i in stream.ids]
    assert torch.equal(found["pixel_values"][0], ours.pixels[0](ours.visuals[0]))


CONVERSATIONS = [
    [("user", 1, "what?")],
    [("user", 2, "  what? "), ("assistant", 0, "a cube"), ("user", 0, " and now?")],
    [("system", 0, "Be brief."), ("user", 1, ""), ("assistant", 0, 'a "ring"'), ("user", 0, "why?")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "vicuna_bare", "llava_hf"])
def test_chat_templates_say_what_ours_say(name: str, turns: list[tuple[Any, int, str]], tmp_path: Path) -> None:
    tiny_models.tokenizer().save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages: list[dict[str, Any]] = []
    parts: list[Any] = []
    for role, images, text in turns:
        content = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
        messages.append({"role": role, "content": content if images else text})
        parts += [replace(probe.picture(1), role=role)] * images + ([Text(text, role=role)] if text else [])
    template = chat_template(name)
    found = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert found == str(render(Record("r", tuple(parts)), name, prompt=True))
    assert found.endswith(" ASSISTANT:")


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "mistral_instruct"])
@pytest.mark.parametrize("turn", ["q\n#", " a # b # c ", "# #\nq # ", " ", "#  q\n\n"])
def test_chat_templates_place_pictures_where_ours_do(name: str, turn: str, tmp_path: Path) -> None:
    tiny_models.tokenizer().save(tmp_path)
    pieces = [p for n, text in enumerate(turn.split("#")) for p in ([None] if n else []) + ([text] if text else [])]
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in pieces]
    parts = tuple(probe.picture(1) if p is None else Text(p, role="user") for p in pieces)
    found = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=chat_template(name),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert found == str(render(Record("r", parts), name, prompt=True))


def test_templates_are_told_apart_by_their_text() -> None:
    assert [template_named(str(chat_template(n))) for n in TEMPLATES if n != "document"] == [
        n for n in TEMPLATES if n != "document"
    ]
    assert template_named("{{ messages }}") is None
    assert template_named(f"{chat_template('vicuna_v1')}\n") == "vicuna_v1"
    assert chat_template("document") is None


@pytest.mark.parametrize("kind", ["lm", "llava"])
def test_a_written_folder_reads_a_conversation_from_its_beginning_once(kind: str, tmp_path: Path) -> None:
    """Readers of a chat template add nothing to it: what a text begins with must stand in it."""
    model = getattr(tiny_models, kind)()
    folder = tmp_path / "hf"
    write_model(model, folder, "hf", lossy=True)
    question = Record("r", (Text("how many?", role="user"), Text("two", "assistant"), Text("red?", role="user")))
    messages = [{"role": p.role, "content": str(p.text)} for p in question.texts]
    ids = model.processor.prompt(question).streams["lm"].ids
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "lm":
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    else:
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        processor = AutoProcessor.from_pretrained(folder)
        found = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert found["input_ids"][0] == ids
    opened = load(folder)
    assert opened.processor.template == model.processor.template
    assert opened.processor.prompt(question).streams["lm"].ids == ids


def test_swapped_ids_change_nothing_else() -> None:
    old = tiny_models.tokenizer()
    new = swapped(old, 2, old.vocab_size - 1)
    assert (new.eos_id, new.bos_id, new.vocab_size) == (old.vocab_size - 1, old.bos_id, old.vocab_size)
    text = "two small balls beside a large blue ring"
    assert new.encode(text) == [{2: new.eos_id, new.eos_id: 2}.get(i, i) for i in old.encode(text)]
    assert new.decode(new.encode(text)) == text
