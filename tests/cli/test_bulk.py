"""Bulk: the same files byte for byte, however the work is split, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.cli.bulk import Order
from ditloom.cli.place import Share, share
from ditloom.cli.run_folder import RunFolder
from ditloom.contracts.errors import UserError
from ditloom.training import durable
from ditloom.training.samples import png

COUNT, GROUP = 14, 4


def bulk(folder, model, count=COUNT):
    return ["generate", "--model", model, "--classes", "all", "--count", count, "--batch-size", GROUP, "--out", folder]


def files_of(folder):
    return {path.name: path.read_bytes() for path in (Path(folder) / "images").iterdir()}


@pytest.fixture
def whole(ditloom, model_folder):
    """The files of one undisturbed process."""
    assert ditloom(*bulk("whole", model_folder)).code == 0
    return files_of("whole")


def as_rank(monkeypatch, rank, size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@given(
    count=st.integers(1, 40),
    inputs=st.integers(1, 7),
    seeds=st.integers(1, 3),
    batch=st.integers(1, 9),
    size=st.integers(1, 5),
)
def test_processes_share_every_picture_once_in_fixed_groups(count, inputs, seeds, batch, size):
    order = Order(inputs=list(range(inputs)), each=count, seeds=range(10, 10 + seeds), batch_size=batch)
    alone = list(order.groups(Share()))
    shared = [group for rank in range(size) for group in order.groups(Share(rank, size))]
    assert sorted(shared, key=lambda group: group.first) == alone
    assert [number for group in alone for number in group.numbers] == list(range(order.total))
    for group in alone:
        assert group.indices.start % batch == 0 and 1 <= len(group.inputs) <= batch
        assert group.inputs == [index % inputs for index in group.indices] == [order.input(n) for n in group.numbers]
        assert group.seed == 10 + group.first // count and group.first % count == group.indices.start
    assert sum(order.pictures(Share(rank, size)) for rank in range(size)) == order.total


def test_two_processes_make_the_same_bytes(ditloom, model_folder, whole, monkeypatch):
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        ended = ditloom(*bulk("shared", model_folder), "--json")
        assert (ended.document["drawn"] == 8) if rank == 0 else (ended.out == "")
    assert files_of("shared") == whole
    assert Path("shared/grid.png").read_bytes() == Path("whole/grid.png").read_bytes()


def test_any_split_may_finish_what_another_began(ditloom, model_folder, whole, monkeypatch):
    as_rank(monkeypatch, 2, 3)
    ditloom(*bulk("mixed", model_folder))
    assert sorted(files_of("mixed")) == [f"{n:06d}.png" for n in range(8, 12)] and not Path("mixed/grid.png").exists()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    found = ditloom(*bulk("mixed", model_folder), "--json").document
    assert (found["drawn"], found["found"]) == (10, 4)
    assert files_of("mixed") == whole


def test_what_is_torn_or_gone_is_drawn_again_with_its_group(ditloom, model_folder, whole):
    images = Path("whole/images")
    (images / "000002.png").write_bytes(whole["000002.png"][:-7])
    (images / "000013.png").unlink()
    found = ditloom(*bulk("whole", model_folder), "--json").document
    assert (found["drawn"], found["found"]) == (4 + 2, 8)
    assert files_of("whole") == whole


def test_groups_decide_the_bytes_and_so_the_folder(refused, model_folder, whole):
    arguments = bulk("whole", model_folder)
    arguments[arguments.index("--batch-size") + 1] = 5
    assert "drawn with another batch_size" in refused(*arguments)


def test_several_processes_need_a_folder_name(refused, model_folder, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    assert "give --out FOLDER" in refused("generate", "ant", "--model", model_folder)


@pytest.mark.parametrize("given_", [{"RANK": "x"}, {"WORLD_SIZE": ""}, {"RANK": "2"}])
def test_a_launcher_that_says_nonsense(monkeypatch, given_):
    as_rank(monkeypatch, 0, 2)
    for name, value in given_.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start several processes with torchrun"):
        share()


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def test_a_kill_between_any_two_file_operations_leaves_whole_pictures_only(tmp_path, monkeypatch):
    from PIL import Image

    pictures = [png(Image.new("L", (4, 4), shade)) for shade in range(3)]
    clean = RunFolder(tmp_path / "clean", 3)
    clean.claim({"pictures": {"seed": 0}})
    operations = _counted(monkeypatch, lambda: clean.keep(range(3), pictures), stop_at=None)
    assert operations > 10
    for stop_at in range(operations):
        folder = RunFolder(tmp_path / f"{stop_at}", 3)
        folder.claim({"pictures": {"seed": 0}})
        with pytest.raises(Killed):
            _counted(monkeypatch, lambda folder=folder: folder.keep(range(3), pictures), stop_at)
        for number in range(3):
            named = folder.picture(number)
            assert not named.exists() or named.read_bytes() == pictures[number]
        folder.claim({"pictures": {"seed": 0}})
        folder.keep(range(3), pictures)
        assert folder.has(range(3)) and sorted(files_of(folder.path)) == sorted(files_of(clean.path))


def _counted(monkeypatch, work, stop_at):
    """Run `work` and count its calls into the operating system; be killed before number `stop_at`."""
    done = 0

    def watched(call):
        def run(*arguments, **named):
            nonlocal done
            if done == stop_at:
                raise Killed
            done += 1
            return call(*arguments, **named)

        return run

    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "rename"):
            patch.setattr(durable.os, name, watched(getattr(os, name)))
        work()
    return done


def test_kill_nine_and_resume(ditloom, model_folder, tmp_path):
    """A process killed while it draws; what it left is whole, and the same command ends with the same bytes."""
    count = 200
    command = [sys.executable, "-m", "ditloom.cli", *map(str, bulk("killed", model_folder, count)), "--steps", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    images, deadline = tmp_path / "killed/images", time.monotonic() + 120
    while len(list(images.glob("[0-9]*.png"))) < 8 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {name: data for name, data in files_of("killed").items() if not name.startswith(".")}
    assert 8 <= len(left) < count
    found = ditloom(*bulk("killed", model_folder, count), "--steps", 2, "--json").document
    assert found["drawn"] + found["found"] == count and found["found"] > 0
    ditloom(*bulk("calm", model_folder, count), "--steps", 2)
    calm = files_of("calm")
    assert files_of("killed") == calm and all(calm[name] == data for name, data in left.items())
    assert json.loads(Path("killed/settings.json").read_text())["pictures"]["count"] == count


@pytest.mark.slow
def test_torchrun(ditloom, model_folder, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "ditloom.cli"]
    subprocess.run([*command, *map(str, bulk("many", model_folder))], cwd=tmp_path, check=True, timeout=300)
    assert files_of("many") == whole
