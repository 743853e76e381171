"""Times a training step of each model, and embedding texts, beside the same mathematics in PyTorch: `make bench`.

    python -m tests.benchmarks.bench --output=runs/bench [--parts=train,embed --models=bert,gpt,bilm] [--width=512 ...]

Both sides are processes of their own, so that neither's threads disturb the other's, and are asked for a step in
turns: ours, theirs, ours, ... A ratio is of two neighbouring steps; the median over all rounds and the middle 80% are
reported, so that a busy machine widens the range rather than moving the ratio. Same sizes, dropout, Adam, compute type,
threads (all cores) and memory allocator settings on both sides. Writes bench.md and bench.json.

Embedding begins with strings and ends with an array a text, tokenisation included; float32. Both sides sort the texts
by length. PyTorch pads each batch to its longest text, for each of `EMBED_BATCHES` texts a batch, and the best counts.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plm import host
from tests.benchmarks.sizes import MODELS, Size
from tests.benchmarks.texts import texts

EMBED_BATCHES = (8, 32, 128)
GOALS = {"bert": 1.3, "gpt": 1.0, "bilm": 3.0}  # times that torch takes longer, on CPU at these sizes
TITLES = {
    "bert": "BERT, logits at the masked positions",
    "bert_all": "BERT, Transformers' own loss: all logits",
    "gpt": "OpenAI-GPT",
    "bilm": "biLM, two towers of projected LSTM",
}


class Side:
    """A process that trains when asked: `side("step", "bert")`."""

    def __init__(self, which: str, arguments: list[str], cache: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.bench", f"--serve={which}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PLM_CACHE": cache, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )

    def __call__(self, *command: str):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the benchmark's other process ended with {self.process.wait()}: see above")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(which: str, size: Size, threads: int, keep_memory: bool) -> None:
    """Answers commands, one JSON list a line, until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if keep_memory:
        host.keep_memory()
    steps, embeds, hits = {}, {}, []
    if which == "ours":
        import jax

        from tests.benchmarks import ours as side

        jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
        host.keep_programs()
        product = side.Product()
    else:
        import torch

        torch.set_num_threads(threads)
        from tests.benchmarks import theirs as side

    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "make":
            before = sum(hits)
            steps[arguments[0]] = side.Step(arguments[0], size)
            answer = sum(hits) - before
        elif command == "step":
            answer = steps[arguments[0]]()
        elif command == "make_embed":
            embeds[tuple(arguments)] = side.Embed(arguments[0], size, *arguments[1:])
            answer = None
        elif command == "embed":
            n, *key = arguments
            answer = embeds[tuple(key)](texts(size, n))
        elif command == "facts":
            answer = steps[arguments[0]].facts()
        elif command == "product":
            answer = product()
        elif command == "versions":
            answer = f"jax {jax.__version__}" if which == "ours" else f"torch {torch.__version__}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, 10th and 90th percentile)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def measure_embed(options, size: Size, names: list[str], ours: Side, theirs: Side) -> dict:
    """{model: pieces a second of both sides, and the ratios of neighbouring passes over the texts}."""
    pieces = sum(len(text.split()) for text in texts(size, options.texts))
    result = {}
    for name in names:
        ours("make_embed", name)
        first = ours("embed", options.texts, name)
        tried = {}
        for batch in EMBED_BATCHES:
            theirs("make_embed", name, batch)
            theirs("embed", options.texts, name, batch)
            tried[batch] = theirs("embed", options.texts, name, batch)
        batch = min(tried, key=tried.get)
        seconds = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            seconds["ours"].append(ours("embed", options.texts, name))
            seconds["theirs"].append(theirs("embed", options.texts, name, batch))
        median, low, high = spread([b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)])
        result[name] = {
            "texts": options.texts,
            "pieces": pieces,
            "ours_pieces_per_second": pieces / statistics.median(seconds["ours"]),
            "theirs_pieces_per_second": pieces / statistics.median(seconds["theirs"]),
            "theirs_batch": batch,
            "first_seconds": first,
            "ratio": median,
            "ratio_low": low,
            "ratio_high": high,
        }
        print(f"embed {name}: {median:.2f} ({low:.2f} to {high:.2f})", file=sys.stderr)
    return result


def measure(options, size: Size, passed_on: list[str]) -> dict:
    names = [name for name in MODELS if name in options.models.split(",")]
    pairs = [(name, name) for name in names] + ([("bert", "bert_all")] if "bert" in names else [])
    with tempfile.TemporaryDirectory() as cache:
        ours, theirs = Side("ours", passed_on, cache), Side("theirs", passed_on, cache)
        result = {
            "size": dataclasses.asdict(size),
            "machine": f"{platform.machine()}, {options.threads} cores",
            "versions": [ours("versions"), theirs("versions")],
            "allocator": options.allocator,
            "rounds": options.rounds,
            "models": {},
            "embed": {},
        }
        if "embed" in options.parts.split(","):
            result["embed"] = measure_embed(options, size, names, ours, theirs)
        if "train" not in options.parts.split(","):
            ours.close()
            theirs.close()
            return result
        for name in names:
            print(f"compiling {name}", file=sys.stderr)
            first_hits = ours("make", name)
            result["models"][name] = ours("facts", name) | {"cache_hits_of_the_first_start": first_hits}
        for _, name in pairs:
            theirs("make", name)
        for mine, other in pairs:
            seconds = {"ours": [], "theirs": []}
            speeds = []
            for _ in range(options.rounds):
                # A step each to bring caches and clocks back to this model, then the ones that count.
                ours("step", mine)
                seconds["ours"].append(ours("step", mine))
                theirs("step", other)
                seconds["theirs"].append(theirs("step", other))
                speeds.append(ours("product"))
            ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
            median, low, high = spread(ratios)
            facts = result["models"][mine]
            row = {
                "ours_ms": 1e3 * statistics.median(seconds["ours"]),
                "theirs_ms": 1e3 * statistics.median(seconds["theirs"]),
                "ours_best_ms": 1e3 * min(seconds["ours"]),
                "theirs_best_ms": 1e3 * min(seconds["theirs"]),
                "ratio": median,
                "ratio_low": low,
                "ratio_high": high,
                "goal": GOALS[mine],
                "product_gflops": statistics.median(speeds) / 1e9,
                "achieved_gflops": facts["operations"] / statistics.median(seconds["ours"]) / 1e9,
            }
            row["share_in_products"] = row["achieved_gflops"] / row["product_gflops"]
            result["models"].setdefault(other, {}).update(row)
            print(f"{other}: {median:.2f} ({low:.2f} to {high:.2f})", file=sys.stderr)
        ours.close()
        theirs.close()
        again = Side("ours", passed_on, cache)
        for name in names:
            hits = again("make", name)
            seconds = again("facts", name)["first_seconds"]
            result["models"][name] |= {"cache_hits_of_the_second_start": hits, "second_start_first_seconds": seconds}
        again.close()
    return result


def markdown(result: dict) -> str:
    """The figures as two tables."""
    lines = _embed_table(result) + (_train_tables(result) if result["models"] else [])
    return "\n".join(lines) + "\n"


def _embed_table(result: dict) -> list[str]:
    if not result["embed"]:
        return []
    one = next(iter(result["embed"].values()))
    lines = [
        f"Embedding {one['texts']:,} texts ({one['pieces']:,} pieces), float32, strings to arrays.",
        "",
        "| embed | our pieces/s | torch's (texts a batch) | ours / torch (middle 80%) | goal | our first pass s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["embed"].items():
        lines.append(
            f"| {TITLES[name].split(',')[0]} | {row['ours_pieces_per_second']:,.0f} |"
            f" {row['theirs_pieces_per_second']:,.0f} ({row['theirs_batch']}) | {row['ratio']:.2f}"
            f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | 1.0 | {row['first_seconds']:.1f} |"
        )
    return [*lines, ""]


def _train_tables(result: dict) -> list[str]:
    size = result["size"]
    lines = [
        f"One training step, {size['dtype']}, batch {size['batch']} x {size['length']}, vocabulary"
        f" {size['vocabulary']:,}, dropout {size['dropout']}, Adam; Transformers {size['layers']} x {size['width']},"
        f" biLM 2 x {size['lstm_layers']} x {size['cells']}/{size['projection']}. {result['machine']},"
        f" {', '.join(result['versions'])}, allocator {result['allocator']} on both sides, {result['rounds']}"
        " interleaved rounds.",
        "",
        "| step | ours ms | torch ms | torch / ours (middle 80%) | goal | best of each |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["models"].items():
        lines.append(
            f"| {TITLES[name]} | {row['ours_ms']:.0f} | {row['theirs_ms']:.0f} | {row['ratio']:.2f}"
            f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | {row['goal']} |"
            f" {row['theirs_best_ms'] / row['ours_best_ms']:.2f} |"
        )
    lines += [
        "",
        "Share of products: the time that the step's matrix products would take at the speed of a 2048 x 2048 product"
        " timed in the same rounds, as a part of the step. Host: until the call returns; own work: processor time of"
        " the calling thread at 2 x 16 tokens with the same parameters, where the program itself takes next to none.",
        "",
        "| our step | host ms (its own work) | compiles | share of products | GFLOP/s | temporaries MB | largest array"
        " | all logits MB | first step s: cold, second start (cache hits) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["models"].items():
        if "compiles" not in row:
            continue
        lines.append(
            f"| {name} | {1e3 * row['host_seconds']:.2f} ({1e3 * row['host_work_seconds']:.2f}) |"
            f" {row['compiles']} in {row['calls']} calls |"
            f" {row['share_in_products']:.0%} | {row['achieved_gflops']:.1f} of {row['product_gflops']:.1f} |"
            f" {row['temporary_bytes'] / 1e6:.0f} | {row['largest_array']}, {row['largest_array_bytes'] / 1e6:.1f} MB |"
            f" {row['all_logits_bytes'] / 1e6:.1f} | {row['first_seconds']:.1f},"
            f" {row['second_start_first_seconds']:.1f} ({row['cache_hits_of_the_second_start']}) |"
        )
    return lines


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/bench", help="folder of bench.md and bench.json")
    parser.add_argument("--parts", default="train,embed")
    parser.add_argument("--texts", type=int, default=1000, help="how many are embedded")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=cores, help="of torch; XLA uses the cores that it may use")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept", help="plm.host.keep_memory or not")
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options = parser.parse_args()
    size = Size(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Size)})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.serve:
        serve(options.serve, size, options.threads, options.allocator == "kept")
        return
    began = time.perf_counter()
    result = measure(options, size, sys.argv[1:])
    result["seconds"] = time.perf_counter() - began
    text = markdown(result)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "bench.md").write_text(text)
    print(text)
    print(f"{output / 'bench.md'}, {output / 'bench.json'}")


if __name__ == "__main__":
    main()
