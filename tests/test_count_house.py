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
