"""The program: fast start, helpful errors, and each command on a miniature story."""

import base64
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image as PilImage
from typer.testing import CliRunner

from isthmus.cli import _warn, app, main
from isthmus.cli.evaluate import spec_of
from isthmus.errors import ConfigError, IsthmusWarning
from isthmus.opening import load
from tests.miniature import tree


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit code, what was printed, what was said on the error stream) of ``isthmus ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_our_own_warnings_are_told_once_in_a_paragraph(capsys):
    """Without their place in the code; warnings of other libraries are shown as ever."""
    theirs, warn = [], partial(_warn, set(), lambda *all: theirs.append(all))
    for place in (7, 8):
        warn(IsthmusWarning("beware"), IsthmusWarning, "folders.py", place)
        warn(UserWarning("theirs"), UserWarning, "other.py", place)
    warn(IsthmusWarning("and else"), IsthmusWarning, "folders.py", 7)
    assert capsys.readouterr().err == "isthmus: warning: beware\nisthmus: warning: and else\n"
    assert [str(message) for message, *_ in theirs] == ["theirs", "theirs"]


def test_an_interruption_is_told(monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.demo.story.run_demo", pressed)
    code, _, said = run(monkeypatch, capsys, "demo", "--no-serve")
    assert (code, said) == (130, "isthmus: Interrupted. The same command goes on where this one stopped.\n")


@pytest.mark.parametrize(
    ("words", "then"),
    [
        (["data", "capfilt", "--data", "d", "--captioner", "c", "--clip", "c", "--out", "o"], "begins anew"),
        (["data", "instruct", "--out", "o", "--scenes", "2"], "goes on where this one stopped"),
        (["data", "instruct", "--out", "o", "--scenes", "2", "--offline"], "begins anew"),
    ],
)
def test_an_interruption_does_not_promise_what_is_not_so(monkeypatch, capsys, words, then):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.cli.data.capfilt", pressed)
    monkeypatch.setattr("isthmus.cli.instruct.run", pressed)
    code, _, said = run(monkeypatch, capsys, *words)
    assert (code, said) == (130, f"isthmus: Interrupted. The same command {then}.\n")


def test_help_and_import_load_nothing_heavy():
    for command in (
        "import isthmus",
        "from isthmus.cli import main; import sys; sys.argv = ['isthmus', '--help']\n"
        "try: main()\nexcept SystemExit: pass",
    ):
        heavy = "{'torch', 'transformers', 'PIL', 'numpy', 'yaml', 'pydantic', 'tokenizers'}"
        script = f"{command}\nimport sys\nassert not {heavy} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_training_data_of_an_evaluation_may_be_described_apart(tmp_path):
    for name in ("dev", "train"):
        (tmp_path / f"{name}.yaml").write_text("{kind: jsonl, file: a.jsonl, image_folder: a}\n")
    data, train = (str(tmp_path / f"{name}.yaml") for name in ("dev", "train"))
    options = ["limit=3", "train.image_folder=b", "task.rule=exact"]
    spec = spec_of("vqa", data, train, options)
    assert spec.data == {"kind": "jsonl", "file": "a.jsonl", "image_folder": "a", "limit": 3}
    assert spec.train == {"kind": "jsonl", "file": "a.jsonl", "image_folder": "b", "limit": 3}
    with pytest.raises(ConfigError, match=r"--set train\.image_folder is about --train, which is not given"):
        spec_of("vqa", data, None, options)


def test_the_package_runs_as_the_program():
    done = subprocess.run([sys.executable, "-m", "isthmus", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "python -m isthmus" in done.stdout


def test_train_show_eval_and_chat(monkeypatch, capsys, story, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tree("llava", story)))
    out = tmp_path / "run"
    code, said, _ = run(monkeypatch, capsys, "train", recipe, "stages.align.steps=1", "--out", out)
    assert code == 0
    assert "isthmus chat" in said
    code, said, _ = run(monkeypatch, capsys, "show", out, "--json", tmp_path / "show.json")
    assert code == 0
    assert json.loads((tmp_path / "show.json").read_text())["visual_tokens"] == 16
    assert "connector" in said
    code, said, _ = run(monkeypatch, capsys, "eval", out, "--json", tmp_path / "scores.json", "--out", tmp_path / "e")
    assert code == 0
    assert {"accuracy", "blind", "shuffled", "prior", "gain"} <= json.loads((tmp_path / "scores.json").read_text())[
        "vqa"
    ].keys()
    assert len((tmp_path / "e" / "vqa" / "outputs.jsonl").read_text().splitlines()) == 12
    picture = tmp_path / "p.png"
    PilImage.new("RGB", (64, 64), "red").save(picture)
    code, said, _ = run(monkeypatch, capsys, "chat", out, "--image", picture, "--max-new-tokens", 4, "what is it?")
    assert code == 0
    expected = load(out).answer(picture, "what is it?", max_new_tokens=4)
    assert "".join(said.split()) == "".join(expected.split())


def test_eval_on_data_of_ones_own(monkeypatch, capsys, story, tmp_path):
    code, said, _ = run(
        monkeypatch, capsys, "data", "scenes", "--out", tmp_path / "s", "--count", 8, "--format", "coco"
    )
    assert code == 0
    assert "8 train scenes" in said
    file = next((tmp_path / "s").glob("*.json"))
    code, said, said_error = run(
        monkeypatch,
        capsys,
        "eval",
        story / "clip",
        "--data",
        file,
        "--set",
        f"image_folder={tmp_path / 's' / 'images'}",
        "--out",
        tmp_path / "e",
    )
    assert code == 0, said_error
    assert "R@1" in said


def test_show_prints_the_compute_rule_and_published_sizes(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "lm.yaml"
    recipe.write_text(yaml.safe_dump(tree("lm")))
    code, said, _ = run(monkeypatch, capsys, "show", recipe, "--json", tmp_path / "f.json")
    assert code == 0
    rule = json.loads((tmp_path / "f.json").read_text())["compute_rule"]
    assert rule["flops"] == 6.0 * rule["parameters"] * rule["tokens"]
    assert rule["optimal_tokens"] == 20 * rule["parameters"]
    assert "fewer tokens than" in " ".join(said.split())
    code, said, _ = run(monkeypatch, capsys, "show", "llava-1.5-7b", "--json", tmp_path / "f.json")
    assert code == 0
    facts = json.loads((tmp_path / "f.json").read_text())
    assert facts["visual_tokens"] == 576
    assert facts["parts"]["connector"] == 20_979_712
    assert [stage["trained"] for stage in facts["stages"]] == [20_979_712, 6_759_395_328]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "clip-tny"], "did you mean 'clip-tiny'?"),
        (["train", "clip-tiny", "stages.contrast.stepps=3"], "did you mean 'steps'?"),
        (["train", "clip-tiny", "steps"], "is not key=value"),
        (["eval", "nowhere"], "no such file or folder"),
        (["eval"], "needs either a MODEL to ask, or --rescore FOLDER"),
        (["eval", "--rescore", "nowhere"], "nowhere is no score folder"),
        (["eval", "--rescore", "nowhere", "--out", "x"], "--out is for asking a model"),
        (["eval", "--rescore", "nowhere", "--limit", "3"], "--limit is for asking a model"),
        (["eval", "--rescore", "nowhere", "--against", "x", "--task", "vqa"], "--task is for asking a model"),
        (["eval", "--rescore", "nowhere", "--set", "limit=3"], "Only task.rule can be set"),
        (["eval", "nowhere", "--seed", "-1"], "Invalid value for '--seed'"),
        (["score", "r.json", "p.json", "--task", "vqa", "--seed", "-1"], "Invalid value for '--seed'"),
        (["score", "r.json", "p.json", "--task", "vqaa"], "did you mean 'vqa'?"),
        (["score", "r.json", "p.json", "--task", "vqa"], "no such file: r.json"),
        (["chat", "nowhere", "--image", "missing.png", "what?"], "There is no picture at missing.png"),
        (["show", "lm-tinny"], "neither a model folder nor a shipped recipe (did you mean 'lm-tiny'?)"),
        (["check", "clip-tny"], "did you mean 'clip-tiny'?"),
        (["data", "scenes", "--out", "x", "--format", "voc"], "cannot be written as 'voc'"),
        (["data", "scenes", "--out", "x", "--split", "tset"], "did you mean 'test'?"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, said = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "STORY/lava", "what?"], "did you mean 'STORY/llava'?"),
        (["chat", "STORY/llava", "  "], "The question is empty"),
        (["chat", "STORY/llava", "--image", "cut.png", "what?"], "cut.png is truncated or damaged"),
        (["chat", "STORY/llava", "--image", "text.png", "what?"], "text.png is not a picture of the formats JPEG, PNG"),
        (["chat", "STORY/lm", "--image", "cut.png", "what?"], "This model (lm) reads only text; leave --image out"),
        (["chat", "STORY/clip"], "This clip model cannot chat; it can: embed_images"),
        (["chat", "STORY/llava", "--max-new-tokens", "0", "what?"], "max_new_tokens is 0"),
        (["show", "STORY/llava", "seed=1"], "key=value changes recipes only"),
        (["eval", "STORY/clip", "--task", "vqa"], "has no task 'vqa' of its own"),
        (["eval", "STORY/clip", "--data", "nothing.json"], "There is no data at nothing.json"),
        (["eval", "STORY/clip", "--data", "broken.yaml"], "broken.yaml is not valid YAML: line 2"),
        (["eval", "STORY/clip", "--data", "d.yaml", "--set", "count=["], "is not valid YAML"),
        (["eval", "STORY/clip", "--data", "d.yaml", "--set", "file={DATA}/x"], "quotes of its own: '\"{DATA}/x\"'"),
        (["eval", "STORY/clip", "--data", "d.yaml", "--task", "retreival"], "did you mean 'retrieval'?"),
        (["eval", "STORY/clip", "--data", "d.yaml", "--set", "task.prefx=a"], "has no option 'prefx'"),
        (["eval", "STORY/llava", "--data", "d.yaml", "--task", "retrieval"], "This llava model cannot embed_images"),
        (["eval", "STORY"], "is not a model folder: it has no config.json"),
    ],
)
def test_nonsense_at_a_model_is_answered_in_words(monkeypatch, capsys, story, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "cut.png"
    PilImage.effect_noise((64, 64), 90).save(picture)
    picture.write_bytes(picture.read_bytes()[:900])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "broken.yaml").write_text("a: [1,\n b: 2")
    (tmp_path / "d.yaml").write_text("{kind: scenes, form: captions, count: 4}")
    arguments = [a.replace("STORY", str(story)) for a in arguments]
    if arguments[0] == "eval":
        arguments += ["--out", str(tmp_path / "e")]
    code, _, said = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words.replace("STORY", str(story)) in " ".join(said.split())
    assert "Traceback" not in said


def test_a_pattern_that_matches_nothing_is_explained(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tree("clip")))
    code, _, said = run(
        monkeypatch, capsys, "train", recipe, "stages.contrast.train.0.pattern=visoin.*", "--out", tmp_path / "run"
    )
    assert code == 2
    assert "'visoin.*' matches no parameter" in " ".join(said.split())
    assert "vision." in said


def test_a_finished_folder_of_another_recipe_is_refused(monkeypatch, capsys, story, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tree("clip")))
    code, _, said = run(monkeypatch, capsys, "train", recipe, "seed=5", "--out", story / "clip")
    assert code == 2
    assert "recipe.seed was 0, now 5" in " ".join(said.split())


def test_doctor_speaks(monkeypatch, capsys):
    code, said, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0
    assert "No torchvision" in said


def test_every_option_and_command_is_explained(monkeypatch, capsys):
    for command in ("demo", "train", "show", "check", "eval", "score", "chat", "doctor", "data", "data scenes"):
        code, said, _ = run(monkeypatch, capsys, *command.split(), "--help")
        assert code == 0
        assert Path(command).name.split()[-1] in said


def test_no_help_cuts_a_name_at_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    commands = [
        [name] for name in ("demo", "train", "show", "check", "eval", "compare", "score", "chat", "look", "serve")
    ]
    commands += [
        ["batch"],
        ["convert"],
        ["verify"],
        ["doctor"],
        *(["data", n] for n in ("scenes", "instruct", "capfilt")),
    ]
    for words in [[], *commands]:
        said = CliRunner().invoke(app, [*words, "--help"]).output
        assert "--help" in said
        assert re.findall(r"--[\w-]*…", said) == []
        assert max(map(len, said.splitlines())) <= 80


def test_score_official_files_then_again_and_in_pairs(monkeypatch, capsys, tmp_path):
    captions = [(1, "a man rides a wave"), (1, "a surfer"), (2, "two dogs on a red sofa")]
    references = {"annotations": [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(captions)]}
    (tmp_path / "r.json").write_text(json.dumps(references))
    for name, said in (("a", ["a man", "dogs"]), ("b", ["a man rides a wave", ""])):
        given = [{"image_id": i, "caption": c} for i, c in enumerate(said, start=1)]
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        code, printed, _ = run(
            monkeypatch, capsys, "score", tmp_path / "r.json", tmp_path / f"{name}.json", "--task", "caption",
            "--json", tmp_path / "s.json", "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0
    assert "1 empty" in printed
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["per_item"]["1"]["ROUGE_L"] == 1.0
    assert facts["corpus"].keys() == facts["intervals"].keys()
    code, printed, _ = run(monkeypatch, capsys, "eval", "--rescore", tmp_path / "b")
    assert code == 0
    assert "CIDEr" in printed
    code, printed, _ = run(
        monkeypatch, capsys, "eval", "--rescore", tmp_path / "a", "--against", tmp_path / "b",
        "--json", tmp_path / "d.json",
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "d.json").read_text())["ROUGE_L"]["difference"] != 0


def test_captions_and_conversations_of_a_trained_model(monkeypatch, capsys, story, tmp_path):
    for task, form, options in (
        ("caption", "captions", []),
        ("conversation", "conversations", ["--set", "turns=2"]),
    ):
        (tmp_path / "data.yaml").write_text(
            yaml.safe_dump({"kind": "scenes", "form": form, "split": "test", "count": 3})
        )
        arguments = ["eval", story / "llava", "--task", task, "--data", tmp_path / "data.yaml", "--out", tmp_path / "e"]
        arguments += ["--json", tmp_path / "f.json", "--set", "task.decoding={max_new_tokens: 4}", *options]
        code, _, said = run(monkeypatch, capsys, *arguments)
        assert code == 0, said
    manifest = json.loads((tmp_path / "e/caption/manifest.json").read_text())
    assert manifest["question"] == "describe the picture."
    assert manifest["prompt"]["first"].endswith("describe the picture. ASSISTANT:")
    assert len(manifest["prompt"]["sha256"]) == 64
    assert manifest["image"]["size"] == 64
    assert manifest["decoding"] == {**manifest["decoding"], "max_new_tokens": 4, "temperature": 0.0}
    assert len((tmp_path / "e/conversation/outputs.jsonl").read_text().splitlines()) == 6
    assert "follow_ups" in json.loads((tmp_path / "f.json").read_text())["conversation"]


def test_benchmarks_over_groups_of_questions(story, tmp_path, monkeypatch, capsys):
    """MME's points and MMBench's circular score, from the official files to the table."""
    folder = tmp_path / "MME/existence"
    folder.mkdir(parents=True)
    for name, colour in (("1", "red"), ("2", "blue")):
        PilImage.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("is there a cube?\tYes\nis there a ring?\tNo\n")
    (tmp_path / "mme.yaml").write_text(f"{{kind: mme, folder: {tmp_path / 'MME'}}}")
    cells = [base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in "12"]
    rows = [f"{n}\twhat?\tred\tblue\t{'AB'[n]}\t{cell}" for n, cell in enumerate(cells)]
    (tmp_path / "table.tsv").write_text("\n".join(["index\tquestion\tA\tB\tanswer\timage", *rows]))
    (tmp_path / "mmbench.yaml").write_text(f"{{kind: mmbench, file: {tmp_path / 'table.tsv'}}}")
    for task, words in (("mme", "perception"), ("mmbench", "circular")):
        options = ["--set", "task.decoding={max_new_tokens: 2}", "--out", tmp_path / task]
        code, said, wrong = run(
            monkeypatch, capsys, "eval", story / "llava", "--task", task, "--data", tmp_path / f"{task}.yaml", *options
        )
        assert (code, words in said, wrong) == (0, True, "")
        assert words in json.loads((tmp_path / task / task / "scores.json").read_text())
