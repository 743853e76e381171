"""Two processes train as one does: same losses, each makes its own rows only, the first alone writes the records."""

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures import children, corpus
from fixtures.children import RUNS

from plm.training import config as configs
from plm.training import loop
from plm.training.metrics import read_metrics

B = 8


def watch() -> None:
    """In a child, before it trains: notes the rows that it makes and the files that Python opens for writing."""
    from plm.data import pretrain

    seen = {"rows": [], "written": []}
    real = pretrain._Layout._numbers

    def numbers(self, step, rows):
        if self.training and [rows.start, rows.stop] not in seen["rows"]:
            seen["rows"].append([rows.start, rows.stop])
            note()
        return real(self, step, rows)

    def note():
        with contextlib.suppress(OSError):
            Path(os.environ["WATCH"]).write_text(json.dumps(seen))

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x"):
            path = str(arguments[0])
            if path != os.environ["WATCH"] and path not in seen["written"]:
                seen["written"].append(path)
                note()

    pretrain._Layout._numbers = numbers
    sys.addaudithook(audit)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus.write(tmp_path_factory.getbasetemp() / "corpus.txt")


def losses_of(workdir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


def train_in_two(kind: str, text, workdir, *flags: str) -> list[dict]:
    """Runs the command as two processes of one device each; returns what each of them saw."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(2):
        arguments = [f"--config={RUNS}:{kind}", f"--config.data.source=text:{text}", f"--workdir={workdir}", *flags]
        arguments += [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"]
        out = workdir.with_name(f"{workdir.name}.{index}")
        before = [("test_processes", "watch")]
        environment = {"devices": 1, "WATCH": f"{out}.json"}
        started.append(children.start("plm.train", *arguments, output=out, before=before, **environment))
    codes = [child.wait() for child in started]
    assert codes == [0, 0], "\n".join(child.text for child in started)
    assert "complete after 24 steps" in started[0].text
    assert all(line.startswith("[Gloo]") for line in started[1].text.splitlines()), started[1].text
    return [json.loads(Path(f"{child.output}.json").read_text()) for child in started]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "begun_by_one"),
    [
        ("lanes", False),
        ("pairs", True),
        pytest.param("lanes", True, marks=slow),
        pytest.param("pairs", False, marks=slow),
    ],
)
def test_two_processes_are_one(kind, begun_by_one, text, tmp_path):
    """Measured: losses 2e-7 apart at most, over a fresh run and over one that a single process began."""
    before = children.quick_compiles()
    try:
        one, two = tmp_path / "one", tmp_path / "two"
        loop.train(configs.load(f"{RUNS}:{kind}", {"data.source": f"text:{text}"}), one)
    finally:
        children.restore(before)
    if begun_by_one:
        shutil.copytree(one, two)
        for step in ("20", "24"):
            shutil.rmtree(two / "checkpoints" / step)
    seen = train_in_two(kind, text, two)
    assert [process["rows"] for process in seen] == [[[0, B // 2]], [[B // 2, B]]]
    records = {"config.json", "run.json", "metrics.jsonl", "results.jsonl", "tokenizer.json"}
    written = [{name for name in records for path in process["written"] if name in path} for process in seen]
    assert written == [records, set()]
    others = [path for path in seen[1]["written"] if path.startswith(str(two)) and "/checkpoints/" not in path]
    assert all(".writable" in path for path in others), others
    expected, got = losses_of(one), losses_of(two)
    assert got.keys() == expected.keys()
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=1e-5, err_msg=str(step))
    np.testing.assert_allclose(*(read_metrics(path)[-1]["eval/loss"] for path in (one, two)), rtol=1e-5)
    run = json.loads((two / "run.json").read_text())
    assert [session["devices"]["processes"] for session in run["sessions"]] == [1] * begun_by_one + [2]
