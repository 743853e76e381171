"""The comparison that the three papers never made: same text, same size of body, same updates; what does each kind of
pretraining buy (docs/protocol.md)?

    python -m launch.sweep --config=experiments/ablations/between_models.py:tiny --root=runs/models
    python -m launch.sweep --config=experiments/ablations/between_models.py:tiny,arm=native --root=runs/native
    python -m plm.report runs/models

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 35 pretraining, 390 on tasks, 40 measured | 2 CPU cores, 3 hours | docs/ablations.md |
| tiny, arm=native | 15 pretraining, 210 on tasks, 15 measured | 2 CPU cores, an hour | docs/ablations.md |
| small | 35 pretraining, 1170 on tasks, 40 measured | one accelerator, a day | not measured yet |

`arm=controlled` (protocol 3): {Transformer, LSTM} x {left to right, two towers, masked} on identical ids, and ELMo's
characters in place of the input table; equal passes over the text. `arm=native` (protocol 4): ELMo, GPT and BERT with
their own vocabularies and objectives; never on one axis with the others. Every model goes to the tasks by three routes
(protocol 9): a linear output on the frozen mix of its layers, a BiLSTM on it, and all of it tuned, by one optimizer and
the best epoch on dev each time; a word's last piece stands for it. Controls (protocol 13): the same from random values,
frozen and tuned; word2vec on the same text; a linear output that learns shuffled labels; the commonest class; for
minimal pairs 5-grams. The four primary contrasts are on the mean of the columns on tasks, each divided by its
deviation; all other comparisons are exploratory.
"""

from experiments.ablations.common import BEST_EPOCH, FULL, Column, Maker, OnTask, Quantity
from plm.analysis.results import MAJORITY
from plm.reporting.studies import difference

QUANTITIES = (
    Quantity("single", "SST-2", "single", paper="sst2", small="sst2"),
    Quantity("pair", "NLI", "pair", paper="snli", small="snli"),
    Quantity("tagging", "tags", "tagging", paper="ud_ewt", small="ud_ewt"),
)
ROUTES = (("probe", "frozen, linear"), ("features", "frozen, BiLSTM"), ("full", "tuned"))
CONTROLLED = {  # row -> label, arguments of compare.py
    "transformer-causal": ("Transformer, left to right (GPT)", "architecture=transformer,objective=causal"),
    "transformer-bidirectional": ("Transformer, two towers", "architecture=transformer,objective=bidirectional"),
    "transformer-masked": ("Transformer, masked (BERT)", "architecture=transformer,objective=masked"),
    "lstm-causal": ("LSTM, left to right", "architecture=lstm,objective=causal"),
    "lstm-bidirectional": ("LSTM, two towers (ELMo)", "architecture=lstm,objective=bidirectional"),
    "lstm-masked": ("LSTM, masked", "architecture=lstm,objective=masked"),
    "lstm-bidirectional-characters": (
        "LSTM, two towers, characters (ELMo)",
        "architecture=lstm,objective=bidirectional,input=characters",
    ),
}
NATIVE = {"elmo": "ELMo", "gpt": "GPT", "bert": "BERT"}
FACTS = [
    ["", "static vectors", "ELMo", "GPT", "BERT"],
    ["a word's vector depends on", "the word", "its whole sentence, each direction by itself", "what is left of it",
     "its whole text, both sides at once"],
    ["reads", "-", "left to right and right to left, two towers", "left to right", "both sides in every layer"],
    ["feature extractor", "a table", "2 LSTM layers of 4,096 cells, projected to 512", "12 Transformer layers x 768",
     "12 or 24 Transformer layers x 768 or 1,024"],
    ["objective", "neighbours in a window (word2vec), or co-occurrence (GloVe)", "next word, in both directions",
     "next piece", "15% of the pieces, from both sides; whether two texts follow each other"],
    ["input", "words, those of a list", "characters of words", "BPE pieces", "WordPieces, two segments"],
    ["transfers by", "a frozen or tuned input", "frozen: a learned mix of its layers is a task model's input",
     "tuned: start, delimiter and classify tokens, one linear output, LM beside it",
     "tuned: [CLS] or every piece, one linear output"],
    ["strengths", "small, fast, any task model", "no unknown words; cheap to use: one pass, then features",
     "generates and scores text; every piece is a target", "both sides in every layer: spans and tags"],
    ["weaknesses", "one vector for all senses of a word", "slow: step by step; directions meet only on top",
     "sees nothing that follows", "one target in seven pieces; [MASK] is never seen later; no probability of a text"],
]  # fmt: skip


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="between_models",
        title="ELMo, GPT and BERT on equal terms",
        source="not in the papers; docs/protocol.md",
        rows=(),
        quantities=QUANTITIES,
        arm=("controlled", "native"),
    )
    native = make.given.arm == "native"
    if native:
        make.study.name, make.study.title = "between_models_native", "ELMo, GPT and BERT as published"
    make.study.facts, on_tasks = FACTS, make.on_tasks
    make.study.columns = []
    routes = {}
    for on in on_tasks:
        for way, label in ROUTES:
            column = make.copy_column(on.column, f"{on.column.name}_{way}", f"{on.column.label}: {label}", {})
            routes[on.column.name, way] = column
    scored = list(routes.values())
    pairs, senses, bits = _measured_columns(make)
    tags, probed = _probe_columns(make)
    models = _pretrained(make)
    for row, model in models.items():
        suites = "ngrams,samples,pseudo_words,minimal_pairs" if row != "lstm-masked" else "pseudo_words,minimal_pairs"
        make.measure(f"{row}-measured", model, [f"--suite={suites},probes", f"--task={make.files_of(tags.task)}"])
        direction = "mean" if row == "elmo" or "bidirectional" in row else "masked" if _masked(row) else "forward"
        make.read(row, pairs, model, f"trained/{direction}/all")
        make.read(row, senses, model, f"trained/nearest_neighbour/layer {make.layers(model)}")
        for alignment, column in probed.items():
            make.read(row, column, model, _probe(tags, f"trained/{alignment}/mix"))
        if bits is not None and not _masked(row):
            make.read(row, bits, model, _bits_metric(row))
        for on in on_tasks:
            for way, _ in ROUTES:
                column = routes[on.column.name, way].name
                options = {"arguments": BEST_EPOCH, "column": column, "tuned": _rates(row, way)}
                make.finetune(row, on, model, way, on.aligned, name=f"{row}-{column}", **options)
    untrained = _controls(make, routes, models)
    make.read("scratch", senses, untrained, f"random_init/nearest_neighbour/layer {make.layers(untrained)}")
    # A vector for each form, whatever made it: it cannot tell two uses of a form apart.
    make.read("word2vec", senses, untrained, "static/nearest_neighbour/form")
    for alignment, column in probed.items():
        make.read("scratch", column, untrained, _probe(tags, f"random_init/{alignment}/mix"))
        make.read("majority", column, untrained, _probe(tags, MAJORITY))
    if native:
        for better, worse in (("bert", "gpt"), ("gpt", "elmo")):
            text = f"{NATIVE[better]} is better than {NATIVE[worse]} (X1)"
            make.claim("X1", text, difference(better, worse, *scored), standardised=True)
        make.claim("pretraining", "pretrained is better than from scratch", _tuned(routes, "bert"), standardised=True)
        return make.study
    primary = {"standardised": True, "family": "primary"}
    masked, forward, towers = "transformer-masked", "transformer-causal", "transformer-bidirectional"
    counts = make.row("counts", "5-grams, Kneser-Ney", control=True)
    make.measure("counts-measured", models["transformer-causal"], ["--suite=pair_ngrams"])
    make.read(counts, pairs, models["transformer-causal"], "kneser_ney_5/forward/all", "pair_ngrams")
    make.claim("primary", "masked - left to right", difference(masked, forward, *scored), **primary)
    make.claim("primary", "masked - two towers", difference(masked, towers, *scored), **primary)
    architectures = [
        (row, column, weight / 3)
        for objective in ("causal", "bidirectional", "masked")
        for row, column, weight in difference(f"transformer-{objective}", f"lstm-{objective}", *scored)
    ]
    make.claim("primary", "Transformer - LSTM", architectures, **primary)
    make.claim("primary", "pretrained - scratch", _tuned(routes, masked), **primary)
    return make.study


def _masked(row: str) -> bool:
    return row == "bert" or row.endswith("masked")


def _rates(row: str, way: str) -> str:
    """Whose rate and duration in `TUNED`: when all is tuned those of how the model reads, or of scratch."""
    if way != "full":
        return ""
    reads = {"scratch": "scratch", "elmo": "bidirectional", "gpt": "causal", "bert": "masked"}
    return FULL[reads.get(row) or row.split("-")[1]]


def _bits_metric(row: str) -> str:
    return "bidirectional_forward_bits_per_byte" if "bidirectional" in row else "causal_bits_per_byte"


def _measured_columns(make: Maker) -> tuple[Column, Column, Column | None]:
    """(minimal pairs, senses, bits per byte); the last only where all models share a vocabulary without UNK."""
    pairs = make.add_column(Column("pairs", "minimal pairs", "minimal_pairs", "", part=""))
    senses = make.add_column(Column("senses", "senses by pseudo-words, top layer", "pseudo_words", "", part=""))
    if make.given.arm == "native":
        return pairs, senses, None
    bits = Column(
        "bits", "bits per byte, left to right", "pretraining", "", part="", unit="", factor=1.0, digits=3,
        smallest=0.01, lower_is_better=True,
    )  # fmt: skip
    return pairs, senses, make.add_column(bits)


def _probe_columns(make: Maker) -> tuple[OnTask, dict[str, Column]]:
    """(the task of tags, {alignment: a linear probe on the mix of layers}): protocol 11 wants both."""
    (tags,) = (on for on in make.on_tasks if on.kind == "tagging")
    labels = {"last": "last piece", "first_and_last": "mean of first and last piece"}
    columns = {
        alignment: Column(f"probe_{alignment}", f"linear probe, {tags.column.label}: {label}", "probes", "", part="",
                          smallest=tags.column.smallest)
        for alignment, label in labels.items()
    }  # fmt: skip
    return tags, {alignment: make.add_column(column) for alignment, column in columns.items()}


def _probe(tags: OnTask, of: str) -> str:
    task, _, metric = tags.column.metric.partition("/")
    return f"{task}/{of}/{metric}"


def _pretrained(make: Maker) -> dict[str, str]:
    if make.given.arm == "native":
        for row, label in NATIVE.items():
            make.row(row, label)
        return {row: make.pretrain(row, row) for row in NATIVE}
    size = "tiny" if make.budget == "tiny" else "small"
    found = {}
    for row, (label, arguments) in CONTROLLED.items():
        make.row(row, label)
        found[row] = make.pretrain(row, "", arguments, file="experiments/compare.py", size=size)
    return found


def _controls(make: Maker, routes: dict, models: dict[str, str]) -> str:
    """From random values: tuned, and frozen; word2vec on the same text under the BiLSTM; a linear output that learns
    shuffled labels; and the commonest class. Returns the model that they are of."""
    row = "bert" if make.given.arm == "native" else "transformer-masked"
    label = NATIVE[row] if row in NATIVE else CONTROLLED[row][0]
    scratch = make.row("scratch", f"{label}, from scratch", control=True)
    static = make.row("word2vec", "word2vec", control=True)
    shuffled = make.row("shuffled", f"{label}, shuffled training labels", control=True)
    majority = make.row("majority", "always the commonest class", control=True)
    text = make.add.given("data.source") or "pydocs#without_tasks"
    for on in make.on_tasks:
        for way, _ in ROUTES:
            column, overrides = routes[on.column.name, way].name, on.aligned | {"init.keep": "nothing"}
            options = {
                "arguments": BEST_EPOCH,
                "column": column,
                "name": f"scratch-{column}",
                "tuned": _rates("scratch", way),
            }
            points = make.finetune(scratch, on, models[row], way, overrides, **options)
            task, _, metric = on.column.metric.partition("/")
            make.cells(majority, column, points, f"{task}/{MAJORITY}/{metric}")
        column, head = routes[on.column.name, "features"].name, f"objectives.{on.objective}"
        vectors = on.aligned | {f"{head}.reads": "vectors", "data.task.vectors": f"word2vec:{text}"}
        options = {"arguments": BEST_EPOCH, "column": column, "name": f"word2vec-{column}"}
        make.finetune(static, on, models[row], "features", vectors, **options)
        column, labels = routes[on.column.name, "probe"].name, on.aligned | {"data.task.shuffled_labels": True}
        options = {"arguments": BEST_EPOCH, "column": column, "name": f"shuffled-{column}"}
        make.finetune(shuffled, on, models[row], "probe", labels, **options)
    return models[row]


def _tuned(routes: dict, row: str):
    columns = [column for (_, way), column in routes.items() if way == "full"]
    return difference(row, "scratch", *columns)
