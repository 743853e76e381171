"""Runs a command on one TPU worker: its output goes to the workdir, and so does its exit code.

    python -m launch.worker --attempt=WORKDIR/launch/3 -- python -m plm.train ...

ATTEMPT/log.I.txt is replaced every half minute and at the end, where I is the worker's number in its slice;
ATTEMPT/code.I appears last. SIGTERM (the machine is going down, or the launcher says stop) is passed on to the command.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags
from etils import epath

from plm import command, processes

EVERY_SECONDS = 30.0


def _write(path: epath.Path, content: bytes, tries: int) -> None:
    """A bucket that cannot be reached for a moment is no reason to stop a run."""
    for attempt in range(1, tries + 1):
        try:
            path.write_bytes(content)
            return
        except Exception as error:  # each client of object storage has its own
            print(f"{path} could not be written ({attempt} of {tries}): {error}", file=sys.stderr, flush=True)
            if attempt < tries:
                time.sleep(5.0)


def main(arguments: list[str]) -> int:
    """The command; returns the exit code of what it ran."""
    attempt, index = epath.Path(flags.FLAGS.attempt), processes.of_tpu().index
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "log.txt"
        with local.open("wb") as output:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=EVERY_SECONDS)
                ended = process.returncode is not None
                _write(attempt / f"log.{index}.txt", local.read_bytes(), tries=5 if ended else 1)
    code = process.returncode
    _write(attempt / f"code.{index}", f"{code}\n".encode(), tries=5)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    flags.DEFINE_string("attempt", None, "folder for this attempt's logs and exit codes; local or gs://")
    command.run(main, required=("attempt",), positional=True)
