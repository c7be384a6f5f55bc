"""Which facts of the papers are guarded by a test: breaks one at a time in a copy and runs the tests near it.

    nice -n 15 .venv/bin/python tools/mutation_check.py [--only NAME ...] [--out docs/guards.md]

Each row of FACTS names a file below src/isthmus, a text that stands in it exactly once, what it is replaced by, and the
tests near it. A fact is guarded when one of these fails. A row whose text is gone is an error: the table follows the
code.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fact:
    name: str
    file: str
    text: str
    broken: str
    tests: str
    """Paths (and node ids) below tests, separated by blanks."""


PAPER = "models/test_published_facts.py"
FACTS = (
    Fact(
        "SigLIP's probe starts at width^-1/2",
        "nn/vit.py",
        "nn.init.normal_(self.pool.probe, std=scale)",
        "nn.init.normal_(self.pool.probe, std=1.0)",
        f"{PAPER}::test_siglips_probe_starts_at_the_scale_of_its_width",
    ),
    Fact(
        "query tokens start from N(0, 0.02²)",
        "nn/connectors/qformer.py",
        "nn.init.normal_(self.queries, std=0.02)",
        "nn.init.normal_(self.queries, std=0.2)",
        f"{PAPER}::test_queries_start_from_a_small_normal",
    ),
    Fact(
        "latents start from N(0, 1)",
        "nn/connectors/resampler.py",
        "nn.Parameter(torch.randn(config.latents, width))",
        "nn.Parameter(torch.randn(config.latents, width) * 0.02)",
        f"{PAPER}::test_latents_and_times_start_from_a_standard_normal",
    ),
    Fact(
        "times start from N(0, 1)",
        "nn/connectors/resampler.py",
        "nn.Parameter(torch.randn(config.frames, width))",
        "nn.Parameter(torch.zeros(config.frames, width))",
        f"{PAPER}::test_latents_and_times_start_from_a_standard_normal",
    ),
    Fact(
        "image_newline starts from N(0, 1/D)",
        "models/llava.py",
        "torch.randn(language.width) / math.sqrt(language.width)",
        "torch.randn(language.width)",
        f"{PAPER}::test_the_newline_starts_as_long_as_an_embedding",
    ),
    Fact(
        "the paper's gated blocks square their ReLU",
        "nn/gated.py",
        'head_width=128, activation="squared_relu"',
        'head_width=128, activation="relu"',
        f"{PAPER}::test_the_papers_resampler_and_blocks_square_their_relu",
    ),
    Fact(
        "the paper's resampler squares its ReLU",
        "nn/connectors/resampler.py",
        'head_width=96, activation="squared_relu"',
        'head_width=96, activation="relu"',
        f"{PAPER}::test_the_papers_resampler_and_blocks_square_their_relu",
    ),
    Fact(
        "LLaVA's warm-up is 3 %, stage 2",
        "recipes/library/llava-1.5-7b.yaml",
        "batch_size: 128\n    warmup: 0.03",
        "batch_size: 128\n    warmup: 0.01",
        f"{PAPER}::test_llavas_stages",
    ),
    Fact(
        "LLaVA's second stage pads", "recipes/library/llava-1.5-7b.yaml", "image_mode: pad", "image_mode: square", PAPER
    ),
    Fact(
        "OpenFlamingo's warm-up of 1,875 steps",
        "recipes/library/open-flamingo-4b.yaml",
        "warmup: 11520000",
        "warmup: 11520",
        f"{PAPER}::test_openflamingos_stage",
    ),
    Fact(
        "gated blocks decay by 0.1",
        "recipes/library/open-flamingo-4b.yaml",
        "weight_decay: 0.1",
        "weight_decay: 0.01",
        f"{PAPER}::test_openflamingos_stage",
    ),
    Fact("CLIP's decay of 0.2", "recipes/library/clip-vit-b-32.yaml", "weight_decay: 0.2", "weight_decay: 0.1", PAPER),
    Fact(
        "BLIP-2's rates fall to half in stage 2",
        "recipes/library/blip2-vit-l-opt-2.7b.yaml",
        "floor: 0.5",
        "floor: 0.0",
        f"{PAPER}::test_blip2s_stages",
    ),
    Fact("reranking takes 128 candidates", "evaluation/rerank.py", "rerank: int = 128", "rerank: int = 64", PAPER),
    Fact(
        "the loss of a step weighs by tokens, not by passes",
        "models/llava.py",
        "return {STREAM: Term(total, count)}",
        "return {STREAM: Term(total / max(count, 1), 1)}",
        f"{PAPER}::test_every_tensor_has_the_same_gradient_over_any_split",
    ),
    Fact(
        "gates pass through tanh",
        "nn/gated.py",
        "y = y + self.attn_gate.tanh() * looked",
        "y = y + self.attn_gate * looked",
        "interop/test_open_flamingo.py::test_resampler_and_block_equal_separately",
    ),
    Fact(
        "nothing is seen before the first image",
        "nn/gated.py",
        "looked = torch.where(somewhere, looked, 0.0)",
        "looked = looked",
        "nn/test_gated.py",
    ),
    Fact(
        "the encoder's hidden state -2 is read",
        "models/llava.py",
        "feature_layer: int | tuple[int, ...] = -2",
        "feature_layer: int | tuple[int, ...] = -1",
        "models/test_llava.py interop/test_llava_hf.py",
    ),
    Fact(
        "the projector's GELU is exact",
        "nn/connectors/projector.py",
        "F.gelu(x) if number",
        'F.gelu(x, approximate="tanh") if number',
        "interop/test_llava_hf.py",
    ),
    Fact(
        "OpenAI's QuickGELU",
        "nn/block.py",
        "F.silu(1.702 * x) * (1 / 1.702)",
        "F.silu(1.7 * x) * (1 / 1.7)",
        "interop/test_clip_hf.py",
    ),
    Fact(
        "the logit scale is held at 100",
        "models/clip.py",
        "max=math.log(self.config.max_scale)",
        "max=math.log(2 * self.config.max_scale)",
        "models/test_clip.py",
    ),
    Fact(
        "SigLIP's bias starts at -10",
        "models/clip.py",
        'object.__setattr__(self, "init_bias", -10.0)',
        'object.__setattr__(self, "init_bias", 0.0)',
        "models/test_clip.py",
    ),
    Fact(
        "OpenAI's crop rounds to even",
        "data/images.py",
        "round((side - self.size) / 2)",
        "(side - self.size + 1) // 2",
        "data/test_images.py",
    ),
    Fact("pad's background floors", "data/images.py", "math.floor(255 * m)", "round(255 * m)", "data/test_images.py"),
    Fact(
        "pixels scale in float64 first",
        "data/images.py",
        "(np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)",
        "np.arange(256, dtype=np.float32) * np.float32(1 / 255)",
        "data/test_images.py",
    ),
    Fact(
        "AnyRes: ties go to the smallest waste",
        "nn/tiles.py",
        "return kept, -(canvas[0] * canvas[1] - kept)",
        "return kept, canvas[0] * canvas[1] - kept",
        "nn/test_tiles.py",
    ),
    Fact(
        "the label of the first token is none",
        "language/causal.py",
        "tokens.labels[:, 1:] != IGNORE",
        "tokens.labels[:, :-1] != IGNORE",
        "interop/test_llava_hf.py",
    ),
    Fact(
        "new tokens' logits have the head's bias",
        "interleave.py",
        "self._new_bias(inputs[0].dtype)",
        "None",
        "test_interleave.py",
    ),
    Fact(
        "LLaVA's head is bare",
        "interop/hf_llava.py",
        "return {**language, **changed}",
        "return language",
        "interop/test_llava_hf.py",
    ),
    Fact(
        "IDEFICS's rotary settings are kept",
        "interop/hf_idefics.py",
        "**{name: raw[name] for name in _ROTARY if raw.get(name) is not None},",
        "",
        "interop/test_idefics.py",
    ),
    Fact(
        "the matching loss has its two kinds of negatives",
        "models/blip2.py",
        "labels[: len(vision)] = 1",
        "labels[: 2 * len(vision)] = 1",
        "models/test_blip2.py",
    ),
)


def broken_copy(fact: Fact, place: Path) -> None:
    """The project in ``place`` with the fact broken. Raises SystemExit when its text is not there exactly once."""
    for name in ("src", "tests", "docs", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, place / name)
    file = place / "src" / "isthmus" / fact.file
    content = file.read_text(encoding="utf-8")
    if content.count(fact.text) != 1:
        raise SystemExit(f"{fact.name}: {fact.file} holds {fact.text!r} {content.count(fact.text)} times, not once.")
    file.write_text(content.replace(fact.text, fact.broken), encoding="utf-8")


def guarded(fact: Fact) -> tuple[bool, str]:
    """Whether a test failed, and which one first. The tests run in a fork, which has the large libraries already."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        broken_copy(fact, place)
        tests = [str(place / "tests" / test) for test in fact.tests.split()]
        said = place / "said.txt"
        if (child := os.fork()) == 0:
            os._exit(_run(place, tests, said))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output = said.read_text(encoding="utf-8")
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    if code not in (0, 1) or (code == 1 and not failed):
        raise SystemExit(f"{fact.name}: the tests did not run.\n{output[-3000:]}")
    return bool(failed), failed[0].split("::")[1].split(" ")[0] if failed else ""


def _run(place: Path, tests: list[str], said: Path) -> int:
    """pytest over the copy in ``place``, in this process, which must not return; what it says goes to a file."""
    paths = [str(place / "src"), str(place)]
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        os.chdir(place)
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that tests start
        sys.path[:0] = paths
        # A library that the parent has imported is one that pytest's plugins cannot rewrite any more.
        known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *known, *tests]))
    except BaseException:
        traceback.print_exc()
        return 99


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", help="parts of names: these facts alone, nothing is written")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "guards.md")
    given = options.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)  # before any fork
    for kind in ("clip", "llama", "llava"):  # what most tests load first; a fork then has it
        import_module(f"transformers.models.{kind}.modeling_{kind}")
    rows, chosen = [], [f for f in FACTS if not given.only or any(part in f.name for part in given.only)]
    for fact in chosen:
        started = time.monotonic()
        found, test = guarded(fact)
        rows.append(f"| {fact.name} | `{fact.file}` | {f'`{test}`' if found else '**no test**'} |")
        print(
            f"{'guarded' if found else 'UNGUARDED':9} {time.monotonic() - started:5.0f} s  {fact.name}  {test}",
            flush=True,
        )
    if not given.only:
        held = sum("no test" not in row for row in rows)
        head = (
            "# Guarded facts\n\n"
            "Written by `tools/mutation_check.py`: each fact was broken by itself in a copy of the project, and the "
            f"tests near it were run. {held} of {len(rows)} were noticed.\n\n"
            "| fact | file | the first test that failed |\n|---|---|---|\n"
        )
        given.out.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
