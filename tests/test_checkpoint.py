"""Our folders: whole or not there, never silently damaged; one writer."""

import contextlib
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import checkpoint
from isthmus.checkpoint import CheckpointError, load_tensors, read_folder, save_tensors, write_folder

FILES = {
    "config.json": {"width": 3},
    "note.txt": "größer",
    "raw.bin": b"\x00\x01",
    "tokenizer/vocab.json": {"a": 1},
    "model.safetensors": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)},
}


def test_all_files_of_a_folder_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        write_folder(tmp_path / "model", FILES)
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "model").rglob("*") if f.is_file()} == {"0o644"}


def test_a_folder_round_trips(tmp_path):
    path = write_folder(tmp_path / "model", FILES)
    files = read_folder(path)
    assert set(files) == set(FILES)
    assert json.loads(files["config.json"].read_text()) == {"width": 3}
    assert files["note.txt"].read_text() == "größer"
    tensors = load_tensors(files["model.safetensors"])
    assert torch.equal(tensors["w"], FILES["model.safetensors"]["w"])
    assert tensors["b"].dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_never_over_an_existing_folder(tmp_path):
    write_folder(tmp_path / "a", {"x": "old"})
    with pytest.raises(CheckpointError, match="never written over"):
        write_folder(tmp_path / "a", {"x": "new"})
    write_folder(tmp_path / "a", {"y": "new"}, replace=True)
    assert set(read_folder(tmp_path / "a")) == {"y"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_copy_of_ones_own_beside_is_left_alone(tmp_path):
    write_folder(tmp_path / "a", {"x": "first"})
    shutil.copytree(tmp_path / "a", tmp_path / "a.old")
    write_folder(tmp_path / "a", {"x": "second"}, replace=True)
    assert read_folder(tmp_path / "a.old")["x"].read_text() == "first"
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not a folder"):
        read_folder(tmp_path / "a")
    write_folder(tmp_path / "a", {"x": "third"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.old"]


@pytest.mark.parametrize("moment", range(12))
def test_a_crash_while_replacing_leaves_the_old_or_the_new(tmp_path, monkeypatch, moment):
    """Stop the process (here: an exception nobody handles) at each file-system call of a replacement."""
    write_folder(tmp_path / "a", {"x": "old"})
    calls = 0

    class Crash(BaseException):
        pass

    def crashing(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise Crash
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_bytes"), (Path, "mkdir")):
            patched.setattr(module, name, crashing(getattr(module, name)))
        with contextlib.suppress(Crash):
            write_folder(tmp_path / "a", {"x": "new", "y": "new"}, replace=True)
    files = read_folder(tmp_path / "a")
    assert {name: f.read_text() for name, f in files.items()} in ({"x": "old"}, {"x": "new", "y": "new"})
    write_folder(tmp_path / "a", {"z": "third"}, replace=True)
    assert set(read_folder(tmp_path / "a")) == {"z"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_the_file_named(data):
    folder = _damaged_fixture()
    name = data.draw(st.sampled_from([*FILES, "manifest.json"]))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        with pytest.raises(CheckpointError, match=name):
            read_folder(folder)
    finally:
        (folder / name).write_bytes(original)
    assert set(read_folder(folder)) == set(FILES)


_FIXTURE: list[Path] = []


def _damaged_fixture() -> Path:
    if not _FIXTURE:
        import tempfile

        _FIXTURE.append(write_folder(Path(tempfile.mkdtemp(prefix="isthmus-test-")) / "a", FILES))
    return _FIXTURE[0]


def teardown_module():
    for folder in _FIXTURE:
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_missing_and_truncated_files_are_named(tmp_path, name):
    path = write_folder(tmp_path / "a", FILES)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=name):
        read_folder(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_folder(path)


@pytest.mark.parametrize("name", ["../x", "/x", "", "manifest.json", "a/../../x", "a\\b"])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(CheckpointError, match="no name"):
        write_folder(tmp_path / "a", {name: "x"})


# ------------------------------------------------------------------------------------------------- full disk


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", {"x": "old"})
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"b: 1\d\d,\d\d\d bytes are needed, 1,000 are free.*intact"):
        write_folder(tmp_path / "b", {"w.safetensors": {"w": torch.zeros(10_000)}})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch, number, after):
    write_folder(tmp_path / "a", {"x": "old"})
    real, calls = checkpoint._write_file, []

    def write(path, content):
        calls.append(path)
        if len(calls) > after:
            raise OSError(number, os.strerror(number), str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_file", write)
    with pytest.raises(CheckpointError, match="intact" if number != errno.EROFS else "Nothing was changed"):
        write_folder(tmp_path / "a", {"x": "new", "y": "new"}, replace=True)
    assert read_folder(tmp_path / "a")["x"].read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_small_disk_really_full(tmp_path):
    """On a tmpfs of 1 MB, where the system lets a process mount one in a namespace of its own."""
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from isthmus import checkpoint
        disk = Path(sys.argv[1])
        first = checkpoint.write_folder(disk / "a", {"w.safetensors": {"w": torch.zeros(90_000)}})
        for guess in (None, 10**9):  # with the check of free space, then with one that is fooled
            if guess:
                checkpoint._free_bytes = lambda folder: guess
            for size in (170_000, 200_000, 400_000):
                try:
                    checkpoint.write_folder(disk / "b", {"w.safetensors": {"w": torch.zeros(size)}})
                except checkpoint.CheckpointError as error:
                    assert "bytes are needed" in str(error), error
                else:
                    raise SystemExit(f"{size} was written")
                assert [p.name for p in disk.iterdir()] == ["a"]
                assert checkpoint.load_tensors(checkpoint.read_folder(first)["w.safetensors"])["w"].numel() == 90_000
        print("held")
    """)
    (tmp_path / "script.py").write_text(script)
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let a process mount a small disk")
    run = subprocess.run(
        [unshare, "-rm", "sh", "-c", f"{mount} && {sys.executable} {tmp_path}/script.py {disk}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": _source()},
    )
    assert run.stdout.strip() == "held", run.stderr


def _source() -> str:
    return str(Path(checkpoint.__file__).parents[1])


# ------------------------------------------------------------------------------------------------- tensors


def _raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        _raw({}, length=2**63),
        _raw({}, length=99),
        _raw(b"[1]"),
        _raw(b"{"),
        _raw(b"[" * 200_000),
        _raw({"a": _entry(shape=(3,))}, b"\0" * 8),
        _raw({"a": _entry()}, b"\0" * 7),
        _raw({"a": _entry()}, b"\0" * 9),
        _raw({"a": _entry(), "b": _entry()}, b"\0" * 8),
        _raw({"a": _entry(offsets=(4, 12))}, b"\0" * 12),
        _raw({"a": _entry(dtype="F33")}, b"\0" * 8),
        _raw({"a": _entry(shape=(-2,))}, b"\0" * 8),
        _raw({"a": _entry(shape=(2.0,))}, b"\0" * 8),
        _raw({"a": _entry(offsets=(0, 2**70))}, b"\0" * 8),
        _raw({"a": 3}),
        _raw({"a": {"dtype": "F32"}}),
        _raw(
            b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        _raw(b"{" + b'"data_offsets":0,' * 1_000_001 + b'"x":0}'),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_tensors(tmp_path / "x.safetensors")


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=5,
    )
)
def test_any_tensors_round_trip(specs):
    import tempfile

    tensors = {
        name: torch.arange(max(1, int(torch.tensor(shape).prod())))[: int(torch.tensor(shape).prod())]
        .reshape(shape)
        .to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "x.safetensors", tensors)
        back = load_tensors(Path(folder) / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())


def test_views_of_one_storage_are_written_apart(tmp_path):
    whole = torch.arange(8.0)
    save_tensors(tmp_path / "x.safetensors", {"a": whole[:4], "b": whole[4:], "c": whole, "d": whole.reshape(2, 4).T})
    back = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["b"], whole[4:])
    assert torch.equal(back["d"], whole.reshape(2, 4).T)
