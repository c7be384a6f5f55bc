"""Models side by side: what is asked of whom, what comes out, what it costs; and that batches change no answer."""

import csv
import json

import pytest
import torch
from PIL import Image as PilImage
from torch.utils.flop_counter import FlopCounterMode

from isthmus.comparison.compare import Contestant, contestants, pooled, recall, shared_tasks
from isthmus.comparison.cost import Operations, trained_parameters
from isthmus.comparison.side_by_side import difference, difference_rows, score_rows
from isthmus.data.attention import with_answer
from isthmus.data.collate import collate
from isthmus.data.record import without_answer
from isthmus.demo.scenes import SceneSource
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.judged import JudgedScores, Relative
from isthmus.evaluation.rescore import rescore
from isthmus.evaluation.run import Result
from isthmus.language import Decoding
from isthmus.opening import load
from isthmus.recipes.scoring import recipe_of
from tests.cli.test_cli import run

pytestmark = [  # of models made at random, which often say nothing
    pytest.mark.filterwarnings("ignore:All .* answers are empty"),
    pytest.mark.filterwarnings("ignore:CIDEr weighs words"),
]


@pytest.fixture(scope="module")
def compared(rivals, tmp_path_factory):
    from isthmus.cli.compare import run as compare

    out = tmp_path_factory.mktemp("compared")
    picked = [str(rivals[name]) for name in ("clip", "flamingo", "llava")]
    compare(picked, out=out, json_file=out / "all.json", given={})
    return out


def test_every_model_is_asked_what_it_can_do(compared):
    rows = list(csv.DictReader((compared / "scores.csv").read_text().splitlines()))
    assert {(r["model"], r["task"]) for r in rows} == {("clip", "retrieval"), ("flamingo", "vqa"), ("llava", "vqa")}
    facts = json.loads((compared / "all.json").read_text())
    overall = {r["model"]: float(r["score"]) for r in rows if r["kind"] == "all"}
    assert overall == {n: facts["models"][n]["accuracy"] for n in ("flamingo", "llava")}
    outputs = (compared / "scores" / "llava" / "vqa" / "outputs.jsonl").read_text()
    raw = [json.loads(line) for line in outputs.splitlines()]
    assert len(raw) == 12
    assert overall["llava"] == sum(r["correct"] for r in raw) / 12
    assert "| llava | vqa | all | 12 |" in (compared / "scores.md").read_text()


def test_a_score_without_an_interval_has_no_line(tmp_path):
    """As when no reply of a judge could be read."""
    scores = JudgedScores(Relative(n=0, excluded=2), {}, 2, {})
    rival = Contestant(name="llava", folder=tmp_path, results=[Result("talk", "judged", scores, [], tmp_path)])
    assert score_rows([rival]) == []


def test_costs_are_those_of_the_runs(compared, rivals):
    costs = json.loads((compared / "all.json").read_text())["costs"]
    recipe = recipe_of(rivals["flamingo"])
    assert recipe is not None
    own = load(rivals["flamingo"]).net
    by_hand = sum(p.numel() for n, p in own.named_parameters() if not n.startswith(("vision.", "language.lm.")))
    assert costs["flamingo"]["trained"] == trained_parameters(rivals["flamingo"], recipe) == by_hand
    assert costs["flamingo"]["visual_tokens"] == 5
    assert costs["clip"]["latency"] is None
    for name in ("flamingo", "llava"):
        assert min(costs[name]["throughput"].values()) > 0
        assert costs[name]["flops_answer"] > 2 * costs[name]["visual_tokens"] * 1000
        assert costs[name]["training_flops"] > costs[name]["flops_answer"]


def test_the_report_shows_all_of_it(compared):
    page = (compared / "report.html").read_text()
    for word in ("clip · flamingo · llava", "Who is better", "llava − flamingo", "What they cost", "loss by stage"):
        assert word in page
    assert page.count("<article") == 12
    assert page.count('class="look"') + page.count("<i>no answer</i>") == 24  # Flamingo's and LLaVA's
    assert "not equal" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_second_call_asks_nothing_again(compared, rivals, monkeypatch, capsys):
    before = (compared / "scores" / "llava" / "vqa" / "outputs.jsonl").stat().st_mtime_ns
    code, said, _ = run(monkeypatch, capsys, "compare", rivals["flamingo"], rivals["llava"], "--out", compared)
    assert code == 0
    assert "report.html" in said
    assert (compared / "scores" / "llava" / "vqa" / "outputs.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("before", [False, True])
def test_shots_give_a_curve_per_model(rivals, monkeypatch, capsys, tmp_path, before):
    models, shots = [rivals["flamingo"], rivals["llava"]], ["--shots", "0", "1"]
    found = ["compare", *([*shots, *models] if before else [*models, *shots]), "--limit", 6, "--out", tmp_path]
    code, _, said = run(monkeypatch, capsys, *found)
    assert code == 0, said
    assert "vqa: score over shots" in (tmp_path / "report.html").read_text()
    assert "Score over shots" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "scores" / "flamingo" / "vqa-1-shots").is_dir()


def test_captions_and_other_measures_stand_in_the_tables(rivals, monkeypatch, capsys, tmp_path):
    (tmp_path / "captions.yaml").write_text("{kind: scenes, form: captions, split: test, count: 6}")
    asked = ["--task", "caption", "--data", tmp_path / "captions.yaml", "--set", "task.decoding={max_new_tokens: 3}"]
    code, _, said = run(monkeypatch, capsys, "compare", rivals["flamingo"], rivals["llava"], *asked, "--out", tmp_path)
    assert code == 0, said
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert {"CIDEr", "Bleu_4"} <= {r["kind"] for r in rows}
    assert [bool(r["gain"]) for r in rows if r["kind"] in ("CIDEr", "Bleu_4")].count(True) == 2
    page = (tmp_path / "report.html").read_text()
    assert "Other scores" in page
    assert "<td>llava − flamingo</td><td>caption</td><td>CIDEr</td>" in page
    pairs = list(csv.DictReader((tmp_path / "differences.csv").read_text().splitlines()))
    assert pairs[0]["measure"] == "CIDEr"
    score = {r["model"]: float(r["score"]) for r in rows if r["kind"] == "CIDEr"}
    assert float(pairs[0]["difference"]) == pytest.approx(score["llava"] - score["flamingo"])


def test_kept_costs_and_maps_are_those_of_the_same_model(compared, rivals, tmp_path):
    for name in ("cost.json", "looks.json"):
        (tmp_path / name).write_text((compared / "scores" / "llava" / name).read_text())
    kept = json.loads((tmp_path / "looks.json").read_text())
    rival = Contestant(name="llava", folder=rivals["llava"])
    assert recall(rival, tmp_path)
    assert rival.attention_pictures.keys() == kept["found"].keys()
    assert not recall(Contestant(name="llava", folder=rivals["flamingo"]), tmp_path)
    (tmp_path / "looks.json").write_text(json.dumps(kept | {"found": {"q0": 3}}))
    with pytest.raises(ConfigError, match=r"looks\.json.*expected str, found int 3"):
        recall(rival, tmp_path)


def yes_or_no(folder, count):
    """A source of pictures of noise, with questions whose truths are yes and no in turns."""
    rows = []
    for number in range(count):
        PilImage.effect_noise((64, 64), 40 + number).convert("RGB").save(folder / f"{number}.png")
        said = [("human", "<image>\nis it noise?"), ("gpt", "no" if number % 2 else "yes")]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return {"kind": "llava", "file": str(folder / "data.json"), "image_folder": str(folder)}


@pytest.mark.parametrize("task", ["pope", "conversation"])
def test_every_task_about_pictures_shows_answers_and_where_they_looked(rivals, monkeypatch, capsys, tmp_path, task):
    talks = {"kind": "scenes", "form": "conversations", "split": "test", "count": 3}
    (tmp_path / "asked.yaml").write_text(json.dumps(yes_or_no(tmp_path, 3) if task == "pope" else talks))
    asked = ["--task", task, "--data", tmp_path / "asked.yaml", "--set", "task.decoding={max_new_tokens: 2}"]
    picked = [rivals["flamingo"], rivals["llava"]]
    code, _, said = run(monkeypatch, capsys, "compare", *picked, *asked, "--out", tmp_path)
    assert code == 0, said
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 3
    assert page.count('class="look"') + page.count("<i>no answer</i>") == 6
    assert page.count('class="look"') > 0
    assert all(cost["latency"] for cost in json.loads((tmp_path / "costs.json").read_text()).values())
    first = next(iter(json.loads((tmp_path / "scores/llava/looks.json").read_text())["found"]))
    outputs = (tmp_path / "scores/llava" / task / "outputs.jsonl").read_text()
    assert first == json.loads(outputs.splitlines()[0])["id"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{llava}",), "at least two models"),
        (("{llava}", "{llava}"), "both called 'llava'"),
        (("{llava}", "{flamingo}", "--task", "vqua"), "names a task 'vqua'"),
        (("{llava}", "/nowhere/x"), "no model at"),
    ],
)
def test_what_cannot_be_compared_is_said(rivals, monkeypatch, capsys, tmp_path, arguments, message):
    filled = [a.format(**rivals) for a in arguments]
    code, _, said = run(monkeypatch, capsys, "compare", *filled, "--out", tmp_path / "o")
    assert code == 2
    assert message in " ".join(said.split())


def test_a_model_that_is_not_there_is_told_before_any_is_asked(rivals, tmp_path):
    with pytest.raises(ConfigError, match=r"no model at .*nowhere"):
        contestants([rivals["llava"], tmp_path / "nowhere"])


def test_tasks_of_one_name_must_be_the_same(rivals):
    one, other = contestants([rivals["llava"], rivals["blip2"]])
    with pytest.raises(ConfigError, match="different tasks called 'vqa'"):
        shared_tasks([one, other])
    with pytest.raises(ConfigError, match="names a task of its own"):
        shared_tasks([Contestant(name="x", folder=rivals["llava"])])


class Unscored:
    """Scores that nobody reads."""

    def to_dict(self):
        raise AssertionError("read")


def test_only_seeds_that_both_have_are_compared(tmp_path):
    def trained(name, seeds):
        runs = {n: [Result("vqa", "vqa", Unscored(), [], tmp_path / name / str(n))] for n in seeds}
        return Contestant(name=name, folder=tmp_path, by_seed=runs)

    both, one, none = trained("both", [0, 1]), trained("one", [1]), trained("none", [7])
    assert both.folders("vqa", one) == [tmp_path / "both/1"]
    assert one.folders("vqa", both) == [tmp_path / "one/1"]
    assert both.folders("vqa", none) == []
    assert difference(both, none, "vqa", 0) == []
    single = Contestant(name="single", folder=tmp_path, results=runs_of(tmp_path / "single"))
    assert single.folders("vqa", both) == [tmp_path / "single"]
    assert len(both.folders("vqa", single)) == 2


def runs_of(folder):
    return [Result("vqa", "vqa", Unscored(), [], folder)]


def asked(folder, kind, rows, **manifest):
    """A finished score folder, scored."""
    folder.mkdir(parents=True)
    facts = {"task": kind, "kind": kind, "items": len(rows), "seed": 0, **manifest}
    (folder / "manifest.json").write_text(json.dumps(facts))
    (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rescore(folder)


def question(name, answer, truth, **rest):
    row = {"id": name, "kind": "any", "question": "?", "truth": [truth], "answer": answer, "blind": "no"}
    return row | {"shuffled": None, "prior": None} | rest


OUTPUTS = {
    "binary": [
        [question("a", "yes", "yes"), question("b", "yes", "no"), question("c", "", "no")],
        [question("a", "no", "yes"), question("b", "no", "no"), question("c", "no", "no")],
    ],
    "conversation": [
        [question("a/1", "x", "x", turn=1, alone="x"), question("a/2", "y", "x", turn=2, alone="y")],
        [question("a/1", "y", "x", turn=1, alone="y"), question("a/2", "x", "x", turn=2, alone="y")],
    ],
    "caption": [
        [question("a", "a red ball on a box", "a red ball on a box"), question("b", "", "two blue cats sit")],
        [question("a", "a ball", "a red ball on a box"), question("b", "two blue cats sit", "two blue cats sit")],
    ],
    "retrieval": [
        [{"id": str(i), "captions": [f"{i}", f"also {i}"], "rank": r, "caption_ranks": [r, 0]} for i, r in enumerate(x)]
        for x in ([0, 1, 0, 5], [0, 0, 0, 7])
    ],
    "zero_shot": [[{"id": str(i), "truth": "x", "rank": r} for i, r in enumerate(x)] for x in ([0, 1, 7], [0, 0, 7])],
    "matching": [
        [{"id": str(i), "label": i % 2, "score": s, "shuffled": 0.5} for i, s in enumerate(x)]
        for x in ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1])
    ],
}


def seeds_of(folder, kind):
    settings = {"classes": ["x", "y"]} if kind == "zero_shot" else {}
    runs = enumerate(OUTPUTS[kind])
    return {n: [asked(folder / str(n) / kind, kind, rows, **settings)] for n, rows in runs}


def flat(facts):
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from ((f"{key} {name}", v) for name, v in flat(value))
        else:
            yield key, value


@pytest.mark.parametrize("kind", OUTPUTS)
def test_scores_of_every_kind_are_means_over_seeds(tmp_path, kind):
    runs = seeds_of(tmp_path, kind)
    rivals = {n: Contestant(name="x", folder=tmp_path, results=found) for n, found in runs.items()}
    (mean,) = pooled(rivals).results
    one, other = (dict(flat(found[0].scores.to_dict())) for found in runs.values())
    moved = 0
    for name, value in flat(mean.scores.to_dict()):
        if name.split()[-1] in ("empty", "unparsable"):
            assert value == one[name] + other[name]
        elif isinstance(value, float) and "gain" not in name and "without_looking" not in name:
            assert value == pytest.approx((one[name] + other[name]) / 2), name
            moved += one[name] != other[name]
        elif isinstance(value, list) and not name.endswith("gain_interval"):
            assert value[0] <= value[1]
    assert moved > 0


def test_seeds_that_were_asked_something_else_are_not_pooled(tmp_path):
    runs = [asked(tmp_path / str(n) / "caption", "caption", OUTPUTS["caption"][n][n:]) for n in (0, 1)]
    rivals = {n: Contestant(name="x", folder=tmp_path, results=[found]) for n, found in enumerate(runs)}
    with pytest.raises(DataError, match="not of the same caption items"):
        pooled(rivals)


def test_pairs_are_compared_in_whatever_has_a_score_per_item(tmp_path):
    for kind, measures in {
        "binary": ["accuracy", "f1"],
        "caption": ["CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"],
        "retrieval": ["image to text R@1", "text to image R@1"],
        "zero_shot": ["top_1", "top_5"],
        "matching": [],
    }.items():
        one, other = (
            Contestant(name=str(n), folder=tmp_path, results=found) for n, found in seeds_of(tmp_path, kind).items()
        )
        rows = difference_rows([one, other], 0)
        assert [r["measure"] for r in rows] == measures
        assert all(r["task"] == kind and r["low"] <= r["difference"] <= r["high"] for r in rows)
        if kind == "retrieval":
            assert rows[0]["difference"] == pytest.approx(1 / 4)


def test_a_broken_picture_costs_its_question_and_is_told(rivals, monkeypatch, capsys, tmp_path):
    rows = []
    for number in range(4):
        PilImage.effect_noise((64, 64), 40 + number).convert("RGB").save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    asked = ["--data", tmp_path / "data.json", "--set", f"image_folder={tmp_path}", "--out", tmp_path / "out"]
    asked += ["--set", "task.decoding={max_new_tokens: 2}", "--set", "task.bad_samples=0.5"]
    code, _, said = run(monkeypatch, capsys, "compare", rivals["flamingo"], rivals["llava"], *asked)
    assert code == 0, said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of vqa (listed in" in page
    assert page.count("<article") == 3


def test_a_task_of_a_stage_is_asked_of_its_own_model_only(rivals, monkeypatch, capsys, tmp_path):
    code, _, said = run(
        monkeypatch, capsys, "compare", rivals["clip"], rivals["blip2"], "--limit", 6, "--out", tmp_path
    )
    assert code == 0, said
    assert {f.name for f in (tmp_path / "scores" / "clip").iterdir() if f.is_dir()} == {"retrieval"}
    kinds = {f.parent.name: json.loads(f.read_text())["kind"] for f in tmp_path.glob("scores/blip2/*/scores.json")}
    assert kinds == {"retrieval": "rerank", "zero-shot-vqa": "vqa", "vqa": "vqa"}


def test_operations_are_pytorchs_own_count():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with FlopCounterMode(display=False) as theirs:
        net(x).sum().backward()
    with Operations() as ours:
        net(x).sum().backward()
    assert ours.total == theirs.get_total_flops() == 2 * 5 * (8 * 16 + 16 * 4) * 2 + 2 * 5 * 16 * 4
    with torch.inference_mode(), Operations() as alone:
        net(x)
    assert alone.total == 2 * 5 * (8 * 16 + 16 * 4)


GAP = 1e-4
"""Two best tokens closer than this may change places when a sum is taken in another order."""


def gap_behind(model, record, ids):
    """The distance of the two best next tokens behind an answer's beginning, of those that may be said at all."""
    batch = collate([with_answer(model.processor.prompt(record), ids)])
    stream = batch.text["lm"]
    with torch.inference_mode():
        if model.kind == "flamingo":
            logits = model.net.logits(batch)
        else:
            logits = model.net.language.logits(model.net.embed_prompt(batch))
    next_token = logits[0, stream.lengths[0] - 1].clone()
    next_token[list(model.ended(Decoding()).forbidden_ids)] = -torch.inf
    best = next_token.topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("name", ["llava", "flamingo", "blip2"])
def test_batches_of_1_7_and_64_give_the_same_answers(rivals, name):
    model = load(rivals[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.net.parameters():  # as trained they all say one word
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    source = SceneSource("questions", split="test", count=64)
    records = [without_answer(source[i]) for i in range(64)]
    prompts = [model.processor.prompt(record) for record in records]
    answers = {size: model._continue(prompts, size, {"max_new_tokens": 6}) for size in (1, 7, 64)}
    assert len({tuple(ids) for ids in answers[1]}) > 8  # else equality would say nothing
    different = [i for i in range(64) if len({tuple(answers[size][i]) for size in answers}) > 1]
    for i in different:
        said = [answers[size][i] for size in answers]
        place = next(n for n, tokens in enumerate(zip(*said, strict=False)) if len(set(tokens)) > 1)
        assert gap_behind(model, records[i], said[0][:place]) < GAP, f"{name}: {records[i].id} says {said}"
    assert len(different) <= 3
    for record, ids, gap in zip(records[:3], answers[1], model.gaps(records[:3], max_new_tokens=6), strict=False):
        steps = [gap_behind(model, record, ids[:n]) for n in range(min(len(ids) + 1, 6))]
        assert gap == pytest.approx(min(steps), abs=1e-5)
