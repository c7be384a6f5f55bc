"""Chat templates that others publish, tried: learnt, cut into spans, and held against the template's own output.

    python tools/published_templates.py gather CLONES FOLDER    git clones under CLONES/OWNER/NAME -> FOLDER/SLUG.jinja
    python tools/published_templates.py write FOLDER            tries all and writes the results and the page's table

The templates are not ours and stay outside; kept are where each is from, what became of it, and a hash of what it
renders, in tests/fixtures/published_templates.json, which a test holds against FOLDER (ISTHMUS_TEMPLATES).
"""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from isthmus.batch import IGNORE
from isthmus.data.chat import OWN, ChatForm, Pieces, chosen
from isthmus.data.processor import TextProcessor
from isthmus.data.record import Record, Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "fixtures" / "published_templates.json"
PAGE = ROOT / "docs" / "own-language-model.md"
MARK = "<!-- published templates -->\n"
_TOKENS = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_\w+>")
"""What looks like a special token in a template; a row names others."""


def gather(rows: list[dict[str, Any]], clones: Path, folder: Path) -> None:
    """Each row's file at its commit; ``path#KEY`` is a text in a dictionary CHAT_TEMPLATES of a Python file, a
    ``compact`` row's indentation and line breaks are taken out, as its repository's page asks."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path, _, key = row["path"].partition("#")
        place = f"{row['commit']}:{path}"
        told = subprocess.run(["git", "-C", clones / row["repository"], "show", place], check=True, capture_output=True)
        text = told.stdout.decode()
        if row.get("compact"):
            text = text.replace("    ", "").replace("\n", "")
        (folder / f"{row['slug']}.jinja").write_text(_entry(text, key) if key else text, encoding="utf-8")


def _entry(source: str, key: str) -> str:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHAT_TEMPLATES":
            assert isinstance(node.value, ast.Dict)
            named = zip(node.value.keys, node.value.values, strict=True)
            return next(ast.literal_eval(v) for k, v in named if isinstance(k, ast.Constant) and k.value == key)
    raise KeyError(key)


def tried(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """What becomes of a template: ``trained`` or why not, the same ``with_system``, and the hash of what it renders.

    Raises AssertionError where ids differ from transformers' ``apply_chat_template``, on one to four turns with a
    system's text and without, or what is learnt is not the answers and their ends.
    """
    words = _words(row, text)
    switches = dict(part.split("=") for part in row.get("switches", "").split(",") if part)
    template, own = chosen(f"{OWN}:{row['switches']}" if switches else OWN, words.with_chat_template(text))
    form, processor = ChatForm(own), TextProcessor(own, template=template, max_length=1 << 20)
    peer = PreTrainedTokenizerFast(tokenizer_object=words.backend, **words.specials)
    how: dict[str, Any] = {
        "chat_template": text,
        **{k: {"false": False, "true": True}.get(v, v) for k, v in switches.items()},
    }
    rendered = hashlib.sha256()
    for system in (False, True):
        pieces = form.headed if system else form.bare
        for turns in (1, 2, 3, 4):
            record = _talk(turns, system)
            asked = Record("asked", record.parts[:-1])
            try:
                prompt = list(processor.prompt(asked).streams["lm"].ids)
            except DataError as error:
                if not system or "refuses" not in str(error):
                    raise AssertionError(f"{row['slug']}: {error}") from error
                continue
            said, ids = _theirs(peer, asked, {**how, "add_generation_prompt": True})
            assert prompt == ids, f"{row['slug']}: the prompt of {turns} turns"
            rendered.update(said.encode())
            if isinstance(pieces, Pieces):
                said, ids = _theirs(peer, record, how)
                rendered.update(said.encode())
                _must_equal(processor.example(record).streams["lm"], ids, words, str(form.stop), turns)
                continue
            try:
                processor.example(record)
                raise AssertionError(f"{row['slug']}: learnt, although it cannot be cut: {pieces}")
            except (ConfigError, DataError):
                pass
    told = {
        name: True if isinstance(p, Pieces) else p for name, p in (("trained", form.bare), ("with_system", form.headed))
    }
    dated = any("today's date" in str(why) for why in told.values())
    return {**told, "stop": form.stop, "rendered": None if dated else rendered.hexdigest()}


def _must_equal(span: Any, ids: list[int], words: Tokenizer, stop: str, turns: int) -> None:
    assert list(span.ids) == ids, f"{turns} turns: {words.decode(span.ids, skip_special=False)!r}"
    learnt = words.decode([i for i in span.labels if i != IGNORE], skip_special=False)
    assert learnt.rstrip().endswith(stop), learnt
    assert all(f"It's no. {n}." in learnt for n in range(turns)), learnt
    assert "Which" not in learnt, learnt


def _words(row: Mapping[str, Any], text: str) -> Tokenizer:
    """A small byte-level vocabulary with the row's special tokens."""
    found = [*dict.fromkeys([*_TOKENS.findall(text), *row.get("tokens", ())])]
    words = Tokenizer.train(["a red cube, a blue ring: user assistant system"] * 3, 300)
    words = words.with_tokens(*(token for token in [*found, row["bos"], row["eos"]] if token))
    return Tokenizer(words.backend, eos=row["eos"], bos=row["bos"], pad=row["eos"], unk="<unk>")


def _talk(turns: int, system: bool) -> Record:
    parts = [Text("Be short, 'please'.", role="system")] * system
    for n in range(turns):
        parts += [
            Text(f"Which cube is {n}?\n(Of é.)", role="user"),
            Text(f"It's no. {n}.", role="assistant", learn=True),
        ]
    return Record("talk", tuple(parts))


def _theirs(peer: Any, record: Record, how: Mapping[str, Any]) -> tuple[str, list[int]]:
    """What transformers makes of a conversation, its messages' contents as texts or, where refused, as parts."""
    messages: list[dict[str, Any]] = [{"role": p.role, "content": str(p.text)} for p in record.texts]
    try:
        said = peer.apply_chat_template(messages, tokenize=False, **how)
    except Exception:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        said = peer.apply_chat_template(messages, tokenize=False, **how)
    return said, peer.apply_chat_template(messages, return_dict=False, **how)


def table(rows: list[dict[str, Any]]) -> str:
    """The page's table."""
    lines = ["| template | file | trained with | with a system's text |", "|---|---|---|---|"]
    for row in rows:
        found = row["found"]
        name = f"{row['name']}, `{row['switches']}`" if "switches" in row else row["name"]
        place = f"{row['repository']} `{row['path']}` at {row['commit'][:7]}"
        bare, headed = ("yes" if found[k] is True else f"no: {_short(found[k])}" for k in ("trained", "with_system"))
        headed = headed if bare == "yes" else "as without"
        lines.append(f"| {name} | {place} | {bare} | {headed} |")
    return "\n".join(lines) + "\n"


def _short(why: str) -> str:
    why = why.split(", so ")[0].split(": TemplateError: ")[-1].replace("|", "\\|").replace("\n", " ")
    return why if len(why) <= 110 else why[:107] + "…"


def main(command: str, *places: str) -> None:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    folder = Path(places[-1])
    if command == "gather":
        gather(rows, Path(places[0]), folder)
        return
    for row in rows:
        text = (folder / f"{row['slug']}.jinja").read_text(encoding="utf-8")
        row |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "found": tried(row, text)}
        print(row["slug"], row.get("switches", ""), json.dumps(row["found"], ensure_ascii=False))
    TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    after = rest.split("\n\n", 1)[-1]
    PAGE.write_text(f"{before}{MARK}{table(rows)}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
