"""What is found wrong with replies, and that nothing is with good ones."""

import pytest

from isthmus.data.instruct import KINDS, Box, Checks, Symbols, load_prompts
from isthmus.data.instruct.checks import NAMES
from isthmus.data.instruct.prompts import Kind
from isthmus.endpoint import Reply
from isthmus.errors import ConfigError

PROMPTS = load_prompts(KINDS)
DOG = Box("dog", (0.1, 0.1, 0.5, 0.5))
SYMBOLS = Symbols(
    "1",
    "a.jpg",
    ("Two brown dogs run on grass.", "Dogs chase a red ball."),
    (DOG, DOG, Box("sports ball", DOG.corners)),
)
CHECKS = Checks(categories={"dog", "sports ball", "cat", "person", "potted plant"})


def asked(*pairs):
    return "\n===\n".join(f"Question:\n{q}\n===\nAnswer:\n{a}" for q, a in pairs)


def fault(text, kind: Kind = "conversation", checks=CHECKS, symbols=SYMBOLS, **reply):
    prompt = PROMPTS[kind]
    turns = prompt.turns_of(text, symbols, 0)
    return checks.fault(Reply(request="x", name="1", text=text, **reply), prompt, symbols, turns)


GOOD = [
    asked(("How many dogs are there?", "There are two dogs."), ("Is there a cat?", "No, there is no cat.")),
    asked(("What colour are the dogs?", "They are brown.")),
    asked(("What do they chase?", "A red ball. One of the dogs is ahead.")),
    asked(("How many dogs are there?", "2")),
    asked(("Why do they run?", "They may see a cat or a person.")),
]


@pytest.mark.parametrize("text", GOOD)
def test_good_conversations_pass(text):
    assert fault(text) == ""


BAD = {
    "cut": (GOOD[0], "conversation", {"finish": "length"}),
    "empty": (" \n", "detail", {}),
    "refusal": ("I'm sorry, but I cannot describe dogs.", "detail", {}),
    "leaked words": (asked(("Is a dog in the captions?", "Yes, a dog runs.")), "conversation", {}),
    "leaked coordinates": ("Two brown dogs are at [0.1, 0.1, 0.5, 0.5].", "detail", {}),
    "cannot be told": (asked(("How old are the dogs?", "They are two.")), "conversation", {}),
    "no answer": (asked(("Where are they?", "It is not mentioned.")), "conversation", {}),
    "bad form": ("Two dogs run on grass.", "reasoning", {}),
    "wrong count": (asked(("How many dogs are there?", "There are three dogs.")), "conversation", {}),
    "colour": (asked(("What colour are the dogs?", "They are black.")), "conversation", {}),
    "not there": ("Two brown dogs run on grass. A cat sits beside them.", "detail", {}),
    "nothing of it": ("A box of sweets lies on a bed, and the bed is on a table.", "detail", {}),
}


def test_every_reason_has_its_case():
    assert set(BAD) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_found_and_may_be_skipped(name):
    text, kind, reply = BAD[name]
    assert fault(text, kind, **reply).partition(":")[0] == name
    if name not in ("bad form", "empty"):  # what is empty is of no form either
        assert fault(text, kind, Checks(skip=[name], categories=CHECKS.categories), **reply) == ""


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("There are 5 large dogs. They run.", "detail", "wrong count"),
        ("There is one dog on the grass.", "detail", "wrong count"),
        ("Three dogs run on grass.", "detail", "wrong count"),
        (asked(("Are there dogs?", "Yes.")) + "\n===\nQuestion:\nAnd?", "conversation", "bad form"),
        (asked(("", "Yes.")), "conversation", "bad form"),
        (asked(("Why?", "So.")) + "\n===\n" + asked(("Why?", "So.")), "reasoning", "bad form"),
        ("As an AI language model, I see two dogs.", "detail", "refusal"),
        ("The bounding box of a dog is large.", "detail", "leaked words"),
        ("It is hard to see, the colour cannot be determined.", "detail", "no answer"),
    ],
)
def test_faults_in_other_words(text, kind, name):
    assert fault(text, kind).partition(":")[0] == name


@pytest.mark.parametrize(
    "text",
    [
        "One dog of the two is ahead of the other.",  # fewer: some of them
        "A dog chases the ball. The ball is to its right.",  # also called so
        "Dogs run. There is no cat, and neither is there a person.",
        "The dogs could be looking for a potted plant.",
    ],
)
def test_what_is_no_fault(text):
    assert fault(text, "detail") == ""


def test_what_captions_count_and_crowds_are_not_miscounted():
    symbols = Symbols("1", "a", ("A crowd of nine people.",), (Box("person", DOG.corners),))
    assert fault("There are nine people here.", "detail", symbols=symbols) == ""
    symbols = Symbols("1", "a", ("Sheep.",), (Box("sheep", DOG.corners),), frozenset({"sheep"}))
    assert fault("There are forty or 50 sheep here.", "detail", symbols=symbols) == ""


def test_unknown_boxes_deny_nothing():
    symbols = Symbols("1", "a", ("A dog.",), known=False)
    assert fault("A cat sits there.", "detail", symbols=symbols) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_examples_pass_our_own_checks(kind):
    prompt = PROMPTS[kind]
    assert len(prompt.examples) >= 2
    for shot in prompt.examples:
        captions, _, boxes = shot.symbols.partition("\n\n")
        assert bool(boxes) == prompt.boxes
        found = [Box(line.partition(":")[0], (0, 0, 1, 1)) for line in boxes.splitlines()]
        symbols = Symbols("1", "a", tuple(captions.splitlines()), tuple(found), known=prompt.boxes)
        assert fault(shot.reply, kind, symbols=symbols) == ""
        if boxes:
            assert symbols.text(boxes=True).partition("\n\n")[0] == captions


def test_unknown_checks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'colour'"):
        Checks(skip=["color"])
    (tmp_path / "checks.yaml").write_text("refusal: ['(']")
    with pytest.raises(ConfigError, match="no regular expression"):
        Checks(tmp_path)
    (tmp_path / "checks.yaml").write_text("supposing: [no, not]")
    with pytest.raises(ConfigError, match="put it in quotes"):
        Checks(tmp_path)
    (tmp_path / "checks.yaml").write_text("refusal: sorry")
    with pytest.raises(ConfigError, match="'refusal' should be a list"):
        Checks(tmp_path)
    (tmp_path / "checks.yaml").write_text("also called: {cat: kitten}")
    with pytest.raises(ConfigError, match="cat: expected a list, found str 'kitten'"):
        Checks(tmp_path)
    (tmp_path / "checks.yaml").write_text("refusals: []")
    with pytest.raises(ConfigError, match="did you mean 'refusal'"):
        Checks(tmp_path)
