"""A second start finds its compiled programs; memory that a step frees is not cleared again by the kernel."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import children, corpus

STEP = """
import json, resource, sys
from plm import host
kept = host.keep_memory() if sys.argv[1] == "kept" else None
import jax, jax.monitoring
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
host.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
step = jax.jit(lambda a, x: a @ jax.numpy.tanh(a @ x))
a, x = jax.numpy.ones((4, 4)), jax.numpy.ones((4, 3_000_000))
def faults():
    jax.block_until_ready(step(a, x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(60)]
hits = sum(name.endswith("compilation_cache/cache_hits") for name in seen)
print(json.dumps({"hits": hits, "kept": kept, "faults": sorted(b - a for a, b in zip(counts[-20:], counts[-19:]))[9],
                  "folder": jax.config.jax_compilation_cache_dir}))
"""


def start(tmp_path, memory: str, **environment: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", STEP, memory],
        env=clean | {"JAX_PLATFORMS": "cpu", "PLM_CACHE": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_the_second_start_finds_its_programs_and_keeps_its_memory(tmp_path):
    first = start(tmp_path, "given back")
    second = start(tmp_path, "kept")
    assert first["hits"] == 0
    assert second["hits"] > 0
    if not second["kept"]:
        pytest.skip("this C library does not let a process keep its memory")
    # Page faults of the median step, after some in which the heap finds its size; one of its matrices is 11,719 pages.
    assert first["faults"] > 10_000
    assert second["faults"] < 200


def test_a_folder_that_the_user_chose_stays(tmp_path):
    chosen = str(tmp_path / "chosen")
    assert start(tmp_path, "kept", JAX_COMPILATION_CACHE_DIR=chosen)["folder"] == chosen


def count_programs() -> None:
    """In a child: notes how many programs it compiled anew and how many it found."""
    import jax.monitoring

    seen = {"cache_hits": 0, "cache_misses": 0}

    def note(name, **_):
        kind = name.rsplit("/", 1)[-1]
        if kind in seen:
            seen[kind] += 1
            Path(os.environ["WATCH"]).write_text(json.dumps(seen))

    Path(os.environ["WATCH"]).write_text(json.dumps(seen))  # a process may compile nothing at all
    jax.monitoring.register_event_listener(note)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_second_start_of_a_run_compiles_nothing(count, tmp_path):
    text = corpus.write(tmp_path / "corpus.txt")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    seen = []
    for start in ("first", "second"):
        arguments = [f"--config={children.RUNS}:blocks", f"--config.data.source=text:{text}", "--config.total_steps=4"]
        started = []
        for index in range(count):
            many = [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]
            started.append(
                children.start(
                    "plm.train",
                    *arguments,
                    f"--workdir={tmp_path / start}",
                    *(many if count > 1 else []),
                    output=tmp_path / f"{start}.{index}.txt",
                    before=[("test_host", "count_programs")],
                    PLM_CACHE=tmp_path / "cache",
                    WATCH=tmp_path / f"{start}.{index}.json",
                    devices=1,
                )
            )
        assert [child.wait() for child in started] == [0] * count, started[0].text
        seen.append([json.loads((tmp_path / f"{start}.{index}.json").read_text()) for index in range(count)])
    first, second = seen
    assert first[0]["cache_misses"] > 5
    # Of several processes JAX tells only of the first one's programs, which it alone writes.
    assert second[0]["cache_misses"] == 0
    assert second[0]["cache_hits"] > 5


def test_peak_memory_of_a_process_grows_with_what_it_holds():
    program = (
        "import json, numpy as np; from plm import host; before = host.peak_memory()['process'];"
        " held = np.ones(40_000_000); print(json.dumps([before, host.peak_memory()['process']]))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert 300e6 < after - before < 400e6
