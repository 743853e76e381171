"""The evaluations that any run can be given, in one table: `SUITES[name]` = (function, settings).

A suite's function takes a `Run` (and, if it is one of tasks, the data of a task) and returns an `Outcome`: rows for
results.jsonl, files for the workdir, tables for the terminal, which also stand in evaluations/. `evaluate`
runs suites one after the other, writes what each returns as soon as it is there, and passes over a suite whose rows are
there already for that step, text and settings (`evaluations.json` says with which settings rows were made).

Text that a suite reads itself (pseudo-words, samples) comes from the run's own source, not from its store: the same
documents, split in the same way, whatever the tokenizer. What is chosen from it depends on the corpus alone and is
remembered in the cache, so that all runs over one corpus share sentences and pairs and only the first one reads them.

Suites that read no corpus of the run (`Suite.of_corpus`) take any model that `plm.load` does.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from plm.analysis import (
    minimal_pairs,
    ngrams,
    overlap,
    probes,
    pseudo_words,
    samples,
    task_suite,
    word_sense,
    zero_shot,
)
from plm.analysis.results import MAJORITY, Table, layer_name
from plm.cache import LocklessError, cache_directory, locked, once, writable
from plm.data import sources
from plm.data.examples import COPIED_WORDS
from plm.data.pipeline import Corpus, open_corpus, open_text
from plm.data.tasks import TaskData
from plm.errors import UserError
from plm.inference.model import Model, is_run, load, read_run
from plm.models.task_heads import chosen_layers
from plm.progress import Progress
from plm.randomness import stable_hash
from plm.training import checkpoint, metrics
from plm.training.loop import make_evaluator
from plm.training.record import seeds
from plm.training.sharding import paths_and_leaves

EVALUATIONS, SAMPLES, SENSES = "evaluations.json", "samples.json", "senses.json"
TABLES = "evaluations"  # the folder of what suites show
VERSION = 1  # raise it whenever all suites would choose other sentences or count otherwise; `Suite.version` is of one
READ_CHARACTERS = 1 << 28  # of training and of held-out text, at most, that pairs and samples are chosen from
READ_BYTES = 1 << 26  # of pretraining text, at most, that a run on a task looks through for its own examples: seconds
NGRAM_TOKENS = 100_000_000  # n-gram tables take about 200 bytes a token


@dataclasses.dataclass(frozen=True)
class Outcome:
    """rows: dicts with metric, split, n, value and perhaps predictions, low, high. files: name -> JSON value. note:
    what the user is told beside the number of rows. tables: are shown, and kept as JSON."""

    rows: list[dict]
    files: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    tables: Sequence[Table] = ()


class Run:
    """A model under evaluation; what is expensive is opened when the first suite asks for it.

    spec: SRC[@STEP]. tasks: what the suites of tasks are run on. pairs: files or folders of minimal pairs, by default
    the generated ones. wsd: a folder of sense-tagged corpora. text: a corpus that was not trained on. output:
    where rows and files go, by default the run itself; weights that are no run of ours need one. progress: show bars.

    Errors: UserError when there is no such run or checkpoint, or its text is not what it was.
    """

    def __init__(
        self,
        spec: str,
        *,
        tasks: Sequence[TaskData] = (),
        pairs: Sequence[str] = (),
        wsd: str = "",
        text: str = "",
        output: epath.PathLike = "",
        progress: bool = True,
    ):
        self.tasks, self.pair_files, self.wsd_folder, self.progress = tuple(tasks), tuple(pairs), wsd, progress
        self.text_source = text
        self.source, self._step = checkpoint.split_step(spec)
        self.workdir = epath.Path(self.source)
        self.is_run = self._step is not None or is_run(self.source)
        if not self.is_run:
            self.config, self.tokenizer = self.model.config, self.model.tokenizer
            if not output:
                raise UserError(f"{self.source} is no run of ours: --output=DIR says where its results go")
        else:
            self.config, self.tokenizer = read_run(self.workdir)
        self.output = epath.Path(output) if output else self.workdir
        self.facts = metrics.RunRecord(self.workdir, enabled=False).facts if self.is_run else {}
        self.of_control: dict[str, Any] = {}  # what depends on no training, kept from checkpoint to checkpoint

    @property
    def name(self) -> str:
        return self.facts.get("name") or self.workdir.absolute().name

    def at(self, step: int) -> "Run":
        """The same at another checkpoint; all that does not depend on it is shared."""
        other = copy.copy(self)
        other.model = self.model.at(step)
        return other

    @functools.cached_property
    def model(self) -> Model:
        return load(self.source if self._step is None else f"{self.source}@{self._step}")

    @property
    def step(self) -> int:
        return self.model.step

    @functools.cached_property
    def corpus(self) -> Corpus:
        corpus = open_corpus(self.config.data, tokenizer_directory=self.workdir / "tokenizer", progress=self.progress)
        before, now = self.facts.get("corpus", {}).get("fingerprint"), corpus.meta["fingerprint"]
        if before is not None and before != now:
            raise UserError(
                f"{self.workdir} was trained on text with fingerprint {before}, and"
                f" data.source={self.config.data.source!r} now has {now}: restore the text"
            )
        if not corpus.valid.n_tokens:
            raise UserError(f"{self.workdir} has no held-out text: data.valid_fraction or data.valid_source gives some")
        return corpus

    @functools.cached_property
    def pairs(self) -> list[minimal_pairs.Pair]:
        return minimal_pairs.read(self.pair_files) if self.pair_files else minimal_pairs.generated()

    @functools.cached_property
    def pair_set(self) -> str:
        """What rows call the pairs."""
        return _set_name(self.pair_files, _of_pairs(self)) if self.pair_files else minimal_pairs.GENERATED_SET

    @functools.cached_property
    def wsd(self) -> word_sense.Data:
        if not self.wsd_folder:
            raise UserError("suite 'word_sense' reads sense-tagged corpora: --wsd=DIR names their folder")
        return word_sense.find(self.wsd_folder)

    @functools.cached_property
    def wsd_fingerprint(self) -> str:
        found = hashlib.sha256()
        for path in self.wsd.files:
            found.update(epath.Path(path).read_bytes())
        return found.hexdigest()[:32]

    @property
    def wsd_set(self) -> str:
        """What rows call the sense-tagged corpora."""
        return _set_name([self.wsd_folder], self.wsd_fingerprint)

    @functools.cached_property
    def task(self) -> TaskData:
        """The task that a fine-tuned run is of."""
        return task_suite.task_of(self.config)

    @functools.cached_property
    def pretrained_share(self) -> tuple[float | None, str]:
        """`_pretrained_share` of its task."""
        return _pretrained_share(self, self.task)

    @functools.cached_property
    def text(self) -> Corpus:
        if not self.text_source:
            raise UserError("suite 'text' measures the model on other text: --text=SOURCE names it")
        if not self.is_run:
            raise UserError(f"suite 'text' needs a run of ours, which says how it reads text; {self.source} is none")
        return open_text(self.text_source, self.tokenizer, progress=self.progress)

    @functools.cached_property
    def initial(self) -> Model:
        """The model before training: the control."""
        return self.model.initial()

    @functools.cached_property
    def chosen(self) -> dict:
        """{"pairs": [pseudo_words.Pair], "samples": as `samples.choose` gives them} of the run's text."""
        pair_settings, sample_settings = SUITES["pseudo_words"].settings, SUITES["samples"].settings
        key = (VERSION, READ_CHARACTERS, pair_settings, sample_settings, self.corpus.meta["fingerprint"])

        def choose(path: Path) -> None:
            held_out: list[Sequence[str]] = []
            # `choose` counts the training text before it looks at the held-out one, which is there by then.
            pairs = pseudo_words.choose(self._train_documents(held_out), held_out, pair_settings)
            chosen = {
                "pairs": [dataclasses.asdict(pair) for pair in pairs],
                "samples": samples.choose(held_out, sample_settings),
            }
            path.write_text(json.dumps(chosen), "utf-8")

        name = f"{stable_hash('held-out text', *key, bits=128):032x}.json"
        found = json.loads(once(cache_directory() / "held_out" / name, choose).read_text("utf-8"))
        return {"pairs": [_pair(pair) for pair in found["pairs"]], "samples": found["samples"]}

    def _train_shards(self) -> list:
        return sources.parse(self.config.data.source, invalid_utf8=self.config.data.invalid_utf8).shards()

    def train_bytes(self) -> int:
        """How much `train_documents` reads."""
        return sum(shard.bytes for shard in self._train_shards())

    def train_documents(self) -> Iterator[Sequence[str]]:
        """The sentences of every document that the run was trained on, read once more from its source."""
        data, shards = self.config.data, self._train_shards()
        fraction = 0.0 if data.valid_source else data.valid_fraction
        bar = Progress("reading text", sum(shard.bytes for shard in shards), unit="B", enabled=self.progress)
        for shard in shards:
            for document in shard.documents():
                if sources.split_of(document, fraction) == "train":
                    yield document.sentences
            bar.add(shard.bytes)
        bar.close()

    def _train_documents(self, held_out: list) -> Iterator[Sequence[str]]:
        """The training documents; on the way puts the held-out ones into `held_out`."""
        data = self.config.data
        fraction = 0.0 if data.valid_source else data.valid_fraction
        read = {"train": 0, "valid": 0}
        for spec, fixed in ((data.source, None), (data.valid_source, "valid")):
            if not spec:
                continue
            shards = sources.parse(spec, invalid_utf8=data.invalid_utf8).shards()
            bar = Progress("reading text", sum(shard.bytes for shard in shards), unit="B", enabled=self.progress)
            for shard in shards:
                for document in shard.documents():
                    split = fixed or sources.split_of(document, fraction)
                    read[split] += sum(map(len, document.sentences))
                    if read[split] > READ_CHARACTERS:
                        continue
                    if split == "train":
                        yield document.sentences
                    else:
                        held_out.append(document.sentences)
                bar.add(shard.bytes)
                if read[fixed or "train"] > READ_CHARACTERS:
                    break
            bar.close()


def _set_name(paths: Sequence[str], fingerprint: str) -> str:
    """Of files that the user names: theirs, and a part of the fingerprint of what they hold."""
    names = (os.path.basename(os.path.abspath(path)).partition(".")[0] for path in paths)
    return f"{'+'.join(names)}-{fingerprint[:8]}"


def _pair(values: Mapping) -> pseudo_words.Pair:
    sides = (tuple(pseudo_words.Occurrence(tuple(o["words"]), o["position"]) for o in s) for s in values["occurrences"])
    return pseudo_words.Pair(tuple(values["words"]), tuple(sides))


# --------------------------------------------------------------------------------------------------------- the suites


def evaluate_perplexity(run: Run, settings: Mapping) -> Outcome:
    """The loop's own held-out numbers for this checkpoint, in the loop's own batches and precision."""
    return _held_out(run, run.corpus, "valid")


def evaluate_text(run: Run, settings: Mapping) -> Outcome:
    """The same on other text, all of it."""
    outcome = _held_out(run, run.text, run.text_source, limit=0)
    body = [[row["metric"], row["n"], row["value"]] for row in outcome.rows]
    table = Table(f"{run.name} on {run.text_source}", ["metric", "targets", "value"], body)
    return dataclasses.replace(outcome, tables=[table])


def _held_out(run: Run, corpus: Corpus, split: str, limit: int | None = None) -> Outcome:
    """limit: batches, 0 for all; None: as many as the run's config says."""
    evaluator = make_evaluator(run.config, corpus)
    if limit is not None:
        evaluator = dataclasses.replace(evaluator, limit=limit)
    with jax.set_mesh(evaluator.mesh):
        values = evaluator(jax.device_put(run.model.params, evaluator.batches.replicated))
    return Outcome(
        [{"metric": name, "split": split, "n": n, "value": value} for name, n, value in metrics.held_out(values)]
    )


def _countable(run: Run, suite: str) -> Corpus:
    corpus = run.corpus
    if corpus.train.n_tokens > NGRAM_TOKENS:
        raise UserError(
            f"suite {suite}: {corpus.train.n_tokens:,} training tokens would need about"
            f" {corpus.train.n_tokens * 200 / 1e9:.0f} GB; at most {NGRAM_TOKENS:,} are counted"
        )
    return corpus


def _stream_layout(run: Run) -> str:
    """Sentence markers are targets in lanes of words only; all other layouts read the same stream."""
    return "lanes" if run.config.data.layout == "lanes" else "blocks"


def evaluate_ngrams(run: Run, settings: Mapping) -> Outcome:
    """Kneser-Ney on the run's own ids and held-out targets: forward, for two towers backward too; masked: the unigram.

    Kept beside the store that they were counted on, so that runs over one store count once.
    """
    corpus, config = _countable(run, "ngrams"), run.config
    direction = {"both": "both", "full": "masked"}.get(config.model.get("direction"), "forward")
    orders = settings["orders"]
    layout = _stream_layout(run)
    splits = (corpus.train.directory, corpus.valid.directory)
    key = ("n-grams", VERSION, layout, orders, *(f"{d.parent.name}/{d.name}" for d in splits))
    folder = corpus.train.directory / "plans"

    def path(name: str):
        return folder / f"ngrams-{name}-{stable_hash(*key, name, bits=64):016x}.json"

    names = ("forward", "backward") if direction == "both" else (direction,)
    if not all(path(name).exists() for name in names):
        with writable(folder), locked(folder / "ngrams"):
            if not all(path(name).exists() for name in names):
                rows = ngrams.baselines(
                    corpus.train,
                    corpus.valid,
                    run.tokenizer,
                    layout=layout,
                    orders=(1,) if direction == "masked" else orders,
                    backward=direction == "both",
                    masked=direction == "masked",
                )
                for name in names:
                    own = [row for row in rows if row["metric"].partition("/")[2].split("_")[0] == name]
                    metrics.write_atomically(path(name), json.dumps(own))
    return Outcome([row for name in names for row in json.loads(path(name).read_text("utf-8"))])


def evaluate_samples(run: Run, settings: samples.Settings) -> Outcome:
    """Continuations or filled masks in samples.json; the row only points there."""
    made = samples.make(run.model, run.chosen["samples"], settings)
    row = {"metric": "texts", "split": "valid", "n": len(made), "value": len(made), "predictions": SAMPLES}
    return Outcome([row], {SAMPLES: made})


def _with_other_steps(run: Run, made: list[dict]) -> list[dict]:
    """What samples.json holds of other checkpoints, and after that what this one made."""
    path = run.output / SAMPLES
    before = json.loads(path.read_text("utf-8")) if path.exists() else []
    return [*(one for one in before if one.get("step") != run.step), *made]


def evaluate_pseudo_words(run: Run, settings: pseudo_words.Settings) -> Outcome:
    """The trained model, the same model before training and a static vector on pairs of words written alike."""
    pairs = run.chosen["pairs"]
    total = sum(4 * pair.n for pair in pairs) * 2  # both forms of every sentence, trained and not
    bar = Progress("pseudo-words", total, unit="sentences", enabled=run.progress)

    def embedder(model: Model) -> pseudo_words.Embed:
        def embed(sentences: list[list[str]], targets: list[int]) -> dict[str, np.ndarray]:
            found: list = [None] * len(sentences)
            done = 0
            sentences, targets = _fitting(model, sentences, targets)
            texts = [" ".join(words) for words in sentences]
            for index, vectors in model.embed_each(texts, "all", "words"):
                found[index] = vectors[:, targets[index]]
                done += 1
                if done % 50 == 0:  # not one by one: the first one waits for a compilation and says nothing of speed
                    bar.add(50)
            bar.add(done % 50)
            by_layer = np.stack(found, axis=1)
            return {layer_name(layer): by_layer[layer] for layer in range(len(by_layer))}

        return embed

    rows, record = pseudo_words.evaluate(
        embedder(run.model), pairs, control=embedder(run.model.initial()), settings=settings
    )
    bar.close()
    rows = [row | {"predictions": SENSES} for row in rows]
    return Outcome(rows, {SENSES: {"step": run.step, **record}}, record.get("reason", ""))


def _fitting(model: Model, sentences: Sequence[list[str]], targets: Sequence[int]) -> tuple[list[list[str]], list[int]]:
    """Sentences that the model can read whole: of a longer one, the words that are farthest from the target go."""
    if model.longest is None:
        return list(sentences), list(targets)
    room = model.longest - sum(map(len, model.frame))
    lengths = [len(pieces) for pieces in model.tokenize([" ".join(words) for words in sentences])]
    kept = []
    for words, target, length in zip(sentences, targets, lengths, strict=True):
        while length > room and len(words) > 1:
            from_start = target > len(words) - 1 - target
            words, target = (words[1:], target - 1) if from_start else (words[:-1], target)
            length = len(model.tokenize([" ".join(words)])[0])
        kept.append((words, target))
    return [words for words, _ in kept], [target for _, target in kept]


def _overlaps(run: Run, settings: Mapping, data: TaskData, *, at_once: bool = False) -> dict[str, overlap.Overlap]:
    """{split: how much of it the run was trained on}. Kept in the cache by text and task, so that all runs over one
    corpus read it once. at_once: {} for what is not there yet and would take more than seconds."""
    trained_on = run.facts.get("corpus", {}).get("fingerprint") or run.corpus.meta["fingerprint"]
    key = (VERSION, dict(settings), trained_on, data.fingerprint)
    path = cache_directory() / "overlaps" / f"{stable_hash('overlap', *key, bits=128):032x}.json"
    if at_once and not path.exists() and run.train_bytes() > READ_BYTES:
        return {}

    def count(path: Path) -> None:
        _ = run.corpus  # an error for text that has changed since
        splits = {split: data.examples(split) for split in data.splits}
        found = overlap.overlaps(splits, run.train_documents(), length=settings["length"])
        path.write_text(json.dumps({name: vars(one) for name, one in found.items()}), "utf-8")

    once(path, count)
    return {name: overlap.Overlap(**one) for name, one in json.loads(path.read_text("utf-8")).items()}


def evaluate_overlap(run: Run, settings: Mapping, data: TaskData) -> Outcome:
    """The share of a task's runs of eight words, and of its examples, that the training text holds."""
    found = _overlaps(run, settings, data)
    rows = []
    for split, one in found.items():
        touched = one.touched / one.examples
        rows.append({"metric": f"{data.name}/{overlap.SHARE}", "split": split, "n": one.runs, "value": one.share})
        rows.append({"metric": f"{data.name}/examples", "split": split, "n": one.examples, "value": touched})
    shares = ", ".join(f"{split} {one.share:.2%}" + " FLAGGED" * one.flagged for split, one in found.items())
    return Outcome(rows, note=f"8-grams of {data.name} in the pretraining text: {shares}")


def evaluate_minimal_pairs(run: Run, settings: Mapping) -> Outcome:
    bar = Progress("minimal pairs", 2 * minimal_pairs.n_sentences(run.pairs), unit="sentences", enabled=run.progress)
    judged = {"trained": minimal_pairs.judge(run.model, run.pairs, bar.add)}
    judged["random_init"] = _of_control(
        run, "minimal pairs", lambda: minimal_pairs.judge(run.initial, run.pairs, bar.add)
    )
    bar.close()
    rows, table = minimal_pairs.summary(run.pairs, judged, run.pair_set)
    return Outcome(rows, tables=[table])


def evaluate_pair_ngrams(run: Run, settings: Mapping) -> Outcome:
    """What counting the run's own training text makes of minimal pairs (docs/protocol.md, 13)."""
    corpus, tokenizer = _countable(run, "pair_ngrams"), run.tokenizer
    sentences = minimal_pairs.distinct(run.pairs)
    ids = [tuple(tokenizer.target_id(np.asarray(one)).tolist()) for one in tokenizer.encode(sentences)]
    layout = _stream_layout(run)
    if layout == "lanes" and "eos" in tokenizer.roles:
        ids = [(*one, tokenizer.role("eos")) for one in ids]
    models = ngrams.kneser_ney(
        *ngrams.stream(corpus.train, tokenizer, layout=layout), tokenizer.size, settings["orders"]
    )
    read_as = dict(zip(sentences, ids, strict=True))
    judged = {}
    for order, totals in ngrams.sentence_totals(models, ids).items():
        by_sentence = {"forward": dict(zip(sentences, totals.tolist(), strict=True))}
        judged[f"kneser_ney_{order}"] = minimal_pairs.credited(run.pairs, by_sentence, read_as)
    rows, table = minimal_pairs.summary(run.pairs, judged, run.pair_set)
    return Outcome(rows, tables=[table])


def evaluate_zero_shot(run: Run, settings: Mapping, data: TaskData) -> Outcome:
    bar = Progress(f"zero-shot {data.name}", 2 * zero_shot.n_scored(data), unit="examples", enabled=run.progress)
    found = {"trained": zero_shot.measure(run.model, data, bar.add)}
    found["random_init"] = _of_control(
        run, f"zero-shot {data.fingerprint}", lambda: zero_shot.measure(run.initial, data, bar.add)
    )
    bar.close()
    rows, table = zero_shot.summary(data, found)
    return Outcome(rows, tables=[table])


def evaluate_probes(run: Run, settings: probes.Settings, data: TaskData) -> Outcome:
    probes.check(data)
    bar = Progress(f"probes {data.name}", 2 * probes.n_steps(data, settings), unit="examples", enabled=run.progress)
    found = {"trained": probes.measure(run.model, data, settings, bar.add)}
    found["random_init"] = _of_control(
        run, f"probes {data.fingerprint}", lambda: probes.measure(run.initial, data, settings, bar.add)
    )
    bar.close()
    rows, tables = probes.summary(data, settings, found)
    return Outcome(rows, tables=tables)


def evaluate_word_sense(run: Run, settings: Mapping) -> Outcome:
    bar = Progress("word senses", 2 * word_sense.n_sentences(run.wsd), unit="sentences", enabled=run.progress)
    found = {"trained": word_sense.predict(run.model, run.wsd, bar.add)}
    found["random_init"] = _of_control(run, "word sense", lambda: word_sense.predict(run.initial, run.wsd, bar.add))
    bar.close()
    rows, table = word_sense.summary(run.wsd, found, run.wsd_set)
    return Outcome(rows, tables=[table])


def evaluate_task(run: Run, settings: Mapping) -> Outcome:
    """A fine-tuned run on its own task: what it was selected by, and what is reported."""
    predictor = task_suite.Predictor(run.config, run.tokenizer, run.model.params, task=run.task, progress=run.progress)
    rows, body = [], []
    parts = task_suite.evaluate(predictor)
    for part in parts:
        file = task_suite.write_predictions(run.output, predictor.task, run.step, part)
        shared = {"split": part.name, "n": part.n, "predictions": file}
        rows += [shared | {"metric": f"{predictor.task.name}/{m}", "value": v} for m, v in part.values.items()]
        body += [[m, part.name, part.n, v] for m, v in part.values.items()] or [["(no labels)", part.name, part.n, ""]]
    for part in parts:
        for m, v in part.majority.items():
            name = f"{predictor.task.name}/{MAJORITY}/{m}"
            rows.append({"metric": name, "split": part.name, "n": part.n, "value": v})
            body.append([f"{m} of the commonest class", part.name, part.n, v])
    shares = mix_shares(run.config, run.model.params)
    for place, own in shares.items():
        for layer, share in own.items():
            name = f"{predictor.task.name}/{task_suite.MIX}/{place}/{layer}"
            rows.append({"metric": name, "split": "learned", "n": len(own), "value": share})
    share, known = run.pretrained_share
    if share is not None:
        rows.append({"metric": f"{predictor.task.name}/{overlap.PRETRAINED}", "split": "all", "n": 1, "value": share})
    title = f"{predictor.task.name} by {run.name} ({known})"
    tables = [Table(title, ["metric", "examples of", "n", "value"], body)]
    if shares:
        layers = list(shares["mix 0"])
        mixes = [[place, *own.values()] for place, own in shares.items()]
        tables.append(Table("shares of the layers in the mix", ["mix", *layers], mixes))
    return Outcome(rows, tables=tables, note=f"predictions in {run.output / task_suite.FOLDER}")


def mix_shares(config, params: Mapping) -> dict[str, dict[str, float]]:
    """{place: {layer: its share}}: softmax of the weights of a head's mix of layers (ELMo figure 2), in the order of
    insertion. config: of the run."""
    found = []
    for path, value in paths_and_leaves(params):
        if match := re.fullmatch(r"heads/(\w+)/reader/mixes/\d+/weights", path):
            weights = np.asarray(value, np.float64)
            shares = np.exp(weights - weights.max())
            layers = map(layer_name, chosen_layers(config.model, config.objectives[match[1]]))
            found.append(dict(zip(layers, (shares / shares.sum()).tolist(), strict=True)))
    return {f"mix {number}": own for number, own in enumerate(found)}


def _pretrained_share(run: Run, data: TaskData) -> tuple[float | None, str]:
    """(the largest share of a split's 8-grams that the model was pretrained on, that in words): as the suite overlap
    measured it for the run that this one starts from, or measured now where that takes seconds."""
    source = (run.facts.get("starts_from") or {}).get("source")
    shares: list[float] = []
    if source and is_run(source):
        noted = _noted(epath.Path(source))

        def is_of_task(row: metrics.Result) -> bool:
            stamp = noted.get(f"overlap {data.name}@{row.step}", {})
            return (row.suite, row.metric, stamp.get("task")) == (
                "overlap",
                f"{data.name}/{overlap.SHARE}",
                data.fingerprint,
            )

        shares = [row.value for row in metrics.read_results(source) if is_of_task(row)]
        if not shares:
            with contextlib.suppress(UserError):  # its text has gone, or has changed
                pretrained = Run(source, progress=run.progress)
                found = _overlaps(pretrained, SUITES["overlap"].settings, data, at_once=True)
                shares = [one.share for one in found.values()]
    if not shares:
        return (
            None,
            f"how much of it was pretrained on: --suite=overlap --task={data.name},... on {source or 'its source'}",
        )
    return max(shares), f"{max(shares):.2%} of its 8-grams were pretrained on{overlap.flag(max(shares))}"


def _of_control(run: Run, name: str, measure: Callable[[], Any]) -> Any:
    """What a model gives before training: the same at every checkpoint, so measured once in a process."""
    if name not in run.of_control:
        run.of_control[name] = measure()
    return run.of_control[name]


def _own_pairs(run: Run) -> str:
    return run.pair_set if run.pair_files else ""


def _of_pairs(run: Run) -> str:
    return f"{stable_hash('minimal pairs', *map(repr, run.pairs), bits=128):032x}"


def _of_own_task(run: Run) -> str:
    return f"{run.task.fingerprint}, pretrained on: {run.pretrained_share[0]}"


@dataclasses.dataclass(frozen=True)
class Suite:
    """function(run, settings) -> Outcome, of a suite of tasks function(run, settings, data), once for each task.

    settings: a mapping or a dataclass, a part of what makes rows the same. of_corpus: reads the text that the run was
    trained on. fingerprint: of what else a suite reads. part: the name of a part of it whose rows and tables stand
    beside those of others, "" where they go by the suite's name alone. headline: a regex of the metrics shown over
    checkpoints. version: raise it whenever the same settings would give other rows.
    """

    function: Callable[..., Outcome]
    settings: Any
    of_tasks: bool = False
    of_corpus: bool = True
    fingerprint: Callable[[Run], str] | None = None
    part: Callable[[Run], str] = lambda run: ""
    headline: str = ".*"
    version: int = VERSION


SUITES: dict[str, Suite] = {
    "ngrams": Suite(evaluate_ngrams, {"orders": ngrams.ORDERS}),
    "samples": Suite(evaluate_samples, samples.Settings()),
    "pseudo_words": Suite(evaluate_pseudo_words, pseudo_words.Settings()),
    "perplexity": Suite(evaluate_perplexity, {}),
    "text": Suite(evaluate_text, {}, of_corpus=False, fingerprint=lambda run: run.text.meta["fingerprint"]),
    "overlap": Suite(evaluate_overlap, {"length": COPIED_WORDS}, of_tasks=True),
    "minimal_pairs": Suite(
        evaluate_minimal_pairs,
        {},
        of_corpus=False,
        fingerprint=_of_pairs,
        part=_own_pairs,
        headline=r".*/(all|mean over phenomena)",
    ),
    "pair_ngrams": Suite(
        evaluate_pair_ngrams,
        {"orders": ngrams.ORDERS},
        fingerprint=_of_pairs,
        part=_own_pairs,
        headline=r".*/(all|mean over phenomena)",
    ),
    "zero_shot": Suite(evaluate_zero_shot, {}, of_tasks=True, of_corpus=False),
    "probes": Suite(
        evaluate_probes,
        probes.Settings(),
        of_tasks=True,
        of_corpus=False,
        headline=r".*/trained/(last|mean)/.*",
        version=2,  # 1: the learning rate was 0 before the last epoch ended
    ),
    "task": Suite(evaluate_task, {}, of_corpus=False, fingerprint=_of_own_task),
    "word_sense": Suite(
        evaluate_word_sense,
        {},
        of_corpus=False,
        fingerprint=lambda run: run.wsd_fingerprint,
        part=lambda run: run.wsd_set,
        headline=r"(first_sense|trained/last/.*)/all",
    ),
}


# ------------------------------------------------------------------------------------------------------- running them


def every_step(spec: str, names: Sequence[str], *, show: Callable[[str], None] = print, **options) -> None:
    """`evaluate` at every kept checkpoint of SRC@all, oldest first; shows how the suites' headlines go over steps.

    options: of `Run` (tasks, pairs, wsd, output, progress) and of `evaluate` (again, say).
    """
    source = spec.removesuffix("@all")
    if not is_run(source):
        raise UserError(f"model {spec!r}: @all means all checkpoints of a run, and {source} is no run of ours")
    steps = checkpoint.kept_steps(source)
    told = {key: options.pop(key) for key in ("again", "say") if key in options}
    run = Run(f"{source}@{steps[0]}", **options)
    for step in steps:
        run = run if step == steps[0] else run.at(step)
        evaluate(run, names, show=lambda text: None, **told)
    for name in dict.fromkeys(names):
        show(over_steps(run, name, steps).text() + "\n")


def over_steps(run: Run, name: str, steps: Sequence[int]) -> Table:
    """The headline metrics of a suite, a row each, over checkpoints."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in _rows_there(run, name):
        if row.step in steps and re.fullmatch(SUITES[name].headline, row.metric):
            values.setdefault((row.metric, row.split), {})[row.step] = row.value
    body = [[metric, split, *(found.get(step) for step in steps)] for (metric, split), found in values.items()]
    return Table(f"{name} of {run.name} over steps", ["metric", "split", *(f"{step:,}" for step in steps)], body)


def evaluate(
    run: Run,
    names: Sequence[str],
    *,
    again: bool = False,
    say: Callable[[str], None] = print,
    show: Callable[[str], None] = lambda text: None,
) -> list[metrics.Result]:
    """Runs the suites in this order; returns the rows that were appended to results.jsonl.

    again: also those that are there. say: gets a line for each suite. show: gets the tables of those that have some,
    also where they were there already.

    Errors: UserError for an unknown suite and for one of tasks without a task or with two of one name, before anything
    runs, and whatever a suite refuses.
    """
    for name in names:
        if name not in SUITES:
            raise UserError(f"suite {name!r} is not known: choose from {', '.join(SUITES)}")
        if SUITES[name].of_tasks and not run.tasks:
            raise UserError(f"suite {name!r} is measured on tasks: --task=NAME[,files=...] names one")
        twice = [one for one, n in Counter(data.name for data in run.tasks).items() if n > 1]
        if SUITES[name].of_tasks and twice:
            raise UserError(
                f"two tasks are called {twice[0]!r}, as their results would be: give name=..., which custom takes, or"
                " measure them one after the other"
            )
        if SUITES[name].of_corpus and not run.is_run:
            raise UserError(f"suite {name!r} reads the text that a run was trained on; {run.source} is no run of ours")
        if SUITES[name].fingerprint is not None:
            SUITES[name].fingerprint(run)  # what is wrong with its files is said before anything runs
    appended: list[metrics.Result] = []
    for name in dict.fromkeys(names):
        for data in run.tasks if SUITES[name].of_tasks else (None,):
            appended += _evaluate_one(run, name, data, again, say, show)
    return appended


def _evaluate_one(
    run: Run, name: str, data: TaskData | None, again: bool, say: Callable, show: Callable
) -> list[metrics.Result]:
    suite = SUITES[name]
    label = " ".join(filter(None, [name, suite.part(run), data.name if data is not None else ""]))
    stamp = _stamp(run, suite, data)
    if not again and _is_there(run, name, label, stamp):
        say(f"{label}: there already for step {run.step:,}")
        _show(run, label, show)
        return []
    began = time.perf_counter()
    outcome = suite.function(run, suite.settings, *(() if data is None else (data,)))
    files = dict(outcome.files)
    if outcome.tables:
        path = _tables_path(run, label)
        files[path] = {"model": run.source, "step": run.step, **stamp, "tables": list(map(vars, outcome.tables))}
        rows = [_row(run, name, {"predictions": path} | row) for row in outcome.rows]
    else:
        rows = [_row(run, name, row) for row in outcome.rows]
    with _only_writer(run.output):
        if name == "samples":
            files[SAMPLES] = _with_other_steps(run, files[SAMPLES])
        for file, value in files.items():
            metrics.write_atomically(run.output / file, json.dumps(value, indent=1) + "\n")
        metrics.append_results(run.output, rows)
        _note(run, label, stamp)
    seconds = time.perf_counter() - began
    note = f" ({outcome.note})" if outcome.note else ""
    say(f"{label}: step {run.step:,}, {len(rows)} rows in {seconds:.1f} s{note}")
    _show(run, label, show)
    return rows


@contextlib.contextmanager
def _only_writer(folder: epath.Path) -> Iterator[None]:
    """Of files there that several measurements add to; without locks, as in a bucket, the last one is right."""
    with contextlib.ExitStack() as lock:
        if "://" not in str(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(LocklessError):
                    lock.enter_context(locked(Path(folder) / f".{EVALUATIONS}"))
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        yield


def _tables_path(run: Run, label: str) -> str:
    """In the output folder; several models may share one that is no run's."""
    own = "" if run.output == run.workdir else f"{run.name} "
    return f"{TABLES}/{own}{label} {run.step}.json".replace(" ", "-")


def _show(run: Run, label: str, show: Callable[[str], None]) -> None:
    path = run.output / _tables_path(run, label)
    if path.exists():
        for table in json.loads(path.read_text("utf-8"))["tables"]:
            show(Table(**table).text() + "\n")


def _row(run: Run, suite: str, row: Mapping) -> metrics.Result:
    values = {key: value for key, value in row.items() if key != "suite"}
    return metrics.Result(run=run.name, step=run.step, suite=suite, **seeds(run.config, run.facts), **values)


def _stamp(run: Run, suite: Suite, data: TaskData | None) -> dict:
    """What rows of a suite depend on beside the checkpoint; comes back from JSON as it was."""
    settings = suite.settings
    settings = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)
    stamp: dict[str, Any] = {"version": suite.version}
    if suite.of_corpus:
        stamp |= {"corpus": run.corpus.meta["fingerprint"], "settings": settings, "eval": run.config.eval.to_dict()}
    else:
        stamp |= {"model": run.model.fingerprint, "settings": settings}
    if suite.fingerprint is not None:
        stamp["files"] = suite.fingerprint(run)
    if data is not None:
        stamp["task"] = data.fingerprint
    return json.loads(json.dumps(stamp))


def _noted(folder: epath.Path) -> dict:
    path = folder / EVALUATIONS
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError:
        return {}  # a file that only saves time


def _is_there(run: Run, name: str, label: str, stamp: dict) -> bool:
    if _noted(run.output).get(_noted_as(run, label)) != stamp:
        return False
    files = {"samples": (SAMPLES,), "pseudo_words": (SENSES,)}.get(name, ())
    if not SUITES[name].of_corpus:
        files = (_tables_path(run, label),)
    if not all((run.output / file).exists() for file in files):
        return False
    return name == "pseudo_words" or any(row.step == run.step for row in _rows_there(run, name))


def _rows_there(run: Run, name: str) -> list[metrics.Result]:
    return [row for row in metrics.read_results(run.output) if row.suite == name and row.run == run.name]


def _noted_as(run: Run, label: str) -> str:
    return f"{label}@{run.step}" if run.output == run.workdir else f"{run.source}: {label}@{run.step}"


def _note(run: Run, label: str, stamp: dict) -> None:
    noted = _noted(run.output) | {_noted_as(run, label): stamp}
    metrics.write_atomically(run.output / EVALUATIONS, json.dumps(noted, indent=1) + "\n")
