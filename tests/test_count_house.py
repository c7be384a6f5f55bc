"""The counting script on a small package, whose numbers are known."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNT = runpy.run_path(str(ROOT / "tools" / "count_house.py"))
LAYERS = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["isthmus.top", "isthmus.low | isthmus.side"]
"""


def house(tmp_path, **files: str):
    (tmp_path / "pyproject.toml").write_text(LAYERS)
    folder = tmp_path / "src" / "isthmus"
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", **files}.items():
        (folder / f"{name}.py").write_text(text)
    return COUNT["House"](tmp_path)


def test_what_is_counted_is_there(tmp_path):
    low = "def f():\n    from isthmus.top import x\nfrom isthmus.side import y\n"
    top = (
        "import isthmus.low\n"
        "if kind == 'llava' or kind in ('clip', 'lm'): pass\n"
        "T = {'llava': 1, 'clip': 2}\nO = {'llava': 1}\n"
        "hasattr(x, 'a'); getattr(x, 'b', None); getattr(x, 'c'); getattr(x, n, None)\n"
    )
    found = house(tmp_path, top=top, low=low, side="V = ContextVar('v')\n")
    assert COUNT["branches_on_kinds"](found) == 3
    assert COUNT["probes"](found) == 2
    assert COUNT["context_variables"](found) == 1
    assert COUNT["circles"](found) == 1
    assert COUNT["upward"](found) == 2  # one up, one sideways
    assert "| pairs of modules in a circle | 1 |" in COUNT["table"]({"now": found})


EDGES = {
    "isthmus.adapters": "peft reads what no module has",
    "isthmus.checkpoint": "JSON that nobody has checked yet",
    "isthmus.config": "what a union of types gives",
    "isthmus.data.tokenizer": "a tokenizer of transformers",
    "isthmus.evaluation.tasks": "a model: what a task needs of it, it says itself",
    "isthmus.interop.hf_peer": "transformers' models, beside ours",
    "isthmus.interop.lora": "peft's settings and models",
    "isthmus.language.chat_template": "what Jinja's templates call by name",
    "isthmus.language.library": "transformers' language models and their configurations",
    "isthmus.language.window": "layers of a cache of transformers",
    "isthmus.recipes.capfilt": "keywords handed on to a model's generate",
    "isthmus.systems.base": "transformers' models, beside ours",
    "isthmus.systems.blip2": "the same",
    "isthmus.systems.clip": "the same",
    "isthmus.systems.peers": "the same",
    "isthmus.systems.towers": "the same",
    "isthmus.training.protocols": "a position, which every loader has its own of",
    "isthmus.user_code": "a class or function of the user's own",
    "isthmus": "a name that is imported when asked for",
}


def test_any_stands_only_where_something_of_others_does():
    """The type Any, and why: what pyright can say nothing about is to be had in few places."""
    used = COUNT["uses_of_any"](COUNT["House"](ROOT)).keys()
    assert used <= EDGES.keys(), f"Any in {sorted(used - EDGES.keys())}: say the type, or object for what is passed on"
    assert used >= EDGES.keys(), f"no Any is left in {sorted(EDGES.keys() - used)}: take it off the list"
