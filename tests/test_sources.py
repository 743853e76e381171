"""Every corpus format gives the documents it should, whole, once, in bounded pieces; bad input gives one clear line."""

import codecs
import gzip
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from plm.data import corpora, pydocs, tensorflow_datasets, text_files
from plm.data.sources import Document, Source, parse, split_of
from plm.errors import UserError

HERE = Path(__file__).resolve().parent


def corpus(seed=0, documents=60):
    """Random documents as lists of lines, with accents and words of very different lengths."""
    draw = random.Random(seed)
    words = ["a", "the", "café", "naïveté", "東京", "word", "x" * 30]
    return [
        [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 9))]
        for _ in range(documents)
    ]


def as_text(documents, draw):
    """Blank lines (several, some with blanks, some line breaks of Windows) between the documents."""
    gaps = ["\n", "\n\n", "\n \t\n", "\r\n\r\n"]
    return draw.choice(["", "\n\n", "\ufeff"]) + "".join("\n".join(d) + "\n" + draw.choice(gaps) for d in documents)


def write(path, data):
    data = data.encode() if isinstance(data, str) else data
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def sentences(source):
    return [list(document.sentences) for document in source.documents()]


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".xz"])
@pytest.mark.parametrize("shard_bytes", [7, 40, 333, 1 << 20])
def test_shards_hold_every_document_once_in_order(tmp_path, monkeypatch, suffix, shard_bytes):
    monkeypatch.setattr(corpora, "SHARD_BYTES", shard_bytes)
    for seed in range(5):
        documents = corpus(seed, 25)
        path = write(tmp_path / f"{seed}{suffix}", as_text(documents, random.Random(seed)))
        source = parse(f"text:{path}")
        shards = pickle.loads(pickle.dumps(source.shards()))
        assert [list(d.sentences) for shard in shards for d in shard.documents()] == documents
        most = text_files.COMPRESSED_SHARDS if suffix != ".txt" else 10**9
        assert shard_bytes > 1000 or min(most, 10) <= len(shards) <= most
        records = "".join(json.dumps({"t": "\n".join(d)}, ensure_ascii=False) + "\n" for d in documents)
        path = write(tmp_path / f"{seed}.jsonl{suffix if suffix != '.txt' else ''}", records)
        assert sentences(parse(f"jsonl:{path}#t")) == documents


def test_small_files_share_a_shard_and_several_globs_are_one_source(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        write(tmp_path / name, f"of {name}")
    for spec in (f"text:{tmp_path}/*.txt+{tmp_path}/*.md", f"text:{tmp_path}/*.txt+text:{tmp_path}/*.md"):
        assert sentences(parse(spec)) == [["of a.txt"], ["of b.txt"], ["of c.md"]]
    assert len(parse(f"text:{tmp_path}/*.txt").shards()) == 1
    plus = write(tmp_path / "c++.txt", "with a plus")
    assert sentences(parse(f"text:{plus}")) == [["with a plus"]]


@pytest.mark.parametrize("invalid_utf8", ["error", "replace"])
def test_huge_documents_and_lines_come_in_bounded_parts_and_lose_nothing(tmp_path, monkeypatch, invalid_utf8):
    monkeypatch.setattr(corpora, "PART_BYTES", 500)
    monkeypatch.setattr(text_files, "LINE_BYTES", 100)
    monkeypatch.setattr(corpora, "SHARD_BYTES", 64)
    line = "é東 " * 700 + "ü" * 700  # pieces end at spaces, and between characters where there is none
    path = write(tmp_path / "huge.txt", f"first\n\n{line}\nlast line\n\nsecond\n")
    found = list(parse(f"text:{path}", invalid_utf8=invalid_utf8).documents())
    assert found[0].sentences == ("first",)
    assert found[-1].sentences == ("second",)
    assert len({document.name for document in found}) == len(found) > 5
    pieces = [sentence for document in found[1:-1] for sentence in document.sentences]
    assert max(len(piece.encode()) for piece in pieces) <= 100
    assert max(sum(len(s.encode()) for s in document.sentences) for document in found) <= 700
    assert "".join(pieces).replace(" ", "") == (line + "lastline").replace(" ", "")
    record = write(tmp_path / "huge.jsonl", json.dumps({"t": [line] * 3}) + "\n")
    parts = list(parse(f"jsonl:{record}#t").documents())
    assert len(parts) > 2
    assert "".join("".join(d.sentences) for d in parts).replace(" ", "") == (line * 3).replace(" ", "")


def test_running_text_is_split_into_sentences(tmp_path):
    path = write(tmp_path / "a.txt", "Mr. Smith went\nhome. He said\n(see fig. 3) no.\n\nA new document! Is it?\n")
    assert sentences(parse(f"text:{path}#split")) == [
        ["Mr. Smith went home.", "He said (see fig. 3) no."],
        ["A new document!", "Is it?"],
    ]


def test_an_unclosed_quotation_mark_does_not_swallow_the_text():
    text = 'He said "this is never closed. ' + "One sentence of words. " * 2000
    found = corpora.split_sentences(text)
    assert max(map(len, found)) <= corpora.WINDOW
    assert len(found) > 1800
    assert " ".join(found) == text.strip()


@pytest.mark.parametrize("space", ["\u00a0", "\u2009", "\u202f", "\u2028", "\u3000", "\x85", " \u00a0", "\u00a0\u3000"])
def test_any_space_may_stand_between_a_lone_capital_and_a_full_stop(tmp_path, space):
    text = f"We saw C{space}. elegans there. It moved, and A.B{space}.{space}. stayed."
    assert "".join(corpora._segment(text)) == text
    first, *rest = corpora.split_sentences(text)
    assert first == f"We saw C{space}. elegans there."
    assert "".join("".join([first, *rest]).split()) == "".join(text.split())
    split_before = f"C.{space}.{space}. The end."  # what sentencex can split is as it was
    assert corpora._segment(split_before) == corpora.sentencex.segment("en", split_before)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), "utf-8")
    assert sentences(parse(f"jsonl:{tmp_path}/a.jsonl#text")) == [[first, *rest]]


def test_json_fields(tmp_path):
    record = {
        "text": "One. Two.\nThree",
        "parts": ["P one. P two.", "Q."],
        "a": {"b": "deep"},
        "a.b": "flat",
        "no": None,
    }
    path = write(tmp_path / "x.jsonl", json.dumps(record) + "\n\n" + json.dumps({**record, "parts": []}) + "\n")
    assert sentences(parse(f"jsonl:{path}#text")) == [["One.", "Two.", "Three"]] * 2
    assert sentences(parse(f"jsonl:{path}#parts")) == [["P one.", "P two.", "Q."]]
    assert sentences(parse(f"jsonl:{path}#a.b")) == [["flat"]] * 2
    assert sentences(parse(f"jsonl:{path}#no")) == []
    nested = write(tmp_path / "y.jsonl", '{"a": {"b": {"c": "deep"}}}')
    assert sentences(parse(f"jsonl:{nested}#a.b.c")) == [["deep"]]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"t": "broken', "t", "x.jsonl, line 4: not valid JSON"),
        ('{"u": "x"}', "t", "x.jsonl, line 4: no field 't' (there: 'u')"),
        ('{"t": {"u": "x"}}', "t.v", "x.jsonl, line 4: no field 't.v' (there: 'u')"),
        ('{"t": 3}', "t", "line 4: field 't' holds int"),
        ('{"t": [["x"]]}', "t", "line 4: field 't' holds list"),
        ('["t"]', "t", "line 4: no field 't' (there: list)"),
        ('{"t": "\\ud800"}', "t", "line 4: field 't' holds half a surrogate pair"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, monkeypatch, line, field, message):
    monkeypatch.setattr(corpora, "SHARD_BYTES", 16)
    good = '{"t": {"v": "x"}}' if "." in field else '{"t": "good text"}'
    write(tmp_path / "x.jsonl", f"{good}\n\n{good}\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        sentences(parse(f"jsonl:{tmp_path}/x.jsonl#{field}"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_invalid_utf8_is_named_by_offset_or_replaced_and_counted(tmp_path, suffix):
    # 70,001 bytes of text first, so that the offset is not that of a block; \xe9 alone is Latin-1.
    data = "é".encode() * 35_000 + b"\n" + b"caf\xe9 au lait \xff\xfe\n" + "東".encode()[:2]
    path = write(tmp_path / f"a{suffix}", data)
    with pytest.raises(UserError, match=r"invalid UTF-8 at byte 70004;.*invalid_utf8=replace"):
        sentences(parse(f"text:{path}"))
    source = parse(f"text:{path}", invalid_utf8="replace")
    assert sentences(source)[0][-2:] == ["caf\ufffd au lait \ufffd\ufffd", "\ufffd"]
    assert source.replaced == 4
    assert (parse(f"text:{path}+2*text:{path}", invalid_utf8="replace")).replaced == 8


def test_invalid_bytes_are_counted_in_one_pass(tmp_path, monkeypatch):
    """A file that is no text, as a user may name one, takes no longer than text."""
    decode, calls = codecs.utf_8_decode, []
    monkeypatch.setattr(codecs, "utf_8_decode", lambda *given: calls.append(given) or decode(*given))
    # Sequences over the borders of blocks of 65,536 bytes, a U+FFFD that the text has, a byte before one.
    parts = [b"ok \xff" * 20_000, "\ufffd東".encode() * 30_000, b"\xe1" + "\ufffd".encode(), b"\xf0\x9f", b"a" * 70_000]
    data = b"".join(parts) + b"\xe6\x9d"
    found = text_files._scan(str(write(tmp_path / "a.txt", data)))
    text = data.decode("utf-8", "replace")
    assert (found.invalid, found.first_invalid) == (20_000 + 1 + 1 + 1, 3)
    assert found.invalid == text.count("\ufffd") - data.count("\ufffd".encode())
    assert len(calls) <= 2 * (len(data) // 65_536 + 2)


def test_files_that_hold_no_text_are_only_digested(tmp_path, monkeypatch):
    path = str(write(tmp_path / "a.array_record", bytes(range(256)) * 300))
    wanted = text_files._scan(path).digest
    monkeypatch.setattr(text_files, "_scan", lambda path: pytest.fail("read as text"))
    source = object.__new__(tensorflow_datasets.TensorFlowDataset)
    source.split, source.field, source.info = "train", "text", types.SimpleNamespace(filepaths=[path])
    assert source.fingerprint == corpora.fingerprint_of("tfds", "train", "text", corpora.splitter(), wanted)
    monkeypatch.setattr(text_files, "_digest_of", lambda path: pytest.fail("read again"))
    assert text_files.digest(path) == wanted


def test_a_mixture_repeats_whole_passes_and_takes_fixed_subsets(tmp_path):
    a = write(tmp_path / "a.txt", "\n\n".join(f"a {i}" for i in range(20)))
    b = write(tmp_path / "b.txt", "\n\n".join(f"b {i}" for i in range(1000)))

    def counts(spec):
        found = {}
        for document in parse(spec).documents():
            found[document.sentences] = found.get(document.sentences, 0) + 1
        return found

    mixed = counts(f"2*text:{a}+0.3*text:{b}")
    assert [mixed[f"a {i}",] for i in range(20)] == [2] * 20
    part = {key for key in mixed if key[0].startswith("b")}
    assert 240 < len(part) < 360
    more = counts(f"1.6*text:{b}")
    assert {key for key, n in more.items() if n == 2} > part
    assert len(more) == 1000
    specs = [f"2*text:{a}+0.3*text:{b}", f"2*text:{a}+0.4*text:{b}", f"text:{a}+0.3*text:{b}"]
    assert len({parse(spec).fingerprint for spec in specs}) == 3


def test_fingerprints_depend_on_content_and_reading_only(tmp_path):
    (tmp_path / "other").mkdir()
    text = "One. Two.\n\nThree.\n"
    paths = [write(tmp_path / "a.txt", text), write(tmp_path / "other/b.gz", text), write(tmp_path / "c.xz", text)]
    assert len({parse(f"text:{path}").fingerprint for path in paths}) == 1
    before = parse(f"text:{paths[0]}").fingerprint
    assert parse(f"text:{paths[0]}#split").fingerprint != before
    write(paths[0], "One. Two.\n\nThreE.\n")
    os.utime(paths[0], ns=(1, 1))  # same size; the remembered digest must not be used for another time of change
    assert parse(f"text:{paths[0]}").fingerprint != before
    script = f"from plm.data.sources import parse; print(parse('text:{paths[1]}').fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PLM_CACHE": str(tmp_path / "empty cache")}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == before


def test_a_file_that_changed_behind_its_old_time_is_read_again(tmp_path):
    path = write(tmp_path / "a.txt", "One.")
    before, times = parse(f"text:{path}").fingerprint, path.stat()
    write(path, "Two.")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert parse(f"text:{path}").fingerprint != before


def test_a_name_that_is_no_utf8_is_a_name(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        Path(os.fsdecode(path)).write_text("One.")
    except OSError:
        pytest.skip("this file system takes no such name")
    source = parse(f"text:{tmp_path}/*.txt")
    assert sentences(source) == [["One."]]
    assert source.fingerprint == parse(f"text:{write(tmp_path / 'plain.txt', 'One.')}").fingerprint


def test_documents_are_held_out_by_their_text():
    documents = [Document(f"name {i}", (f"sentence {i}", "end")) for i in range(4000)]
    held_out = {d.sentences for d in documents if split_of(d, 0.05) == "valid"}
    assert 140 < len(held_out) < 260
    assert held_out < {d.sentences for d in documents if split_of(d, 0.1) == "valid"}
    assert all(split_of(Document("copy", d.sentences), 0.05) == split_of(d, 0.05) for d in documents[:50])
    assert {split_of(d, 0.0) for d in documents} == {"train"}


def test_tensorflow_datasets_without_tensorflow(tmp_path):
    # A package named tensorflow that can be imported: any import of it would show in sys.modules.
    (tmp_path / "fake" / "tensorflow").mkdir(parents=True)
    (tmp_path / "fake" / "tensorflow" / "__init__.py").write_text("")
    script = f"""
        import json, pickle, sys
        sys.path.insert(0, {str(HERE)!r})
        from tiny_corpus.tiny_corpus import Builder
        builder = Builder(data_dir={str(tmp_path)!r}, file_format="array_record")
        builder.download_and_prepare()
        from plm.data import corpora, sources
        corpora.SHARD_BYTES = builder.info.splits["train"].num_bytes // 3
        from plm.errors import UserError
        where = str(builder.data_dir)
        read = {{}}
        for spec in (f"tfds:{{where}}#text", f"tfds:{{where}}:train[:40%]#body.parts", "tfds:tiny_corpus:1.0.0#text",
                     f"tfds:{{where}}#nope", f"tfds:{{where}}:test#text", f"tfds:{{where}}#label"):
            try:
                source = sources.parse(spec)
                shards = pickle.loads(pickle.dumps(source.shards()))
                documents = [d.sentences for shard in shards for d in shard.documents()]
                read[spec.replace(where, "DIR")] = [len(shards), source.licence, source.fingerprint, documents]
            except UserError as error:
                read[spec.replace(where, "DIR")] = str(error)
        print(json.dumps([read, "tensorflow" in sys.modules]))
    """
    path = os.pathsep.join([str(HERE.parent), str(tmp_path / "fake")])
    environment = {**os.environ, "PYTHONPATH": path, "TFDS_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read, imported = json.loads(done.stdout.splitlines()[-1])
    assert not imported
    shards, licence, fingerprint, documents = read["tfds:DIR#text"]
    assert documents == [[f"Document {i} says café.", "It is short."] for i in range(10)]
    assert "CC0-1.0" in licence
    assert 3 <= shards <= 4
    assert read["tfds:tiny_corpus:1.0.0#text"][2:] == [fingerprint, documents]
    parts = read["tfds:DIR:train[:40%]#body.parts"][3]
    assert parts == [[f"Part {i}.", "The next part.", "It goes on."] for i in range(4)]
    assert "no field 'nope' (there: 'body', 'label', 'text')" in read["tfds:DIR#nope"]
    assert "there are: train" in read["tfds:DIR:test#text"]
    assert "field 'label' holds int" in read["tfds:DIR#label"]


class Shouting(corpora.Shard):
    bytes = 10

    def documents(self):
        yield Document("one", ("A SENTENCE",))


class Outside(Source):
    spec = "outside"
    fingerprint = "of its own"

    def shards(self):
        return [Shouting()]


def outside():
    return Outside()


def wrong():
    return 3


def test_a_source_from_outside_the_package():
    assert sentences(parse(f"{__name__}:outside")) == [["A SENTENCE"]]
    assert sentences(parse(f"2*{__name__}:outside")) == [["A SENTENCE"]] * 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty; right would be pydocs"),
        ("pydoc", "'pydoc' is not understood; right would be pydocs"),
        ("txt:a", "no module 'txt'; right would be pydocs"),
        ("text:DIR/none-*.txt", "no file matches 'DIR/none-*.txt'"),
        ("text:DIR", "'DIR' is a directory; DIR/*.txt would be right"),
        ("text:DIR/a.tar.xz", "a.tar.xz cannot be read; plain, .gz or .xz text would be right"),
        ("text:DIR/blank.txt", "is empty: no text in 1 file(s)"),
        ("text:DIR/bad.gz", "bad.gz: cannot be decompressed"),
        ("text:DIR/cut.xz", "cut.xz: cannot be decompressed"),
        ("jsonl:DIR/a.txt", "names no field; jsonl:GLOB#field would be right"),
        ("0*text:DIR/a.txt", "weight 0 of 'text:DIR/a.txt' must be above 0"),
        ("tfds:DIR#text", "is no prepared dataset of TFDS"),
        ("tfds:no_such_dataset#text", "TFDS knows no dataset 'no_such_dataset'"),
        ("tfds:lm1b", "names no field"),
        (f"{__name__}:missing", "has no 'missing'"),
        (f"{__name__}:wrong", "returned int; a plm.data.sources.Source is right"),
    ],
)
def test_bad_specs_give_one_line(tmp_path, spec, message):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "blank.txt", " \n\n \n")
    (tmp_path / "a.tar.xz").write_bytes(b"x")
    (tmp_path / "bad.gz").write_bytes(b"not gzip")
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"text " * 1000)[:-20])
    with pytest.raises(UserError) as error:
        parse(spec.replace("DIR", str(tmp_path))).shards()
    assert message.replace("DIR", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


MARKUP = """
Assignment
**********

This is :class:`the text <of.a.Class>` that *should* stay, with ``code`` and `a link`_ inside,
broken into two lines. (It is also :ref:`~kept`.)

   assignment_stmt ::= (target_list "=")+ (starred_expression | yield_expression)

* A bullet is a sentence too.
* And so is the second one,
  which goes on.

Example of a thing::

   This literal block looks like prose but is not kept.

   Nor is its second paragraph kept here.

After the block we are back.

>>> This.is(a, doctest)
The output of the doctest.

======  =====
This is a table row
======  =====

.. code-block:: python

   This is some code in a block.

.. note:: A note is kept as prose.

:param spam: how many eggs there are.

  -v, --verbose   say more about it
"""


def test_python_documentation_is_cleaned_to_prose():
    assert pydocs.prose(MARKUP) == [
        "This is the text that should stay, with code and a link inside, broken into two lines.",
        "(It is also kept.)",
        "A bullet is a sentence too.",
        "And so is the second one, which goes on.",
        "Example of a thing:",
        "After the block we are back.",
        "A note is kept as prose.",
        "how many eggs there are.",
    ]


def test_another_sentence_splitter_reads_python_documentation_anew(monkeypatch):
    def fingerprint() -> str:
        source = pydocs.PythonDocumentation()
        source.files = [("json", json.__file__)]
        return source.fingerprint

    before = fingerprint()
    monkeypatch.setattr(pydocs, "splitter", lambda: "another one")
    assert fingerprint() == before, "it is of the sentences"
    monkeypatch.setattr(pydocs, "splitter", lambda: "a third")
    monkeypatch.setattr(pydocs, "split_sentences", lambda text: [text])
    assert fingerprint() != before


def test_python_documentation_is_read_without_importing_it():
    source = parse("pydocs")
    assert "this" in dict(source.files)
    assert "antigravity" in dict(source.files)
    first, *_, last = source.shards()
    documents = [*first.documents(), *last.documents()]
    assert documents[0].name.startswith("pydocs:topics.")
    assert sum(document.name.startswith("pydocs:topics.") for document in documents) > 50
    text = [sentence for document in documents for sentence in document.sentences]
    assert sum(map(len, text)) > 250_000
    assert not [s for s in text if s.startswith(">>>") or "::=" in s or ":func:`" in s or "\n" in s]
    assert "antigravity" not in sys.modules


@pytest.mark.real_data
def test_published_counts_of_real_corpora(real_data):
    folder = real_data / "pretrain" / "wiki_squad"
    found = sentences(parse(f"text:{folder}/train.sents.txt.xz"))
    assert (len(found), sum(map(len, found))) == (442, 91_409)
    assert len(sentences(parse(f"jsonl:{folder}/valid.jsonl.xz#paragraphs"))) == 48
