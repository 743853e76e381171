"""What is made once is never seen half made, is made by one process, and is found again."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from plm import cache
from plm.errors import UserError


def test_what_is_there_is_not_made_again_and_what_was_left_half_made_is_no_obstacle(tmp_path):
    for path, leftover in ((tmp_path / "a.json", ".a.tmp.json"), (tmp_path / "folder", ".folder.tmp")):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("left by a killed process")

        def make(temporary: Path) -> None:
            assert not temporary.exists()
            if temporary.suffix == ".json":
                temporary.write_text("whole")
            else:
                temporary.mkdir()

        assert cache.once(path, make) == path
        assert path.exists()
        assert not (tmp_path / leftover).exists()
        cache.once(path, lambda temporary: pytest.fail("made again"))


def test_a_failure_leaves_nothing_that_counts_as_made(tmp_path):
    def make(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.once(tmp_path / "a", make)
    assert not (tmp_path / "a").exists()
    assert cache.once(tmp_path / "a", lambda temporary: temporary.write_text("whole")).read_text() == "whole"


def _make_slowly(path: Path, made: Path) -> None:
    def make(temporary: Path) -> None:
        (made / str(os.getpid())).touch()
        time.sleep(0.5)
        temporary.write_text("whole")

    assert cache.once(path, make).read_text() == "whole"


def test_processes_that_begin_together_make_it_once(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make_slowly, args=(tmp_path / "a", made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(made.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, number):
    def make(temporary: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=rf"the cache cannot be written \(.*{os.strerror(number)}.*set PLM_CACHE"):
        cache.once(tmp_path / "a", make)

    def fail(temporary: Path) -> None:
        raise FileNotFoundError("a bug of ours")

    with pytest.raises(FileNotFoundError):
        cache.once(tmp_path / "b", fail)


def test_a_cache_that_cannot_be_entered_is_one_line(tmp_path, monkeypatch):
    def refused(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(UserError, match=r"the cache cannot be written \(.*Permission denied.*set PLM_CACHE"):
        cache.once(tmp_path / "a", lambda temporary: None)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be locked \(.*a file system with locks is needed; PLM_CACHE"):
        cache.once(tmp_path / "a", lambda temporary: None)


def test_a_folder_that_another_host_has_finished_first_is_taken(tmp_path):
    def make(temporary: Path) -> None:
        for folder, text in ((temporary, "ours"), (tmp_path / "folder", "theirs")):
            folder.mkdir()
            (folder / "a").write_text(text)

    assert (cache.once(tmp_path / "folder", make) / "a").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.lock"]


def test_facts_are_remembered_by_their_whole_key_and_only_cost_time_where_they_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "cache"))
    assert cache.remembered(["a", 1], lambda: {"n": 3}) == {"n": 3}
    assert cache.remembered(["a", 1], lambda: pytest.fail("looked again")) == {"n": 3}
    assert cache.remembered(["a", 2], lambda: "other") == "other"
    (kept,) = [path for path in (tmp_path / "cache" / "scans").iterdir() if "other" in path.read_text()]
    kept.write_text('{"key": ["a", 2]')
    assert cache.remembered(["a", 2], lambda: "once more") == "once more"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "file"))
    found = iter((1, 2))
    assert [cache.remembered(["a"], lambda: next(found)) for _ in range(2)] == [1, 2]
