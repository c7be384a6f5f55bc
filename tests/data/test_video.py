"""Clips from folders, files and memory; what is sampled of them, and what is wrong with bad ones."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image as PilImage

from isthmus.data.images import ImageTransform
from isthmus.data.messages import parts_of
from isthmus.data.record import Image, Video
from isthmus.data.sources import open_source
from isthmus.data.video import FileFrames, FolderFrames, MadeFrames, as_video, as_visual, natural, thinned
from isthmus.errors import DataError


def write_video(path, seconds: int, fps: int = 5, late=lambda n: 0) -> None:
    """A video whose brightness tells its second: 20 a second. Its frame ``n`` is shown ``late(n)`` frames late."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for n in range(seconds * fps):
            level = np.full((32, 32, 3), 20 * (n // fps), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame.pts, frame.time_base = n + late(n), Fraction(1, fps)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def levels(frames) -> list[int]:
    return [round(float(np.asarray(f).mean()) / 20) for f in frames]


def test_a_file_is_sampled_at_one_frame_a_second(tmp_path):
    write_video(tmp_path / "v.mp4", seconds=6)
    assert levels(FileFrames(tmp_path / "v.mp4").read()) == [0, 1, 2, 3, 4, 5]
    assert levels(FileFrames(tmp_path / "v.mp4", fps=0.5).read()) == [0, 2, 4]
    assert levels(FileFrames(tmp_path / "v.mp4", most=3).read()) == [0, 2, 5]
    assert len(FileFrames(tmp_path / "v.mp4", fps=2, most=99).read()) == 12


def test_times_count_from_the_first_frame_and_go_on_behind_a_gap(tmp_path):
    write_video(tmp_path / "late.mkv", seconds=4, late=lambda n: 50)
    with av.open(str(tmp_path / "late.mkv")) as container:
        assert next(container.decode(video=0)).time == pytest.approx(10)
    assert levels(FileFrames(tmp_path / "late.mkv", most=99).read()) == [0, 1, 2, 3]
    write_video(tmp_path / "gap.mkv", seconds=4, late=lambda n: 50 * (n >= 10))
    assert levels(FileFrames(tmp_path / "gap.mkv", most=99).read()) == [0, 1, 2, 3]


def test_numbers_in_names_of_frames_are_ordered_by_value(tmp_path):
    for n in range(12):
        PilImage.new("RGB", (8, 8), (20 * n,) * 3).save(tmp_path / f"frame{n}.png")
    assert levels(FolderFrames(tmp_path, most=12).read()) == list(range(12))
    names = ["2.png", "a10", "a2b1", "10.png", "a2", "02.png", "b"]
    assert sorted(names, key=natural) == ["02.png", "2.png", "10.png", "a2", "a2b1", "a10", "b"]


def test_a_folder_gives_its_pictures_in_order(tmp_path):
    for n in (2, 0, 1):
        PilImage.new("RGB", (8, 8), (20 * n,) * 3).save(tmp_path / f"{n}.png")
    (tmp_path / "notes.txt").write_text("x")
    clip = as_video(tmp_path)
    assert isinstance(clip.source, FolderFrames)
    assert levels(clip.source.read()) == [0, 1, 2]
    assert ImageTransform.clip(4)(clip).shape == (3, 3, 4, 4)
    assert len(clip.content_key()) == 64
    assert as_video(clip) is clip
    assert isinstance(clip, Image)
    assert isinstance(as_visual(str(tmp_path)), Video)
    assert not isinstance(as_visual(tmp_path / "0.png"), Video)
    (part,) = parts_of([{"role": "user", "content": [{"type": "video", "video": tmp_path}]}])
    assert isinstance(part, Video)
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "c").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "c" / "0.png")
    rows.write_text('{"video": "c", "question": "what?", "answer": "yes"}\n')
    record = open_source({"kind": "jsonl", "file": str(rows)})[0]
    assert isinstance(record.images[0], Video)
    assert levels(record.images[0].source.read()) == [0]


def test_thinning_keeps_first_and_last():
    assert thinned(list(range(20)), 5) == [0, 5, 10, 14, 19]
    assert thinned([1, 2], 5) == [1, 2]
    assert thinned([1, 2, 3], 1) == [1]


def test_bad_clips_are_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 50)
    write_video(tmp_path / "cut.mp4", seconds=2)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:200])
    for clip, words in (
        (tmp_path / "empty", "has 0 frames"),
        (tmp_path / "broken.mp4", r"broken\.mp4 cannot be decoded"),
        (tmp_path / "cut.mp4", r"cut\.mp4 cannot be decoded"),
        (tmp_path / "none.mp4", "no readable file"),
        ([], "0 frames"),
        ([PilImage.new("RGB", (8, 8)), PilImage.new("RGB", (9, 8))], "differ in size"),
    ):
        with pytest.raises(DataError, match=words):
            as_video(clip).source.read()
    with pytest.raises(DataError, match="no readable folder"):
        FolderFrames(tmp_path / "nowhere").read()
    with pytest.raises(DataError, match="not a video: int"):
        as_video(3)  # type: ignore[arg-type]
    assert MadeFrames([PilImage.new("RGB", (8, 8))]).describe() == "video"
