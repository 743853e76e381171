"""Weak scaling: a step of 1, 2, 4 and 8 devices, each with as many rows, beside one device with all of them.

    python -m tests.benchmarks.scaling [--config=experiments/gpt.py:tiny] [--rows=4] [--output=DIR]

The devices are virtual ones of one process, then processes of one device each that talk over gloo. All share this
machine's cores, so a step of n devices takes n times as long at best; what is compared is the same global batch with
collectives and without any. Each measurement is a process of its own, and rounds are interleaved. The overhead is told
in seconds of the processors, over all processes: others on the machine move it less than the time on the clock.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1, 2, 4, 8)
WAYS = ("devices", "processes", "one device")


def worker(arguments) -> None:
    """Runs steps of a config on a mesh of `devices` here or of `processes`; each prints its medians."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.index)
    from plm.data import placeholder
    from plm.planning import hlo
    from plm.training import config as configs
    from plm.training import sharding
    from plm.training.program import carries, make_batches, make_program

    config = configs.load(arguments.config, {"batch_size": arguments.batch_size, "total_steps": 1000}, complete=False)
    config = configs.resolve(config, platform="cpu")
    mesh = sharding.make_mesh(config.mesh)
    wanted = config.data.tokenizer
    vocabulary = placeholder.tokenizer(wanted.kind, wanted.vocab, lowercase=wanted.lowercase)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        corpus = placeholder.corpus(vocabulary, config.seq_len, Path(folder))
        batches = make_batches(config, corpus, "train", mesh)
        program = make_program(config, vocabulary, mesh, carries(config, batches.layout))
        state, batch = program.fresh(), batches(0)
        step = program.step.lower(state, batch).compile()
        seconds, processor = [], []
        for number in range(arguments.steps + 2):
            began, used = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            if number >= 2:
                seconds.append(time.perf_counter() - began)
                processor.append(time.process_time() - used)
        moved = sum(c.bytes * c.times for c in hlo.collectives(step.as_text()))
    numbers = {"seconds": statistics.median(seconds), "processor": statistics.median(processor), "moved": moved}
    print(json.dumps(numbers), flush=True)


def measure(way: str, count: int, options) -> dict:
    """{"seconds", "processor" seconds of all processes, "moved" bytes of a device} of a step of count x rows rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = count if way == "processes" else 1
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--worker", f"--config={options.config}"]
    command += [f"--devices={count if way == 'devices' else 1}", f"--processes={processes}", f"--address={address}"]
    command += [f"--batch_size={count * options.rows}", f"--steps={options.steps}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    started = [
        subprocess.Popen([*command, f"--index={index}"], stdout=subprocess.PIPE, text=True, env=environment)
        for index in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way} x {count} failed")
    each = [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for output in outputs]
    return each[0] | {"processor": sum(numbers["processor"] for numbers in each)}


def table(best: dict, rows: int) -> str:
    """Markdown; the least of the rounds, since all else on the machine only adds to it."""
    lines = [
        "| devices x rows | one device | virtual devices | processes | overhead of devices | of processes | moved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in COUNTS:
        ways = [best[way, count] for way in ("one device", "devices", "processes")]
        base = ways[0]["processor"]
        times = [f"{way['seconds']:.2f} s ({way['processor']:.2f})" for way in ways]
        over = [f"{way['processor'] / base - 1:+.0%}" for way in ways[1:]]
        lines.append(
            f"| {count} x {rows} | {' | '.join(times)} | {' | '.join(over)} | {ways[1]['moved'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def main(options) -> None:
    best: dict = {}
    for round_ in range(options.rounds):
        for count in COUNTS:
            for way in WAYS:
                got = measure(way, count, options)
                print(f"round {round_ + 1}: {count} x {way}: {got['seconds']:.3f} s", file=sys.stderr, flush=True)
                known = best.setdefault((way, count), got)
                best[way, count] = {name: min(value, known[name]) for name, value in got.items()}
    print(table(best, options.rows))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        results = [{"way": way, "devices": count, **values} for (way, count), values in best.items()]
        (options.output / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="experiments/gpt.py:tiny")
    parser.add_argument("--rows", type=int, default=4, help="rows of each device")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name in ("devices", "processes", "index", "batch_size"):
        parser.add_argument(f"--{name}", type=int, default=1 if name != "index" else 0, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    worker(given) if given.worker else main(given)
