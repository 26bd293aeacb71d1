"""One writer for a workdir: the second is refused, the dead one's place is free, and who lost it stops."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import fake_gcs
import pytest
from conftest import ROOT, RecordingConsole

from trainer.core.errors import DataError
from trainer.io import lock
from trainer.io.bucket import Conflict, Unavailable
from trainer.io.lock import Lease

console = RecordingConsole()


def test_the_second_is_refused_in_fifty_of_fifty_tries(tmp_path: pathlib.Path) -> None:
    with lock.hold_workdir(str(tmp_path), console):
        for _ in range(50):
            told = rf"in use by process {os.getpid()} on .* since 20.*UTC"
            with pytest.raises(DataError, match=told), lock.hold_workdir(str(tmp_path), console):
                pass
    assert os.listdir(tmp_path) == []
    with lock.hold_workdir(str(tmp_path), console):
        pass


def test_of_many_at_once_one_gets_it(tmp_path: pathlib.Path) -> None:
    """Also while others give it back: who removes the file must not let two in."""
    inside, most, wins, guard = 0, 0, 0, threading.Lock()

    def compete() -> None:
        nonlocal inside, most, wins
        for _ in range(200):
            try:
                with lock.hold_workdir(str(tmp_path), console):
                    with guard:
                        inside, wins = inside + 1, wins + 1
                        most = max(most, inside)
                    time.sleep(0.0005)
                    with guard:
                        inside -= 1
            except DataError:
                pass

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert wins > 6


def test_a_lock_dies_with_its_process(tmp_path: pathlib.Path) -> None:
    code = f"""
import time
from trainer.core.console import Console
from trainer.io import lock
with lock.hold_workdir({str(tmp_path)!r}, Console()):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=f"process {process.pid} on"), lock.hold_workdir(str(tmp_path), console):
        pass
    process.kill()
    process.wait()
    with lock.hold_workdir(str(tmp_path), console) as held:
        held.check()


def test_who_lost_the_file_stops(tmp_path: pathlib.Path) -> None:
    with lock.hold_workdir(str(tmp_path), console) as first:
        first.check()
        (tmp_path / lock.NAME).unlink()
        with lock.hold_workdir(str(tmp_path), console) as second:
            second.check()
            with pytest.raises(DataError, match="removed or replaced"):
                first.check()
    assert os.listdir(tmp_path) == []


class Memory:
    """A bucket's object: generations and preconditions, and requests that fail on demand."""

    def __init__(self) -> None:
        self.generation, self.content, self.count = 0, b"", 0
        self.down = False
        self.lose_answers = 0
        self.guard = threading.Lock()

    def read(self) -> tuple[int, bytes]:
        with self.guard:
            if self.down:
                raise Unavailable("503")
            return self.generation, self.content

    def write(self, content: bytes, generation: int) -> int:
        with self.guard:
            if self.down:
                raise Unavailable("503")
            if generation != self.generation:
                raise Conflict
            self.count += 1
            self.generation, self.content = self.count, content
            if self.lose_answers:
                self.lose_answers -= 1
                raise Conflict  # as when the client repeats a request that was served
            return self.generation

    def delete(self, generation: int) -> None:
        with self.guard:
            if generation != self.generation:
                raise Conflict
            self.generation, self.content = 0, b""


def lease(register: Memory, *, silent: bool = False) -> Lease:
    """A lease of 0.4 s; a silent owner is as good as dead: it never renews by itself."""
    made = Lease("gs://b/run/.lock", register, 0.4)
    if silent:
        made._renew = 1000.0
    return made


def test_a_living_owner_keeps_its_bucket_in_fifty_of_fifty_tries() -> None:
    register = Memory()
    owner = lease(register).acquire(console)
    refused = 0
    for _ in range(50):
        with pytest.raises(DataError, match=rf"--workdir=gs://b/run is in use by process {os.getpid()} on"):
            lease(register).acquire(console)
        refused += 1
        owner.check()
    owner.release()
    assert refused == 50
    assert register.generation == 0
    lease(register).acquire(console).release()


def test_of_many_that_find_no_object_one_gets_it() -> None:
    register, won = Memory(), []

    def compete() -> None:
        with contextlib.suppress(DataError):
            won.append(lease(register).acquire(console))

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


def test_a_dead_owners_bucket_is_free_after_the_lease_and_the_dead_one_stops() -> None:
    register = Memory()
    dead = lease(register, silent=True).acquire(console)
    began = time.monotonic()
    heir = lease(register).acquire(console)
    assert 0.4 <= time.monotonic() - began < 5
    with pytest.raises(DataError, match="taken over by another job"):
        dead.check()
    heir.check()
    dead.release()  # must not delete what is another's
    heir.check()
    assert json.loads(register.content)["process"] == os.getpid()
    heir.release()
    assert register.generation == 0


def test_a_bucket_that_does_not_answer_is_waited_for_and_not_for_ever() -> None:
    register = Memory()
    owner = lease(register).acquire(console)
    register.down = True
    time.sleep(0.15)
    owner.check()  # the lease has not run out
    time.sleep(0.5)
    with pytest.raises(DataError, match=r"could not be renewed for \d+ s \(503\)"):
        owner.check()
    register.down = False
    owner.check()  # nobody has taken it: it is ours again
    owner.release()


def test_who_ends_for_a_silent_bucket_does_not_wait_for_it_again() -> None:
    """Each request may take half a minute. Once the bucket answers again, it is given back as ever."""

    class Slow(Memory):
        deletes = 0

        def delete(self, generation: int) -> None:
            self.deletes += 1
            super().delete(generation)

    register = Slow()
    owner = lease(register).acquire(console)
    register.down = True
    time.sleep(0.3)
    owner.release()
    assert register.deletes == 0
    register = Slow()
    owner = lease(register).acquire(console)
    register.down = True
    time.sleep(0.2)
    register.down = False
    time.sleep(0.3)
    owner.release()
    assert (register.deletes, register.generation) == (1, 0)


def test_an_answer_that_got_lost_is_no_conflict() -> None:
    register = Memory()
    register.lose_answers = 1
    owner = lease(register, silent=True).acquire(console)
    owner.check()
    register.lose_answers = 1
    owner._renewed -= 0.3
    owner.check()
    owner.release()
    assert register.generation == 0


def test_a_bucket_that_says_no_is_one_line() -> None:
    register = Memory()
    register.down = True
    with pytest.raises(DataError, match=r"cannot take gs://b/run/\.lock, which keeps other jobs out: 503"):
        lease(register).acquire(console)


@pytest.fixture
def objects(gcs: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch) -> fake_gcs.Server:
    """The fake bucket, for google-cloud-storage in this process."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return gcs


def test_a_bucket_is_held_by_preconditions_and_given_back(objects: fake_gcs.Server) -> None:
    with lock.hold_workdir("gs://bucket/run", console, lease=1.0) as held:
        assert json.loads(objects.get("bucket", "run/.lock"))["process"] == os.getpid()
        with (
            pytest.raises(DataError, match="in use by process"),
            lock.hold_workdir("gs://bucket/run", console, lease=1.0),
        ):
            pass
        held.check()
        assert len(objects.requests("upload")) >= 2, "it is not renewed"  # the object is named in the body
    assert objects.names("bucket") == []


def test_a_dead_owner_in_a_bucket_is_followed(objects: fake_gcs.Server) -> None:
    objects.put("bucket", "run/.lock", b'{"process": 1, "host": "gone", "since": "long ago"}')
    with lock.hold_workdir("gs://bucket/run", console, lease=0.5) as held:
        held.check()
        # Somebody takes it from us as we did from the dead one.
        objects.put("bucket", "run/.lock", b"{}")
        time.sleep(0.6)
        with pytest.raises(DataError, match="taken over by another job"):
            held.check()
    assert objects.get("bucket", "run/.lock") == b"{}"


def test_a_lost_answer_of_a_bucket_is_no_conflict(objects: fake_gcs.Server) -> None:
    objects.fail("lost", "upload", times=1)
    with lock.hold_workdir("gs://bucket/run", console, lease=20.0) as held:
        held.check()
        assert objects.heal()[0].consumed == 1
    assert objects.names("bucket") == []


def test_a_bucket_that_refuses_is_one_line(objects: fake_gcs.Server) -> None:
    objects.fail("403", "", times=None)
    with (
        pytest.raises(DataError, match=r"cannot take gs://bucket/run/\.lock.*403"),
        lock.hold_workdir("gs://bucket/run", console),
    ):
        pass
