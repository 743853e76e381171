"""Tasks: every published format is read whole and checked; the embedded ones do not leak; parts of data are fixed."""

import gzip
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from plm.analysis.overlap import overlaps
from plm.data import corpora, docstrings, pydocs, sources, tasks
from plm.data.examples import Answer, Example, fraction, halves
from plm.errors import UserError

HERE = Path(__file__).resolve().parent


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content.encode()))
    return folder


def squad_file(*questions, version="1.1"):
    """Each question: (id, context, text, [(answer, start), ...] or None for impossible)."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": name,
                    "question": text,
                    "answers": [{"text": answer, "answer_start": start} for answer, start in answers or ()],
                }
                | ({"is_impossible": answers is None} if version == "2.0" else {})
            ],
        }
        for name, context, text, answers in questions
    ]
    return {"version": version, "data": [{"title": "T", "paragraphs": paragraphs}]}


DREAM = [[["M: A?", "W: B."], [{"question": "Q?", "choice": ["x", "y", "z"], "answer": "y"}], "1-2"]]
SWAG_HEADER = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label\n"
CLOZE_HEADER = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
)
FORMATS = {
    # name: (task, files, {split: the first example}, as each field is expected)
    "GLUE, quotation marks mean nothing": (
        "sst2",
        {
            "train.tsv": 'sentence\tlabel\n"good film \t1\nbad\t0\n',
            "dev.tsv.gz": "sentence\tlabel\nfine\t1\n",
            "test.tsv": "index\tsentence\n0\tso so\n1\tnice\n",
        },
        {
            "train": Example("0", ('"good film ',), label=1),
            "dev": Example("0", ("fine",), label=1),
            "test": Example("0", ("so so",)),
        },
    ),
    "GLUE without a header, but for test": (
        "cola",
        {
            "train.tsv": "gj04\t1\t\tThey sang.\nks08\t0\t*\tThey song.\r\n",
            "test.tsv": "index\tsentence\n7\tIt is.\n",
        },
        {"test": Example("7", ("It is.",))},
    ),
    "MRPC with a byte order mark": (
        "mrpc",
        {
            "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\ta\tb\n0\t1\t2\tc\td\n",
            "dev.tsv": "",
        },
        {"train": Example("0", ("a", "b"), label=1)},
    ),
    "MNLI": (
        "mnli",
        {
            "train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n5\tp\th\tneutral\tcontradiction\n"
            "6\tp\tg\tneutral\tneutral\n",
            "dev_matched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tp\th\tentailment\n",
        },
        {"train": Example("5", ("p", "h"), label=2), "dev": Example("0", ("p", "h"), label=0)},
    ),
    "STS-B of GLUE": (
        "stsb",
        {"train.tsv": 'index\tsentence1\tsentence2\tscore\n3\ta "\tb\t4.75\n4\ta\tb\t0\n'},
        {},
    ),
    "STS-B as csv without a header": (
        "stsb",
        {"train.csv": "x,y,1.0\n", "dev.csv.xz": '"A, so",B,2.5\nC,D,5.0\n'},
        {"dev": Example("0", ("A, so", "B"), label=2.5)},
    ),
    "SNLI, pairs without a majority left out": (
        "snli",
        {
            "snli_1.0_dev.jsonl": "\n".join(
                json.dumps({"gold_label": label, "sentence1": "p", "sentence2": "h", "pairID": f"{i}"})
                for i, label in enumerate(["-", "neutral", "entailment"])
            )
        },
        {"dev": Example("1", ("p", "h"), label=1)},
    ),
    "SNLI of GLUE, whose rows have the labels of all annotators": (
        "snli",
        {
            "train.tsv": "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\ta\tp\th\tneutral\tneutral\tcontradiction\tneutral\tcontradiction\tcontradiction\n"
            "1\tb\tp\tg\tneutral\tentailment\n",
            "dev.tsv": "sentence1\tsentence2\tgold_label\np\th\tneutral\n",
        },
        {"train": Example("a", ("p", "h"), label=2), "dev": Example("0", ("p", "h"), label=1)},
    ),
    "DREAM": (
        "dream",
        {"dev.json.xz": DREAM},
        {"dev": Example("1-2/0", ("M: A?\nW: B.", "Q?"), choices=("x", "y", "z"), label=1)},
    ),
    "SWAG": (
        "swag",
        {"val.csv": SWAG_HEADER + '0,v,1,He sat. She,"He ""sat"".",She,gold,a,b,c,d,2\n'},
        {"dev": Example("0", ('He "sat".',), choices=("She a", "She b", "She c", "She d"), label=2)},
    ),
    "Story Cloze": (
        "storycloze",
        {"cloze_test_test__spring2016 - cloze_test_ALL_test.csv": CLOZE_HEADER + "i,One.,Two.,Three.,Four.,yes,no,2\n"},
        {"test": Example("i", ("One. Two. Three. Four.",), choices=("yes", "no"), label=1)},
    ),
    "RACE": (
        "race_high",
        {
            "dev/high/7.txt": {
                "id": "high7.txt",
                "article": "A.",
                "questions": ["_ ?", "Why?"],
                "options": [["a", "b", "c", "d"]] * 2,
                "answers": ["C", "A"],
            }
        },
        {"dev": Example("high7.txt/0", ("A.", "_ ?"), choices=("a", "b", "c", "d"), label=2)},
    ),
    "CoNLL-U, multi-word tokens and empty nodes left out": (
        "ud_ewt",
        {
            "en_ewt-ud-dev.conllu": "# sent_id = s1\n# text = I don't .\n"
            "1\tI\tI\tPRON\t_\t_\t0\t_\t_\t_\n2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n2\tdo\t_\tAUX\t_\t_\t0\t_\t_\t_\n"
            "2.1\tx\t_\tVERB\t_\t_\t_\t_\t_\t_\n3\tn't\t_\tPART\t_\t_\t0\t_\t_\t_\n\n"
        },
        {"dev": Example("0", words=("I", "do", "n't"), label=(10, 3, 9))},
    ),
    "CoNLL columns, blank lines with blanks": (
        "wnut17",
        {"dev.conll": "In\tO\nNew\tB-location\nYork\tI-location\n\t\n\n:\tO\n", "test.conll": "a O\nb B-person\n"},
        {
            "dev": Example("0", words=("In", "New", "York"), label=(0, 7, 8)),
            "test": Example("0", words=("a", "b"), label=(0, 9)),
        },
    ),
    "CoNLL-2003": (
        "conll2003",
        {"eng.testa": "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nsaid VBD I-VP O\n"},
        {"dev": Example("0", words=("EU", "said"), label=(4, 0))},
    ),
    "SQuAD 1.1": (
        "squad",
        {"dev-v1.1.json": squad_file(("q", "Anna saw Bob.", "Who?", [("Anna", 0), ("Bob", 9)]))},
        {"dev": Example("q", ("Who?", "Anna saw Bob."), answers=(Answer("Anna", 0), Answer("Bob", 9)))},
    ),
    "SQuAD 2.0": (
        "squad_v2",
        {"dev-v2.0.json": squad_file(("q", "Anna.", "Who?", None), ("r", "Bob.", "W?", [("Bob", 0)]), version="2.0")},
        {"dev": Example("q", ("Who?", "Anna."))},
    ),
    "WiC": (
        "wic",
        {
            "dev/dev.data.txt": "board\tN\t2-1\tRoom and board .\tHe boards .\nx\tN\t0-0\tx .\tx !\n",
            "dev/dev.gold.txt": "T\nF\n",
            "test/test.data.txt": "x\tN\t0-0\tx .\tx !\n",
        },
        {
            "dev": Example("0", ("Room and board .", "He boards ."), spans=((9, 14), (3, 9)), label=1),
            "test": Example("0", ("x .", "x !"), spans=((0, 1), (0, 1))),
        },
    ),
    "WiC of SuperGLUE": (
        "wic",
        {
            "val.jsonl": json.dumps(
                {
                    "idx": 3,
                    "sentence1": "a b",
                    "sentence2": "b",
                    "start1": 2,
                    "end1": 3,
                    "start2": 0,
                    "end2": 1,
                    "label": True,
                }
            )
        },
        {"dev": Example("3", ("a b", "b"), spans=((2, 3), (0, 1)), label=1)},
    ),
    "MCL-WiC": (
        "mclwic",
        {
            "dev.en-en.data.json": [
                {
                    "id": "d",
                    "sentence1": "a b",
                    "sentence2": "b",
                    "start1": "2",
                    "end1": "3",
                    "start2": "0",
                    "end2": "1",
                }
            ],
            "dev.en-en.gold.json": [{"id": "d", "tag": "F"}],
        },
        {"dev": Example("d", ("a b", "b"), spans=((2, 3), (0, 1)), label=0)},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats(tmp_path, name):
    task, files, expected = FORMATS[name]
    data = tasks.load(task, files=str(write(tmp_path, files)))
    for split, example in expected.items():
        assert data.examples(split)[0] == example
        assert str(tmp_path) in data.examples(split)[0].where


def test_damaged_rows_of_qqp_are_left_out_and_counted(tmp_path, capsys):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = "7\t1\t2\tWhy?\tHow?\t0\n8\t1\t2\n9\t1\t2\tWhy?\t \t0\n10\t1\t2\tWhy?\tWhy so?\n11\t1\t2\tWho?\tWhom?\t1\n"
    write(tmp_path, {"train.tsv": header + rows, "dev.tsv": header + "1\t1\t2\ta\tb\t1\n"})
    data = tasks.load("qqp", files=str(tmp_path))
    assert data.examples("train") == (
        Example("7", ("Why?", "How?"), label=0),
        Example("11", ("Who?", "Whom?"), label=1),
    )
    data.examples("dev")
    assert data.damaged == {"train": 3, "dev": 0}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("task 'qqp': 3 of the rows of train left out")
    assert f"{tmp_path}/train.tsv, line 3" in line
    # A column that no row has, and rows that are too long, are still wrong.
    write(tmp_path, {"train.tsv": header.replace("question2", "q2") + rows})
    with pytest.raises(UserError, match="line 2: no column 'question2'"):
        tasks.load("qqp", files=str(tmp_path)).examples("train")
    write(tmp_path, {"train.tsv": header + "7\t1\t2\tWhy?\tHow?\t0\t0\n"})
    with pytest.raises(UserError, match="line 2: 7 columns, and line 1 has 6"):
        tasks.load("qqp", files=str(tmp_path)).examples("train")


def test_names_and_settings_alone_make_a_task(tmp_path):
    write(tmp_path, {"train.tsv": "s1\ts2\tgold\na\tb\tyes\nc\td\tno\n", "valid.tsv": "s1\ts2\tgold\ne\tf\tno\n"})
    data = tasks.load(
        f"custom,kind=pair,files={tmp_path}/{{split}}.tsv,text=s1+s2,label=gold,metrics=f1_macro,name=mine"
    )
    assert (data.name, data.splits, data.labels, data.task.metrics) == (
        "mine",
        ("train", "dev"),
        ("no", "yes"),
        ("f1_macro",),
    )
    assert data.examples("train") == (Example("0", ("a", "b"), label=1), Example("1", ("c", "d"), label=0))
    assert data.examples("dev")[0].where == f"{tmp_path}/valid.tsv, line 2"

    write(tmp_path, {"x.jsonl": "\n".join(json.dumps({"t": {"en": f"t{i}"}, "y": i % 2}) for i in range(30))})
    data = tasks.load(f"custom,files={tmp_path}/x.jsonl,text=t.en,label=y")
    assert data.labels == ("0", "1")
    assert [len(data.examples(split)) for split in data.splits] == [27, 3], "a tenth of train is dev"
    assert not {e.id for e in data.examples("dev")} & {e.id for e in data.examples("train")}

    write(tmp_path / "tags", {"train.conll": "a X\nb Y\n\nc X\n"})
    data = tasks.load(f"custom,kind=tagging,files=train={tmp_path}/tags/train.conll")
    assert data.labels == ("X", "Y")
    write(tmp_path / "choices", {"dev.jsonl": json.dumps({"c": "One", "o": ["x", "y"], "label": 1})})
    (example,) = tasks.load(f"custom,kind=choice,files={tmp_path}/choices,text=c,choices=o").examples("dev")
    assert example == Example("0", ("One",), choices=("x", "y"), label=1)
    write(tmp_path / "q", {"x.json": squad_file(("q", "Anna.", "Who?", [("Anna", 0)]))})
    (example,) = tasks.load(f"custom,kind=span,files=dev={tmp_path}/q/x.json").examples("dev")
    assert example.answers == (Answer("Anna", 0),)


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val"])
def test_dev_may_have_any_of_its_names(tmp_path, name):
    rows = "text\tlabel\na\tyes\nb\tno\n"
    write(tmp_path, {"train.tsv": rows, f"{name}.tsv": rows.replace("a\t", "of dev\t")})
    for files in (tmp_path, f"{tmp_path}/{{split}}.tsv"):
        data = tasks.load(f"custom,files={files},text=text")
        assert [len(data.examples(split)) for split in data.splits] == [2, 2]
        assert data.examples("dev")[0].texts == ("of dev",)


def test_equal_data_has_equal_fingerprints_wherever_it_lies(tmp_path):
    rows = "sentence\tlabel\na\t1\nb\t0\n"
    first = tasks.load("sst2", files=str(write(tmp_path / "a", {"train.tsv": rows, "dev.tsv": rows})))
    second = tasks.load("sst2", files=str(write(tmp_path / "b", {"train.tsv.xz": rows, "dev.tsv": rows})))
    other = tasks.load(
        "sst2", files=str(write(tmp_path / "c", {"train.tsv": rows, "dev.tsv": rows.replace("a\t", "c\t")}))
    )
    assert first.fingerprint == second.fingerprint != other.fingerprint


JSONL = "\n".join([json.dumps({"text": "t", "label": "a"})] * 730 + ['{"text": "t", "label": '])
BAD = {  # what is wrong: (task, files, split, message with {f} for the folder)
    "label not in the set": (
        "sst2",
        {"train.tsv": "sentence\tlabel\na\t1\nb\t2\n"},
        r"{f}/train.tsv, line 3: label '2' is none of '0', '1'",
    ),
    "column missing": (
        "sst2",
        {"train.tsv": "text\tlabel\na\t1\n"},
        r"{f}/train.tsv, line 2: no column 'sentence' \(there: 'text', 'label'\)",
    ),
    "label column missing": (
        "sst2",
        {"train.tsv": "sentence\ny\n"},
        r"line 2: no column 'label' \(there: 'sentence'\)",
    ),
    "all one class": (
        "sst2",
        {"train.tsv": "sentence\tlabel\n" + "a\t1\n" * 5},
        r"{f}/train.tsv: the label is '1' in all 5 examples",
    ),
    "unequal columns": (
        "sst2",
        {"train.tsv": "sentence\tlabel\na\t1\nb\n"},
        r"{f}/train.tsv, line 3: 1 column, and line 1 has 2",
    ),
    "unequal columns, csv": (
        "stsb",
        {"train.csv": 'a,"b\nc",1\nd,e\n'},
        r"{f}/train.csv, line 3: 2 columns, and line 1 has 3",
    ),
    "unclosed quotation": ("stsb", {"train.csv": 'a,b,1\nc,"d,2\n'}, r"{f}/train.csv, line 2: not valid CSV"),
    "broken JSON": (
        "custom,files={f}/train.jsonl,text=text,labels=a+b",
        {"train.jsonl": JSONL},
        r"{f}/train.jsonl, line 731: not valid JSON",
    ),
    "broken JSON file": ("squad", {"dev-v1.1.json": '{{"data":\n [}}'}, r"{f}/dev-v1.1.json, line 2: not valid JSON"),
    "score outside": ("stsb", {"train.csv": "a,b,5.5\n"}, r"line 1: score '5.5' is no number from 0 to 5"),
    "no score": ("stsb", {"train.csv": "a,b,1\na,c,x\n"}, r"line 2: score 'x' is no number"),
    "empty text": ("sst2", {"train.tsv": "sentence\tlabel\n \t1\n"}, r"line 2: column 'sentence' is empty"),
    "no rows": ("sst2", {"train.tsv": "sentence\tlabel\n"}, r"{f}/train.tsv: no examples"),
    "invalid UTF-8": ("sst2", {"train.tsv": "latin"}, r"{f}/train.tsv, line 2: invalid UTF-8"),
    "tag missing": (
        "wnut17",
        {"train.conll": "a\tO\nb\n"},
        r"{f}/train.conll, line 2: 1 column, so this word has no tag",
    ),
    "empty tag": ("wnut17", {"train.conll": "a\tO\nb\t\n"}, r"{f}/train.conll, line 2: an empty tag"),
    "unknown tag": (
        "wnut17",
        {"train.conll": "a\tO\nb\tB-city\n"},
        r"train.conll, line 1: tag 'B-city' of word 'b' is none of 'O', 'B-corp",
    ),
    "tag's column by a name, and the columns have none": (
        "custom,kind=tagging,label=tag",
        {"train.conll": "a\tO\n"},
        r"{f}/train.conll: the tag's column is 'tag'; its number is right \(0 the first, -1 the last\)",
    ),
    "a name of CoNLL-U's in another file": (
        "custom,kind=tagging,label=upos",
        {"train.conll": "a\tx\ty\tO\n"},
        r"{f}/train.conll: the tag's column is 'upos'; its number is right.* in a .conllu file \(id, form, ",
    ),
    "RACE's answer is no letter": (
        "race_high",
        {"dev/high/7.txt": {"article": "A.", "questions": ["?"], "options": [["a", "b"]], "answers": ["AB"]}},
        r"{f}/dev/high/7.txt, question 0: the answer is 'AB'; one letter from A to D is right",
    ),
    "RACE's answer is a number": (
        "race_high",
        {"dev/high/7.txt": {"article": "A.", "questions": ["?"], "options": [["a", "b"]], "answers": [1]}},
        r"{f}/dev/high/7.txt, question 0: the answer is 1; one letter",
    ),
    "short CoNLL-U line": ("ud_ewt", {"en_ewt-ud-train.conllu": "1\ta\ta\tX\n"}, r"line 1: 4 columns; CoNLL-U has 10"),
    "tags that do not align": (
        "custom,kind=tagging,reader=table,files={f}/t.jsonl,text=w,label=y",
        {"t.jsonl": '{{"w": ["a", "b"], "y": ["P", "Q"]}}\n{{"w": ["a", "b"], "y": ["P"]}}\n'},
        r"{f}/t.jsonl, line 2: 1 tags for 2 words",
    ),
    "span outside": (
        "squad",
        {"dev-v1.1.json": squad_file(("q7", "Anna.", "W?", [("Anna", 3)]))},
        r"{f}/dev-v1.1.json, question 'q7': answer 'Anna' at character 3 is outside the context, which has 5",
    ),
    "span elsewhere": (
        "squad",
        {"dev-v1.1.json": squad_file(("q7", "Anna saw.", "W?", [("Anna", 1)]))},
        r"question 'q7': answer 'Anna' is not at character 1 \(there: 'nna '\)",
    ),
    "no answer in 1.1": (
        "squad",
        {"dev-v1.1.json": squad_file(("q7", "Anna.", "W?", []))},
        r"question 'q7': no answer, and task 'squad' has one",
    ),
    "format": ("squad", {"dev-v1.1.json": {"data": [{"title": "x"}]}}, r"{f}/dev-v1.1.json: no 'paragraphs' where"),
    "same id twice": (
        "squad",
        {"dev-v1.1.json": squad_file(*[("q", "A.", "W?", [("A", 0)])] * 2)},
        r"id 'q' is there already",
    ),
    "answer is no choice": (
        "dream",
        {"dev.json": [[["M"], [{"question": "Q", "choice": ["a", "b"], "answer": "c"}], "1"]]},
        r"dialogue '1', question 0: the answer 'c' is none",
    ),
    "no word there": (
        "wic",
        {"dev.data.txt": "x\tN\t0-9\tx y\tx\n", "dev.gold.txt": "T\n"},
        r"dev.data.txt, line 1: '0-9' are no places",
    ),
    "gold too short": (
        "wic",
        {"dev.data.txt": "x\tN\t0-0\tx y\tx\n", "dev.gold.txt": ""},
        r"dev.gold.txt: 0 labels for the 1 lines",
    ),
    "unlabelled dev": ("wic", {"dev.data.txt": "x\tN\t0-0\tx y\tx\n"}, r"dev.data.txt, line 1: no column 'label'"),
    "damaged archive": ("sst2", {"train.tsv.zz": ""}, r"no file of it in '{f}'; for example train.tsv would be right"),
    "more columns than the header, and none that is repeated": (
        "snli",
        {"train.tsv": "sentence1\tsentence2\tgold_label\np\th\tneutral\tneutral\n"},
        r"{f}/train.tsv, line 2: 4 columns, and line 1 has 3",
    ),
    "half a surrogate pair in a text": (
        "custom,files={f}/train.jsonl,text=sentence,labels=0+1",
        {"train.jsonl": '{{"sentence": "a", "label": 1}}\n{{"sentence": "b \\ud83d", "label": 0}}\n'},
        r"{f}/train.jsonl, line 2: column 'sentence' holds half a surrogate pair",
    ),
    "half a surrogate pair in a word": (
        "custom,kind=tagging,reader=table,files={f}/t.jsonl,text=w,label=y",
        {"t.jsonl": '{{"w": ["a", "b"], "y": ["P", "Q"]}}\n{{"w": ["a", "\\ud83d"], "y": ["P", "Q"]}}\n'},
        r"{f}/t.jsonl, line 2: word '\\ud83d' holds half a surrogate pair",
    ),
    "half a surrogate pair in a choice": (
        "dream",
        {"dev.json": [[["M"], [{"question": "Q", "choice": ["a", "\ud83d"], "answer": "a"}], "1"]]},
        r"dialogue '1', question 0: choice '\\ud83d' holds half a surrogate pair",
    ),
    "half a surrogate pair in an id": (
        "squad",
        {"dev-v1.1.json": squad_file(("q\ud83d", "Anna.", "W?", [("Anna", 0)]))},
        r"question 'q\\ud83d': column 'id' holds half a surrogate pair",
    ),
    "DREAM is no list": ("dream", {"dev.json": "7"}, r"{f}/dev.json: the file is a number where the format has a list"),
    "DREAM's turns are null": (
        "dream",
        {"dev.json": [[None, [{"question": "Q", "choice": ["a", "b"], "answer": "a"}], "1"]]},
        r"dialogue '1': 'turns' is null where the format has a list",
    ),
    "DREAM's turns are no texts": (
        "dream",
        {"dev.json": [[["M", 3], [{"question": "Q", "choice": ["a", "b"], "answer": "a"}], "1"]]},
        r"dialogue '1': a turn is 3; text is right",
    ),
    "DREAM's questions are null": ("dream", {"dev.json": [[["M"], None, "1"]]}, r"dialogue '1': 'questions' is null"),
    "RACE's file is a list": ("race_high", {"dev/high/7.txt": "[1]"}, r"{f}/dev/high/7.txt: a JSON list; an object"),
    "RACE's answers are null": (
        "race_high",
        {"dev/high/7.txt": {"article": "A.", "questions": ["?"], "options": [["a", "b"]], "answers": None}},
        r"{f}/dev/high/7.txt: 'answers' is null where the format has a list",
    ),
    "SQuAD's answers are null": (
        "squad",
        {
            "dev-v1.1.json": {
                "data": [{"paragraphs": [{"context": "A.", "qas": [{"id": "q7", "question": "?", "answers": None}]}]}]
            }
        },
        r"{f}/dev-v1.1.json, question 'q7': 'answers' is null where the format has a list",
    ),
    "SQuAD's answer has no text": (
        "squad",
        {"dev-v1.1.json": squad_file(("q7", "Anna.", "W?", [(None, 0)]))},
        r"question 'q7': the text of an answer is None; a piece of the context is right",
    ),
    "answers and places of unequal number": (
        "custom,kind=span,reader=table,files={f}/t.jsonl,text=q+c,label=a",
        {"t.jsonl": '{{"q": "W?", "c": "Anna.", "a": {{"text": ["Anna"], "answer_start": [0, 1]}}}}\n'},
        r"{f}/t.jsonl, line 1: 1 texts of answers, and 2 places where they start",
    ),
    "no folder": ("sst2,files={f}/nowhere", {}, r"'{f}/nowhere' is no folder"),
    "unknown task": ("sst-2", {}, r"task 'sst-2' is not known: custom, or one of sst2, "),
    "unknown setting": ("sst2,text=a", {}, r"task 'sst2' takes files=..., not text=..."),
    "unknown custom setting": ("custom,files={f},txt=a", {}, r"no setting 'txt'; there are name, kind, files"),
    "unknown kind": ("custom,files={f},kind=regression", {}, r"kind='regression' is not known: single, pair"),
    "number of texts": ("custom,kind=pair,files={f},text=a", {}, r"kind=pair has 1 text columns; 2 are right"),
    "nothing to read": ("wnut17", None, r"task 'wnut17' needs files="),
    "one label only": (
        "custom,files={f}/a.tsv,text=t,label=l",
        {"a.tsv": "t\tl\nx\ty\n"},
        r"the label column 'l' holds 'y'; two classes",
    ),
}


def test_a_superscript_is_no_number_of_a_label(tmp_path):
    write(tmp_path, {"a.tsv": "t\tl\nx\t²\ny\t2\nz\t10\n"})
    assert tasks.load(f"custom,files={tmp_path}/a.tsv,text=t,label=l").labels == ("2", "10", "²")


def test_a_field_of_csv_may_be_long(tmp_path):
    write(tmp_path, {"train.csv": f'a,"{"long " * 40_000}",1\nd,e,2\n', "dev.csv": "a,b,1\n"})
    assert len(tasks.load(f"stsb,files={tmp_path}").examples("train")[0].texts[1]) == 200_000


def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    folder = tmp_path / "wnut-2.0"
    folder.mkdir()
    write(folder, {"train.conll": "a\tO\nb\tP\n\na\tO\n", "dev.conll": "a\tO\nb\tP\n"})
    (example,) = tasks.load(f"custom,kind=tagging,files={folder}").examples("dev")
    assert (example.words, example.label) == (("a", "b"), (0, 1))


def read_all(spec):
    data = tasks.load(spec)
    for split in data.splits:
        data.examples(split)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, name):
    spec, files, message = BAD[name]
    for file, content in (files or {}).items():
        write(tmp_path, {file: content.replace("{{", "{").replace("}}", "}") if isinstance(content, str) else content})
    if name == "invalid UTF-8":
        (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    spec = spec.replace("{f}", str(tmp_path))
    if files and "files=" not in spec:
        spec += f",files={tmp_path}"
    with pytest.raises(UserError, match=message.replace("{f}", re.escape(str(tmp_path)))) as caught:
        read_all(spec)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- parts of data


def test_fractions_are_nested_exact_and_independent_of_order():
    examples = tuple(Example(f"id {i}", ("t",), label=i % 2) for i in range(997))
    shares = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    parts = [fraction(examples, share) for share in shares]
    assert [len(part) for part in parts] == [max(1, round(997 * share)) for share in shares]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) <= set(larger)
    assert set(fraction(examples[::-1], 0.1)) == set(parts[3])
    assert [e.id for e in fraction(examples, 0.003)] == ["id 61", "id 252", "id 394"], "the same for ever"
    assert parts[-1] == examples
    with pytest.raises(UserError, match="fraction of 0"):
        fraction(examples, 0)


def test_dev_is_halved_where_no_test_is_labelled(tmp_path):
    rows = "sentence\tlabel\n" + "".join(f"t{i}\t{i % 2}\n" for i in range(101))
    test = "index\tsentence\n0\ta\n"
    data = tasks.load("sst2", files=str(write(tmp_path, {"train.tsv": rows, "dev.tsv": rows, "test.tsv": test})))
    (first_name, first), (second_name, second) = data.selection_and_report()
    assert (first_name, second_name) == ("dev, first half", "dev, second half")
    assert (len(first), len(second)) == (50, 51)
    assert sorted((*first, *second), key=lambda e: int(e.id)) == list(data.examples("dev"))
    assert halves(data.examples("dev")[::-1])[0] == first[::-1]
    write(tmp_path, {"test.tsv": rows})
    (_, dev), (name, test) = tasks.load("sst2", files=str(tmp_path)).selection_and_report()
    assert (len(dev), name, len(test)) == (101, "test", 101)


def test_story_cloze_is_cut_as_the_paper_s_code_cuts_it(tmp_path):
    rows = CLOZE_HEADER + "".join(f"s{i},A{i}.,B.,C.,D.,x,y,{1 + i % 2}\n" for i in range(1871))
    data = tasks.load(
        "storycloze", files=str(write(tmp_path, {"cloze_test_val__spring2016 - cloze_test_ALL_val.csv": rows}))
    )
    assert (len(data.examples("train")), len(data.examples("dev"))) == (1497, 374)
    import numpy as np

    shuffled = np.random.RandomState(3535999445).permutation(1871)
    assert {e.id for e in data.examples("dev")} == {f"s{i}" for i in shuffled[:374]}


# --------------------------------------------------------------------------------------------------- the embedded tasks


def test_embedded_tasks_share_no_text_between_splits_and_with_the_corpus_without_them():
    package, signature = tasks.load("docstring_package"), tasks.load("docstring_signature")
    by_split = {split: package.examples(split) for split in package.splits}
    assert list(by_split) == ["train", "dev", "test"]
    assert all(len(examples) > 200 for examples in by_split.values())
    texts = Counter(e.texts[0] for examples in by_split.values() for e in examples)
    assert set(texts.values()) == {1}
    modules = [{e.id.partition(":")[0] for e in examples} for examples in by_split.values()]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]
    for examples in by_split.values():
        counts = Counter(e.label for e in examples)
        assert len(counts) == len(package.labels), "each split has each package"
        assert max(counts.values()) < len(examples) / 3

    of_split = {
        split: {e.id.partition(".")[0].partition(":")[0] for e in signature.examples(split)}
        for split in signature.splits
    }
    assert of_split["dev"] <= {"http", "logging"}
    assert of_split["test"] <= {"unittest", "xml"}
    assert not of_split["train"] & {"http", "logging", "unittest", "xml"}
    for split in signature.splits:
        examples = signature.examples(split)
        assert all(len(set(e.choices)) == 4 for e in examples)
        assert max(Counter(e.label for e in examples).values()) < 0.35 * len(examples)
        by_place = {one.place: one for one in docstrings.docstrings()}
        assert all(by_place[e.id].sentences[0] == e.choices[e.label] for e in examples)

    whole, without = sources.parse("pydocs"), sources.parse("pydocs#without_tasks")
    kept = {module for module, _ in without.files}
    assert {module for module, _ in whole.files} - kept >= {e.id.partition(":")[0] for e in package.examples("test")}
    assert not any(module.partition(".")[0] in pydocs.TASK_PACKAGES for module in kept)
    assert "topics" in kept or "topics" not in {module for module, _ in whole.files}
    assert whole.spec == "pydocs"
    documents = [d.sentences for shard in without.shards() for d in shard.documents()]
    found = overlaps({split: package.examples(split) for split in package.splits}, documents)
    assert sum(map(len, documents)) > 10_000
    # Copies in other packages go, too; of a train split a sentence is left that two modules share (protocol: up to 1%).
    assert [found[split].common for split in ("dev", "test")] == [0, 0], found
    assert all(one.runs > 5000 for one in found.values())
    assert found["train"].common < 0.001 * found["train"].runs, found
    with pytest.raises(UserError, match=r"'pydocs#without' is not understood"):
        sources.parse("pydocs#without")


def test_the_text_of_a_task_is_a_corpus(tmp_path, monkeypatch):
    write(
        tmp_path,
        {
            "train.tsv": "sentence\tlabel\nOne. Two here.\t1\nThree.\t0\nThree.\t1\n",
            "dev.tsv": "sentence\tlabel\nNo.\t1\n",
        },
    )
    source = sources.parse(f"task:sst2,files={tmp_path}")
    assert [d.sentences for d in source.documents()] == [("One.", "Two here."), ("Three.",)]
    assert source.fingerprint == sources.parse(f"task:sst2,files={tmp_path}").fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "splitter", lambda: "another one")
        assert source.fingerprint != sources.parse(f"task:sst2,files={tmp_path}").fingerprint
    mixed = sources.parse(f"task:sst2,files={tmp_path}+0.5*pydocs#without_tasks")
    assert [weight for weight, _ in mixed.terms] == [1.0, 0.5]


# -------------------------------------------------------------------------------------------------- TensorFlow Datasets


def test_tensorflow_datasets_by_the_names_that_users_have(tmp_path):
    # A package named tensorflow that can be imported: any import of it would show in sys.modules.
    (tmp_path / "fake" / "tensorflow").mkdir(parents=True)
    (tmp_path / "fake" / "tensorflow" / "__init__.py").write_text("")
    script = f"""
        import json, sys
        from pathlib import Path
        import tensorflow_datasets as tfds
        from plm.data import tasks, tensorflow_datasets

        class Made(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = Path({str(tmp_path)!r})

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=Made.features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {{split: enumerate(own) for split, own in Made.rows.items()}}

            def _generate_examples(self):
                pass

        def prepare(name, like, rows):
            Made.features = tensorflow_datasets.tfds_builder("", like, prepare=False).info.features
            Made.rows = rows
            builder = Made(data_dir={str(tmp_path)!r} + "/" + name, file_format="array_record")
            builder.download_and_prepare()
            return str(builder.data_dir)

        missing = []
        for task in tasks.TASKS.values():
            for layout in task.layouts:
                if not layout.dataset or layout.dataset == "super_glue/wic":  # its module imports tensorflow
                    continue
                features = tensorflow_datasets.tfds_builder("", layout.dataset, prepare=False).info.features
                # RACE and Story Cloze keep several questions or choices in one column.
                wanted = [*layout.text, layout.label] if layout.reader == "tfds" else []
                missing += [(task.name, name) for name in wanted if name.split("|")[0] not in features]
        sst2 = prepare("sst2", "glue/sst2", {{
            "train": [{{"idx": 5, "sentence": "caf\u00e9", "label": 1}}, {{"idx": 6, "sentence": "b", "label": 0}}],
            "validation": [{{"idx": 0, "sentence": "c", "label": 1}}],
            "test": [{{"idx": 0, "sentence": "d", "label": -1}}]}})
        none = {{"text": [], "answer_start": []}}
        squad = prepare("squad", "squad/v2.0", {{
            "validation": [
                {{"id": "q", "title": "T", "context": "Anna saw.", "question": "Who?", "is_impossible": False,
                  "answers": {{"text": ["Anna"], "answer_start": [0]}}, "plausible_answers": none}},
                {{"id": "r", "title": "T", "context": "Anna saw.", "question": "When?", "is_impossible": True,
                  "answers": none, "plausible_answers": none}}]}})
        pos = prepare("pos", "universal_dependencies/en_ewt", {{
            "dev": [{{"idx": "s1", "text": "", "tokens": ["don't", "do", "n't"], "upos": ["_", "AUX", "PART"],
                     **{{k: ["_"] * 3 for k in ("deprel", "deps", "feats", "head", "lemmas", "misc", "xpos")}}}}]}})
        stsb = prepare("stsb", "glue/stsb", {{
            "validation": [{{"idx": 0, "sentence1": "a", "sentence2": "b", "label": 2.5}}],
            "test": [{{"idx": 0, "sentence1": "c", "sentence2": "d", "label": -1.0}}]}})
        found = {{}}
        for name, files in (("sst2", sst2), ("squad_v2", squad), ("ud_ewt", pos), ("stsb", stsb)):
            data = tasks.load(name, files="tfds:" + files)
            rows = lambda split: [[e.id, e.texts, e.words, [a.text for a in e.answers], e.label]
                                  for e in data.examples(split)]
            found[name] = [[split, rows(split)] for split in data.splits]
        own = tasks.load("custom,text=sentence,label=label,files=tfds:" + sst2)
        found["custom"] = [own.labels, own.examples("train")[0].label]
        print(json.dumps([missing, found, "tensorflow" in sys.modules]))
    """
    path = os.pathsep.join([str(HERE.parent), str(tmp_path / "fake")])
    environment = {**os.environ, "PYTHONPATH": path, "TFDS_DATA_DIR": str(tmp_path / "none")}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    missing, found, imported = json.loads(done.stdout.splitlines()[-1])
    assert not imported
    assert not missing, "columns of the table that the catalogue's datasets do not have"
    assert found["sst2"] == [
        ["train", [["5", ["café"], [], [], 1], ["6", ["b"], [], [], 0]]],
        ["dev", [["0", ["c"], [], [], 1]]],
        ["test", [["0", ["d"], [], [], None]]],
    ]
    assert found["squad_v2"] == [
        ["dev", [["q", ["Who?", "Anna saw."], [], ["Anna"], None], ["r", ["When?", "Anna saw."], [], [], None]]]
    ]
    assert found["ud_ewt"] == [["dev", [["s1", [], ["do", "n't"], [], [3, 9]]]]]
    assert found["stsb"] == [
        ["dev", [["0", ["a", "b"], [], [], 2.5]]],
        ["test", [["0", ["c", "d"], [], [], None]]],
    ], "scores of -1 are none"
    assert found["custom"] == [["negative", "positive"], 1]


# ----------------------------------------------------------------------------------------------------------- real files

ROWS = {  # folder: (task, {split: rows}, words of tagging or None)
    "sst2": ("sst2", {"train": 6920, "dev": 872, "test": 1821}, None),
    "mrpc": ("mrpc", {"train": 3668, "dev": 408, "test": 1725}, None),
    "stsb": ("stsb", {"train": 5749, "dev": 1500, "test": 1379}, None),
    "snli_small": ("snli", {"dev": 9842, "test": 9824}, None),
    "squad_v1.1": ("squad", {"train": 87599, "dev": 10570}, None),
    "xquad_en": ("squad", {"dev": 1190}, None),
    "ud_ewt": ("ud_ewt", {"train": 12544, "dev": 2001, "test": 2077}, (204577, 25147, 25094)),
    "wnut17": ("wnut17", {"train": 3394, "dev": 1009, "test": 1287}, None),
    "mclwic_en": ("mclwic", {"train": 8000, "dev": 1000}, None),
    "dream": ("dream", {"train": 6116, "dev": 2040, "test": 2041}, None),
}


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ROWS)
def test_real_files_hold_what_they_should(real_data, folder):
    name, rows, words = ROWS[folder]
    data = tasks.load(name, files=str(real_data / "tasks" / folder))
    if folder == "squad_v1.1":  # train is the same reader on 8 times the questions
        rows = {"dev": rows["dev"]}
    assert {split: len(data.examples(split)) for split in rows} == rows
    if words:
        assert tuple(sum(len(e.words) for e in data.examples(split)) for split in rows) == words
    assert all(any(e.all_texts()) for split in rows for e in data.examples(split))
    (_, selection), (_, report) = data.selection_and_report()
    assert len(selection) + len(report) == rows["dev"] + rows.get("test", 0)
