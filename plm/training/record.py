"""What a run tells: one object between the loop and its files, bar and messages (`plm.training.metrics`)."""

import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from plm import host
from plm.data.pipeline import Batches, Corpus
from plm.errors import UserError
from plm.models.flops import train_flops
from plm.models.graph import ModelGraph
from plm.training import checkpoint, chips, metrics, optimizer
from plm.training import config as configs
from plm.training.best import Best

CONFIG, TOKENIZER = "config.json", "tokenizer"


def seeds(config, facts: Mapping) -> dict[str, int | None]:
    """Of a row of results: a task's run has a seed of its own, and that of the pretraining that it starts from.

    facts: of run.json.
    """
    if config.data.layout != "task":
        return {"pretrain_seed": config.seed, "head_seed": None}
    return {"pretrain_seed": (facts.get("starts_from") or {}).get("pretrain_seed"), "head_seed": config.seed}


class Record:
    """config.json, tokenizer, run.json, metrics.jsonl and results.jsonl of a run, and its progress.

    config: resolved. enabled: False on all processes but the first, where nothing is written or printed.
    """

    def __init__(self, workdir: epath.PathLike, config, *, enabled: bool):
        self.workdir, self.config, self.enabled = epath.Path(workdir), config, enabled
        self.run = metrics.RunRecord(workdir, enabled=enabled)
        self._metrics = self._progress = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._progress is not None:
            self._progress.message(line)
        elif self.enabled:
            metrics.Progress(1).message(line)

    def refuse_another_config(self, corpus: Corpus) -> None:
        """A `UserError` if the workdir belongs to a run with another config, other text or another vocabulary."""
        path = self.workdir / CONFIG
        if not path.exists():
            return
        before = self.run.facts.get("corpus", {}).get("fingerprint")
        same = before is not None and before == corpus.meta["fingerprint"]
        saved = configs.from_json(path.read_text())
        configs.refuse_differences(saved, self.config, str(self.workdir), same_data=same)
        if before is not None and not same:
            raise UserError(
                f"{self.workdir} was trained on text with fingerprint {before}, and"
                f" data.source={self.config.data.source!r} now has {corpus.meta['fingerprint']}:"
                " restore the text, or give another --workdir"
            )
        vocabulary = self.run.facts.get("tokenizer", {}).get("fingerprint", corpus.tokenizer.fingerprint)
        if vocabulary != corpus.tokenizer.fingerprint:
            raise UserError(
                f"{self.workdir} was trained with the vocabulary {vocabulary}, and its folder {TOKENIZER} holds"
                f" {corpus.tokenizer.fingerprint}: restore it, or give another --workdir"
            )

    def begin(
        self, start: int, *, corpus: Corpus, graph: ModelGraph, batches: Batches, mesh, starts_from: dict | None
    ) -> None:
        """Notes a session that starts after `start` steps. Only now, when nothing is left to be refused, the workdir
        becomes that of a run: its config is written last. starts_from: where a new run's parameters come from."""
        config, tokenizer = self.config, corpus.tokenizer
        if self.enabled:
            tokenizer.save(self.workdir / TOKENIZER)
        device = jax.devices()[0]
        self.start, self.device_kind, self.n_devices = start, device.device_kind, mesh.size
        self.examples_per_pass = batches.examples_per_pass
        # Batches of a task are as long as their rows want.
        widths = getattr(batches.layout, "batches_by_width", None) or {config.seq_len: 1}
        shares = {width: n / sum(widths.values()) for width, n in widths.items()}
        self.tokens_per_step = round(config.batch_size * sum(width * share for width, share in shares.items()))
        flops = {width: train_flops(graph, config, tokenizer.size, width) for width in widths}
        self.flops = None if None in flops.values() else sum(flops[width] * share for width, share in shares.items())
        self.text, self.held_out = corpus.meta["train"], corpus.meta["valid_source"]
        self.task = None if corpus.task is None else corpus.task.name
        lines = metrics.read_metrics(self.workdir)
        self.seconds_before = max((line.get("seconds", 0.0) for line in lines if line["step"] <= start), default=0.0)
        # A run that was killed between saving a step and evaluating it does the latter when it resumes.
        self.has_evaluated = any(line["step"] == start and "eval/loss" in line for line in lines)
        if jax.process_count() > 1:
            self.has_evaluated = bool(multihost_utils.broadcast_one_to_all(np.asarray(self.has_evaluated)))
        self._metrics = metrics.Metrics(
            self.workdir,
            step=start,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=configs.flatten(config),
            enabled=self.enabled,
        )
        counts = graph.counts()
        total = counts.pop("total")
        self.run.start(
            from_step=start,
            devices={
                "kind": device.device_kind,
                "platform": device.platform,
                "count": mesh.size,
                "processes": jax.process_count(),
                "mesh": dict(mesh.shape),
            },
            corpus={key: corpus.meta[key] for key in ("source", "valid_source", "fingerprint", "licence")},
            tokenizer={
                "kind": tokenizer.kind,
                "size": tokenizer.size,
                "fingerprint": tokenizer.fingerprint,
                "lossless": tokenizer.lossless,
            },
            store={
                split: {f"n_{name}": value for name, value in corpus.meta[split].items()}
                for split in ("train", "valid")
            },
            layout=batches.layout.report,
            name=self.workdir.absolute().name,
            architecture=config.model.get("architecture", config.model.name),
            direction=config.model.get("direction"),
            objectives=list(config.objectives),
            parameters=counts,
            parameters_total=total,
            seeds=config.seeds.to_dict(),
            total_steps=config.total_steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_step=self.flops,
            **({"starts_from": starts_from} if starts_from else {}),
        )
        if self.enabled:
            metrics.write_atomically(self.workdir / CONFIG, configs.to_json(config))
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.say(
            f"{self.run.facts['architecture']} x {' + '.join(config.objectives)}: {total:,} parameters ({parts})\n"
            f"{self.text['tokens']:,} tokens of {corpus.meta['source']} by {tokenizer.kind} of {tokenizer.size:,};"
            f" {config.total_steps:,} steps of {self.tokens_per_step:,} tokens,"
            f" {config.total_steps * config.batch_size / self.examples_per_pass:.2f} epochs;"
            f" {mesh.size} x {device.device_kind}, {config.precision.compute}"
        )
        if config.optimizer.warmup_steps >= config.total_steps:
            self.say(
                f"optimizer.warmup_steps={config.optimizer.warmup_steps} lasts for the whole run of"
                f" {config.total_steps} steps: the learning rate never reaches optimizer.peak_lr"
            )
        self._progress = metrics.Progress(config.total_steps, start, enabled=self.enabled)
        self._began = self._last = time.perf_counter()
        self._last_step, self._paused = start, 0.0

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self._began

    def train(self, step: int, numbers: Mapping[str, float], *, line: bool = False) -> None:
        """Takes a step's numbers; every `log.every_steps`, or if `line`, writes the means since the last line."""
        for name in numbers:
            self._sums[name] = self._sums.get(name, 0.0) + numbers[name]
        self._count += 1
        self._progress.update(step)
        every, total = self.config.log.every_steps, self.config.total_steps
        if step % every and step != total and not line:
            return
        now = time.perf_counter()
        seconds = max(now - self._last - self._paused, 1e-9) / (step - self._last_step)
        values = {f"train/{name}": value / self._count for name, value in self._sums.items()}
        skipped, counts = numbers["skipped"], self._counts(step)
        values |= {
            "train/skipped": skipped,
            "train/skipped_in_a_row": numbers["skipped_in_a_row"],
            "train/learning_rate": optimizer.learning_rate_at(
                self.config.optimizer, self.config.optimizer.schedule_steps, step - 1 - int(skipped)
            ),
            "train/tokens": float(counts["tokens"]),
            "train/epochs": counts["epochs"],
            "train/tokens_per_second": self.tokens_per_step / seconds,
            "train/step_seconds": seconds,
            "seconds": self._seconds(),
        }
        if self.flops is not None:
            utilisation = chips.model_flops_utilisation(
                self.flops, seconds, self.device_kind, self.n_devices, self.config.precision.compute
            )
            if utilisation is not None:
                values["train/mfu"] = utilisation
        self._metrics.add(step, values)
        if line:
            self._metrics.flush()
        self._progress.update(step, loss=values["train/loss"], tokens_per_second=values["train/tokens_per_second"])
        self._sums, self._count = {}, 0
        self._last, self._last_step, self._paused = now, step, 0.0

    def pause(self, seconds: float) -> None:
        """Time that was not training, left out of tokens/s."""
        self._paused += seconds

    def evaluation(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes held-out numbers, as rows of results.jsonl and as a line of metrics.jsonl: the line last, by which a
        run that was killed on the way knows that it has evaluated."""
        self.pause(seconds)
        self._append_results(step, values)
        self._metrics.add(step, {**values, "eval/seconds": seconds, "seconds": self._seconds()})
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, _, value in metrics.held_out(values)
            if not name.endswith(metrics.PERPLEXITY)
        )
        self._progress.message(f"step {step}: held-out {shown}")
        if self.enabled:
            self._update(step)

    def _append_results(self, step: int, values: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        prefix = "" if self.task is None else f"{self.task}/"
        metrics.append_results(
            self.workdir,
            [
                metrics.Result(
                    run=self.run.facts["name"],
                    step=step,
                    suite="pretraining" if self.task is None else "task",
                    metric=f"{prefix}{name}",
                    **seeds(self.config, self.run.facts),
                    split="valid" if self.task is None else self.held_out,
                    n=n,
                    value=value,
                )
                for name, n, value in metrics.held_out(values)
            ],
        )

    def _counts(self, step: int) -> dict[str, float | None]:
        """`metrics.COUNTS` since step 0: of the steps of a run that this one goes on from (`init.keep=all`) as many as
        it had, for its rows were others."""
        begins, earlier = metrics.counted_before(self.run.facts, self.config.init.keep)
        epochs = (step - begins) * self.config.batch_size / self.examples_per_pass
        own = {name: epochs * self.text[of] for name, of in metrics.TEXT_COUNTS.items()}
        own |= {"tokens": (step - begins) * self.tokens_per_step, "epochs": epochs}
        counts = {name: value + earlier.get(name, 0) for name, value in own.items()}
        # Rounded, since the sum of the two parts of a run that goes on differs from the whole in the last bit.
        counts = {name: round(value, 12) if name == "epochs" else round(value) for name, value in counts.items()}
        known = self.flops is not None and (not begins or "flops" in earlier)
        return counts | {"flops": earlier.get("flops", 0) + (step - begins) * self.flops if known else None}

    def _update(self, step: int) -> None:
        before = self.run.facts.get("peak_memory", {})
        self.run.update(
            step=step,
            **self._counts(step),
            seconds=self._seconds(),
            peak_memory={what: max(size, before.get(what, 0)) for what, size in host.peak_memory().items()},
        )

    def best(self, best: Best) -> None:
        """Notes which evaluation is the best so far."""
        self.run.note(**{checkpoint.BEST: best.record()})

    def finish(self, step: int, early: Best | None = None) -> None:
        """Notes that the run is complete and closes everything. early: why it ended before its last step."""
        if step > self.start:
            self._update(step)
        self.run.facts.pop("stopped_early", None)
        self.run.finish(**({"stopped_early": step} if early else {}))
        self.close()
        why = f", {early.since} evaluations after the best {early.name}, of step {early.step:,}" if early else ""
        self.say(f"complete after {step:,} steps{why}: {self.workdir}")

    def interrupted(self, step: int) -> None:
        """Notes that the run was told to stop after `step`, which is saved."""
        if step > self.start:
            self._update(step)
        self.run.note(status="interrupted")
        self.close()
        self.say(f"interrupted after step {step:,} of {self.config.total_steps:,}, which is saved: {self.workdir}")

    def fail(self, error: BaseException) -> None:
        """Notes why the run ended before its time."""
        self.run.note(status="failed", error=" ".join(str(error).split()) or type(error).__name__)
        self.close()

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._progress is not None:
            self._progress.close()
            self._progress = None
