"""Files that are written whole or not at all, and that say what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pydefect import persistence
from pydefect.errors import InputError, ModelFileError
from pydefect.persistence import (
    Checkpoint,
    alone_in,
    content_digest,
    file_version,
    folder_written_atomically,
    load_tensors,
    opened_checkpoint,
    replace_metadata,
    save_tensors,
    write_atomically,
)
from pydefect.places import check_file_writable

TENSORS = {
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def test_round_trip(tmp_path):
    metadata = {"format": 1, "nested": {"list": [1, 2.5, None, "é"]}, "flag": True}
    save_tensors(tmp_path / "model", TENSORS, metadata)
    tensors, read = load_tensors(tmp_path / "model")
    assert read == metadata
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_what_was_read_does_not_depend_on_the_file(tmp_path):
    """A model that is copied over a loaded one changed its scores, or ended the process."""
    path = tmp_path / "model"
    save_tensors(path, TENSORS, {})
    tensors, _ = load_tensors(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_digest_is_of_the_content(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_tensors(tmp_path / name, {"x": torch.tensor(value)}, {})
    versions = {name: file_version(tmp_path / name) for name in "abc"}
    a, b, c = (content_digest(tmp_path / name, version=version) for name, version in versions.items())
    assert a == b != c
    with pytest.raises(ModelFileError, match="was replaced in the meantime"):
        content_digest(tmp_path / "a", version=versions["b"])


def test_a_replaced_file_hands_its_permissions_on(tmp_path):
    path = tmp_path / "model"
    write_atomically(path, b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o444, 0o400])
def test_a_model_file_has_an_ordinary_files_permissions(tmp_path, mode):
    path = tmp_path / "model"
    before = os.umask(0o022)
    try:
        save_tensors(path, TENSORS, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(mode)
        save_tensors(path, {"x": torch.ones(3)}, {})
        assert stat.S_IMODE(path.stat().st_mode) == mode
        write_atomically(path, b"others too, and read-only files can be replaced")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == ["model"]


def test_a_model_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, fsync, replace = [], os.fsync, os.replace

    def seen(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(source, target):
        assert os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(persistence.os, "fsync", seen)
    monkeypatch.setattr(persistence.os, "replace", checked)
    save_tensors(tmp_path / "model", TENSORS, {})
    assert len(synced) == 1


def test_views_that_share_memory_are_written_apart(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"all": base, "row": base[1], "transposed": base.T, "again": base, "none": base[:0]}
    save_tensors(tmp_path / "model", views, {})
    tensors, _ = load_tensors(tmp_path / "model")
    assert torch.equal(tensors["again"], base)
    assert tensors["none"].shape == (0, 4)
    assert torch.equal(tensors["row"], base[1])
    assert torch.equal(tensors["transposed"], base.T)


def test_the_folder_is_made_and_the_file_is_an_ordinary_one(tmp_path):
    path = tmp_path / "a" / "b" / "model"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"content")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "model"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(persistence.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_is_reported_of_the_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(persistence.os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*model'") as caught:
        write_atomically(tmp_path / "model", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_model_for_which_there_is_no_room(tmp_path):
    path = tmp_path / "model"
    save_tensors(path, TENSORS, {})
    before = path.read_bytes()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/model'$") as caught:
            save_tensors(path, {"x": torch.zeros(2000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_an_interruption_leaves_the_old_file_too(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_atomically(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(persistence.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("named", [(), ("hidden/new/file",)])
def test_a_full_disk_is_reported_of_the_folder(tmp_path, named):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/run'$") as caught,
        folder_written_atomically(tmp_path / "run"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "models").mkdir()
    link, file = tmp_path / "current", tmp_path / "models" / "3"
    for target in (Path("models/3"), Path("models/none/4")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_atomically(link, b"new")
        assert link.readlink() == target
        assert (tmp_path / target).read_bytes() == b"new"
    assert not file.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "models"]


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_own_output_goes_behind_what_was_printed_even_into_a_file(tmp_path):
    code = "from pydefect.persistence import write_atomically as write; print('table', flush=True); "
    # /dev/stdout leads here too, but a failing test could replace it.
    code += "write('/dev/fd/1', b'figures')"
    with (tmp_path / "output").open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "output").read_bytes() == b"table\nfigures"
    assert os.listdir(tmp_path) == ["output"]


def test_a_file_is_looked_for_where_its_link_leads(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "closed" / "model")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "closed")
    with pytest.raises(InputError, match=r"--out: no permission to write to '.*closed'"):
        check_file_writable(tmp_path / "link", "--out")
    check_file_writable(tmp_path / "file", "--out")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    check_file_writable("/dev/null", "--out")


@pytest.mark.parametrize("path", ["../run", "../away/../run"])
def test_a_folder_is_replaced_where_its_name_leads_from_the_current_folder(tmp_path, monkeypatch, path):
    """Inside the very folder, and by way of a link: neither may be resolved anew on the way."""
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "away").symlink_to(tmp_path / "elsewhere" / "inner")
    place = tmp_path / "elsewhere" / "run" if "away" in path else tmp_path / "run"
    for folder in {place, tmp_path / "run"}:
        folder.mkdir()
        (folder / "old").write_text("")
    monkeypatch.chdir(tmp_path / "run")
    with folder_written_atomically(path) as unfinished:
        (unfinished / "new").write_text("")
    assert os.listdir(place) == ["new"]
    assert os.listdir(tmp_path / "run") == (["old"] if "away" in path else ["new"])
    assert not [name for name in [*os.listdir(tmp_path), *os.listdir(place.parent)] if name[0] == "."]


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_between_two_renames_loses_neither_folder(tmp_path, monkeypatch, call):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    calls, rename = [], Path.rename

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), folder_written_atomically(tmp_path / "run") as unfinished:
        (unfinished / "new").touch()
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["old"]


@pytest.fixture
def killed(tmp_path) -> Path:
    """What a program leaves that was killed while it wrote the folder ``run``."""
    code = (
        "import os, signal, sys; from pydefect.persistence import folder_written_atomically as written\n"
        "with written('run') as new: (new / 'part').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "new" / "part").exists()
    return left


def test_what_a_killed_program_left_is_removed(tmp_path, killed):
    with folder_written_atomically(tmp_path / "other"):
        assert killed.exists()
    with folder_written_atomically(tmp_path / "run"):
        assert not killed.exists()
    assert sorted(os.listdir(tmp_path)) == ["other", "run"]


def test_what_others_use_or_made_is_not_removed(tmp_path, killed):
    path = tmp_path / "run"
    # Killed between the two renames: the earlier run is in it alone.
    (killed / "old").mkdir()
    kept = tmp_path / ".run.original"
    kept.mkdir()
    with folder_written_atomically(path) as first, folder_written_atomically(path) as second:
        (first / "of").write_text("the first")
        (second / "of").write_text("the second")
    # The inner block ends first.
    assert (path / "of").read_text() == "the first"
    assert sorted(tmp_path.iterdir()) == sorted([killed, kept, path])


def test_no_infinity_in_the_metadata(tmp_path):
    """It is no JSON: other readers of the file would stumble."""
    with pytest.raises(ValueError, match="JSON"):
        save_tensors(tmp_path / "model", {}, {"loss": float("inf")})
    assert os.listdir(tmp_path) == []


def written(tmp_path) -> bytes:
    save_tensors(tmp_path / "whole", TENSORS, {"format": 1})
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:5], id="cut in the length"),
        pytest.param(lambda content: content[:40], id="cut in the header"),
        pytest.param(lambda content: content[:-3], id="cut in the data"),
        pytest.param(lambda content: content + b"x", id="too long"),
        pytest.param(lambda content: b"\xff" * 8 + content[8:], id="absurd length"),
        pytest.param(lambda content: content.replace(b'\\"format\\"', b'\\"format##'), id="broken JSON"),
        pytest.param(lambda content: b"a text file, no model at all", id="something else"),
    ],
)
def test_damaged_files(tmp_path, damage):
    (tmp_path / "model").write_bytes(damage(written(tmp_path)))
    with pytest.raises(ModelFileError, match=r"model: '.*model' is damaged or no safetensors file"):
        load_tensors(tmp_path / "model")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), id="a bit of a tensor"),
        pytest.param(lambda content: content.replace(b'\\"format\\": 1', b'\\"format\\": 3'), id="a digit"),
        pytest.param(lambda content: content.replace(b'"I64"', b'"F64"'), id="a type"),
        pytest.param(lambda content: content.replace(b"[2,3]", b"[3,2]"), id="a shape"),
        pytest.param(lambda content: content.replace(b'"half"', b'"calf"'), id="a name"),
    ],
)
def test_what_is_not_what_was_written(tmp_path, damage):
    """Such files have a form that can be read, and would score otherwise without a word."""
    content = damage(written(tmp_path))
    assert content != written(tmp_path)
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model: '.*model' is damaged: it does not hold what was"):
        load_tensors(tmp_path / "model")


def test_files_from_before_there_were_digests(tmp_path):
    save_file(TENSORS, tmp_path / "model", metadata={"pydefect": '{"format": 1}'})
    assert load_tensors(tmp_path / "model")[1] == {"format": 1}


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"pydefect": "[1, 2]"}])
def test_files_of_others(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "model", metadata=metadata)
    with pytest.raises(ModelFileError, match="was not written by pydefect"):
        load_tensors(tmp_path / "model")


def test_no_such_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelFileError, match=r"model: no file"):
            load_tensors(path)


# -- checkpoints
# ---------------------------------------------------------------------------------------------------

RUN = {"seed": 0, "levels": [1, 2], "images": "abc"}


def test_a_checkpoint_keeps_every_stage(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", RUN)
    assert checkpoint.load("final") is None
    checkpoint.save("final", TENSORS, {"step": 1})
    checkpoint.save("final", TENSORS, {"step": 2})
    checkpoint.save("fold-0", {}, {"step": 9})
    tensors, state = Checkpoint(tmp_path / "state", dict(reversed(RUN.items()))).load("final")
    assert state == {"step": 2}
    assert torch.equal(tensors["matrix"], TENSORS["matrix"])
    assert Checkpoint(tmp_path / "state", RUN).load("fold-0")[1] == {"step": 9}


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ({**RUN, "seed": 1}, "seed"),
        ({**RUN, "levels": [1, 3], "images": "abd"}, "images, levels"),
        ({**RUN, "new_setting": None, "seed": 2}, "seed"),
        ({"seed": 0, "levels": [1, 2]}, "images"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, run, names):
    Checkpoint(tmp_path, RUN).save("final", {}, {})
    with pytest.raises(
        InputError, match=rf"holds another run \(it differs in {names}\); repeat that run's settings"
    ):
        Checkpoint(tmp_path, run).load("final")


def test_a_run_goes_on_in_a_version_with_more_settings(tmp_path):
    Checkpoint(tmp_path, RUN).save("final", {}, {"epoch": 3})
    assert Checkpoint(tmp_path, {**RUN, "new_setting": None}).load("final") == ({}, {"epoch": 3})


def test_what_a_killed_save_has_left_goes_with_the_next_run(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"run": 1})
    checkpoint.save("training", {"a": torch.zeros(1)}, {})
    left = tmp_path / ".training.safetensors.k3x_9"
    left.write_bytes(b"half")
    (tmp_path / ".other.safetensors.k3x_9").write_bytes(b"another stage's")
    assert Checkpoint(tmp_path, {"run": 1}).load("training") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.safetensors.k3x_9",
        "training.safetensors",
    ]


def test_one_training_at_a_time_has_a_checkpoint(tmp_path):
    """The second would remove what the first one is writing."""
    with opened_checkpoint(tmp_path / "state", RUN) as checkpoint:
        assert checkpoint is not None
        second = opened_checkpoint(tmp_path / "state", RUN)
        with pytest.raises(InputError, match=r"checkpoint: another program is at work in .*state"):
            second.__enter__()
        checkpoint.save("final", {}, {"epoch": 3})
    with opened_checkpoint(tmp_path / "state", RUN) as checkpoint:
        assert checkpoint is not None
        assert checkpoint.load("final") == ({}, {"epoch": 3})
    with opened_checkpoint(None, RUN) as checkpoint:
        assert checkpoint is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """One that draws images ahead may outlive the training for a moment, when that is killed."""
    reading, writing = os.pipe()
    with alone_in(tmp_path, "out"):
        child = os.fork()
        if child == 0:
            os.write(writing, b".")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)
    try:
        with alone_in(tmp_path, "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_changes_are_of_the_file_that_was_read(tmp_path):
    path = tmp_path / "model"
    save_tensors(path, TENSORS, {"calibration": None})
    version = file_version(path)
    replace_metadata(path, {"calibration": 1}, version=version)
    assert load_tensors(path)[1] == {"calibration": 1}
    before = path.read_bytes()
    with pytest.raises(ModelFileError, match=r"model: .* was replaced in the meantime; it stays as it is"):
        replace_metadata(path, {"calibration": 2}, version=version, out=tmp_path / "other")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(ModelFileError, match="model: no file"):
        file_version(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"checkpoint: '.*file' is a file; a folder is needed"):
        Checkpoint(tmp_path / "file", RUN)


def test_a_folder_without_permission_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="checkpoint: no permission to write to"):
        Checkpoint(tmp_path / "a" / "b", {})


def test_the_header_is_readable_by_anyone(tmp_path):
    """Eight bytes of length, then JSON: what the safetensors format promises to other programs."""
    content = written(tmp_path)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["pydefect"])["format"] == 1
