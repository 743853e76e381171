"""Every key of a config with its default, meaning and range, and the strict reading of configs from files and flags.

A config is a locked `ml_collections.ConfigDict`. An experiment file makes one: `get_config(arguments)`, where the
arguments are what stands behind the colon of `--config=experiments/bert.py:base,phase=2`; they take choices and numbers
only. Single values are overridden by `--config.optimizer.peak_lr=1e-4`. An unknown key, a value of the wrong type, out
of its range or not among its choices is a `UserError` of one line before anything starts.

    load(spec, overrides)      file + arguments + overrides -> validated config, not yet resolved
    resolve(config, ...)       the one duration -> total_steps, seeds filled in; a workdir's config.json holds this
    differences(saved, now)    what may not change between a run and its resumption
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict

from plm.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Rules: what a value may be
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be: `convert` gives the value in its own type or raises ValueError; `expects` says it in words.

    `choices` are offered as the nearest where a word is misspelt; `is_text` values are taken from flags as they are,
    all others are read as Python literals. `kind` is the type of the field.
    """

    expects: str
    convert: Callable[[Any], Any]
    kind: type
    choices: tuple = ()
    is_text: bool = False
    or_none: bool = False

    def __call__(self, key: str, value: Any) -> Any:
        if self.or_none and value is None:
            return None
        try:
            return self.convert(value)
        except (ValueError, TypeError):
            suggestion = _nearest(str(value), [str(choice) for choice in self.choices])
            raise UserError(f"{key}={value!r} must be {self.expects}{suggestion}") from None

    def read(self, key: str, text: str) -> Any:
        """The value that `text` spells, for example on a command line."""
        if self.is_text:
            return self(key, text)
        word = {"true": "True", "false": "False", "none": "None"}.get(text.strip().lower(), text)
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e6
        return self(key, value)


def _nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def _between(low, high) -> str:
    if high is None:
        return f" of at least {low}" if low is not None else ""
    return f" from {low} to {high}"


def whole(low: int | None = 0, high: int | None = None, *, or_none: bool = False) -> Rule:
    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError
        return value

    return Rule(f"a whole number{_between(low, high)}", convert, int, or_none=or_none)


def real(low: float | None = 0.0, high: float | None = None, *, above: bool = False, or_none: bool = False) -> Rule:
    """A finite number; `above` leaves `low` itself out."""

    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or (low is not None and (value < low or (above and value == low))):
            raise ValueError
        if high is not None and value > high:
            raise ValueError
        return value

    expects = f"a number above {low:g}" if above else f"a number{_between(low, high)}"
    expects += f" and at most {high:g}" if above and high is not None else ""
    return Rule(expects, convert, float, or_none=or_none)


def truth() -> Rule:
    def convert(value):
        if value is not True and value is not False:
            raise TypeError
        return value

    return Rule("true or false", convert, bool)


def one_of(*choices: str, outside: bool = False) -> Rule:
    """One of these words; `outside` also takes "module:function", which is imported where it is used."""

    def convert(value):
        if value in choices or (outside and isinstance(value, str) and is_outside(value)):
            return value
        raise ValueError

    expects = f"one of {', '.join(choices)}" + (" or module:function" if outside else "")
    return Rule(expects, convert, str, choices=choices, is_text=True)


def words() -> Rule:
    def convert(value):
        if not isinstance(value, str):
            raise TypeError
        return value

    return Rule("text", convert, str, is_text=True)


def regex() -> Rule:
    def convert(value):
        try:
            re.compile(value)
        except re.error:
            raise ValueError from None
        return value

    return Rule("a regular expression", convert, str, is_text=True)


def items(rule: Rule, example: str) -> Rule:
    def convert(value):
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(rule.convert(item) for item in value)

    return Rule(f"a tuple, each item {rule.expects}, for example {example}", convert, tuple)


def pairs(first: Rule, second: Rule, example: str) -> Rule:
    def convert(value):
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple((first.convert(a), second.convert(b)) for a, b in value)

    return Rule(f"a tuple of pairs ({first.expects}, {second.expects}), for example {example}", convert, tuple)


def is_outside(name: str) -> bool:
    """Whether a name says "module:function", something of the user's own."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The keys
# ---------------------------------------------------------------------------------------------------------------------

DURATIONS = ("total_steps", "total_tokens", "total_examples", "total_epochs")
LAYOUTS = ("blocks", "lanes", "pairs", "task")
TOKENIZERS = ("wordpiece", "bpe", "byte_bpe", "words")
OPTIMIZERS = ("bert_adam", "gpt_adam", "adagrad", "adamw")
SCHEDULES = ("bert_linear", "linear", "cosine", "constant", "openai_linear", "openai_cosine")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "tanh")
DIRECTIONS = ("forward", "both", "full")
# Which model.direction an objective can be trained in; "both" is two towers.
OBJECTIVE_DIRECTIONS = {
    "causal": ("forward",),
    "bidirectional": ("both",),
    "masked": ("full",),
    "next_sentence": ("full",),
    "classify": DIRECTIONS,
    "regress": DIRECTIONS,
    "choose": DIRECTIONS,
    "tag": DIRECTIONS,
    "span": DIRECTIONS,
}

# The objective of each kind of task, and so its head.
OBJECTIVE_OF_KIND = {
    "single": "classify",
    "pair": "classify",
    "word": "classify",
    "similarity": "regress",
    "choice": "choose",
    "tagging": "tag",
    "span": "span",
}

# (key, default, rule, what it means); None as a default means "not given".
KEYS: tuple[tuple[str, Any, Rule, str], ...] = (
    ("seed", 0, whole(0), "the seed of everything that has none of its own"),
    ("seeds.init", None, whole(0, or_none=True), "of the initial parameters and of dropout; none = seed"),
    ("seeds.data", None, whole(0, or_none=True), "of order, offsets, pairs, masks and negatives; none = seed"),
    ("batch_size", 32, whole(1), "rows of the global batch, over all devices and microbatches"),
    ("seq_len", 128, whole(2), "tokens in a row"),
    ("microbatches", 1, whole(1), "pieces a batch is computed in; the gradients are exact sums, memory is less"),
    # Exactly one duration holds; overriding one clears the others.
    ("total_steps", None, whole(1, or_none=True), "the run's length in updates"),
    ("total_tokens", None, whole(1, or_none=True), "... in tokens: steps x batch_size x seq_len, rounded up"),
    ("total_examples", None, whole(1, or_none=True), "... in rows: steps x batch_size, rounded up"),
    ("total_epochs", None, real(0.0, above=True, or_none=True), "... in passes over the training split"),
    # Data
    ("data.source", "pydocs", words(), "pydocs, text:GLOB, jsonl:GLOB#field, tfds:NAME#field, joined by +, 2* weights"),
    ("data.valid_source", "", words(), "held-out text; '' = a part of data.source, split by document"),
    ("data.valid_fraction", 0.05, real(0.0, 0.9), "the part of the documents that is held out"),
    ("data.layout", "blocks", one_of(*LAYOUTS, outside=True), "how text becomes rows: GPT's, ELMo's or BERT's way"),
    ("data.invalid_utf8", "error", one_of("error", "replace"), "replace: broken bytes become U+FFFD and are counted"),
    ("data.workers", 0, whole(0), "processes that tokenise; 0 = one for each core"),
    ("data.tokenizer.kind", "byte_bpe", one_of(*TOKENIZERS), "BERT's, GPT's, the comparison's, ELMo's"),
    ("data.tokenizer.vocab", 8192, whole(2), "number of pieces or words, specials included"),
    ("data.tokenizer.path", "", words(), "a trained vocabulary or official files; '' = init.from's, or trained here"),
    ("data.tokenizer.add", "", words(), "a file of words, one a line, that become entries of their own"),
    ("data.tokenizer.lowercase", False, truth(), "letter case is dropped"),
    ("data.tokenizer.pretokenized", False, truth(), "bpe, words: the text has spaces between words already"),
    (
        "data.lanes.backward",
        "independent",
        one_of("independent", "shared"),
        "the backward LM's stream: its own, or the forward one's",
    ),
    ("data.lanes.block_windows", 64, whole(1), "windows of seq_len in a contiguous block; lanes walk shuffled blocks"),
    ("data.pairs.short_sequence_probability", 0.1, real(0.0, 1.0), "of a document cut to a random shorter length"),
    ("data.pairs.duplicates", 10, whole(1), "different cuts of the corpus into pairs (BERT's dupe_factor)"),
    # Optimizer
    ("optimizer.name", "adamw", one_of(*OPTIMIZERS, outside=True), "the update rule"),
    ("optimizer.peak_lr", 1e-3, real(0.0, above=True), "learning rate at the end of the warm-up"),
    ("optimizer.schedule", "linear", one_of(*SCHEDULES), "of the learning rate after the warm-up"),
    ("optimizer.schedule_steps", 0, whole(0), "steps in the whole schedule; 0 = the run's (a run may be a part of it)"),
    ("optimizer.warmup_steps", 0, whole(0), "updates of linear warm-up from 0"),
    ("optimizer.warmup_fraction", 0.0, real(0.0, 1.0), "warm-up as a part of the schedule, instead of warmup_steps"),
    ("optimizer.weight_decay", 0.0, real(0.0), "decoupled, times the scheduled learning rate"),
    ("optimizer.clip_norm", 0.0, real(0.0), "global norm that gradients are clipped to; 0 = none"),
    ("optimizer.gradient_scale", 1.0, real(0.0, above=True), "factor on gradients, before the clip (ELMo: 20)"),
    ("optimizer.b1", 0.9, real(0.0, 0.9999999), "Adam's decay of the first moment"),
    ("optimizer.b2", 0.999, real(0.0, 0.9999999), "Adam's decay of the second moment"),
    ("optimizer.eps", 1e-8, real(0.0, above=True), "Adam's epsilon"),
    ("optimizer.accumulator", 1.0, real(0.0, above=True), "Adagrad's initial accumulator"),
    (
        "optimizer.decay",
        (),
        pairs(regex(), real(0.0), "(('bias$', 0.0),)"),
        "regex in the logical name -> factor of the weight decay; the first match holds",
    ),
    (
        "optimizer.lr_factors",
        (),
        pairs(regex(), real(0.0), "(('^embedding/', 0.1),)"),
        "regex in the logical name -> factor of the learning rate",
    ),
    ("optimizer.freeze", (), items(regex(), "('^embedding/',)"), "regexes of logical names that do not train"),
    # Machine
    ("mesh.data", -1, whole(-1), "devices along data; -1 = all that the other axes leave"),
    ("mesh.fsdp", 1, whole(1), "devices along fsdp: rows and stored parameters are split"),
    ("mesh.tensor", 1, whole(1), "devices along tensor: heads, hidden units and the vocabulary are split"),
    ("precision.compute", "auto", one_of("auto", "float32", "bfloat16"), "auto: bfloat16 on accelerators"),
    ("remat", "none", one_of("none", "blocks"), "blocks: activations inside blocks are recomputed backwards"),
    ("scan.unroll", False, truth(), "unrolls the loop over blocks; checkpoints do not depend on it"),
    ("vocabulary_multiple", 128, whole(1), "vocabulary tables are stored padded to a multiple of this"),
    ("softmax_chunk", 0, whole(0), "about so many tokens have logits at once; 0 = all of a microbatch"),
    # Loop
    ("checkpoint.every_steps", 1000, whole(0), "0 = at the end only"),
    ("checkpoint.keep", 3, whole(1), "newest checkpoints that are kept"),
    ("checkpoint.keep_at", (), items(whole(0), "(10,100,1000)"), "steps whose parameters are kept for ever"),
    ("checkpoint.keep_best", "", words(), "a held-out number, or selects: its best evaluation is kept as SRC@best"),
    ("eval.every_steps", 1000, whole(0), "0 = at the end only"),
    ("eval.every_epochs", 0.0, real(0.0), "... in passes over the training split, instead of steps; 0 = in steps"),
    ("eval.batches", 0, whole(0), "batches of the held-out split; 0 = all of it"),
    ("eval.batch_size", 0, whole(0), "rows; 0 = batch_size"),
    ("eval.patience", 0, whole(0), "evaluations without a better checkpoint.keep_best that end the run; 0 = none do"),
    ("log.every_steps", 100, whole(1), "steps between two lines of metrics.jsonl"),
    ("log.tensorboard", False, truth(), "TensorBoard files too"),
    ("log.wandb", "", words(), "Weights & Biases project; '' = none"),
    ("nonfinite.max_in_a_row", 10, whole(1), "skipped steps in a row after which the run halts"),
    ("init.from", "", words(), "a workdir, converted or foreign directory to start from, [@STEP]"),
    ("init.allow_missing", "", regex(), "regex of parameters that init.from may lack; they start at random values"),
    ("init.reset", "", regex(), "regex of parameters that start at random values although init.from has them"),
    (
        "init.keep",
        "params",
        one_of("params", "all", "nothing"),
        "all: optimizer and step too, so schedule, noise and data go on; nothing: only the vocabulary (from scratch)",
    ),
)

# What the head of every task objective has (`plm.models.task_heads`).
POOLINGS = ("last", "first", "mean", "max", "attention")
_TASK_HEAD: tuple[tuple[str, Any, Rule, str], ...] = (
    ("reads", "last", one_of("last", "mix", "concat", "static", "vectors"),
     "of the model: its last layer, a learned mix of layers, layers side by side, its tokens' vectors without context,"
     " or nothing but vectors from a file"),
    ("layers", (), items(whole(None), "(-4,-3,-2,-1)"), "that a mix or concat reads, 0 the embedding; () = all"),
    ("mix_norm", False, truth(), "each layer of a mix is normalised first"),
    ("mix_gamma", True, truth(), "the mix has a learned factor"),
    ("mix_penalty", 0.0, real(0.0), "lambda of |w|^2 on the mix's weights before their softmax (ELMo)"),
    ("vectors", 0, whole(0), "width of the vectors that data.task.vectors adds; set when its file is read"),
    ("input_dropout", 0.0, real(0.0, 0.95), "on what the head reads and between its LSTM layers"),
    ("lstm", 0, whole(0), "cells in each direction of a BiLSTM between the model and the output; 0 = none"),
    ("lstm_layers", 1, whole(1), "of it"),
    ("insert", "input", one_of("input", "output", "both"), "where the model's vectors join the BiLSTM (ELMo table 3)"),
    ("pooling", "last", one_of(*POOLINGS), "one vector for a row: of its last or first token, or over all"),
    ("pooler", False, truth(), "BERT's dense layer and tanh on it, next-sentence prediction's if init.from has one"),
    ("dropout", 0.0, real(0.0, 0.95), "before the output; one mask for all choices of an example"),
)  # fmt: skip
_PAIRS = (
    "pairs",
    "joined",
    one_of("joined", "both_orders", "apart"),
    "two texts in one row; in two rows, one for each order, whose vectors are added (GPT); or each text in its own row",
)

# Settings of each objective; a config has a group for every objective that it trains.
OBJECTIVES: dict[str, tuple[tuple[str, Any, Rule, str], ...]] = {
    "causal": (("per_row", False, truth(), "the mean over rows of each row's mean loss (GPT's fine-tuning)"),),
    "bidirectional": (("samples", 0, whole(0), "negatives of the sampled softmax; 0 = the full softmax"),),
    "masked": (
        ("rate", 0.15, real(0.0, 1.0, above=True), "part of a row's positions that are predicted"),
        ("mask", 0.8, real(0.0, 1.0), "of these, the part that becomes [MASK]"),
        ("random", 0.1, real(0.0, 1.0), "... a random token"),
        ("keep", 0.1, real(0.0, 1.0), "... stays"),
        ("max_predictions", 20, whole(1), "at most so many positions of a row"),
        ("static", False, truth(), "one mask for each example, as in BERT's data files; else a new one each time"),
        ("whole_word", False, truth(), "chooses whole words"),
    ),
    "next_sentence": (),
    "classify": (
        *_TASK_HEAD,
        _PAIRS,
        ("classes", 0, whole(0), "of the task; 0 = set when its data is read"),
        ("marked", 0, whole(0, 2), "target words whose vectors stand beside the row's own; set when the data is read"),
    ),
    "regress": (*_TASK_HEAD, _PAIRS),
    "choose": (*_TASK_HEAD, ("choices", 2, whole(2), "rows of an example, one for each choice")),
    "tag": (
        *_TASK_HEAD,
        ("classes", 0, whole(0), "tags; 0 = set when the task's data is read"),
        ("crf", False, truth(), "a linear chain over the tags"),
    ),
    "span": _TASK_HEAD,
}
_COEFFICIENT = ("coefficient", 1.0, real(0.0, above=True), "factor of its mean loss in the loss")
TOKEN_OBJECTIVES = ("causal", "bidirectional", "masked")  # whose loss is that of a token of the vocabulary
TASK_OBJECTIVES = frozenset(("classify", "regress", "choose", "tag", "span"))
_OUTSIDE = ("name", "", words(), "module:function of an objective of the user's own")

MODEL: tuple[tuple[str, Any, Rule, str], ...] = (
    ("name", "language_model", one_of("language_model", outside=True), "the model"),
    ("architecture", "transformer", one_of("transformer", "lstm"), "of the body"),
    ("direction", "forward", one_of(*DIRECTIONS), "what a position sees: the left, two towers, everything"),
    ("input", "tokens", one_of("tokens", "characters"), "rows of a table, or ELMo's convolutions over bytes"),
    ("width", 128, whole(1), "of embedding and residual stream"),
    ("layers", 2, whole(1), "blocks in a tower"),
    ("segments", 0, whole(0), "rows of the segment table; 0 = none"),
    ("embedding_norm", False, truth(), "LayerNorm after the embedding"),
    ("dropout", 0.0, real(0.0, 0.95), "on sub-layer outputs; LSTM: on layer inputs and the last output"),
    ("embedding_dropout", 0.0, real(0.0, 0.95), "see embedding_dropout_on"),
    ("embedding_dropout_on", "sum", one_of("sum", "matrix"), "on the summed vectors, or on the matrix itself (GPT)"),
    ("tied", True, truth(), "the output's table is the input's"),
    ("head_transform", False, truth(), "BERT's dense, activation and LayerNorm before the output"),
    ("head_bias", False, truth(), "a bias for every piece of the vocabulary"),
    ("norm_epsilon", 1e-5, real(0.0, above=True), "of every LayerNorm"),
    ("init", "normal", one_of("normal", "truncated_normal", "fan_in"), "of matrices and tables"),
    ("init_stddev", 0.02, real(0.0, above=True), "of the two normal ones"),
    ("activation", "gelu", one_of(*ACTIVATIONS), "of MLP and head transform; gelu is the erf form"),
)
MODEL_TRANSFORMER: tuple[tuple[str, Any, Rule, str], ...] = (
    ("heads", 2, whole(1), "of attention"),
    ("mlp_width", 512, whole(1), "hidden units of the MLP"),
    ("max_positions", 128, whole(0), "rows of the position table; 0 = none"),
    ("attention_dropout", 0.0, real(0.0, 0.95), "on attention probabilities"),
    ("positions_in_softmax", 0, whole(0), "position rows that are classes of the softmax too (GPT's fine-tuning code)"),
)
MODEL_LSTM: tuple[tuple[str, Any, Rule, str], ...] = (
    ("lstm.cells", 256, whole(1), "cells of a layer and direction"),
    ("lstm.projection", 128, whole(0), "width of a layer's output and recurrent state; 0 = no projection"),
    ("lstm.cell_clip", 0.0, real(0.0), "of the cell state; 0 = none"),
    ("lstm.projection_clip", 0.0, real(0.0), "of the projected state; 0 = none"),
    ("lstm.residual", True, truth(), "from the second layer on, its input is added to its output"),
)
MODEL_CHARACTERS: tuple[tuple[str, Any, Rule, str], ...] = (
    ("characters.dim", 16, whole(1), "of a byte's vector"),
    ("characters.filters", ((1, 32),), pairs(whole(1, 50), whole(1), "((1,32),(2,32))"), "(width, number)"),
    ("characters.highways", 1, whole(0), "highway layers"),
    ("characters.activation", "relu", one_of("relu", "tanh"), "after the maximum over positions"),
)

# The group data.task of a config whose data.layout is "task"; name .. unanswerable: see `plm.data.tasks.SETTINGS`.
TASK: tuple[tuple[str, Any, Rule, str], ...] = (
    ("name", "", words(), "a task of plm.data.tasks, or custom"),
    ("files", "", words(), "its folder, files, or tfds:NAME; '' = its own dataset in TFDS"),
    ("kind", "", words(), "of a custom task: single, pair, similarity, choice, tagging, span or word"),
    ("reader", "", words(), "of a custom task: how its files are laid out"),
    ("text", "", words(), "of a custom task: its columns, joined by +"),
    ("label", "", words(), "of a custom task: its column"),
    ("labels", "", words(), "of a custom task: its classes, joined by +"),
    ("choices", "", words(), "of a custom task: the columns of its choices, joined by +"),
    ("id", "", words(), "of a custom task: its column"),
    ("metrics", "", words(), "of a custom task: joined by +, the first one selects"),
    ("unanswerable", "", words(), "of a custom task: yes where questions without an answer are meant"),
    ("fraction", 1.0, real(0.0, 1.0, above=True), "of the training examples, a fixed subset; a smaller one lies in it"),
    ("held_out_fraction", 1.0, real(0.0, 1.0, above=True), "... of the selection part and of the reported part, each"),
    ("shuffled_labels", False, truth(), "the control: labels of the training examples change places"),
    ("buckets", (), items(whole(2), "(32,64)"), "row lengths below seq_len; a batch has the least that holds its rows"),
    ("word_piece", "first", one_of("first", "last"), "the piece that stands for a word"),
    ("question", 64, whole(1), "pieces of a question at most, of a span task"),
    ("stride", 128, whole(1), "pieces between two windows of a long context"),
    (
        "vectors",
        "",
        words(),
        "file of vectors of words that the head reads too (GloVe, word2vec), or word2vec:SOURCE",
    ),
)

# A resumed run may change these: where it runs, how often it saves and reports. Not what is computed.
MAY_CHANGE = ("mesh.", "microbatches", "checkpoint.", "eval.", "log.", "data.workers")
# ... and these, where the caller knows that the data's fingerprints are the same.
MAY_CHANGE_WITH_SAME_DATA = (
    "data.task.files",
    "data.source",
    "data.valid_source",
    "data.tokenizer.path",
    "data.tokenizer.add",
)

# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def _nest(rows: Iterable[tuple[str, Any, Rule, str]]) -> ConfigDict:
    config = ConfigDict()
    for key, default, rule, _ in rows:
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        node[leaf] = config_dict.placeholder(rule.kind) if default is None else default
    return config


def base() -> ConfigDict:
    """Every key but those of the model, with its default; no objective and no duration yet."""
    config = _nest(KEYS)
    config.data.blocks = ConfigDict()  # the blocks layout has no settings
    config.data.own = ConfigDict()  # settings of a layout from outside: whatever it wants
    config.objectives = ConfigDict()
    config.model = ConfigDict()
    return config.lock()


def _with(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    for key, value in settings.items():
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        if leaf not in node:
            raise KeyError(f"no such setting: {key}")
        node[leaf] = value
    return config


def add_objective(config: ConfigDict, name: str, coefficient: float = 1.0, **settings) -> None:
    """Adds the group `objectives.<name>`; further settings replace defaults."""
    group = _with(_nest((_COEFFICIENT, *OBJECTIVES[name])), {"coefficient": coefficient, **settings})
    with config.unlocked():
        config.objectives[name] = group


def set_task(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    """Adds the group `data.task`: the rows come from a labelled task (`TASK`)."""
    with config.unlocked():
        config.data.task = _with(_nest(TASK), settings)


def set_model(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    """Makes the group `model` from dotted settings; all others have their defaults. Says nothing of what it lacks:
    a Transformer has no `lstm`, an LSTM no `heads`, `mlp_width`, `max_positions`, `attention_dropout`.
    """
    rows = _model_rows(settings.get("architecture", "transformer"), settings.get("input", "tokens"))
    with config.unlocked():
        config.model = _with(_nest(rows), settings)


def _model_rows(architecture: str, input: str) -> tuple:
    body = {"transformer": MODEL_TRANSFORMER, "lstm": MODEL_LSTM}.get(architecture, ())
    return (*MODEL, *body, *(MODEL_CHARACTERS if input == "characters" else ()))


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of all leaves, in their order."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _rows(config: ConfigDict) -> dict[str, tuple[Any, Rule]]:
    """(default, rule) of every key that this config must have; sections from outside add what they have beyond that."""
    rows = {key: (default, rule) for key, default, rule, _ in KEYS}
    for name in config.objectives:
        group = config.objectives[name]
        settings = (_COEFFICIENT, _OUTSIDE) if group.get("name") else (_COEFFICIENT, *OBJECTIVES.get(name, ()))
        rows |= {f"objectives.{name}.{key}": (default, rule) for key, default, rule, _ in settings}
    if config.data.get("layout") == "task" or "task" in config.data:
        rows |= {f"data.task.{key}": (default, rule) for key, default, rule, _ in TASK}
    if is_outside(config.model.get("name", "")):
        rows["model.name"] = MODEL[0][1:3]
    else:
        known = _model_rows(config.model.get("architecture", ""), config.model.get("input", ""))
        rows |= {f"model.{key}": (default, rule) for key, default, rule, _ in known}
    return rows


def rules(config: ConfigDict) -> dict[str, Rule]:
    """The rule of every key that this config must have; sections from outside add what they have beyond that."""
    return {key: rule for key, (_, rule) in _rows(config).items()}


def _is_free(config: ConfigDict, key: str) -> bool:
    """Whether a key without a rule is a setting of something of the user's own."""
    top, _, rest = key.partition(".")
    if key.startswith("data.own."):
        return True
    if top in ("model", "optimizer"):
        return is_outside(config[top].get("name", ""))
    if top == "objectives" and rest:
        return bool(config.objectives.get(rest.split(".")[0], {}).get("name"))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def validate(config: ConfigDict, *, complete: bool = True) -> ConfigDict:
    """Checks every key, type, choice and range, and what the keys say together; returns the config.

    complete: also ask for what only the user can give: a corpus, a run to start from.

    Raises:
      UserError: one line that names the key, its value and what would be right.
    """
    known, values = rules(config), flatten(config)
    for key, value in values.items():
        if key in known:
            known[key](key, value)
        elif not _is_free(config, key):
            raise _unknown(key, known)
    for key in known:
        if key not in values:
            raise UserError(f"{key} is missing from the config: {known[key].expects}")
    _check_duration(config)
    _check_objectives(config)
    _check_data(config, complete)
    if not is_outside(config.model.name):
        _check_model(config)
    if config.optimizer.warmup_fraction and config.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_fraction={config.optimizer.warmup_fraction:g} and"
            f" optimizer.warmup_steps={config.optimizer.warmup_steps} are both given; one of them holds"
        )
    for key, seed in (("seed", config.seed), *((f"seeds.{name}", one) for name, one in config.seeds.items())):
        if seed is not None and seed >= 2**32:  # of JAX's generator: that one would be 0 again
            raise UserError(f"{key}={seed} must be less than 2**32 = {2**32}")
    if config.batch_size % config.microbatches:
        raise UserError(f"batch_size={config.batch_size} must be divisible by microbatches={config.microbatches}")
    if complete and config.init.keep == "all" and not config.init["from"]:
        raise UserError("init.keep='all' continues another run: give init.from as well")
    if complete and config.init.reset and not config.init["from"]:
        raise UserError(f"init.reset={config.init.reset!r} needs a model to start from: init.from")
    if config.init.reset and config.init.keep == "all":
        raise UserError(
            f"init.reset={config.init.reset!r} is not for init.keep='all', which goes on with every parameter as it is:"
            " init.keep='params'"
        )
    return config


def _unknown(key: str, known: Iterable[str]) -> UserError:
    group, _, leaf = key.rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        # The last part counts first: a key in the wrong group is as likely as a misspelt one.
        its_group, _, its_leaf = name.rpartition(".")
        parts = its_leaf.split("_")
        same = 1.0 if leaf == its_leaf else 0.95 if leaf == parts[-1] else 0.9 if leaf in parts else 0.0
        return (
            same or difflib.SequenceMatcher(None, leaf, its_leaf).ratio(),
            difflib.SequenceMatcher(None, group, its_group).ratio(),
        )

    nearest = max(known, key=likeness)
    hint = f"; did you mean {nearest!r}?" if likeness(nearest)[0] >= 0.6 else ""
    return UserError(f"config.{key} does not exist{hint}")


def _check_duration(config: ConfigDict) -> None:
    given = [f"{key}={config[key]}" for key in DURATIONS if config[key] is not None]
    if len(given) != 1:
        what = "none is given" if not given else f"{' and '.join(given)} are given"
        raise UserError(f"exactly one of {', '.join(DURATIONS)} must be given; {what}")


def _check_objectives(config: ConfigDict) -> None:
    if not config.objectives:
        raise UserError(f"objectives is empty; name at least one of {', '.join(OBJECTIVES)}")
    for name in config.objectives:
        group = config.objectives[name]
        if group.get("name"):
            if not is_outside(group.name):
                raise UserError(f"objectives.{name}.name={group.name!r} must be module:function")
            continue
        if name not in OBJECTIVES:
            raise UserError(
                f"objectives.{name} is unknown{_nearest(name, OBJECTIVES)}; or give it a name=module:function"
            )
        direction, fitting = config.model.get("direction"), OBJECTIVE_DIRECTIONS[name]
        if direction is not None and direction not in fitting:
            raise UserError(
                f"objectives.{name} needs model.direction={' or '.join(map(repr, fitting))}, not {direction!r}:"
                f" {_WHY[name]}"
            )
    if "masked" in config.objectives and not config.objectives.masked.get("name"):
        masked = config.objectives.masked
        shares = masked.mask + masked.random + masked.keep
        if abs(shares - 1) > 1e-6:
            raise UserError(f"objectives.masked.mask + random + keep = {shares:g} must be 1")
    for name in TASK_OBJECTIVES.intersection(config.objectives):
        if not config.objectives[name].get("name"):
            _check_task_objective(config, name, config.objectives[name])


def _check_task_objective(config: ConfigDict, name: str, settings: ConfigDict) -> None:
    key, direction = f"objectives.{name}", config.model.get("direction")
    if name not in ("tag", "span"):
        if settings.pooling == "first" and direction != "full":
            raise UserError(
                f"{key}.pooling='first' needs model.direction='full': under a causal mask the first position sees"
                " nothing; 'last' sees the whole row"
            )
        if settings.pooling in ("first", "last") and settings.reads in ("static", "vectors") and not settings.lstm:
            raise UserError(
                f"{key}.pooling={settings.pooling!r} with reads={settings.reads!r} sees one token of a row: mean, max"
                f" or attention is right, or {key}.lstm above 0"
            )
    if settings.reads == "vectors" and not config.data.get("task", {}).get("vectors"):
        raise UserError(f"{key}.reads='vectors' needs a file of them: data.task.vectors=FILE")
    layers = config.model.get("layers", 1)
    for layer in settings.layers:
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"{key}.layers names layer {layer}: the model has 0 (its embedding) to {layers}")
    together = rows_per_example(config)
    if config.batch_size % (together * config.microbatches):
        raise UserError(
            f"batch_size={config.batch_size} must be divisible by microbatches={config.microbatches} x the {together}"
            f" rows that {key} has for an example: they stay together"
        )
    if config.eval.batch_size % together:
        raise UserError(
            f"eval.batch_size={config.eval.batch_size} must be divisible by the {together} rows that {key} has for an"
            " example: they stay together"
        )
    if settings.mix_norm and config.microbatches > 1:
        raise UserError(
            f"{key}.mix_norm normalises over the rows of a microbatch, so microbatches={config.microbatches} would"
            " change what is learned: 1 is right"
        )


def rows_per_example(config: ConfigDict) -> int:
    """Consecutive rows of a batch that belong to one example."""
    together = 1
    for name in TASK_OBJECTIVES.intersection(config.objectives):
        settings = config.objectives[name]
        own = settings.get("choices", 1) if settings.get("pairs", "joined") == "joined" else 2
        together = math.lcm(together, own)
    return together


_WHY = {
    "causal": "a position that sees what follows it has nothing to predict",
    "bidirectional": "it is the loss of two towers that read in opposite directions",
    "masked": "a masked position is predicted from both sides",
    "next_sentence": "under a causal mask the first position, which is classified, sees nothing",
}


def _check_data(config: ConfigDict, complete: bool) -> None:
    data, layout = config.data, config.data.layout
    own = {name for name in config.objectives if not config.objectives[name].get("name")}
    of_task = sorted(own & TASK_OBJECTIVES)
    if layout == "task":
        if complete and not data.task.name:
            raise UserError("data.task.name must be given: a task of plm.data.tasks, or custom")
        return
    if of_task and not is_outside(layout):
        raise UserError(f"objectives.{of_task[0]} needs a task's rows: data.layout='task', not {layout!r}")
    if complete and not data.source:
        raise UserError("data.source must be given, for example --config.data.source='text:books/*.txt'")
    if not data.valid_fraction and not data.valid_source and config.eval.every_steps:
        raise UserError(
            "data.valid_fraction=0 leaves nothing to evaluate on; give data.valid_source or eval.every_steps=0"
        )
    if "next_sentence" in own and layout in ("blocks", "lanes"):
        raise UserError(f"objectives.next_sentence needs data.layout='pairs', not {layout!r}")
    if "masked" in own and layout == "lanes":
        raise UserError(
            "objectives.masked needs data.layout='blocks' or 'pairs': lanes carry the state of a left-to-right LSTM"
        )
    kind = data.tokenizer.kind
    if kind in ("bpe", "words"):
        if "masked" in own:
            raise UserError(
                f"objectives.masked needs a mask token: data.tokenizer.kind wordpiece or byte_bpe, not {kind!r}"
            )
        if layout == "pairs":
            raise UserError(
                f"data.layout='pairs' needs [CLS] and [SEP]: data.tokenizer.kind wordpiece or byte_bpe, not {kind!r}"
            )
    if "bidirectional" in own:
        samples = config.objectives.bidirectional.samples
        if not data.tokenizer.path and samples >= data.tokenizer.vocab:
            raise UserError(
                f"objectives.bidirectional.samples={samples} must be below data.tokenizer.vocab={data.tokenizer.vocab}"
            )


def _check_model(config: ConfigDict) -> None:
    model = config.model
    if model.architecture == "transformer":
        if model.width % model.heads:
            raise UserError(f"model.width={model.width} must be divisible by model.heads={model.heads}")
        if model.max_positions and config.seq_len > model.max_positions:
            raise UserError(f"seq_len={config.seq_len} is longer than model.max_positions={model.max_positions}")
        if model.positions_in_softmax > model.max_positions:
            raise UserError(
                f"model.positions_in_softmax={model.positions_in_softmax} must be at most"
                f" model.max_positions={model.max_positions}"
            )
        if model.positions_in_softmax and not (model.tied and model.input == "tokens"):
            raise UserError(
                "model.positions_in_softmax needs model.tied=True and model.input='tokens': GPT has one matrix for all"
            )
    else:
        output = (model.lstm.projection or model.lstm.cells) * (2 if model.direction == "full" else 1)
        if output != model.width:
            raise UserError(
                f"model.width={model.width} must equal the LSTM layers' output width {output}"
                " (model.lstm.projection, or model.lstm.cells without one; twice that in direction 'full')"
            )
    if model.input == "characters" and model.embedding_dropout_on == "matrix":
        raise UserError(
            "model.embedding_dropout_on='matrix' needs model.input='tokens': characters have no such matrix"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading: arguments, files, overrides, flags
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Number:
    """An argument that is a whole number: its default and its range."""

    default: int
    low: int = 0
    high: int | None = None


def arguments(text: str, **options: tuple | Number) -> ConfigDict:
    """Reads what stands behind the colon of an experiment, `base,phase=2`.

    options: name -> its choices (words or numbers; the first is the default) or a `Number`. The first option may be
    given without its name, as the first item.

    Raises:
      UserError: an unknown name, a value that is not among the choices, a name given twice.
    """
    result = {name: option.default if isinstance(option, Number) else option[0] for name, option in options.items()}
    first, given = next(iter(options), None), set()
    for position, item in enumerate(text.split(",") if text else []):
        name, equals, value = item.strip().partition("=")
        if not equals and position == 0 and first is not None:
            name, value, equals = first, name, "="
        if name not in options or not equals:
            listed = ", ".join(f"{n}={_listed(o)}" for n, o in options.items()) or "none"
            raise UserError(
                f"config argument {item!r} is unknown{_nearest(name, options, 0.6)}; the arguments are {listed}"
                if name not in options
                else f"config argument {name!r} has no value; it is {name}={_listed(options[name])}"
            )
        if name in given:
            raise UserError(f"config argument {name!r} is given twice")
        given.add(name)
        option = options[name]
        if isinstance(option, Number):
            result[name] = whole(option.low, option.high).read(f"config argument {name}", value)
        else:
            match = [choice for choice in option if str(choice) == value]
            if not match:
                raise UserError(
                    f"config argument {name}={value!r} must be {_listed(option)}{_nearest(value, map(str, option))}"
                )
            result[name] = match[0]
    return ConfigDict(result)


def _listed(option: tuple | Number) -> str:
    if isinstance(option, Number):
        return f"a whole number{_between(option.low, option.high)}"
    return "|".join(map(str, option))


def read_file(path: str, needs: str = "get_config"):
    """The module of an experiment file; a file inside a package may import from the package that it lies in.

    needs: get_config, what a run is made of, or sweep.
    """
    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path(".")
        near = _nearest(str(file), [str(f) for f in folder.glob("*.py")])
        raise UserError(f"--config={path!r}: there is no such file{near}")
    file = file.resolve()
    root = file.parent
    while (root / "__init__.py").exists():
        root = root.parent
    if root != file.parent and str(root) not in sys.path:
        sys.path.append(str(root))
    spec = importlib.util.spec_from_file_location(f"plm_experiment_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config={path!r} is not valid Python: {error}") from error
    if not callable(getattr(module, needs, None)):
        takes = {"get_config": "get_config(arguments)", "sweep": "sweep(add, arguments)"}
        other = {"get_config": ("sweep", "launch.sweep runs it"), "sweep": ("get_config", "plm.train runs it")}[needs]
        hint = f"; python -m {other[1]}" if callable(getattr(module, other[0], None)) else ""
        raise UserError(f"--config={path!r} defines no {takes[needs]}{hint}")
    return module


def split_spec(spec: str) -> tuple[str, str]:
    """`FILE.py:arguments` -> (FILE.py, arguments)."""
    path, _, text = spec.partition(":")
    return path, text


def load(
    spec: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    complete: bool = True,
    source: ConfigDict | None = None,
) -> ConfigDict:
    """The config of `FILE.py:arguments` with overrides, validated and locked.

    Args:
      spec: what `--config=` takes.
      overrides: dotted key -> value, or its text as on a command line. Overriding one duration clears the others.
      complete: see `validate`. A file whose get_config has a parameter `source` gets the config of the model in
        `init.from`, which must be given; without `complete` it may be None.
      source: that config, where the model is not there yet.

    Raises:
      UserError: one line for everything that is wrong with them.
    """
    path, text = split_spec(spec)
    get_config = read_file(path).get_config
    if "source" in inspect.signature(get_config).parameters:
        config = get_config(text, source or _model_of((overrides or {}).get("init.from", ""), path, complete))
    else:
        config = get_config(text)
    apply(config, overrides or {})
    return validate(config, complete=complete).lock()


def _model_of(source: str, path: str, complete: bool) -> ConfigDict | None:
    """The config of the model that a run starts from, for an experiment file that describes runs of any model."""
    if source:
        from plm.training.start import open_source  # reads checkpoints: only where it is asked for

        return open_source(source).config
    if complete:
        raise UserError(f"--config={path!r} starts from a model: --config.init.from=SRC must be given")
    return None


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Overrides single values in place; each is checked against its rule."""
    known = rules(config)
    values = flatten(config)
    durations = [key for key in overrides if key in DURATIONS]
    if len(durations) > 1:
        raise UserError(f"{' and '.join(durations)} are both given; exactly one duration holds")
    if durations:
        for key in DURATIONS:
            config[key] = None
    for key, value in overrides.items():
        if key not in values:
            inside = [name for name in values if name.startswith(f"{key}.")]
            if inside:
                raise UserError(f"config.{key} is a group; set one of its keys, for example config.{inside[0]}")
            raise _unknown(key, [*values])
        rule = known.get(key) or _rule_of(values[key])
        value = rule.read(key, value) if isinstance(value, str) else rule(key, value)
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[leaf] = value
    if durations and config[durations[0]] is None:
        raise UserError(f"{durations[0]} must be given a number")


def _rule_of(value: Any) -> Rule:
    """Of a setting of the user's own: the type that its file gave it."""
    if isinstance(value, bool):
        return truth()
    if isinstance(value, int):
        return whole(None)
    if isinstance(value, float):
        return real(None)
    if isinstance(value, tuple):
        return Rule("a tuple", lambda v: tuple(v) if isinstance(v, list | tuple) else int(v), tuple)
    return words()


def as_flag(key: str, value: Any) -> str:
    """The command-line flag that gives `key` this value; `load` reads it back to an equal one."""
    return f"--config.{key}={value if isinstance(value, str) else repr(value)}"


class ConfigFlags:
    """`--config=FILE:arguments` and any number of `--config.KEY=VALUE`; made by `define_flags`."""

    def __init__(self, flag_values: flags.FlagValues, keys: tuple[str, ...]):
        self._flags, self._keys = flag_values, keys

    @property
    def spec(self) -> str:
        """The value of `--config`."""
        return self._flags["config"].value

    @property
    def overrides(self) -> dict[str, str]:
        """{dotted key: text} of all `--config.KEY=VALUE`."""
        return {key: self._flags[f"config.{key}"].value for key in self._keys}

    def load(self, *, complete: bool = True) -> ConfigDict:
        """The validated config; see `load`."""
        return load(self.spec, self.overrides, complete=complete)


def define_flags(argv: list[str] | None = None, flag_values: flags.FlagValues = flags.FLAGS) -> ConfigFlags:
    """Defines `--config` and, for each `--config.KEY` that stands on the command line, a flag of that name.

    absl must know a flag before it parses, and which keys exist is known only once the file is read: so the command
    line is searched for names here, and names and values are judged by `load`.
    """
    flags.DEFINE_string(
        "config",
        None,
        "experiment file and its arguments, FILE.py:ARGUMENTS; single values by --config.KEY=VALUE",
        flag_values=flag_values,
    )
    keys: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        if argument == "--":
            break
        match = re.match(r"--?config\.([^=\s]+)", argument)
        if match and match[1] not in keys:
            keys.append(match[1])
            flags.DEFINE_string(f"config.{match[1]}", None, "override", flag_values=flag_values)
    return ConfigFlags(flag_values, tuple(keys))


# ---------------------------------------------------------------------------------------------------------------------
# Resolving, saving, comparing
# ---------------------------------------------------------------------------------------------------------------------


def resolve_seeds(config: ConfigDict) -> ConfigDict:
    """A copy in which every seed that is not given is `seed`."""
    config = config.copy_and_resolve_references().unlock()
    for key in config.seeds:
        if config.seeds[key] is None:
            config.seeds[key] = config.seed
    return config.lock()


def resolve(config: ConfigDict, *, examples_per_pass: float | None = None, platform: str | None = None) -> ConfigDict:
    """A copy in which everything is said: `total_steps` is the only duration, seeds and schedule length are numbers.

    Args:
      config: a validated config.
      examples_per_pass: rows of the layout in one pass over the training split, for what is said in epochs.
      platform: of the devices ("cpu", "gpu", "tpu"), to settle precision.compute='auto'; None leaves it.

    Raises:
      UserError: a schedule shorter than the run.
    """
    config = resolve_seeds(config).unlock()
    rows = config.batch_size
    if config.total_tokens is not None:
        steps = -(-config.total_tokens // (rows * config.seq_len))
    elif config.total_examples is not None:
        steps = -(-config.total_examples // rows)
    elif config.total_epochs is not None:
        if not examples_per_pass:
            raise ValueError("total_epochs needs examples_per_pass")
        # Rounded before the ceiling: 0.1 x 30 must not become 4 steps of one row.
        steps = math.ceil(round(config.total_epochs * examples_per_pass / rows, 6))
    else:
        steps = config.total_steps
    for key in DURATIONS:
        config[key] = None
    config.total_steps = max(steps, 1)
    if config.eval.every_epochs and examples_per_pass:
        config.eval.every_steps = max(round(config.eval.every_epochs * examples_per_pass / rows), 1)
        config.eval.every_epochs = 0.0
    optimizer = config.optimizer
    optimizer.schedule_steps = optimizer.schedule_steps or config.total_steps
    if optimizer.schedule_steps < config.total_steps:
        raise UserError(
            f"optimizer.schedule_steps={optimizer.schedule_steps} is less than the run's {config.total_steps} steps"
        )
    if optimizer.warmup_fraction:
        # Rounded first: 0.1 x 30 is 3. Google's code cuts; OpenAI's compares parts, so its first update has rate 0.
        warmup = round(optimizer.warmup_fraction * optimizer.schedule_steps, 6)
        optimizer.warmup_steps = (math.ceil if optimizer.schedule.startswith("openai") else math.floor)(warmup)
        optimizer.warmup_fraction = 0.0
    if platform is not None and config.precision.compute == "auto":
        config.precision.compute = "float32" if platform == "cpu" else "bfloat16"
    return config.lock()


def settle(config: ConfigDict, *, task: str, kind: str, classes: int, vectors: int) -> ConfigDict:
    """A copy in which what only a task's data tells is said.

    task: its name; classes: their number, 0 for a kind without; vectors: width of those of `data.task.vectors`.

    Raises:
      UserError: objectives that do not fit the kind, or another number of classes.
    """
    config = config.copy_and_resolve_references().unlock()
    name = OBJECTIVE_OF_KIND[kind]
    if name not in config.objectives:
        raise UserError(f"task {task!r} is of kind {kind!r} and needs objectives.{name}, not {[*config.objectives]}")
    settings = config.objectives[name]
    if "classes" in settings:
        if settings.classes not in (0, classes):
            raise UserError(f"objectives.{name}.classes={settings.classes}: task {task!r} has {classes}")
        settings.classes = classes
    if settings.get("pairs", "joined") != "joined" and kind not in ("pair", "similarity", "word"):
        raise UserError(
            f"objectives.{name}.pairs={settings.pairs!r} is for two texts, and task {task!r} is of kind {kind!r}:"
            " joined is right"
        )
    if name == "classify":
        settings.marked = 0 if kind != "word" else 2 if settings.pairs == "joined" else 1
        if kind == "word" and settings.pairs == "both_orders":
            raise UserError("objectives.classify.pairs='both_orders' is not for a word in context: joined or apart")
    settings.vectors = vectors
    return config.lock()


def to_text(config: ConfigDict) -> str:
    """One line for every key, `key = value`: for reading, comparing and golden texts."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config).items())


def to_json(config: ConfigDict) -> str:
    """The config as JSON, indented; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """What `to_json` wrote; lists become tuples again. A key that is newer than the text has its default: a default
    changes nothing of what was computed.

    Raises:
      UserError: text that is no JSON object.
    """

    def restore(value):
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    try:
        values = restore(json.loads(text))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UserError(f"the saved config is damaged: {error}") from error
    config = ConfigDict(values)
    for key, _, rule, _ in KEYS:
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node.get(group, ConfigDict())
        if leaf in node and node[leaf] is None:
            del node[leaf]
            node[leaf] = config_dict.placeholder(rule.kind)
    if {"data", "model", "objectives"} <= set(config):
        _add_new_keys(config)
    return config.lock()


def _add_new_keys(config: ConfigDict) -> None:
    have = flatten(config)
    groups = {key.rpartition(".")[0] for key in have}
    for key, (default, rule) in _rows(config).items():
        group, _, leaf = key.rpartition(".")
        if key not in have and group in groups:
            node = config
            for part in group.split(".") if group else ():
                node = node[part]
            node[leaf] = config_dict.placeholder(rule.kind) if default is None else default


def differences(saved: ConfigDict, current: ConfigDict, *, same_data: bool = False) -> list[str]:
    """What a resumed run may not change and `current` does: lines `key: saved value -> present value`.

    Both configs resolved. same_data: corpus and tokenizer have the fingerprints they had, so their paths may differ.
    """
    before, now = flatten(saved), flatten(current)
    free = MAY_CHANGE + (MAY_CHANGE_WITH_SAME_DATA if same_data else ())

    def may_change(key: str) -> bool:
        return any(key.startswith(name) if name.endswith(".") else key == name for name in free)

    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, "(no such key)"), now.get(key, "(no such key)")
        if old != new and not may_change(key):
            lines.append(f"{key}: {old!r} -> {new!r}")
    return lines


def refuse_differences(saved: ConfigDict, current: ConfigDict, workdir: str, *, same_data: bool = False) -> None:
    """Raises a `UserError` that lists all `differences`."""
    lines = differences(saved, current, same_data=same_data)
    if lines:
        raise UserError(
            f"{workdir} was trained with another config: {'; '.join(lines)}. Give the saved values to resume,"
            " or another --workdir to start anew"
        )
