"""Runs a command on one TPU worker: its output goes to the workdir, and so does its exit code.

    python -m launch.worker --attempt=WORKDIR/launch/3 -- python -m plm.train ...

ATTEMPT/log.I.txt is replaced every half minute and at the end, where I is the worker's number in its slice;
ATTEMPT/code.I appears last. SIGTERM (the machine is going down, or the launcher says stop) is passed on to the command.
"""

import signal
import subprocess
import tempfile
from pathlib import Path

from absl import flags
from etils import epath

from plm import command, processes

EVERY_SECONDS = 30.0


def _exit_code(process: subprocess.Popen, publish) -> int:
    while True:
        try:
            return process.wait(timeout=EVERY_SECONDS)
        except subprocess.TimeoutExpired:
            publish()


def main(arguments: list[str]) -> int:
    """The command; returns the exit code of what it ran."""
    attempt, index = epath.Path(flags.FLAGS.attempt), processes.of_tpu().index
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "log.txt"
        with local.open("wb") as output:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))

            def publish() -> None:
                (attempt / f"log.{index}.txt").write_bytes(local.read_bytes())

            code = _exit_code(process, publish)
        publish()
    (attempt / f"code.{index}").write_text(f"{code}\n")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    flags.DEFINE_string("attempt", None, "folder for this attempt's logs and exit codes; local or gs://")
    command.run(main, required=("attempt",), positional=True)
