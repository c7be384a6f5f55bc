"""Official files of benchmarks that LLaVA-1.5 and later models report: A-OKVQA, DocVQA, MMBench, MME, SEED-Bench, MMMU,
VSR. As in :mod:`.annotations`, each reader knows the fields of its files.

Choices have LLaVA-1.5's form (2310.03744, appendix): the question, one ``A. text`` a line, and the request
for the letter. The scorers' rules are in :mod:`isthmus.evaluation.benchmark_rules` and ``grouped``.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from isthmus.data.images import EncodedImage
from isthmus.data.record import ImageSource
from isthmus.data.sources.annotations import LETTER
from isthmus.data.sources.cells import unpacked
from isthmus.data.sources.files import Names, Root, named_images, read_json, read_rows, read_table
from isthmus.data.sources.items import LazyRows, each_once, field_of, filled_name, listed_under, one_of
from isthmus.data.sources.llava_bench import llava_bench
from isthmus.data.sources.rows import MARK, Form, Row, Rows
from isthmus.data.sources.webdataset import IMAGE_ENDINGS
from isthmus.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORTLY = "Answer the question using a single word or phrase."


def multiple_choice(question: str, choices: Sequence[str], *, hint: str = "") -> str:
    """LLaVA-1.5's form; a ``hint`` stands before the question."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)), LETTER]
    return "\n".join(lines)


def aokvqa(
    root: Root,
    form: Form,
    *,
    file: str,
    answer: str = "choice",
    image_name: str = "{id:012d}.jpg",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """A-OKVQA (Schwenk et al. 2022, github.com/allenai/aokvqa): ``aokvqa_v1p0_val.json``, a list of question_id,
    image_id (COCO 2017), question, choices, correct_choice_idx, direct_answers, difficult_direct_answer.

    ``answer``: the right one of four choices (``choice``), or in one's own words (``direct``), which the official
    script leaves out the questions that are difficult_direct_answer.
    """
    one_of("answer", answer, ("choice", "direct"))
    content = read_json(root.path(file))
    if not isinstance(content, list) or not all(isinstance(q, dict) for q in content):
        raise DataError(f"{file} is not an A-OKVQA file: it needs a list of questions")
    items = [
        q for q in each_once(content, "question_id", file) if answer == "choice" or not q.get("difficult_direct_answer")
    ]
    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        number = str(item["question_id"])
        sample = f"question {number}"
        picture = pictures.find(filled_name(image_name, id=field_of(sample, item, "image_id", int)))
        question = field_of(sample, item, "question")
        if answer == "direct":
            direct = [str(a) for a in field_of(sample, item, "direct_answers", list)]
            if not direct:
                raise DataError(
                    f"empty answer: {sample} has no direct answers; those of the test set are not published"
                )
            values = {"question": question, "answer": max(direct, key=direct.count)}
            return Row(f"a-okvqa/{number}", values, (picture,), key=number, meta={"answers": tuple(direct)})
        return _row(
            f"a-okvqa/{number}",
            question,
            field_of(sample, item, "choices", list),
            item.get("correct_choice_idx"),
            picture,
        )

    return LazyRows(items, make, pictures)


def docvqa(root: Root, form: Form, *, file: str, image_folder: str | None = None, images: Names = ()) -> Rows:
    """DocVQA (Mathew et al. 2021, rrc.cvc.uab.es/?ch=17): ``val_v1.0_withQT.json``, an object with ``data``, a list of
    questionId, question, answers, image (below the image folder) and, in later files, question_types, the first of
    which is the kind."""
    items = each_once(listed_under(read_json(root.path(file)), "data", file), "questionId", file)
    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        number = str(item["questionId"])
        sample = f"question {number}"
        answers = tuple(map(str, _filled_list(sample, item, "answers")))
        if not answers:
            raise DataError(f"empty answer: {sample} has no answers; those of the test set are not published")
        values = {
            "question": field_of(sample, item, "question"),
            "answer": answers[0],
            "kind": next(iter(_filled_list(sample, item, "question_types")), None),
        }
        picture = pictures.find(field_of(sample, item, "image"))
        return Row(f"docvqa/{number}", values, (picture,), key=number, meta={"answers": answers})

    return LazyRows(items, make, pictures)


def _filled_list(sample: str, item: Mapping[str, object], name: str) -> list[object]:
    """A list that a file may leave out or empty."""
    return field_of(sample, item, name, list) if item.get(name) else []


def seedbench(root: Root, form: Form, *, file: str, image_folder: str | None = None, images: Names = ()) -> Rows:
    """SEED-Bench (Li et al. 2023, github.com/AILab-CVC/SEED-Bench): ``SEED-Bench.json``, an object with ``questions``,
    each question_id, question, choice_a to choice_d, answer (a letter), data_id, data_type, question_type_id; and
    ``question_type``, names by id, which are the kinds. Its image questions alone are read: those about videos are
    about stretches of clips that come from three other data sets."""
    content = read_json(root.path(file))
    items = [
        q
        for q in each_once(listed_under(content, "questions", file), "question_id", file)
        if q.get("data_type") == "image"
    ]
    if not items:
        raise DataError(f"{file}: none of its questions has the data_type 'image'")
    types = content.get("question_type") if isinstance(content, dict) else None
    names = {str(number): str(name) for name, number in types.items()} if isinstance(types, dict) else {}
    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        number = str(item["question_id"])
        sample = f"question {number}"
        choices = [field_of(sample, item, f"choice_{letter}", (str, int, float)) for letter in "abcd"]
        kind = str(item.get("question_type_id"))
        picture = pictures.find(str(field_of(sample, item, "data_id", (str, int))))
        place = _letter(sample, item.get("answer"), choices)
        question = field_of(sample, item, "question")
        return _row(f"seed-bench/{number}", question, choices, place, picture, kind=names.get(kind, kind))

    return LazyRows(items, make, pictures)


def vsr(
    root: Root, form: Form, *, file: str, by: str = "relation", image_folder: str | None = None, images: Names = ()
) -> Rows:
    """VSR (Liu et al. 2023, github.com/cambridgeltl/visual-spatial-reasoning): JSON lines of image, caption, label (1
    or 0) and relation, which is the kind (``by: none`` leaves it out). The answer is true or false; say what to answer
    by the option ``suffix``."""
    one_of("by", by, ("relation", "none"))
    path = root.path(file)
    items = list(enumerate(read_rows(path)))
    pictures = named_images(root, image_folder, images, beside=path)

    def make(item: tuple[int, Mapping[str, object]]) -> Row:
        number, row = item
        sample = f"line {number + 1} of {path.name}"
        label = row.get("label")
        if label not in (0, 1):
            raise DataError(f"bad label: {sample}: VSR knows 1 and 0, not {label!r}")
        values = {
            "question": field_of(sample, row, "caption"),
            "answer": "true" if label else "false",
            "kind": row.get("relation") if by == "relation" else None,
        }
        return Row(
            f"vsr/{path.stem}/{number}", values, (pictures.find(field_of(sample, row, "image")),), key=str(number)
        )

    return LazyRows(items, make, pictures)


_PLACES = re.compile(r"<image ([1-7])>")


def mmmu(root: Root, form: Form, *, file: Names, image_folder: str | None = None, images: Names = ()) -> Rows:
    """MMMU (Yue et al. 2024, github.com/MMMU-Benchmark/MMMU) as JSON or JSON lines of its fields: id, question, options
    (a list, or Python's text of one), answer, question_type, and image_1 to image_7 as names. ``<image 1>`` in question
    or options is the place of a picture. The kind is the subject, taken from the id: ``validation_Accounting_1``."""
    items = each_once([row for path in root.files(file) for row in read_rows(path)], "id", str(file))
    pictures = named_images(root, image_folder, images, beside=root.files(file)[0])

    def make(item: Mapping[str, object]) -> Row:
        number = str(item["id"])
        sample = f"question {number}"
        choices = [str(o) for o in _all(item.get("options"), f"options of {sample}")]
        question = field_of(sample, item, "question")
        text = multiple_choice(question, choices) if choices else f"{question}\n{SHORTLY}"
        shown = [int(n) for n in _PLACES.findall(text)]
        own = [n for n in range(1, 8) if item.get(f"image_{n}")]
        before = [n for n in own if n not in shown]
        text = MARK * len(before) + ("\n" if before else "") + _PLACES.sub(MARK, text)
        found = tuple(pictures.find(_name(sample, item, n)) for n in (*before, *shown))
        subject = re.sub(r"^(dev|validation|test)_|_\d+$", "", number)
        if choices:
            return _row(
                f"mmmu/{number}", text, choices, _letter(sample, item.get("answer"), choices), *found, kind=subject,
                complete=True,
            )  # fmt: skip
        answers = tuple(str(a) for a in _all(item.get("answer"), f"answer of {sample}"))
        if not answers or answers == ("?",):
            raise DataError(f"empty answer: {sample} has no answer; those of the test set are not published")
        values = {"question": text, "answer": answers[0], "kind": subject}
        return Row(f"mmmu/{number}", values, found, key=number, meta={"answers": answers})

    return LazyRows(items, make, pictures)


def mme(root: Root, form: Form, *, folder: str, categories: Sequence[str] = ()) -> Rows:
    """MME (Fu et al. 2023, github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation): a folder
    per category, each picture beside a text file of its name with two lines ``question<tab>Yes`` or ``No``; in some
    categories they stand below ``images`` and ``questions_answers_YN``. The kind is the category, the ``group`` the
    picture."""
    top = root.path(folder)
    found = sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []
    chosen = [name for name in found if not categories or name in categories]
    items = [(c, path) for c in chosen for path in sorted((top / c).rglob("*.txt"))]
    if not items or any(name not in found for name in categories):
        raise DataError(
            f"{top} holds no MME: it needs a folder for each category with pictures and .txt files beside them"
        )
    pictures = named_images(root, folder, (), beside=top)
    lines = [(c, path, n, line) for c, path in items for n, line in enumerate(_lines(path), start=1)]

    def make(item: tuple[str, Path, int, str]) -> Row:
        category, path, number, line = item
        question, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"bad answer: {path}, line {number} should end in a tab and Yes or No: {line!r:.100}")
        group = f"{category}/{path.stem}"
        values = {"question": question, "answer": answer.strip(), "kind": category}
        picture = pictures.find(_beside(path, top))
        return Row(f"mme/{group}/{number}", values, (picture,), key=group, meta={"group": group})

    return LazyRows(lines, make, pictures)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _beside(path: Path, top: Path) -> str:
    """The picture of a text file, below ``top``: in the same folder, or in ``images`` beside that."""
    for folder in (path.parent, path.parent.parent / "images"):
        for ending in sorted(IMAGE_ENDINGS):
            if (folder / f"{path.stem}.{ending}").is_file():
                return (folder / f"{path.stem}.{ending}").relative_to(top).as_posix()
    raise DataError(f"missing image: {path} has no picture of its name beside it")


COLUMNS = ("index", "question", "A", "B", "answer", "image")
_SHORTEST_PICTURE = 64
"""Characters; a shorter ``image`` is the index of the row that holds the picture, as MMBench's tables have it."""


def mmbench(root: Root, form: Form, *, file: str, circular: bool = True, by: str = "category") -> Rows:
    """MMBench (Liu et al. 2024, github.com/open-compass/MMBench): a table with tabs of index, question, hint, A to D
    (fewer may be filled), answer, category, l2-category and image (base64). With ``circular`` each question comes
    once for each turn of its choices, all in one ``group``: it is answered when all of them are."""
    one_of("by", by, ("category", "l2-category", "none"))
    path = root.path(file)
    with _long_cells():
        columns, rows = read_table(path, "\t", COLUMNS)
    for column in COLUMNS:
        if column not in columns:
            raise DataError(
                f"{file} is not an MMBench table: it has no column {column!r}; the test sets have no answers"
            )
    pictures = {str(row["index"]): str(row["image"]) for row in each_once(rows, "index", file)}
    turns = [(row, k) for row in rows for k in range(len(_filled(row)) if circular else 1)]

    def make(item: tuple[Mapping[str, object], int]) -> Row:
        row, k = item
        number = str(row["index"])
        choices = _filled(row)
        place = _letter(f"question {number}", row["answer"], choices)
        name = f"mmbench/{number}/{k}" if circular else f"mmbench/{number}"
        encoded = pictures[number]
        if len(encoded) < _SHORTEST_PICTURE:
            encoded = pictures.get(encoded, "")
        kind = row.get(by) if by != "none" else None
        turned = [choices[(j + k) % len(choices)] for j in range(len(choices))]
        picture = EncodedImage(encoded, f"{path.name}, picture of question {number}")
        place = (place - k) % len(choices)
        hint = "" if _hole(row.get("hint")) else str(row["hint"])
        return _row(name, str(row["question"]), turned, place, picture, kind=kind, hint=hint, group=number)

    return LazyRows(turns, make, named_images(root, None, (), beside=path))


def _filled(row: Mapping[str, object]) -> list[str]:
    return [str(row[letter]) for letter in "ABCDEFGH" if letter in row and not _hole(row[letter])]


def _hole(cell: object) -> bool:
    return cell is None or str(cell).strip().lower() in ("", "nan")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells longer than the csv module's 128 KiB, such as pictures."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _row(
    name: str,
    question: str,
    choices: Sequence[object],
    place: object,
    *pictures: ImageSource,
    kind: object = None,
    hint: str = "",
    group: str | None = None,
    complete: bool = False,
) -> Row:
    """A question with choices; ``question`` is the ``complete`` prompt, or the question alone."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices) <= len(LETTERS):
        raise DataError(f"bad answer: {name}: {place!r} is not the number of one of the {len(choices)} choices")
    texts = [str(c) for c in choices]
    text = question if complete else multiple_choice(question, texts, hint=hint)
    values = {"question": text, "answer": LETTERS[place], "choices": texts, "kind": kind}
    meta = {"answers": (LETTERS[place],)} | ({"group": group} if group is not None else {})
    return Row(name, values, pictures, key=name.partition("/")[2], meta=meta)


def _letter(sample: str, answer: object, choices: Sequence[object]) -> int:
    letter = str(answer).strip()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise DataError(f"bad answer: {sample} has the answer {answer!r}, which is none of its {len(choices)} letters")
    return LETTERS.index(letter)


def _name(sample: str, item: Mapping[str, object], number: int) -> str:
    given = item.get(f"image_{number}")
    name = given.get("path") if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        raise DataError(f"missing image: {sample} has no name under 'image_{number}'; write the pictures as files")
    return name


def _all(value: object, what: str) -> list[object]:
    """A list, also where it is written into one text; a text alone is a list of it."""
    found = unpacked(value, what)
    return found if isinstance(found, list) else [] if found is None else [found]


BENCHMARKS: dict[str, Callable[..., Rows]] = {
    "a-okvqa": aokvqa,
    "docvqa": docvqa,
    "llava-bench": llava_bench,
    "mmbench": mmbench,
    "mme": mme,
    "mmmu": mmmu,
    "seed-bench": seedbench,
    "vsr": vsr,
}
