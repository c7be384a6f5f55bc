"""Official annotation files of other people's data sets, as rows: VQA v2 and OK-VQA, VizWiz, TextVQA, GQA,
ScienceQA, POPE, the
Karpathy splits, NLVR.

Each reader knows the fields of its files, so they need no ``fields`` map; the options of the form (``suffix``,
``turns``) still apply. What is checked for all samples at once (unknown ids, ids that come twice, files that do not
belong together) is checked when the source is opened; a single bad sample is met, and quarantined, when it is read.
"""

from collections.abc import Callable, Mapping

from isthmus.data.sources.files import Names, Root, named_images, once, read_json, read_rows
from isthmus.data.sources.items import LazyRows, each_once, field_of, filled_name, listed_under, one_of
from isthmus.data.sources.rows import Form, Row, Rows
from isthmus.errors import ConfigError, DataError, nearest


def vqav2(
    root: Root,
    form: Form,
    *,
    questions: str,
    annotations: str,
    image_name: str = "COCO_{split}_{id:012d}.jpg",
    by: str = "answer_type",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """VQA v2 and OK-VQA: a questions file and the annotations to it.

    The learnt answer is ``multiple_choice_answer`` (else the commonest of the ten, the first of equals); the ten are
    what scoring reads. ``image_name`` makes the file's name from the image's ``{id}`` and the file's ``{split}``.
    ``by``: the kind of question is its ``answer_type`` or its ``question_type``.
    """
    one_of("by", by, ("answer_type", "question_type"))
    question_file, annotation_file = read_json(root.path(questions)), read_json(root.path(annotations))
    items = listed_under(question_file, "questions", questions)
    answers = listed_under(annotation_file, "annotations", annotations)
    found = {str(q["question_id"]): q for q in each_once(items, "question_id", questions)}
    for a in each_once(answers, "question_id", annotations):
        question = found.get(str(a["question_id"]), {})
        if not question:
            raise DataError(
                f"{annotations}: question {a['question_id']} is not in {questions}; are the two of one split?"
            )
        if len({str(item["image_id"]) for item in (a, question) if "image_id" in item}) > 1:
            raise DataError(
                f"{annotations}: question {a['question_id']} is about the image {a['image_id']}, and in {questions} "
                f"about {question['image_id']}; are the two of one version?"
            )
    if len(answers) < len(found):
        lost = sorted(set(found) - {str(a["question_id"]) for a in answers})
        raise DataError(f"{annotations}: {len(lost)} questions of {questions} have no answers, the first is {lost[0]}.")
    split = str(question_file.get("data_subtype", "")) if isinstance(question_file, dict) else ""

    pictures = named_images(root, image_folder, images, beside=root.path(questions))

    def make(annotation: Mapping[str, object]) -> Row:
        number = str(annotation["question_id"])
        question, sample = found[number], f"question {number}"
        ten = _ten(sample, annotation)
        values = {
            "question": field_of(sample, question, "question"),
            "answer": annotation.get("multiple_choice_answer") or max(ten, key=ten.count),
            "kind": annotation.get(by),
        }
        image = field_of(sample, question, "image_id", (str, int))
        if not str(image).isdecimal():
            raise DataError(f"bad field: {sample}: 'image_id' should be a number and is {image!r}")
        name = filled_name(image_name, id=int(image), split=split)
        return Row(f"vqa/{number}", values, (pictures.find(name),), key=number, meta={"answers": tuple(ten)})

    return LazyRows(answers, make, pictures, also_read=found.values())


def vizwiz(root: Root, form: Form, *, file: str, image_folder: str | None = None, images: Names = ()) -> Rows:
    """VizWiz-VQA: a JSON list of image, question and ten answers as objects. The kind is the ``answer_type``; the
    learnt answer is the commonest of the ten, the first of equals."""
    items = read_rows(root.path(file))
    for number, item in enumerate(items):
        if not isinstance(item.get("image"), str) or "question" not in item:
            raise DataError(f"{file} is not a VizWiz file: entry {number} needs `image` (a name) and `question`")
    once((item["image"] for item in items), file, "image")
    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        sample = f"question about {item['image']}"
        ten = _ten(sample, item)
        kind = item.get("answer_type") or ("unanswerable" if item.get("answerable") == 0 else None)
        values = {"question": field_of(sample, item, "question"), "answer": max(ten, key=ten.count), "kind": kind}
        name = str(item["image"])
        return Row(f"vizwiz/{name}", values, (pictures.find(name),), key=name, meta={"answers": tuple(ten)})

    return LazyRows(items, make, pictures)


def textvqa(
    root: Root,
    form: Form,
    *,
    file: str,
    image_name: str = "{id}.jpg",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """TextVQA: an object whose ``data`` lists question, question_id, image_id and ten answers as texts. OCR tokens are
    not read: the question is taken as it is."""
    items = each_once(listed_under(read_json(root.path(file)), "data", file), "question_id", file)
    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        number = str(item["question_id"])
        sample = f"question {number}"
        ten = _ten(sample, item, bare=True)
        name = filled_name(image_name, id=field_of(sample, item, "image_id", (str, int)))
        values = {"question": field_of(sample, item, "question"), "answer": max(ten, key=ten.count)}
        return Row(f"textvqa/{number}", values, (pictures.find(name),), key=number, meta={"answers": tuple(ten)})

    return LazyRows(items, make, pictures)


def _ten(sample: str, item: Mapping[str, object], *, bare: bool = False) -> list[str]:
    """The answers that people gave, as objects with an ``answer`` or ``bare``. Raises DataError for none."""
    given = field_of(sample, item, "answers", list)
    ten = [str(a if bare else field_of(sample, a, "answer", (str, int, float))) for a in given]
    if not ten:
        raise DataError(f"empty answer: {sample} has no answers; drop it")
    return ten


def gqa(
    root: Root,
    form: Form,
    *,
    file: str,
    image_name: str = "{id}.jpg",
    by: str = "structural",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """GQA: one object of questions by id. The kind is the question's ``structural``, ``semantic`` or ``detailed``
    type; the answer is the short one."""
    one_of("by", by, ("structural", "semantic", "detailed"))
    content = read_json(root.path(file))
    found = list(content.items()) if isinstance(content, dict) else []
    if not any(isinstance(q, dict) and "question" in q for _, q in found):
        raise DataError(f"{file} is not a GQA file: it needs an object of questions by their ids")

    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: tuple[str, object]) -> Row:
        name, given = item
        q = given if isinstance(given, Mapping) else {}
        sample = f"question {name}"
        question = field_of(sample, q, "question")
        types = field_of(sample, q, "types", dict) if q.get("types") else {}
        values = {"question": question, "answer": q.get("answer"), "kind": types.get(by)}
        image = filled_name(image_name, id=field_of(sample, q, "imageId", (str, int)))
        return Row(f"gqa/{name}", values, (pictures.find(image),), key=name)

    return LazyRows(found, make, pictures)


FORMATS = ("CQM-A", "QCM-LEA", "QCM-A", "QCM-ALE")
"""What ScienceQA's prompts call their parts: Context, Question, Multiple options - Answer, Lecture, Explanation."""
LETTER = "Answer with the option's letter from the given choices directly."


def scienceqa(
    root: Root,
    form: Form,
    *,
    problems: str,
    splits: str,
    split: str,
    format: str = "CQM-A",
    only: str = "all",
    by: str = "subject",
    image_name: str = "{split}/{id}/{image}",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """ScienceQA: the problems, and which of them are in a split.

    ``format`` is the order of the prompt and what is answered: ``CQM-A`` asks for the letter (LLaVA-1.5's, with its
    suffix), ``QCM-LEA`` has lecture and explanation before "The answer is X." (LLaVA v1's). ``only``: ``all``, or
    the problems with a picture (``image``) or without (``text``). ``by``: the kind of question is its ``subject``,
    ``grade`` or ``modality`` (image, text or none).
    """
    one_of("format", format, FORMATS)
    one_of("only", only, ("all", "image", "text"))
    one_of("by", by, ("subject", "grade", "modality"))
    content, numbers = read_json(root.path(problems)), read_json(root.path(splits))
    if not isinstance(content, dict) or not all(isinstance(p, dict) for p in content.values()):
        raise DataError(f"{problems} is not a ScienceQA file: it needs an object of problems by their numbers")
    if not isinstance(numbers, dict) or not all(isinstance(n, list) for n in numbers.values()):
        raise DataError(f"{splits} is not a ScienceQA file: it needs an object of lists of numbers by split")
    if split not in numbers:
        raise ConfigError(f"{splits} has no split {split!r}; {nearest(split, numbers)}")
    unknown = [n for n in numbers[split] if str(n) not in content]
    if unknown:
        raise DataError(
            f"{problems}: {len(unknown)} problems of split {split!r} are missing, the first is {unknown[0]}."
        )
    chosen = [
        n for n in map(str, numbers[split]) if only == "all" or bool(content[n].get("image")) == (only == "image")
    ]

    pictures = named_images(root, image_folder, images, beside=root.path(problems))

    def make(number: str) -> Row:
        problem = content[number]
        for name, form in (("question", str), ("choices", list), ("answer", object)):
            field_of(f"problem {number}", problem, name, form)
        question, answer, letter = scienceqa_texts(problem, format)
        image = problem.get("image")
        name = filled_name(image_name, split=problem.get("split", split), id=number, image=image)
        modality = "image" if image else "text" if problem.get("hint") else "none"
        values = {
            "question": question,
            "answer": answer,
            "choices": list(problem["choices"]),
            "kind": modality if by == "modality" else problem.get(by),
        }
        return Row(
            f"scienceqa/{number}",
            values,
            (pictures.find(name),) if image else (),
            key=number,
            meta={"answers": (letter,)},
        )

    return LazyRows(chosen, make, pictures, also_read=[content[n] for n in chosen])


def scienceqa_texts(problem: Mapping[str, object], format: str) -> tuple[str, str, str]:
    """Question, answer to be learnt, and the letter, of one problem in one of FORMATS.

    Raises DataError when the right answer is none of the choices.
    """
    choices, place = field_of("the problem", problem, "choices", list), problem["answer"]
    letters = "ABCDEFGHIJ"
    if not isinstance(place, int) or not 0 <= place < len(choices) <= len(letters):
        raise DataError(f"bad answer: {place!r} is not the number of one of the {len(choices)} choices")
    letter = letters[place]
    order, wanted = format.split("-")
    context = str(problem.get("hint") or "").strip() or "N/A"
    pieces = {
        "C": f"Context: {context}",
        "Q": str(problem["question"]) if order == "QCM" else f"Question: {problem['question']}",
        "M": "Options: " + " ".join(f"({x}) {c}" for x, c in zip(letters, choices, strict=False)),
    }
    question = _single_spaced("\n".join(pieces[p] for p in order))
    because = f"{problem.get('lecture') or ''} {problem.get('solution') or ''}".strip()
    if order == "CQM":
        return f"{question}\n{LETTER}", letter, letter
    said = f"The answer is {letter}."
    answer = {"A": said, "LEA": f"{because} {said}", "ALE": f"{said} BECAUSE: {because}" if because else said}[wanted]
    return question, _single_spaced(answer), letter


def _single_spaced(text: str) -> str:
    return text.replace("  ", " ").strip()


def pope(root: Root, form: Form, *, file: Names, image_folder: str | None = None, images: Names = ()) -> Rows:
    """POPE: JSON lines of question_id, image, text and label (yes or no), one file per sampling.

    The kind is the sampling: the last word of the file's name (``coco_pope_random.json`` -> random).
    """
    items: list[tuple[str, Mapping[str, object]]] = []
    for path in root.files(file):
        rows = read_rows(path)
        each_once(rows, "question_id", str(path))
        items += [(path.stem, row) for row in rows]

    pictures = named_images(root, image_folder, images, beside=root.files(file)[0])

    def make(item: tuple[str, Mapping[str, object]]) -> Row:
        stem, row = item
        number = str(row["question_id"])
        sample = f"question {number}"
        if row.get("label") not in ("yes", "no"):
            raise DataError(f"bad label: {sample}: POPE knows yes and no, not {row.get('label')!r}")
        values = {"question": field_of(sample, row, "text"), "answer": row["label"], "kind": stem.rsplit("_", 1)[-1]}
        return Row(
            f"{stem}/{number}", values, (pictures.find(str(field_of(sample, row, "image", (str, int)))),), key=number
        )

    return LazyRows(items, make, pictures)


def karpathy(
    root: Root,
    form: Form,
    *,
    file: str,
    split: str = "test",
    image_name: str = "{name}",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """The Karpathy splits of Flickr30k and COCO: one record per picture, its sentences as alternatives.

    ``split``: train, val, test or restval, several joined by ``+``.
    """
    content = listed_under(read_json(root.path(file)), "images", file)
    wanted = split.split("+")
    known = sorted({str(i.get("split")) for i in content})
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{file} has no split {name!r}; {nearest(name, known)}")
    chosen = [i for i in content if i.get("split") in wanted]
    each_once(chosen, "imgid" if "imgid" in chosen[0] else "filename", file)

    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: Mapping[str, object]) -> Row:
        sample = f"picture {item.get('imgid', item.get('filename'))}"
        file_name = field_of(sample, item, "filename")
        folder = field_of(sample, item, "filepath") if item.get("filepath") else ""
        name = "/".join(p for p in (folder, file_name) if p)
        values = {"caption": [field_of(sample, s, "raw") for s in field_of(sample, item, "sentences", list)]}
        return Row(f"karpathy/{file_name}", values, (pictures.find(filled_name(image_name, name=name)),), key=name)

    return LazyRows(chosen, make, pictures)


def nlvr(
    root: Root, form: Form, *, file: str, permutations: int = 6, image_folder: str | None = None, images: Names = ()
) -> Rows:
    """NLVR: JSON lines of sentence, label and identifier, with the pictures' six box orders below ``<directory>``.

    One record per picture; the ``group`` is the example, for which all box orders should get the same answer. Say
    what to answer by the option ``suffix``, for example "true or false?".
    """
    if not 1 <= permutations <= 6:
        raise ConfigError(f"source of kind 'nlvr': permutations is 1 to 6, not {permutations}")
    path = root.path(file)
    rows = each_once(read_rows(path), "identifier", str(path))
    split = path.stem

    pictures = named_images(root, image_folder, images, beside=root.path(file))

    def make(item: tuple[Mapping[str, object], int]) -> Row:
        row, k = item
        sample = f"example {row['identifier']}"
        label = str(row.get("label")).lower()
        if label not in ("true", "false"):
            raise DataError(f"bad label: {sample}: NLVR knows true and false, not {row.get('label')!r}")
        stem = f"{split}-{row['identifier']}-{k}"
        folder = f"{row['directory']}/" if "directory" in row else ""
        picture = pictures.find_first((f"{folder}{stem}.png", f"{stem}.png"))
        values = {"question": field_of(sample, row, "sentence"), "answer": label}
        return Row(f"nlvr/{stem}", values, (picture,), key=stem, meta={"group": str(row["identifier"])})

    return LazyRows([(row, k) for row in rows for k in range(permutations)], make, pictures)


READERS: dict[str, Callable[..., Rows]] = {
    "vqav2": vqav2,
    "ok-vqa": vqav2,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "gqa": gqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "karpathy": karpathy,
    "nlvr": nlvr,
}
