"""How an output takes its place, and a source that changes while it is read."""

import contextlib
import json
import multiprocessing
import os
import shutil

import pytest

from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError, DGemmaError, InputError

FLAGS = {"quantize": True, "shard_bytes": 60_000}


@pytest.fixture
def source(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "source")


def meanwhile(act):
    """A progress callback that acts once, when a third of the bytes are converted."""
    acted = []

    def progress(what, done, total):
        if what == "converting" and done > total / 3 and not acted:
            acted.append(True)
            act()

    return progress


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_at_the_target_is_kept(overwrite, source, tmp_path):
    target = tmp_path / "out"

    def appear():
        target.mkdir()
        (target / "thesis.tex").write_text("chapter one")

    words = "holds no checkpoint" if overwrite else "exists"
    with pytest.raises(InputError, match=words):
        convert(source, target, **FLAGS, overwrite=overwrite, progress=meanwhile(appear))
    assert names(target) == ["thesis.tex"]
    target.rename(tmp_path / "moved")
    report = convert(source, target, **FLAGS)
    assert report.resumed == report.shards
    assert names(tmp_path) == ["moved", "out", "source"]
    assert not (target / ".lock").exists()


def test_a_file_or_a_broken_link_at_the_target_is_kept(source, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(InputError, match="no folder"):
        convert(source, target, **FLAGS, progress=meanwhile(lambda: target.write_text("mine")))
    assert target.read_text() == "mine"
    target.unlink()
    with pytest.raises(InputError, match="no folder"):
        convert(source, target, **FLAGS, progress=meanwhile(lambda: target.symlink_to("nowhere")))
    assert target.is_symlink()


def _race(source, target, barrier, results):
    os.fsync = lambda _: None
    barrier.wait()
    try:
        convert(source, target, **FLAGS)
        results.put("published")
    except DGemmaError as error:
        results.put(str(error))


def test_one_of_many_simultaneous_conversions_publishes(source, tmp_path):
    spawn = multiprocessing.get_context("spawn")  # MLX has threads, which a fork would lose
    barrier, results = spawn.Barrier(3), spawn.Queue()
    target = tmp_path / "out"
    racers = [spawn.Process(target=_race, args=(source, target, barrier, results)) for _ in "abc"]
    for racer in racers:
        racer.start()
    said = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert said.count("published") == 1, said
    refused = [text for text in said if text != "published"]
    assert all("another conversion" in text or "exists" in text for text in refused), refused
    assert names(tmp_path) == ["out", "source"]


def leave_old(target, number=123):
    """What a conversion leaves that is killed while it replaces a checkpoint."""
    old = target.with_name(f"{target.name}.old-{number}")
    old.mkdir()
    (old / "config.json").write_text('{"old": true}')
    return old


def test_what_a_killed_replacement_left_is_removed(source, tmp_path):
    target = tmp_path / "out"
    convert(source, target, **FLAGS)
    leave_old(target)
    leave_old(target, 7)
    (tmp_path / "out.old-9").mkdir()
    (tmp_path / "out.old-9" / "thesis.tex").write_text("no checkpoint")
    (tmp_path / "out.old-mine").mkdir()
    (tmp_path / "out.old-mine" / "config.json").write_text("{}")
    convert(source, target, **FLAGS, overwrite=True)
    assert names(tmp_path) == ["out", "out.old-9", "out.old-mine", "source"]


@pytest.mark.parametrize("calls", range(9))
def test_a_removal_that_was_killed_is_ended_by_the_next_run(calls, source, tmp_path, monkeypatch):
    """Found by studies/conversion_kills.py: what a kill left of `out.old-PID` lay there for ever,
    for its config.json was gone already."""

    class Kill(BaseException):
        pass

    target, left = tmp_path / "out", calls
    convert(source, target, **FLAGS)
    remaining = {name: getattr(os, name) for name in ("unlink", "rmdir", "rename")}

    def dying(name):
        def act(path, *args, **kwargs):
            nonlocal left
            if ".old-" in str(path) and (left := left - 1) < 0:
                raise Kill
            return remaining[name](path, *args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        for name in remaining:
            patch.setattr(os, name, dying(name))
        with contextlib.suppress(Kill):
            convert(source, target, **FLAGS, overwrite=True)
    convert(source, target, **FLAGS, overwrite=True)
    assert names(tmp_path) == ["out", "source"]


def test_half_a_checkpoint_is_not_put_back(source, tmp_path):
    old = leave_old(tmp_path / "out")
    (old / "config.json").rename(old / ".replaced")
    convert(source, tmp_path / "out", **FLAGS)
    assert names(tmp_path) == ["out", "source"]


def test_the_last_whole_checkpoint_is_put_back(source, tmp_path):
    target = tmp_path / "out"
    leave_old(target)
    with pytest.raises(InputError, match="add --overwrite"):
        convert(source, target, **FLAGS)
    assert json.loads((target / "config.json").read_text()) == {"old": True}
    convert(source, target, **FLAGS, overwrite=True)
    assert names(tmp_path) == ["out", "source"]


def test_a_link_out_of_the_source_is_not_followed(source, tmp_path):
    (tmp_path / "secret.json").write_text('{"password": 1}')
    (source / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"extra\.json is a link to .*secret\.json, outside"):
        convert(source, tmp_path / "out", **FLAGS)
    assert names(tmp_path) == ["secret.json", "source"]
    (source / "extra.json").unlink()
    (source / "extra.json").symlink_to("tokenizer_config.json")
    os.mkfifo(source / "pipe.json")
    convert(source, tmp_path / "out", **FLAGS)
    assert (tmp_path / "out" / "extra.json").read_text() == "{}"
    assert not (tmp_path / "out" / "pipe.json").exists()


def test_the_links_of_the_hubs_cache_are_followed(checkpoint, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(checkpoint, tmp_path / "models--a--b" / "blobs")
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    convert(snapshot, tmp_path / "out", **FLAGS)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


def _write_again(path):
    path.write_bytes(path.read_bytes())


def _replace(path):
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


CHANGES = {
    "written again": ("model.safetensors", _write_again, "changed while it was read"),
    "replaced by an equal file": ("model.safetensors", _replace, "changed while it was read"),
    "removed": ("model.safetensors", os.unlink, "was removed while it was read"),
    "cut short": ("model.safetensors", lambda path: os.truncate(path, 99_000), "was cut short"),
    "another config": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace("4096", "8192")),
        r"config\.json changed while it was read",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_source_that_changes_is_noticed(kind, source, tmp_path):
    name, change, words = CHANGES[kind]
    acting = meanwhile(lambda: change(source / name))
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "out", **FLAGS, progress=acting)
    assert names(tmp_path) == ["source"]


def test_a_source_that_changes_between_runs_is_noticed(source, tmp_path):
    class Stop(BaseException):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        convert(source, tmp_path / "out", **FLAGS, progress=meanwhile(stop))
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    _replace(source / "model.safetensors")
    assert convert(source, tmp_path / "out", **FLAGS).resumed == ()
