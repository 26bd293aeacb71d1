"""One writer for a workdir: a second is refused, a dead one is succeeded, and one that lost the
workdir stops.
"""

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
from trainer.io.lock import Lease, LeaseStore

console = RecordingConsole()


def test_a_second_process_is_refused(tmp_path: pathlib.Path) -> None:
    with lock.hold_workdir(str(tmp_path), console):
        for _ in range(50):
            message = rf"in use by process {os.getpid()} on .* since 20.*UTC"
            with pytest.raises(DataError, match=message), lock.hold_workdir(str(tmp_path), console):
                pass
    assert os.listdir(tmp_path) == []
    with lock.hold_workdir(str(tmp_path), console):
        pass


def test_one_of_many_threads_at_a_time_has_the_lock(tmp_path: pathlib.Path) -> None:
    """Also while others release it: removing the file must not let two in."""
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


def test_a_job_whose_lock_file_was_removed_stops(tmp_path: pathlib.Path) -> None:
    with lock.hold_workdir(str(tmp_path), console) as first:
        first.check()
        (tmp_path / lock.NAME).unlink()
        with lock.hold_workdir(str(tmp_path), console) as second:
            second.check()
            with pytest.raises(DataError, match="removed or replaced"):
                first.check()
    assert os.listdir(tmp_path) == []


class Store:
    """A bucket with one object in memory: generations, preconditions, and requests that fail on
    demand.
    """

    def __init__(self) -> None:
        self.generation, self.content, self.count = 0, b"", 0
        self.down = False
        self.lose_answers = 0
        self.deletes = 0
        self.guard = threading.Lock()

    def read(self, name: str) -> tuple[int, bytes]:
        with self.guard:
            self._require_up(name)
            return self.generation, self.content

    def write(self, name: str, content: bytes, generation: int) -> int:
        with self.guard:
            self._require_up(name)
            if generation != self.generation:
                raise Conflict
            self.count += 1
            self.generation, self.content = self.count, content
            if self.lose_answers:
                self.lose_answers -= 1
                raise Conflict  # as when the client repeats a request that was served
            return self.generation

    def delete(self, name: str, generation: int) -> None:
        del name
        with self.guard:
            self.deletes += 1
            if generation != self.generation:
                raise Conflict
            self.generation, self.content = 0, b""

    def _require_up(self, name: str) -> None:
        if self.down:
            raise Unavailable(f"reach {name}", "503", "try later")


class PausableStore:
    """The same bucket as a process sees it whose machine stands still for a while."""

    def __init__(self, store: Store) -> None:
        self.store, self.running = store, threading.Event()
        self.running.set()

    def read(self, name: str) -> tuple[int, bytes]:
        self.running.wait()
        return self.store.read(name)

    def write(self, name: str, content: bytes, generation: int) -> int:
        self.running.wait()
        return self.store.write(name, content, generation)

    def delete(self, name: str, generation: int) -> None:
        self.running.wait()
        self.store.delete(name, generation)


def lease(store: LeaseStore) -> Lease:
    """A lease of 0.4 s, not acquired yet."""
    return Lease("gs://b/run/.lock", store, "run/.lock", 0.4)


def test_a_second_job_is_refused_while_the_owner_renews() -> None:
    store = Store()
    owner = lease(store).acquire(console)
    for _ in range(50):
        with pytest.raises(DataError, match=rf"--workdir=gs://b/run is in use by process {os.getpid()} on"):
            lease(store).acquire(console)
        owner.check()
    owner.release()
    assert store.generation == 0
    lease(store).acquire(console).release()


def test_one_of_many_jobs_that_start_together_gets_the_lease() -> None:
    store, owners = Store(), []

    def compete() -> None:
        with contextlib.suppress(DataError):
            owners.append(lease(store).acquire(console))

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1
    owners[0].release()


def test_a_job_that_stood_still_loses_its_lease_and_stops() -> None:
    store = Store()
    stalled = PausableStore(store)
    first = lease(stalled).acquire(console)
    stalled.running.clear()
    time.sleep(0.1)  # a renewal that began before ends
    began = time.monotonic()
    second = lease(store).acquire(console)
    assert 0.4 <= time.monotonic() - began < 5
    stalled.running.set()
    with pytest.raises(DataError, match="taken over by another job"):
        first.check()
    second.check()
    first.release()  # must not delete the other job's object
    second.check()
    assert json.loads(store.content)["process"] == os.getpid()
    second.release()
    assert store.generation == 0


def test_renewals_may_fail_for_as_long_as_the_lease() -> None:
    store = Store()
    owner = lease(store).acquire(console)
    store.down = True
    time.sleep(0.15)
    owner.check()  # the lease has not run out
    time.sleep(0.5)
    with pytest.raises(DataError, match=r"could not be renewed for \d+ s \(503\)"):
        owner.check()
    store.down = False
    owner.check()  # no other job has taken it
    owner.release()


def test_release_sends_no_request_to_a_bucket_that_does_not_answer() -> None:
    """Each request may take half a minute. Once renewals succeed again, the object is deleted as
    usual.
    """
    store = Store()
    owner = lease(store).acquire(console)
    store.down = True
    time.sleep(0.3)
    owner.release()
    assert store.deletes == 0
    store = Store()
    owner = lease(store).acquire(console)
    store.down = True
    time.sleep(0.2)
    store.down = False
    time.sleep(0.3)
    owner.release()
    assert (store.deletes, store.generation) == (1, 0)


def test_a_lost_answer_is_no_conflict() -> None:
    """Neither to the first write nor to a renewal."""
    store = Store()
    store.lose_answers = 1
    owner = lease(store).acquire(console)
    owner.check()
    store.lose_answers = 1
    deadline = time.monotonic() + 5
    while store.lose_answers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not store.lose_answers
    owner.check()
    owner.release()
    assert store.generation == 0


def test_a_bucket_that_does_not_answer_is_one_line() -> None:
    store = Store()
    store.down = True
    with pytest.raises(DataError, match=r"cannot take gs://b/run/\.lock, which keeps other jobs out: 503"):
        lease(store).acquire(console)


@pytest.fixture
def objects(gcs: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch) -> fake_gcs.Server:
    """The fake bucket, for google-cloud-storage in this process."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return gcs


def test_a_workdir_in_a_bucket_is_locked_and_released(objects: fake_gcs.Server) -> None:
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


def test_a_dead_owner_in_a_bucket_is_succeeded(objects: fake_gcs.Server) -> None:
    objects.put("bucket", "run/.lock", b'{"process": 1, "host": "gone", "since": "long ago"}')
    with lock.hold_workdir("gs://bucket/run", console, lease=0.5) as held:
        held.check()
        # Another job takes it over in the same way.
        objects.put("bucket", "run/.lock", b"{}")
        time.sleep(0.6)
        with pytest.raises(DataError, match="taken over by another job"):
            held.check()
    assert objects.get("bucket", "run/.lock") == b"{}"


def test_a_lost_answer_of_a_real_client_is_no_conflict(objects: fake_gcs.Server) -> None:
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


def test_a_bucket_that_does_not_exist_is_one_line(objects: fake_gcs.Server) -> None:
    del objects
    with (
        pytest.raises(DataError, match=r"cannot take gs://nowhere/run/\.lock.*there is no bucket nowhere"),
        lock.hold_workdir("gs://nowhere/run", console),
    ):
        pass


def test_without_credentials_a_bucket_is_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    import google.auth

    def raise_no_credentials(**_: object) -> None:
        raise google.auth.exceptions.DefaultCredentialsError("nothing")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(google.auth, "default", raise_no_credentials)
    lines = RecordingConsole()
    with lock.hold_workdir("gs://bucket/run", lines) as unlocked:
        unlocked.check()
    assert "nothing keeps a second job out" in "".join(lines.lines)
