"""A hub id and its revision, against a stand-in of the hub's protocol on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import isthmus
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.hub import located

COMMIT = "c0ffee" + "0" * 34
NAME = "someone/tiny-llama"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A sharded language model, and what no loader may ask for: code, and the weights in another form."""
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")
    Tokenizer.train(["a red cube and a blue ring"] * 3, 320).save(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "modeling_evil.py").write_text("raise SystemExit('code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    return folder


@pytest.fixture(scope="module")
def hub(repository):
    """The stand-in: revision, tree, HEAD and GET of files. Yields its address and the paths asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            path = urlparse(self.path).path
            asked.append(path)
            content, headers, status = b"", {}, 200
            if path in (f"/api/models/{NAME}/revision/{r}" for r in ("main", COMMIT)):
                files = [{"rfilename": f.name} for f in sorted(repository.iterdir())]
                content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode()
            elif path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
                content = json.dumps(
                    [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                        for f in sorted(repository.iterdir())
                    ]
                ).encode()
            elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and (repository / path.split("/")[-1]).is_file():
                file = repository / path.split("/")[-1]
                content, headers = file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}
            else:
                status, code = 404, "RevisionNotFound" if NAME in path else "RepoNotFound"
                headers = {"X-Error-Code": code}
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    def etag(file):
        return hashlib.sha1(file.read_bytes()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


LOCATE = """
import sys
from isthmus.errors import CheckpointError
from isthmus.interop.hub import located
for wanted in sys.argv[1:]:
    try:
        print(located(*wanted.split("@")))
    except CheckpointError as error:
        print(error)
"""


def run(*arguments, home, address, offline=False):
    """Python in a process of its own: huggingface_hub reads the environment when it is imported."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def show(*arguments, **where):
    return run("-m", "isthmus", "show", *arguments, **where)


def test_a_hub_id_is_fetched_once_and_opens_offline_after(hub, repository, tmp_path):
    address, asked = hub
    facts = tmp_path / "facts.json"
    done = show(NAME, "--revision", "main", "--json", str(facts), home=tmp_path, address=address)
    assert done.returncode == 0, done.stderr
    held = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(repository).parameters())
    assert json.loads(facts.read_text())["parts"]["language"] == held
    fetched = {path.split("/")[-1] for path in asked if "/resolve/" in path}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not {"modeling_evil.py", "pytorch_model.bin"} & fetched
    before = len(asked)
    again = show(NAME, "--revision", COMMIT, home=tmp_path, address=address, offline=True)
    assert again.returncode == 0, again.stderr
    assert len(asked) == before


@pytest.mark.parametrize(
    ("offline", "messages"),
    [
        (False, {f"{NAME}@v9": "no revision 'v9'", "nobody/nothing@main": "no model 'nobody/nothing'"}),
        (True, {f"{NAME}@main": "was not fetched before"}),
    ],
)
def test_what_the_hub_cannot_give_is_said_in_words(hub, tmp_path, offline, messages):
    done = run("-c", LOCATE, *messages, home=tmp_path, address=hub[0], offline=offline)
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stdout.splitlines(), messages.values(), strict=True):
        assert message in line


def test_an_id_without_a_revision_is_told_how_to_name_one(hub, tmp_path):
    before = len(hub[1])
    done = show(NAME, home=tmp_path, address=hub[0])
    assert done.returncode == 2
    assert "--revision main" in done.stderr
    assert len(hub[1]) == before


def test_no_revision_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="with --revision main"):
        isthmus.load("someone/tiny-llama")
    with pytest.raises(CheckpointError, match="leave revision out"):
        located(tmp_path, "main")
    with pytest.raises(CheckpointError, match="owner/name"):
        located("a/b/c", "main")
