"""METEOR and SPICE through the optional package pycocoevalcap, which runs the authors' Java programs.

Nothing here downloads: SPICE's models must lie in the package already. What is missing is said before any scoring.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from isthmus.errors import MissingExtraError
from isthmus.evaluation.captions.tokens import tokens

_FILES = {
    "METEOR": ("meteor/meteor-1.5.jar",),
    "SPICE": (
        "spice/spice-1.0.jar",
        "spice/lib/stanford-corenlp-3.6.0.jar",
        "spice/lib/stanford-corenlp-3.6.0-models.jar",
    ),
}
JAVA_NAMES = tuple(_FILES)


def check(name: str) -> None:
    """Raises MissingExtraError when the package, a Java runtime or a file of the metric ``name`` is missing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"{name} needs the optional package pycocoevalcap: pip install 'isthmus[eval]'. "
            "BLEU, ROUGE-L and CIDEr need nothing."
        )
    if shutil.which("java") is None:
        raise MissingExtraError(f"{name} is a Java program and there is no `java` on the path; install a runtime.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for file in _FILES[name]:
        if not (folder / file).is_file():
            raise MissingExtraError(
                f"{name} needs {folder / file}, which is not there, and isthmus downloads nothing by itself; "
                f"see the readme of pycocoevalcap for where to get it, or leave {name} out."
            )


def java_scores(
    name: str, references: Mapping[str, Sequence[str]], candidates: Mapping[str, str]
) -> tuple[float, list[float]]:
    """The corpus score and the items' in the references' order. Raises MissingExtraError, see :func:`check`."""
    check(name)
    module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    scorer = getattr(module, name.capitalize())()
    numbers = {key: place for place, key in enumerate(references)}  # SPICE returns the items sorted by their key
    theirs = {numbers[k]: [" ".join(tokens(c)) for c in captions] for k, captions in references.items()}
    ours = {numbers[k]: [" ".join(tokens(candidates[k]))] for k in references}
    corpus, items = scorer.compute_score(theirs, ours)
    if name == "SPICE":
        items = [item["All"]["f"] for item in items]
    return float(corpus), [float(v) for v in items]
