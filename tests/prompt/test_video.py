"""Frames and their times, as Gemma 4's video processor samples them."""

from __future__ import annotations

import builtins
import io
from typing import Any

import numpy as np
import pytest

from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt.media import prepare_messages
from mlx_dgemma.prompt.patches import ImageProcessor
from mlx_dgemma.prompt.pictures import Picture
from mlx_dgemma.prompt.tokenizer import load_tokenizer
from mlx_dgemma.prompt.video import Sampling, open_video, timestamp
from tests.prompt.drawings import animation, gif, photograph, saved


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of 64x48 pixels at 12 frames a second; the scene brightens."""
    av = pytest.importorskip("av", reason="PyAV, the video extra, is not installed")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(24):
            shade = np.full((48, 64, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("total", "fps", "options"),
    [
        (100, 24.0, {"num_frames": 32}),
        (32, 24.0, {"num_frames": 32}),
        (33, 30.0, {"num_frames": 7}),
        (250, 25.0, {"fps": 2}),
        (10, 29.97, {"fps": 0.5}),
        (300, 29.97, {"fps": 1.7}),
    ],
)
def test_indices_are_the_references(total, fps, options):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    expected = default_sample_indices_fn(metadata, **options).tolist()
    ours = Sampling(options.get("num_frames", 32), options.get("fps")).indices(total, fps)
    assert ours == expected


def test_a_short_video_gives_every_frame():
    """The reference refuses to sample 32 frames of 5."""
    assert Sampling(32).indices(5, 24.0) == [0, 1, 2, 3, 4]
    assert Sampling(rate=100).indices(5, 24.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (59.99, "00:59"), (61.5, "01:01"), (7265, "121:05")]
)
def test_timestamps(seconds, text):
    assert timestamp(seconds) == text


@pytest.mark.parametrize("sampling", [Sampling(5), Sampling(32), Sampling(rate=3)])
def test_a_video_file_gives_the_references_frames(clip, sampling):
    from transformers.video_utils import default_sample_indices_fn, read_video_pyav

    options = {"fps": sampling.rate} if sampling.rate else {"num_frames": min(sampling.count, 24)}
    frames, metadata = read_video_pyav(
        str(clip), lambda metadata, **_: default_sample_indices_fn(metadata, **options)
    )
    ours = open_video(clip, sampling)
    assert ours.seconds == metadata.timestamps
    assert len(ours.frames) == len(frames)
    for mine, theirs in zip(ours.frames, frames, strict=True):
        np.testing.assert_array_equal(mine.image, theirs)
    assert ours.name == "clip.mp4"
    again = open_video(clip.read_bytes(), sampling)
    assert again.seconds == ours.seconds


def test_a_container_that_does_not_count_its_frames(clip, tmp_path):
    import av

    path = tmp_path / "clip.mkv"
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    ours = open_video(path, Sampling(4))
    assert [round(second * 12) for second in ours.seconds] == [0, 6, 12, 18]
    np.testing.assert_array_equal(
        ours.frames[2].image, open_video(clip, Sampling(4)).frames[2].image
    )


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_animations(form):
    video = open_video(animation(6, form, duration=250), Sampling(3))
    assert video.seconds == [0.0, 0.5, 1.0]
    shades = [int(np.asarray(frame.image)[0, 0, 0]) for frame in video.frames]
    assert shades == pytest.approx([0, 80, 160], abs=2)


def test_lists_of_pictures():
    pictures = [photograph(20, 10, seed) for seed in range(10)]
    video = open_video(pictures, Sampling(5), source_fps=2.0)
    assert video.seconds == [0.0, 1.0, 2.0, 3.0, 4.0]
    np.testing.assert_array_equal(video.frames[1].image, pictures[2])
    assert open_video(pictures, Sampling(5)).seconds[1] == 2 / 24  # as the reference assumes
    assert len(open_video([np.asarray(p) for p in pictures], Sampling(rate=24)).frames) == 10


def test_a_still_picture_is_a_video_of_one_frame():
    assert len(open_video(saved(photograph(9, 9)), Sampling(32)).frames) == 1


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        open_video(source, Sampling(4), **options)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_what_is_no_video(tmp_path, clip):
    assert "needs at least one" in refusal([])
    assert "10x10 and 20x10" in refusal([photograph(20, 10), photograph(10, 10)])
    assert "There is no file" in refusal(tmp_path / "no.mp4")
    assert "-1 frames per second" in refusal([photograph(9, 9)], source_fps=-1.0)
    (tmp_path / "text.mp4").write_text("hello")
    assert "not a video that can be read" in refusal(tmp_path / "text.mp4")
    assert "damaged" in refusal(animation()[:60])
    content = clip.read_bytes()
    assert refusal(content[: len(content) // 3])
    with pytest.raises(InputError, match="one frame at least"):
        Sampling(0)


def test_a_playlist_does_not_lead_anywhere(tmp_path, clip):
    """An untrusted playlist could name files and hosts of this machine."""
    pytest.importorskip("av", reason="PyAV, the video extra, is not installed")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    assert "not a video" in refusal(tmp_path / "list.m3u8")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    assert "not a video" in refusal(tmp_path / "list.ffconcat")


def test_sound_alone_is_no_video():
    av = pytest.importorskip("av", reason="PyAV, the video extra, is not installed")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no pictures in it" in refusal(file.getvalue())


def test_an_animation_of_too_many_frames_is_refused() -> None:
    """The frames are one pixel each, or a picture of 25 million each."""
    assert len(open_video(gif(500), Sampling(4)).frames) == 4
    assert "10,001 frames of 1x1" in refusal(gif(10_001))
    assert "100 frames of 5000x5000, and at most 20" in refusal(gif(100, size=(5000, 5000)))


def test_a_frame_is_kept_as_what_is_made_of_it() -> None:
    """So that no two frames of a large video need be in memory together."""
    made = []

    def keep(picture: Picture) -> int:
        made.append(picture)
        return len(made)

    pictures = [photograph(20, 10, seed) for seed in range(4)]
    for source in (animation(6, "GIF"), pictures):
        made.clear()
        assert open_video(source, Sampling(3), keep=keep).frames == [1, 2, 3]
        assert all(one.image.mode == "RGB" for one in made)


def test_frames_that_do_not_fit_the_context_are_not_all_prepared(monkeypatch) -> None:
    tokenizer, config = load_tokenizer(CHECKPOINT, [1]), ModelConfig.from_folder(CHECKPOINT)
    prepared = []
    prepare = ImageProcessor.prepare

    def counted(self: ImageProcessor, *arguments: Any) -> Any:
        prepared.append(arguments)
        return prepare(self, *arguments)

    monkeypatch.setattr(ImageProcessor, "prepare", counted)
    part = {"type": "video", "video": gif(1000, size=(64, 64)), "fps": 1000}
    with pytest.raises(InputError, match="do not fit into the context: ask for fewer"):
        prepare_messages(tokenizer, config, [{"role": "user", "content": [part]}])
    assert len(prepared) < 500


def test_without_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_av(name, *arguments, **options):
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    assert "pip install 'mlx-dgemma[video]'" in refusal(tmp_path / "film.mp4")
    assert open_video(animation(), Sampling(2)).frames  # Pillow reads this one
