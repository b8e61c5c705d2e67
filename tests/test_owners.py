from __future__ import annotations

import os
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import InMemoryStorage

from autoprune.errors import RunError
from autoprune.searching import owners
from autoprune.searching.owners import Heartbeat, Owner, Watch, this_process

ELSEWHERE = Owner("other-machine", 77, "123456")


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(storage=InMemoryStorage())


class Looking:
    """A watch on an owner elsewhere, by a clock that only `after` moves."""

    def __init__(self, study: optuna.Study, silence_s: float = 60.0) -> None:
        self.study, self.now = study, 0.0
        self.watch = Watch(study, silence_s=silence_s, clock=lambda: self.now)
        self.count = 0

    def beat(self, owner: Owner = ELSEWHERE) -> None:
        self.count += 1
        self.study.set_user_attr(owner.key, self.count)

    def after(self, seconds: float) -> bool:
        self.now += seconds
        return self.watch.alive(ELSEWHERE)


@pytest.fixture
def looking(study) -> Looking:
    return Looking(study)


@pytest.mark.parametrize("owner", [ELSEWHERE, Owner("a.b-1", 1, ""), Owner("fe80:1", 4, "9"), this_process()])
def test_an_owner_survives_being_written_down(owner):
    assert Owner.parse(owner.text) == owner


@pytest.mark.parametrize(
    "text", ["", "host", "host:1", ":1:2", "host:x:2", "host:-1:2", "host:0:2", "host:²:3", "None"]
)
def test_text_that_names_no_owner(text):
    assert Owner.parse(text) is None


def test_this_process_is_the_same_all_the_time_and_alive(study):
    assert this_process() == this_process()
    assert this_process().pid == os.getpid()
    assert Watch(study).alive(this_process())


SLEEPER = "from autoprune.searching.owners import this_process as p; print(p().text, flush=True); input()"


def test_a_process_here_is_alive_until_it_is_killed_reaped_or_not(study):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    owner = Owner.parse(process.stdout.readline().strip())
    assert owner is not None
    assert (owner.host, owner.pid) == (this_process().host, process.pid)
    watch = Watch(study)
    assert watch.alive(owner)
    assert not watch.alive(Owner(owner.host, owner.pid, "1"))  # its number now belongs to another
    process.kill()
    deadline = time.monotonic() + 10
    while watch.alive(owner) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not watch.alive(owner)  # a zombie
    process.communicate()
    assert not watch.alive(owner)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_another_owner():
    me = this_process().text
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, this_process().text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 1000).decode()
    assert text != me
    assert Owner.parse(text).pid == child


def test_without_proc_the_system_is_asked_whether_the_process_exists(study, monkeypatch, tmp_path):
    monkeypatch.setattr(owners, "_PROC", tmp_path)
    here = this_process().host
    assert Watch(study).alive(Owner(here, os.getpid(), "whenever"))
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    assert not Watch(study).alive(Owner(here, finished.pid, "whenever"))


def test_an_owner_elsewhere_without_a_heartbeat_is_dead_at_once(looking):
    assert not looking.after(0)
    looking.beat()
    assert looking.after(2)  # it came back


def test_an_owner_elsewhere_is_dead_after_silence_and_not_before(looking):
    looking.beat()
    assert looking.after(0)
    assert looking.after(59)
    assert not looking.after(1)
    looking.beat()
    assert looking.after(2)
    for _ in range(20):
        looking.beat()
        assert looking.after(30)


def test_the_first_look_comes_late_and_still_gives_it_time(looking):
    looking.beat()
    assert looking.after(100_000)
    assert not looking.after(60)


def test_a_storage_that_was_gone_makes_nobody_dead(looking):
    """Both wrote until the outage; after it, ours is not further than theirs by more than the outage can explain."""
    me = this_process()
    for _ in range(3):
        looking.beat()
        looking.beat(me)
        assert looking.after(15)
    assert looking.after(110)  # gone: neither wrote
    looking.study.set_user_attr(me.key, looking.count + 1)  # ours is the first to get through
    assert looking.after(2)
    looking.beat()
    assert looking.after(2)


def test_ours_gets_through_and_theirs_does_not(looking):
    me = this_process()
    looking.study.set_user_attr(me.key, 10)
    looking.beat()
    assert looking.after(0)
    for count in range(11, 14):
        looking.study.set_user_attr(me.key, count)
        assert looking.after(15)
    looking.study.set_user_attr(me.key, 14)
    assert not looking.after(15)


def test_many_owners_cost_one_read(study, monkeypatch):
    reads = []
    original = InMemoryStorage.get_study_user_attrs
    monkeypatch.setattr(
        InMemoryStorage, "get_study_user_attrs", lambda self, number: (reads.append(0), original(self, number))[1]
    )
    watch = Watch(study, clock=lambda: 5.0)
    assert not any(watch.alive(Owner("other", pid, "1")) for pid in range(1, 50))
    assert len(reads) == 1


def beats(study: optuna.Study, owner: Owner) -> object:
    return study.user_attrs.get(owner.key, "never")


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_heartbeat_begins_before_start_returns_and_is_taken_back(study):
    heartbeat = Heartbeat(study, owner=ELSEWHERE, every_s=3600)
    assert beats(study, ELSEWHERE) == "never"
    heartbeat.start()
    heartbeat.start()
    assert beats(study, ELSEWHERE) == 1
    watch = Watch(study, clock=time.monotonic)
    assert watch.alive(ELSEWHERE)
    heartbeat.stop()
    heartbeat.stop()
    assert beats(study, ELSEWHERE) is None
    assert not Watch(study).alive(ELSEWHERE)


def test_it_goes_on_beating(study):
    with Heartbeat(study, owner=ELSEWHERE, every_s=0.001):
        until(lambda: beats(study, ELSEWHERE) >= 5)
    with Heartbeat(study, every_s=0.001, sleep=time.sleep):
        until(lambda: beats(study, this_process()) >= 3)


@pytest.mark.parametrize("error", [RunError("gone"), OSError("gone"), optuna.exceptions.StorageInternalError("gone")])
def test_it_survives_what_a_storage_raises_and_counts_only_what_was_written(study, monkeypatch, error):
    heartbeat = Heartbeat(study, owner=ELSEWHERE, every_s=0.001)
    heartbeat.start()
    tries = []

    def broken(key, value):
        tries.append(value)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(study, "set_user_attr", broken)
        until(lambda: len(tries) >= 5)
    assert len(set(tries)) == 1
    before = beats(study, ELSEWHERE)
    until(lambda: beats(study, ELSEWHERE) > before)
    heartbeat.stop()


def test_a_first_beat_that_fails_is_told(study, monkeypatch):
    def gone(key, value):
        raise RunError("the database did not answer")

    monkeypatch.setattr(study, "set_user_attr", gone)
    with pytest.raises(RunError, match="did not answer"):
        Heartbeat(study).start()


def test_stopping_does_not_wait_for_a_storage_that_is_gone(study, monkeypatch):
    heartbeat = Heartbeat(study, owner=ELSEWHERE, every_s=0.001)
    heartbeat.start()
    monkeypatch.setattr(study, "set_user_attr", lambda key, value: time.sleep(5))
    time.sleep(0.05)
    start = time.monotonic()
    heartbeat.stop(patience_s=0.1)
    assert time.monotonic() - start < 2
