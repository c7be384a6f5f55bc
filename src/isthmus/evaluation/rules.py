"""The rules that give an answer its points, by the name that a recipe, a manifest or ``--set task.rule=`` uses."""

from isthmus.errors import ConfigError, nearest
from isthmus.evaluation import vqa_accuracy
from isthmus.evaluation.benchmark_rules import A_OKVQA, ANLS, MMMU
from isthmus.evaluation.binary import YES_NO
from isthmus.evaluation.choice import CHOICE, SCIENCEQA
from isthmus.evaluation.outputs import AnswerRow
from isthmus.evaluation.vqa import EXACT, Rule


def _gqa(answer: str, row: AnswerRow) -> float:
    given = _bare(answer)
    return float(bool(given) and given == _bare(str(row["truth"][0])))


def _bare(answer: str) -> str:
    return answer.strip().rstrip(".").strip().lower()


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        EXACT,
        Rule(name="vqa", version=1, points=lambda a, row: vqa_accuracy.accuracy(a, row["truth"])),
        Rule(name="ok-vqa", version=1, points=lambda a, row: vqa_accuracy.stemmed_accuracy(a, row["truth"])),
        Rule(name="gqa", version=1, points=_gqa),
        YES_NO,
        CHOICE,
        SCIENCEQA,
        A_OKVQA,
        ANLS,
        MMMU,
    )
}
"""``exact`` (light normalisation), ``vqa`` (official VQA v2 accuracy), ``ok-vqa`` (the same on stemmed answers),
``gqa`` (equal strings, case and a last full stop aside), ``yes-no`` (also true and false), ``choice`` (the
choice that is named), ``scienceqa`` (letters in the published forms alone); of one benchmark each: ``a-okvqa``,
``anls``, ``mmmu``."""


def rule(name: object) -> Rule:
    """Raises ConfigError for an unknown name, with the nearest."""
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"There is no scoring rule {name!r}; {nearest(str(name), RULES)}")
    return RULES[name]
