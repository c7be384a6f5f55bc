"""SceneSource: scenes as Records, in the forms that the stages train and evaluate on.

=============  ====================================================================================================
captions       picture, then a caption with alternatives (running text, learnt)
outlines       picture, its solids in paints without a name, then a caption with shapes and no colours
questions      picture, one question, a short answer; the kinds take turns, so a count of 6 n gives n of each kind
conversations  picture, then several turns of mixed kinds, with follow-ups that need the turn before
facts          picture, then true statements about it (running text, learnt)
describe       picture, a request, a detailed description
reasoning      picture, a question, an answer that says why
symbols        text only: a conversation (or, every third time, a caption) with the description for the picture
symbol_captions  text only: the description that stands for the picture, then a caption
symbol_facts   text only: the description that stands for the picture, then true statements
readings       text only: one question about the description that stands for the picture (scores a language model)
fewshot        text only: made-up words whose meaning is only in the examples
pages          several pictures, each with a caption after it, as one running document
lessons        shots with pictures, then a picture to name: made-up words whose meaning is only in the shots
lesson_texts   text only: the same, the value (red, cube) standing for the picture
echoes         text only: words in an order that means nothing, then stretches of the same (learnt but for their start)
clips          a short video and a sentence about what happens in it (running text, learnt)
clip_questions a short video, a question about what happens, a short answer
symbol_clips   text only: where things stand first and last, then such a question or (every third time) the sentence
=============  ====================================================================================================
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from isthmus.data.mix import Source
from isthmus.data.record import Image, Part, Record, Role, Text, Video
from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.draw import ScenePicture
from isthmus.demo.scenes.facts import facts
from isthmus.demo.scenes.few_shot import echo, few_shot
from isthmus.demo.scenes.interleaved import (
    ATTRIBUTES,
    CLIP_KINDS,
    Clip,
    Lesson,
    clip_part,
    clip_text,
    lesson_parts,
    lesson_text,
    make_clip,
    make_lesson,
)
from isthmus.demo.scenes.practice import PRACTICE, practise
from isthmus.demo.scenes.questions import KINDS, Question, follow_up, make_question
from isthmus.demo.scenes.scene import SPLITS, Scene, Split, make_scene
from isthmus.demo.scenes.words import captions, describe, outlines, symbols
from isthmus.errors import ConfigError, nearest

Form = Literal[
    "captions",
    "outlines",
    "questions",
    "conversations",
    "facts",
    "describe",
    "reasoning",
    "symbols",
    "symbol_captions",
    "symbol_facts",
    "readings",
    "fewshot",
    "pages",
    "lessons",
    "lesson_texts",
    "echoes",
    "clips",
    "clip_questions",
    "symbol_clips",
]
FORMS: tuple[Form, ...] = get_args(Form)
REQUESTS = ("describe the picture.", "what do you see?", "tell me everything about this picture.")
EXPLAIN = "explain."
_FOLLOW_UPS = 0.3
_FEWEST_SHOTS = 4
_MOST_REDRAWS = 10_000


class SceneSource(Source):
    """``count`` records of one form, a pure function of (form, split, seed, side, index); drawing waits for ``read()``.

    ``shots`` are a lesson's examples (none given: 4 to 8), the first ``in_words`` of them in words (its name before is
    ``told``); ``frames`` a clip's; ``control`` spoils them on purpose, see
    :data:`isthmus.demo.scenes.interleaved.CONTROLS`.

    ``turns`` is the number of question-answer turns in conversations and symbols, ``led`` the share of their
    comparisons before which a question about each of the two comes (turns beyond that number), ``kinds`` the kinds of
    question in any form, the attributes (colour, shape) that lessons are about, or what happens in clips (none given:
    all). In conversations and symbols there may also be kinds of practice.py among them, which nothing is scored by.
    ``distinct`` skips scenes whose captions an earlier one could have (for retrieval tests). Raises ConfigError for an
    unknown form, split or kind.
    """

    def __init__(
        self,
        form: Form,
        *,
        split: Split = "train",
        count: int = 10_000,
        seed: int = 0,
        size: int = 64,
        turns: int = 6,
        led: float = 0.0,
        distinct: bool = False,
        shots: int | None = None,
        in_words: int = 0,
        told: int = 0,
        frames: int = 4,
        control: str = "",
        kinds: Sequence[str] | None = None,
    ) -> None:
        if form not in FORMS:
            raise ConfigError(f"scenes have no form {form!r}; {nearest(form, FORMS)}")
        if split not in SPLITS:
            raise ConfigError(f"scenes have no split {split!r}; {nearest(split, SPLITS)}")
        known = _known_kinds(form)
        kinds = tuple(k for k in known if k not in PRACTICE) if kinds is None else tuple(kinds)
        for kind in kinds:
            if kind not in known:
                raise ConfigError(f"scenes, form {form}: there is no kind {kind!r}; {nearest(kind, known)}")
        if not kinds:
            raise ConfigError(f"scenes: kinds is empty; name some of {', '.join(known)}")
        if count < 1 or turns < 1:
            raise ConfigError(f"scenes need at least one record and one turn, not count={count}, turns={turns}")
        if not 0 <= led <= 1:
            raise ConfigError(f"scenes: led is a share of comparisons, between 0 and 1, not {led}")
        fewest = _FEWEST_SHOTS if shots is None else shots
        if told and in_words:
            raise ConfigError("scenes: told is the name of in_words before; give in_words alone")
        key, in_words = ("told", told) if told else ("in_words", in_words)
        if in_words and (form != "lessons" or not 0 < in_words <= fewest):
            raise ConfigError(f"scenes: {key}={in_words} is for lessons, and at most their {fewest} shots are in words")
        self.form, self.seed, self.size, self.kinds = form, seed, size, kinds
        self.turns, self.led = turns, led
        self.split: Split = split
        self.shots, self.in_words, self.frames, self.control = shots, in_words, frames, control
        self.name = f"scenes-{form}-{split}"
        self._make: Callable[[int, Dice], Record] = getattr(self, f"_{form}")
        self._numbers = _distinct(seed, split, count) if distinct else range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._numbers[index]
        return self._make(number, Dice("words", self.form, self.seed, self.split, number))

    def scene(self, index: int) -> Scene:
        """The ground truth of a record: its scene as first drawn (``questions`` may have redrawn it, see meta)."""
        return make_scene(self.seed, self.split, self._numbers[index])

    def _record(self, number: int, parts: list[Part], **meta: object) -> Record:
        return Record(f"{self.form}/{self.split}/{self.seed}/{number}", tuple(parts), self.name, meta)

    def _picture(self, number: int, role: Role = "user", attempt: int = 0, repainted: bool = False) -> Image:
        picture = ScenePicture(self.seed, self.split, number, attempt, self.size, repainted)
        return Image(picture, role=role, key=picture.key)

    def _captions(self, number: int, dice: Dice) -> Record:
        scene = make_scene(self.seed, self.split, number)
        text = Text(captions(scene), role="text", learn=True)
        return self._record(number, [self._picture(number, role="text"), text])

    def _outlines(self, number: int, _: Dice) -> Record:
        text = Text(outlines(make_scene(self.seed, self.split, number)), role="text", learn=True)
        return self._record(number, [self._picture(number, role="text", repainted=True), text])

    def _questions(self, number: int, _: Dice) -> Record:
        attempt, question = self._redraw(number)
        parts = [self._picture(number, attempt=attempt), *_turn(question.text, question.answer)]
        return self._record(number, parts, kind=question.kind, answers=(question.answer,), attempt=attempt)

    def _reasoning(self, number: int, _: Dice) -> Record:
        attempt, question = self._redraw(number)
        answer = f"{question.reason}, so the answer is {question.answer}."
        parts = [self._picture(number, attempt=attempt), *_turn(f"{question.text} {EXPLAIN}", answer)]
        return self._record(number, parts, kind="reasoning", answers=(question.answer,), attempt=attempt)

    def _redraw(self, number: int) -> tuple[int, Question]:
        """The number's question. Scene after scene gets the same throws, so their questions stay balanced."""
        kind = self.kinds[number % len(self.kinds)]
        for attempt in range(_MOST_REDRAWS):
            scene = make_scene(self.seed, self.split, number, attempt)
            question = make_question(scene, kind, Dice("ask", self.seed, self.split, number))
            if question:
                return attempt, question
        raise AssertionError(f"no scene answers a question of kind {kind}")  # every kind fits many scenes

    def _conversations(self, number: int, dice: Dice) -> Record:
        attempt, turns = self._asked(number, dice)
        parts = [self._picture(number, attempt=attempt), *(p for q in turns for p in _turn(q.text, q.answer))]
        return self._record(number, parts, kinds=tuple(q.kind for q in turns))

    def _asked(self, number: int, dice: Dice) -> tuple[int, list[Question]]:
        """The number's turns, about the first of its scenes that some question of the wanted kinds fits."""
        for attempt in range(_MOST_REDRAWS):
            scene = make_scene(self.seed, self.split, number, attempt)
            turns = turns_about(scene, dice, self.turns, self.kinds, led=self.led)
            if turns:
                return attempt, turns
        raise AssertionError(f"no scene answers questions of the kinds {self.kinds}")  # every kind fits many scenes

    def _describe(self, number: int, dice: Dice) -> Record:
        scene = make_scene(self.seed, self.split, number)
        return self._record(number, [self._picture(number), *_turn(dice.choice(REQUESTS), describe(scene))])

    def _symbols(self, number: int, dice: Dice) -> Record:
        if number % 3 == 2:
            return self._symbol_captions(number, dice)
        throws = Dice("style", self.form, self.seed, self.split, number)
        attempt, (first, *rest) = self._asked(number, dice)
        description = symbols(make_scene(self.seed, self.split, number, attempt), throws)
        parts: list[Part] = [*_turn(f"{description}\n{first.text}", first.answer)]
        parts += [p for q in rest for p in _turn(q.text, q.answer)]
        return self._record(number, parts)

    def _facts(self, number: int, dice: Dice) -> Record:
        text = Text(facts(make_scene(self.seed, self.split, number), dice, self.turns), learn=True)
        return self._record(number, [self._picture(number, role="text"), text])

    def _symbol_captions(self, number: int, dice: Dice) -> Record:
        scene = make_scene(self.seed, self.split, number)
        return self._record(number, [Text(f"{symbols(scene, dice)}\n"), Text(captions(scene), learn=True)])

    def _symbol_facts(self, number: int, dice: Dice) -> Record:
        scene = make_scene(self.seed, self.split, number)
        answer = Text(facts(scene, dice, self.turns), learn=True)
        return self._record(number, [Text(f"{symbols(scene, dice)}\n"), answer])

    def _readings(self, number: int, dice: Dice) -> Record:
        attempt, question = self._redraw(number)
        description = symbols(make_scene(self.seed, self.split, number, attempt), dice)
        parts = _turn(f"{description}\n{question.text}", question.answer)
        return self._record(number, [*parts], kind=question.kind, answers=(question.answer,), attempt=attempt)

    def _fewshot(self, number: int, dice: Dice) -> Record:
        """Learnt is every made-up word that an earlier example has explained."""
        task = few_shot(dice, reserved=self.split != "train")
        parts: list[Part] = []
        known: set[str] = set()
        for thing, word in task.examples:
            parts += [Text(f"{thing} is"), Text(f" {word}\n", learn=word in known)]
            known.add(word)
        return self._record(number, parts, kind=f"fewshot_{task.attribute}", answers=(task.examples[-1][1],))

    def _pages(self, number: int, dice: Dice) -> Record:
        """Two to four pictures, the captions in one of their forms each."""
        parts: list[Part] = []
        for place in range(2 + dice.below(3)):
            index = 4 * number + place
            caption = dice.choice(captions(make_scene(self.seed, self.split, index)))
            parts += [self._picture(index, role="text"), Text(caption, learn=True)]
        return self._record(number, parts)

    def _lessons(self, number: int, dice: Dice) -> Record:
        name = f"{self.form}/{self.split}/{self.seed}/{number}"
        lesson = self._lesson(dice)
        parts = lesson_parts(
            lesson, name=name, side=self.size, seed=self.seed, split=self.split, number=number, in_words=self.in_words
        )
        return self._record(number, parts, kind=f"lesson_{lesson.attribute}", answers=(lesson.words[-1],))

    def _lesson_texts(self, number: int, dice: Dice) -> Record:
        lesson = self._lesson(dice)
        kind = f"lesson_{lesson.attribute}"
        return self._record(number, lesson_text(lesson), kind=kind, answers=(lesson.words[-1],))

    def _echoes(self, number: int, dice: Dice) -> Record:
        words, stretches = echo(dice)
        parts = [Text(f" {' '.join(words)}")]
        for first, *rest in stretches:
            parts += [Text(f" {first}"), Text(f" {' '.join(rest)}", learn=True)]
        return self._record(number, [*parts])

    def _lesson(self, dice: Dice) -> Lesson:
        shots = _FEWEST_SHOTS + dice.below(5) if self.shots is None else self.shots
        permuted = self.control == "permuted"
        return make_lesson(dice, split=self.split, shots=shots, attributes=self.kinds, permuted=permuted)

    def _clips(self, number: int, dice: Dice) -> Record:
        clip, part = self._clip(number, dice, "text")
        return self._record(number, [part, Text(clip.sentence, learn=True)], kind=clip.kind)

    def _clip_questions(self, number: int, dice: Dice) -> Record:
        clip, part = self._clip(number, dice, "user")
        return self._record(number, [part, *_turn(clip.question, clip.answer)], kind=clip.kind, answers=(clip.answer,))

    def _symbol_clips(self, number: int, dice: Dice) -> Record:
        clip, _ = self._clip(number, dice, "user")
        description = f"{clip_text(clip, dice)}\n"
        if dice.chance(1 / 3):
            return self._record(number, [Text(description), Text(clip.sentence, learn=True)], kind=clip.kind)
        parts = _turn(f"{description}{clip.question}", clip.answer)
        return self._record(number, [*parts], kind=clip.kind, answers=(clip.answer,))

    def _clip(self, number: int, dice: Dice, role: Role) -> tuple[Clip, Video]:
        clip = make_clip(
            dice,
            split=self.split,
            seed=self.seed,
            number=number,
            frames=self.frames,
            kinds=self.kinds,
            control=self.control,
        )
        name = f"clip/{self.split}/{self.seed}/{number}/{self.frames}"
        return clip, clip_part(clip, name=name, side=self.size, control=self.control, role=role)


def _known_kinds(form: Form) -> tuple[str, ...]:
    if form in ("lessons", "lesson_texts"):
        return tuple(sorted(ATTRIBUTES))
    if form in ("clips", "clip_questions", "symbol_clips"):
        return CLIP_KINDS
    return (*KINDS, *PRACTICE) if form in ("conversations", "symbols") else KINDS


def _distinct(seed: int, split: Split, count: int) -> list[int]:
    """The first ``count`` numbers whose scenes differ in what captions can say."""
    numbers: list[int] = []
    seen: set[object] = set()
    number = 0
    while len(numbers) < count:
        layout = make_scene(seed, split, number).layout
        if layout not in seen:
            seen.add(layout)
            numbers.append(number)
        number += 1
    return numbers


def _turn(question: str, answer: str) -> tuple[Text, Text]:
    return Text(question, role="user"), Text(answer, role="assistant", learn=True)


def turns_about(scene: Scene, dice: Dice, count: int, kinds: Sequence[str], *, led: float = 0.0) -> list[Question]:
    """Different questions of the kinds given, and before the share ``led`` of those that have them their steps. A
    follow-up asks about the turn before, and nothing said there."""
    turns: list[Question] = []
    asked: set[str] = set()
    for _ in range(20 * count):
        if len(turns) >= count:
            break
        before = turns[-1] if turns else None
        if before and before.about and dice.chance(_FOLLOW_UPS):
            question = follow_up(scene, before.about, dice)
            if question and question.answer not in f"{before.text} {before.answer}":
                turns.append(question)
            continue
        kind = dice.choice(kinds)
        question = practise(scene, kind, dice) if kind in PRACTICE else make_question(scene, kind, dice)
        if question and question.text not in asked:
            if led and question.steps and dice.chance(led):
                turns += [step for step in question.steps if step.text not in asked]
                asked.update(step.text for step in question.steps)
            asked.add(question.text)
            turns.append(question)
    return turns
