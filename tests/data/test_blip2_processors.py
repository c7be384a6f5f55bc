"""BLIP-2's processors: streams, labels and places of both phases, the cleaning rules, bad samples."""

import numpy as np
import pytest
from PIL import Image as PilImage

from isthmus.batch import IGNORE
from isthmus.data.blip2 import PairProcessor, PromptProcessor, clean_caption, clean_question, newline_id
from isthmus.data.collate import collate
from isthmus.data.images import ImageTransform, as_image
from isthmus.data.processors import processor_from_dict
from isthmus.data.reading import scored
from isthmus.data.record import Record, Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import train_wordpiece
from isthmus.errors import ConfigError, DataError

WORDS = ["a small red cube and a big ring", "how many things are there?", "Question: Answer: USER: ASSISTANT:"] * 5
LM = Tokenizer.train(WORDS, 400)
BERT = train_wordpiece(WORDS, 120)
IMAGE = ImageTransform.clip(8)
R = 3


def picture():
    return as_image(PilImage.fromarray(np.zeros((8, 8, 3), np.uint8)))


def caption(text: str | tuple[str, ...] = "a small red cube") -> Record:
    return Record("c", (picture(), Text(text, learn=True)))


def question(*turns: str) -> Record:
    said = [Text(t, role="assistant" if n % 2 else "user", learn=bool(n % 2)) for n, t in enumerate(turns)]
    return Record("q", (picture(), *said))


def prompts(**options) -> PromptProcessor:
    return PromptProcessor(LM, IMAGE, num_tokens=R, **{"max_text": 64, **options})


def test_cleaning_follows_the_published_rules() -> None:
    assert clean_caption('A "red" cube.A (big)  ring!; *x* #1: ~y') == "a red cube a big ring x 1 y"
    assert clean_question("What's this: a (red) Cube?!") == "what's this a red cube?"
    assert clean_question("a.b") == "ab"
    assert clean_question("How  many\nred  cubes ?  ") == "how  many\nred  cubes ?"
    assert clean_question("a " * 60) == " ".join("a" * 50)
    assert len(clean_caption("word " * 70).split()) == 50


def test_pairs_read_from_cls_to_sep_and_learn_all_but_cls() -> None:
    processor = PairProcessor(BERT, IMAGE)
    span = processor.example(caption("A small red cube.")).streams["qformer"]
    cls = BERT.backend.token_to_id("[CLS]")
    assert span.ids == [cls, *BERT.encode("a small red cube"), BERT.eos_id]
    assert span.labels == [IGNORE, *span.ids[1:]]
    assert collate([processor.example(caption())]).supervised() == len(span.ids) - 1
    short = PairProcessor(BERT, IMAGE, max_text=4).example(caption()).streams["qformer"].ids
    assert short == [*span.ids[:3], BERT.eos_id]
    start = processor.prompt(Record("p", (picture(),)))
    assert start.streams["qformer"].ids == [BERT.bos_id]
    assert start.streams["qformer"].labels is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("r", (Text("a cube", learn=True),)), "one picture a sample and this has 0"),
        (Record("r", (picture(), picture(), Text("a cube", learn=True))), "this has 2"),
        (caption(" "), "the caption is empty"),
        (caption("!!."), "punctuation does not count"),
        (Record("r", (picture(),)), "one caption a sample and this has 0"),
    ],
)
def test_bad_pairs(record: Record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairProcessor(BERT, IMAGE).example(record)


def test_a_whole_caption_is_learnt_with_its_start() -> None:
    example = prompts(end="newline").example(caption("A small red cube."))
    span = example.streams["lm"]
    text = LM.encode("a small red cube\n")
    assert span.ids == [LM.pad_id] * R + [LM.bos_id, *text]
    assert span.labels == [IGNORE] * R + [LM.bos_id, *text]
    (place,) = example.places
    assert (place.visual, place.stream, place.start, place.length) == (0, "lm", 0, R)
    assert prompts(end="newline").stop_ids == (LM.encode("\n")[-1],)
    assert prompts().example(caption()).streams["lm"].ids[-1] == LM.eos_id
    assert prompts().stop_ids == ()


def test_a_prompt_is_said_and_not_learnt() -> None:
    said = LM.encode("a photo of")
    span = prompts(prompt="a photo of").example(caption()).streams["lm"]
    assert span.ids[R:] == [LM.bos_id, *LM.encode("a photo of a small red cube"), LM.eos_id]
    assert span.labels is not None
    assert span.labels[: R + 1 + len(said)] == [IGNORE] * (R + 1 + len(said))
    assert span.labels[R + 1 + len(said) :] == [*LM.encode(" a small red cube"), LM.eos_id]
    asked = prompts(prompt="a photo of").prompt(Record("p", (picture(),)))
    assert asked.streams["lm"].ids[R:] == [LM.bos_id, *said]
    assert asked.streams["lm"].labels is None


def test_questions_and_answers() -> None:
    processor = prompts(question="USER: {} ASSISTANT:")
    span = processor.example(question("How many things?", "two")).streams["lm"]
    assert LM.decode(span.ids[R + 1 :]) == "USER: how many things? ASSISTANT: two"
    assert span.labels is not None
    assert LM.decode([i for i in span.labels if i != IGNORE], skip_special=False) == " two</s>"
    asked = processor.prompt(question("How many things?", "two")).streams["lm"]
    assert asked.ids == span.ids[: len(asked.ids)]
    assert LM.decode(asked.ids[R + 1 :]).endswith("ASSISTANT:")
    talk = processor.prompt(question("what is it?", "a cube", "which colour?"))
    assert LM.decode(talk.streams["lm"].ids[R + 1 :]) == (
        "USER: what is it? ASSISTANT: a cube USER: which colour? ASSISTANT:"
    )
    blind = processor.prompt(Record("b", (Text("what is it?", role="user"),)))
    assert blind.places == ()
    assert blind.streams["lm"].ids[0] == LM.bos_id


def test_an_encoder_decoder_splits_captions_anywhere_questions_at_answers() -> None:
    processor = prompts(start_id=0)
    whole = LM.encode("a small red cube")
    seen = set()
    for draw in range(60):
        streams = processor.example(caption(), draw).streams
        before, after = streams["encoder"].ids[R:], streams["decoder"].ids
        assert before[-1] == LM.eos_id
        assert after[0] == 0
        assert before[:-1] + after[1:] == [*whole, LM.eos_id]
        assert streams["decoder"].labels == [IGNORE, *after[1:]]
        assert streams["encoder"].labels is None or set(streams["encoder"].labels) == {IGNORE}
        seen.add(len(before) - 1)
    assert seen == set(range(len(whole)))
    streams = processor.example(question("what?", "two")).streams
    assert LM.decode(streams["encoder"].ids[R:]) == "Question: what? Answer:"
    assert streams["decoder"].ids == [0, *LM.encode(" two"), LM.eos_id]
    assert processor.prompt(question("what?", "two")).streams["encoder"].ids == streams["encoder"].ids
    batch = collate([processor.example(question("what?", "two")), processor.example(caption())])
    assert set(batch.text) == {"encoder", "decoder"}
    with pytest.raises(DataError, match="learns the last one only"):
        processor.example(question("what?", "two", "which?", "red"))


def test_a_prefix_is_never_cut() -> None:
    """A caption that is longer than both streams loses its end, never its middle."""
    whole = [*LM.encode("a small red cube and a big ring"), LM.eos_id]
    short = prompts(start_id=0, max_text=4)
    seen = set()
    for draw in range(60):
        streams = short.example(caption("a small red cube and a big ring"), draw).streams
        read = streams["encoder"].ids[R:-1] + streams["decoder"].ids[1:]
        assert read == whole[: len(read)]
        assert max(len(streams["encoder"].ids) - R, len(streams["decoder"].ids)) <= 4
        seen.add(len(streams["encoder"].ids) - R - 1)
    assert seen == {0, 1, 2, 3}


def test_an_encoder_decoder_scores_a_caption_whole() -> None:
    for said, text in (("", "a cube"), ("", "a small red cube and a big ring"), ("a photo of", "a cube")):
        streams = prompts(start_id=0, prompt=said).scored(caption(text)).streams
        assert streams["encoder"].ids[R:] == [*LM.encode(said), LM.eos_id]
        learnt = [*LM.encode(f" {text}" if said else text), LM.eos_id]
        assert streams["decoder"].ids == [0, *learnt]
        assert streams["decoder"].labels == [IGNORE, *learnt]


def test_a_turn_in_pieces_is_one_turn() -> None:
    """Pictures may stand among what one speaker says: text, picture, text."""
    asked = (Text("How many ", role="user"), picture(), Text("things?", role="user"))
    answered = (Text("a", "assistant"), Text(" cube ", "assistant", learn=True), Text(" ", "assistant"))
    processor = prompts(qformer=BERT, end="newline")
    streams = processor.example(Record("r", (*asked, *answered))).streams
    assert LM.decode(streams["lm"].ids[R + 1 :]) == "Question: how many things? Answer: a cube\n"
    assert streams["lm"].labels is not None
    assert LM.decode([i for i in streams["lm"].labels if i != IGNORE]) == " cube\n"
    assert streams["qformer"].ids[1:-1] == BERT.encode("how many things?")
    before = processor.prompt(Record("r", (*asked, *answered))).streams
    assert LM.decode(before["lm"].ids[R + 1 :]) == "Question: how many things? Answer:"
    assert before["qformer"] == streams["qformer"]


def test_other_braces_of_a_question_s_form_are_written() -> None:
    span = prompts(question="{x} {0} {{ {} }").prompt(question("what?")).streams["lm"]
    assert span.ids[R + 1 :] == LM.encode("{x} {0} {{ what? }")


def test_the_qformer_reads_the_question_beside() -> None:
    processor = prompts(qformer=BERT)
    streams = processor.example(question("How many things?", "two")).streams
    cls = BERT.backend.token_to_id("[CLS]")
    assert streams["qformer"].ids == [cls, *BERT.encode("how many things?"), BERT.eos_id]
    short = prompts(qformer=BERT, max_question=4).example(question("how many things?", "two")).streams["qformer"]
    assert short.ids == [cls, *BERT.encode("how many things?")[-2:], BERT.eos_id]  # its beginning is lost


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("r", (Text("a cube", learn=True),)), "this has 0"),
        (caption("..."), "empty"),
        (question("what?", " "), "empty"),
        (question("what?"), "nothing learnt"),
        (Record("r", (picture(), Text("a cube"))), "one caption a sample"),
    ],
)
def test_bad_samples(record: Record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts().example(record)


def test_lengths_are_kept() -> None:
    ids = prompts(max_text=4).example(caption()).streams["lm"].ids
    assert len(ids) == R + 4
    with pytest.raises(DataError, match="nothing learnt: the first 5 tokens"):
        prompts(max_text=5).example(question("how many things are there?", "two"))
    with pytest.raises(DataError, match="prompt too long"):
        prompts(max_text=5).prompt(question("how many things are there?"))


def test_processors_survive_json_and_name_mistakes() -> None:
    pair = processor_from_dict(PairProcessor(BERT, IMAGE, max_text=9, clean=False).to_dict(), BERT)
    assert pair.to_dict() == PairProcessor(BERT, IMAGE, max_text=9, clean=False).to_dict()
    made = prompts(qformer=BERT, start_id=0, end="newline", prompt="a photo of", clean=False)
    again = processor_from_dict(made.to_dict(), LM, {"qformer": BERT})
    assert again.to_dict() == made.to_dict()
    record = question("What?", "two")
    assert again.example(record, 3).streams == made.example(record, 3).streams
    with pytest.raises(ConfigError, match=r"no \{\} for the question"):
        prompts(question="ask")
    with pytest.raises(ConfigError, match=r"has 2 \{\} for the question and needs one"):
        prompts(question="{} or {}")
    with pytest.raises(ConfigError, match="neither newline nor eos"):
        prompts(end="stop")
    with pytest.raises(ConfigError, match="WordPiece tokenizer"):
        PairProcessor(LM, IMAGE)
    with pytest.raises(ConfigError, match="at least 3"):
        prompts(max_text=2)


def test_scoring_takes_the_pictures_a_prompt_takes_and_training_one() -> None:
    asked = question("what?", "two")
    for images in ((), (picture(), picture())):
        record = Record("r", (*images, *asked.texts))
        assert (
            prompts().scored(record).streams["lm"].ids[len(images) * R :]
            == (prompts().example(asked).streams["lm"].ids[R:])
        )
        with pytest.raises(DataError, match=f"this has {len(images)}"):
            prompts().example(record)


@pytest.mark.parametrize("start_id", [None, 0])
def test_a_scored_sample_is_whole_or_refused(start_id: int | None) -> None:
    fits = prompts(start_id=start_id, max_text=len(LM.encode("Question: what? Answer: two")) + 2)
    record = question("what?", "two")
    assert scored(fits, record, "two").streams == fits.example(record).streams
    with pytest.raises(DataError, match=r"candidate 1 .'two and so on.* is too long"):
        scored(fits, Record("candidate 1", question("what?", "two " + "and so on " * 30).parts), "two and so on")
    with pytest.raises(DataError, match=r"prompt too long: .* no room for candidate 1"):
        scored(fits, Record("candidate 1", question("what? " * 40, "two").parts), "two")


def test_a_tokenizer_without_a_newline_is_named_and_stops_at_nothing_else():
    assert newline_id(LM) == LM.encode("\n")[-1]
    assert newline_id(BERT) is None
    with pytest.raises(ConfigError, match="end: newline ends no text, for the tokenizer has no token for one"):
        PromptProcessor(BERT, IMAGE, num_tokens=2, end="newline")
    assert PromptProcessor(BERT, IMAGE, num_tokens=2, end="eos").stop_ids == ()
