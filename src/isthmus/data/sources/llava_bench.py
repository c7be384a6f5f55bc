"""LLaVA-Bench (2304.08485, section 5.1): questions about pictures with reference answers and, for the judge,
contexts."""

from collections.abc import Mapping, Sequence
from typing import cast

from isthmus.data.sources.coco import CategoryBox
from isthmus.data.sources.files import Names, Root, named_images, read_rows
from isthmus.data.sources.items import LazyRows, each_once, field_of
from isthmus.data.sources.rows import Form, Row, Rows
from isthmus.errors import DataError


def llava_bench(
    root: Root,
    form: Form,
    *,
    questions: str,
    references: str,
    contexts: str,
    image_name: str = "{image}",
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """JSON lines of three files, as github.com/haotian-liu/LLaVA has them: ``questions`` (question_id, image, text,
    category), ``references`` (question_id, text), and ``contexts`` (image, and a caption, or captions and instances of
    category and bbox in 0..1). The kind is the category: conv, detail or complex. ``image_name`` makes the file's name
    from the ``{image}`` of a question: COCO's 2014 files are called ``COCO_val2014_{image}``.
    """
    items = each_once(read_rows(root.path(questions)), "question_id", questions)
    given = {str(a["question_id"]): a for a in each_once(read_rows(root.path(references)), "question_id", references)}
    context_of = {str(c["image"]): c for c in each_once(read_rows(root.path(contexts)), "image", contexts)}
    for item in items:
        number, image = str(item["question_id"]), str(item.get("image"))
        if number not in given:
            raise DataError(f"{references}: question {number} of {questions} has no reference answer.")
        if image not in context_of:
            raise DataError(f"{contexts}: the picture {image} of question {number} has no context.")
    pictures = named_images(root, image_folder, images, beside=root.path(questions))

    def make(item: Mapping[str, object]) -> Row:
        number, image = str(item["question_id"]), str(item["image"])
        sample = f"question {number}"
        answer = field_of(f"the reference to {sample}", given[number], "text")
        values = {"question": field_of(sample, item, "text"), "answer": answer, "kind": item.get("category")}
        picture = pictures.find(image_name.replace("{image}", image))
        return Row(
            f"llava-bench/{number}",
            values,
            (picture,),
            key=number,
            meta={"context": _context(context_of[image], image)},
        )

    return LazyRows(items, make, pictures, also_read=[*given.values(), *context_of.values()])


def _context(item: Mapping[str, object], image: str) -> str:
    """The captions, and the boxes as LLaVA's prompts have them."""
    captions = item.get("captions", item.get("caption"))
    given: list[object] = captions if isinstance(captions, list) else [] if captions is None else [captions]
    lines = [line for line in given if isinstance(line, str)]
    instances = cast("Sequence[CategoryBox]", item.get("instances") or ())
    try:
        boxes = [f"{i['category']}: [{', '.join(f'{c:.3f}' for c in i['bbox'])}]" for i in instances]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"bad context: the instances of {image} need category and bbox (four numbers)") from None
    if len(lines) < len(given) or not (lines or boxes):
        raise DataError(f"bad context: {image} has neither a caption, nor captions, nor instances")
    return "\n".join([*lines, *([""] if lines and boxes else []), *boxes])
