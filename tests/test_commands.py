"""`python -m plm` lists the commands, and nothing else of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_list_of_commands_is_that_of_the_readme():
    done = subprocess.run([sys.executable, "-m", "plm"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  plm\.(\w+) +\S", done.stdout, re.MULTILINE)
    documented = re.findall(r"python -m plm\.(\w+)", (ROOT / "README.md").read_text("utf-8"))
    assert listed == sorted(set(documented))
    assert "launch.sweep" in done.stdout


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plm.train", {"config", "workdir", "suite", "join_seconds"}),
        ("launch.sweep", {"config", "root", "tpu_zone", "wait"}),
    ],
)
def test_help_has_every_flag_of_a_command(command, expected):
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    listed = set(re.findall(r"^ +--(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))
    assert expected <= listed, done.stdout + done.stderr
