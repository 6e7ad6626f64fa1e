"""The translation memory: nothing is lost, nothing is written by two, and what was made differently is apart."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import captions.memory
from captions.memory import MERGED, TranslationMemory, main, merge
from common.files import no_space_left

ROOT = Path(__file__).resolve().parent.parent
MARIAN = {"backend": "transformers", "model": "marian", "target": "por"}
GOOGLE = {"backend": "google", "target": "pt"}


def test_what_was_added_is_found_in_the_next_run(tmp_path):
    with TranslationMemory(tmp_path / "new", 0, 1, MARIAN) as memory:
        assert memory.find(["a cat"]) == {}
        memory.add({"a cat": "um gato", "quotes \"' and \0 \t\n": "ção 🦫", "x" * 10_000: ""})
    with TranslationMemory(tmp_path / "new", 0, 1, MARIAN) as memory:
        known = memory.find(["a cat", "a dog", "quotes \"' and \0 \t\n", "x" * 10_000, "a cat"])
        assert known == {"a cat": "um gato", "quotes \"' and \0 \t\n": "ção 🦫", "x" * 10_000: ""}


def test_more_sentences_than_a_query_takes(tmp_path):
    many = {f"sentence {i}": f"frase {i}" for i in range(1703)}
    with TranslationMemory(tmp_path, 0, 1, MARIAN) as memory:
        memory.add(many)
        assert memory.find([*many, "unknown"]) == many


def test_translators_languages_and_settings_are_apart(tmp_path):
    with TranslationMemory(tmp_path, 0, 1, MARIAN) as memory:
        memory.add({"a cat": "um gato"})
    for other in (GOOGLE, MARIAN | {"target": "spa"}, MARIAN | {"beams": 4}):
        with TranslationMemory(tmp_path, 0, 1, other) as memory:
            assert memory.find(["a cat"]) == {}
    with TranslationMemory(tmp_path, 0, 1, dict(reversed(MARIAN.items()))) as memory:
        assert memory.find(["a cat"]) == {"a cat": "um gato"}, "the order of the settings means nothing"


def test_a_shard_reads_what_the_others_write(tmp_path, monkeypatch):
    with TranslationMemory(tmp_path, 0, 2, MARIAN) as first:
        assert first.find(["a dog"]) == {}
        with TranslationMemory(tmp_path, 1, 2, MARIAN) as second:
            assert second.find(["a cat"]) == {}
            first.add({"a cat": "um gato"})
            second.add({"a dog": "um cão"})
            assert second.find(["a cat", "a dog"]) == {"a cat": "um gato", "a dog": "um cão"}
            assert first.find(["a dog"]) == {}, "its file appeared after the others were listed"
            monkeypatch.setattr(captions.memory, "LISTED_EVERY_S", 0)
            assert first.find(["a dog"]) == {"a dog": "um cão"}


def test_a_second_writer_is_refused_by_name(tmp_path):
    with TranslationMemory(tmp_path, 1, 4, MARIAN):
        with pytest.raises(ValueError, match=rf"1-of-4.sqlite is being written by process {os.getpid()} on "):
            TranslationMemory(tmp_path, 1, 4, GOOGLE)
        TranslationMemory(tmp_path, 2, 4, MARIAN).__exit__()
    TranslationMemory(tmp_path, 1, 4, MARIAN).__exit__()


def test_a_killed_writer_leaves_whole_batches_and_no_lock(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from captions.memory import TranslationMemory
memory = TranslationMemory(Path(sys.argv[1]), 0, 2, {MARIAN})
memory.add({{"a cat": "um gato", "a dog": "um cão"}})
memory._own.execute("PRAGMA cache_size = 1")  # so that the next transaction is on the disk before its end
memory._own.executemany(
    "INSERT INTO translations VALUES (?, ?, ?)",
    [(memory.translator, "half " + str(i) * 900, "metade") for i in range(300)],
)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "0-of-2.sqlite-journal").stat().st_size > 0, "nothing was half-written"
    with TranslationMemory(tmp_path, 1, 2, MARIAN) as other:  # which may not undo what another shard's file has
        assert other.find(["a cat", "half " + "0" * 900]) in ({}, {"a cat": "um gato"})
    with TranslationMemory(tmp_path, 0, 2, MARIAN) as memory:
        assert memory.find(["a cat", "a dog", "half " + "0" * 900]) == {"a cat": "um gato", "a dog": "um cão"}


def test_a_damaged_file_of_another_shard_costs_only_its_translations(tmp_path, caplog):
    (tmp_path / "1-of-2.sqlite").write_bytes(b"no database at all" * 100)
    with TranslationMemory(tmp_path, 0, 2, MARIAN) as memory:
        memory.add({"a cat": "um gato"})
        for _ in range(3):
            assert memory.find(["a cat", "a dog"]) == {"a cat": "um gato"}
    assert caplog.text.count("can't be read now") == 1
    with pytest.raises(ValueError, match=r"1-of-2.sqlite is damaged, or no translation memory"):
        TranslationMemory(tmp_path, 1, 2, MARIAN)
    with pytest.raises(ValueError, match=r"1-of-2.sqlite is damaged"):
        merge(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.sqlite")) == ["0-of-2.sqlite", "1-of-2.sqlite"]


def test_a_full_disk(tmp_path):
    with TranslationMemory(tmp_path, 0, 1, MARIAN) as memory:
        memory.add({"a cat": "um gato"})
        (pages,) = memory._own.execute("PRAGMA page_count").fetchone()
        memory._own.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own way to be full
        with pytest.raises(OSError, match=r"No space left on the disk of .*0-of-1.sqlite") as caught:
            memory.add({f"sentence {i}": "frase " * 50 for i in range(500)})
        assert caught.value.errno == errno.ENOSPC and no_space_left(caught.value)
        assert memory.find(["a cat", "sentence 0"]) == {"a cat": "um gato"}


def test_merge(tmp_path, capsys):
    for index, entries in enumerate([{"a": "1", "b": "2"}, {"b": "other", "c": "3"}, {}]):
        with TranslationMemory(tmp_path, index, 3, MARIAN) as memory:
            memory.add(entries)
    with TranslationMemory(tmp_path, 0, 3, GOOGLE) as memory:
        memory.add({"a": "google"})
    merged = merge(tmp_path)
    assert (merged.files, merged.translations, merged.conflicts) == (3, 4, 1)
    for path in tmp_path.glob("*-of-*"):
        path.unlink()
    with TranslationMemory(tmp_path, 5, 9, MARIAN) as memory:
        assert memory.find("abcd") == {"a": "1", "b": "2", "c": "3"}
        memory.add({"b": "new", "d": "4"})
    main([str(tmp_path)])  # again: the merged file has the first word
    assert "5 translations of 2 files" in capsys.readouterr().out
    connection = sqlite3.connect(tmp_path / MERGED)
    assert dict(connection.execute("SELECT source, translation FROM translations WHERE source = 'b'")) == {"b": "2"}
    assert connection.execute("SELECT count(*) FROM translators").fetchone() == (2,)
    connection.close()
    assert not list(tmp_path.glob(".merged*"))


def test_merge_refuses_writers_and_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="holds no translation memory"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="merges the files of a folder"):
        main([])
    with TranslationMemory(tmp_path, 0, 2, MARIAN), pytest.raises(ValueError, match=r"0-of-2.sqlite is being written"):
        merge(tmp_path)
    assert not (tmp_path / MERGED).exists() and not list(tmp_path.glob(".merged*"))


def test_of_two_merges_at_once_the_later_one_waits(tmp_path, caplog):
    with TranslationMemory(tmp_path, 0, 2, MARIAN) as memory:
        memory.add({"a": "1"})
    other, ended = captions.memory._claim(tmp_path / MERGED), []

    def end():
        """As the other merge would, and somebody removes what nothing needs any longer."""
        (tmp_path / "0-of-2.sqlite").rename(tmp_path / MERGED)
        ended.append(True)
        os.close(other)

    threading.Timer(0.5, end).start()
    with caplog.at_level("INFO", "capivara"):
        assert merge(tmp_path).translations == 1 and ended
    assert f"merged.sqlite is being written by process {os.getpid()} on" in caplog.text


WRITES_AND_READS = f"""
import sys
from pathlib import Path
import captions.memory

captions.memory.LISTED_EVERY_S = 0
index = int(sys.argv[2])
with captions.memory.TranslationMemory(Path(sys.argv[1]), index, 3, {MARIAN}) as memory:
    for batch in range(20):
        memory.add({{f"{{index}} {{batch}} {{i}}": f"frase {{index}} {{batch}} {{i}}" for i in range(5)}})
        found = memory.find(f"{{other}} {{batch}} {{i}}" for other in range(3) for i in range(5))
        assert all(found[text] == f"frase {{text}}" for text in found)
        counts = [sum(text.startswith(f"{{other}} ") for text in found) for other in range(3)]
        assert counts[index] == 5 and set(counts) <= {{0, 5}}, "a batch is there as a whole, or not yet"
"""


def test_readers_and_writers_at_once(tmp_path):
    """Three processes, each writing its file and reading those of the others: all of it arrives, whole."""
    command = [sys.executable, "-c", WRITES_AND_READS, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(index)], cwd=ROOT) for index in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert merge(tmp_path).translations == 3 * 20 * 5
