"""A trained model in use: `model = plm.load("runs/bert")`, then `.embed`, `.score`, `.generate`, `.fill_mask`.

Every text is run by itself, in float32, without dropout and with fresh LSTM states, framed as the model's pretraining
framed its text:

| pretrained on | a text is read as |
| --- | --- |
| sentence pairs (`data.layout=pairs`: BERT) | `[CLS] text [SEP]`, all of it segment 0 |
| lanes with sentence markers (tokenizer `words`: ELMo) | `<S> text </S>`; the backward tower reads it from `</S>` on |
| a task (`data.layout=task`) | as the task's single texts, see `plm.data.task_rows` |
| running text without markers (GPT, the byte-level models of the comparison) | the text as it is, nothing added |

Two towers: features are the forward tower's, then the backward one's, both at the same token (each has read that token
and all before it, or all after it).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from plm import weights
from plm.data import reading
from plm.data.reading import Text, Tokens
from plm.data.task_rows import Frame
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.inference import batches, embedding, filling, generation, scoring
from plm.models.graph import ModelGraph, build
from plm.randomness import stable_hash
from plm.training import checkpoint
from plm.training import config as configs
from plm.training.record import CONFIG


def load(source: str, *, random: bool = False, allow_missing: str = "", vocabulary: str = "") -> "Model":
    """The model in a run's workdir (config.json, tokenizer/, checkpoints/), a converted or a foreign folder.

    source: `SRC` (the newest whole checkpoint), `SRC@STEP` or `SRC@best`. random: the same architecture with the
    parameters that the run began with (`config.seeds.init`), no checkpoint needed: the control of every measurement.
    allow_missing, vocabulary: of a foreign folder, see `plm.weights.read`.

    Errors: UserError when a part is missing or damaged, or the parameters are not those of the config.
    """
    workdir, step = checkpoint.split_step(str(source))
    if step is None and not is_run(workdir):
        return _load_foreign(workdir, random, allow_missing, vocabulary)
    config, tokenizer = read_run(workdir)
    graph = build(config, tokenizer.size, tuple(config.objectives), jnp.float32)
    if random:
        return Model(config, tokenizer, graph, initial_params(config, graph), 0, workdir)
    params, step = checkpoint.restore_params(workdir, step)
    _check(graph, params, workdir)
    return Model(config, tokenizer, graph, params, step, workdir)


def _load_foreign(source: str, random: bool, allow_missing: str, vocabulary: str) -> "Model":
    foreign = weights.read(source, allow_missing=allow_missing, vocabulary=vocabulary)
    graph = build(foreign.config, foreign.tokenizer.size, tuple(foreign.config.objectives), jnp.float32)
    params = initial_params(foreign.config, graph) if random else foreign.params
    return Model(foreign.config, foreign.tokenizer, graph, params, 0, source, foreign.report)


def is_run(folder: epath.PathLike) -> bool:
    """Whether a folder is a run's workdir or a converted one, with a config of this project."""
    path = epath.Path(folder) / CONFIG
    return path.exists() and b'"objectives"' in path.read_bytes()


def save(model: "Model", folder: epath.PathLike) -> None:
    """Writes a folder that `load` reads: config.json, tokenizer/ and the parameters as the checkpoint of its step."""
    folder = epath.Path(folder)
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER) as saved:
        saved.save({"params": jax.device_put(model.params)}, model.step, force=True)
    model.tokenizer.save(folder / "tokenizer")
    # Last: a folder without it is no model.
    (folder / CONFIG).write_text(configs.to_json(model.config))


def read_run(workdir: epath.PathLike):
    """(config, tokenizer) of a run's folder."""
    workdir = epath.Path(workdir)
    if not (workdir / CONFIG).exists():
        raise UserError(f"{workdir} is no run: it has no {CONFIG}; give the --workdir of python -m plm.train")
    return configs.from_json((workdir / CONFIG).read_text()), Tokenizer.load(workdir / "tokenizer")


def initial_params(config, graph: ModelGraph) -> dict:
    """The parameters that a run of this config begins with."""
    return graph.init(jax.random.key(configs.resolve_seeds(config).seeds.init))


def _check(graph: ModelGraph, params: dict, source: str) -> None:
    def shapes(tree) -> dict[str, tuple]:
        return {path: tuple(leaf.shape) for path, leaf in checkpoint.paths_and_leaves(tree)}

    wanted, found = shapes(graph.shapes()), shapes(params)
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            there, here = (list(s[path]) if path in s else "missing" for s in (found, wanted))
            raise UserError(
                f"{source}: parameter {path} is {there} in the checkpoint and {here} in the model of {CONFIG}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A tokenizer, a model and its parameters. step: of the checkpoint; source: where it came from.

    `dataclasses.replace(model, params=...)` gives another one that shares the compiled programs. Rows of every batch
    are spread over all devices of the process.
    """

    config: object
    tokenizer: Tokenizer
    graph: ModelGraph
    params: dict
    step: int
    source: str
    report: weights.Report | None = None  # of foreign weights
    # What does not depend on the parameters' values, compiled programs above all: copies with other ones share it.
    _shared: dict = dataclasses.field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def direction(self) -> str | None:
        return self.config.model.get("direction")

    @property
    def reads_characters(self) -> bool:
        return self.config.model.get("input") == "characters"

    @property
    def longest(self) -> int | None:
        """Tokens that fit into one row, the frame included; None without a limit (LSTMs)."""
        return self.config.model.get("max_positions") or None

    @functools.cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after every text; see the module."""
        roles, layout = self.tokenizer.roles, self.config.data.layout
        if layout == "pairs":
            return (roles["cls"],), (roles["sep"],)
        if layout == "lanes" and "bos" in roles and "eos" in roles:
            return (roles["bos"],), (roles["eos"],)
        if layout == "task":
            frame = Frame.of(self.tokenizer)
            return (frame.begin,), (frame.end,)
        return (), ()

    @property
    def head(self) -> str:
        """The name of its language model's head."""
        names = [name for name in configs.TOKEN_OBJECTIVES if name in self.config.objectives]
        if not names:
            trained = ", ".join(self.config.objectives)
            raise UserError(f"{self.source} has no language model's head: it was trained for {trained}")
        return names[0]

    @property
    def n_layers(self) -> int:
        """Layers that `embed` can return; 0 is the embedding."""
        return self._layer_shape[0]

    @property
    def n_features(self) -> int:
        """Numbers of one layer's vector."""
        return self._layer_shape[1]

    @property
    def _layer_shape(self) -> tuple[int, int]:
        if "layers" not in self._shared:
            batch = self.batch([[0]], 1, batches.bucket(1, self.longest), [])
            found = jax.eval_shape(lambda p: self.graph.bind(p)(batch, {}, layers=True)[0]["layers"], self.params)
            self._shared["layers"] = found.shape[0], found.shape[-1]
        return self._shared["layers"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the parameters, the architecture and the tokenizer: equal vectors and equal scores."""
        sums = checkpoint.checksums(dict(checkpoint.paths_and_leaves(self.placed)))
        model = sorted(self.config.model.to_dict().items(), key=lambda item: item[0])
        parts = (sorted(sums.items()), str(model), self.config.data.layout, self.tokenizer.fingerprint)
        return f"{stable_hash('model', *map(str, parts), bits=128):032x}"

    def at(self, step: int) -> "Model":
        """Another checkpoint of the same run; compiled programs are shared."""
        params, step = checkpoint.restore_params(self.source, step)
        _check(self.graph, params, self.source)
        return dataclasses.replace(self, params=params, step=step)

    def initial(self) -> "Model":
        """This model before training; compiled programs are shared."""
        return dataclasses.replace(self, params=initial_params(self.config, self.graph), step=0)

    # ------------------------------------------------------------------------------------------------ what it does

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens]:
        """Each text as the model reads it: its words, pieces and ids, and the word that each piece belongs to."""
        return reading.tokenize(self.tokenizer, texts)

    def embed(
        self,
        texts: Sequence[Text],
        layers: int | str | slice | Sequence[int] = -1,
        units: str = "words",
        *,
        pooling: str = "mean",
        specials: bool = False,
        mix: "str | Sequence[float] | embedding.ScalarMix | None" = None,
        window: int | None = None,
        stride: int | None = None,
        stateful: bool = False,
    ) -> list[np.ndarray]:
        """Contextual vectors: a float32 array [units, features] a text, [layers, units, features] for several layers.

        Args:
          texts: strings, or lists of words. A string's words stand between white space, and the tokenizer splits
            punctuation off as it does in running text; a list's words are taken as they are.
          layers: a number (0 the embedding, -1 the top), several, a slice, or "all".
          units: "words" or "subwords". A word's vector is that of its pieces pooled; a word of which the tokenizer
            leaves nothing (control characters alone) has zeros.
          pooling: "mean", "first" or "last" piece.
          specials: also the vectors of what frames the text, as first and last units.
          mix: of several layers one vector: "sum", "mean", "concat", or a weight for each layer; None or "none" keeps
            them apart. ELMo's own is "scalar", or an `embedding.ScalarMix` with learned weights.
          window: pieces, the frame included, that are read at once; longer texts are read in several windows, one
            every `stride` pieces, and each piece's vector is from the window in which it has most context
            (`reading.windows`). By default all positions of the model, and half of that; LSTMs read any length whole.
          stateful: each text begins with the LSTM states in which the one before it ended, as ELMo was trained; the
            texts are then one document in order.

        Texts are sorted by length and padded to few shapes, each compiled once.

        Errors: UserError for an unknown option or a layer that is not there.
        """
        options = embedding.options(self, layers, units, pooling, specials, mix, window, stride)
        result: list[np.ndarray | None] = [None] * len(texts)
        if stateful:
            found = embedding.in_order(self, [texts], options, None)[0]
        else:
            found = embedding.each(self, texts, options)
        for index, vectors in found:
            result[index] = vectors
        return result

    def embed_each(
        self, texts: Sequence[Text], layers=-1, units: str = "words", *, pooling: str = "mean"
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the text, its vectors as `embed` gives them), shortest texts first; holds few batches at a time."""
        options = embedding.options(self, layers, units, pooling, False, None, None, None)
        return embedding.each(self, texts, options)

    def static(self, words: Sequence[str]) -> np.ndarray:
        """float32 [words, features]: vectors of words without context, before positions and norms are added: the mean
        of a word's rows of the embedding table, or what the characters' convolutions give."""
        return embedding.static(self, words)

    def score(
        self, texts: Sequence[Text], *, within_words: bool = False, from_word: Sequence[int] | None = None
    ) -> "list[scoring.Score]":
        """Log-likelihoods of texts and of each of their pieces, in nats; see `scoring` for what a model can give.

        within_words: of a masked model: pieces behind the masked one in the same word are masked too. from_word: for
        each text the first word that is scored; those before it are read only, and their pieces score 0.
        """
        return scoring.score(self, texts, within_words, from_word)

    def generate(
        self,
        prompt: str | Sequence[str],
        tokens: int = 40,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str | list[str]:
        """Continues a prompt, or each of several: the new text alone, at most `tokens` pieces of it.

        temperature: 0 takes the likeliest piece, 1 samples from the model's probabilities; top_k: only among the
        likeliest k (0 = all); top_p: only among the likeliest pieces that together have this probability. The same seed
        gives the prompt at the same place in the list the same text, whatever the others are. Ends early where the
        model ends the sentence (ELMo) or the document, and before the first of the strings in `stop`. UNK, padding and
        the like are never drawn. Two towers: the forward one writes. What was read is kept
        (`LanguageModel.initial_cache`), so each piece takes the same time; where a Transformer's positions end, the
        older half of the text is forgotten.

        Errors: UserError for a model that sees both sides, an empty prompt where the tokenizer has no start, and
        options out of range.
        """
        options = generation.Options(tokens, temperature, top_k, top_p, seed, tuple(stop))
        made = generation.generate(self, [prompt] if isinstance(prompt, str) else list(prompt), options)
        return made[0] if isinstance(prompt, str) else made

    def fill_mask(self, text: str | Sequence[str], top_k: int = 5) -> list:
        """The likeliest pieces for each [MASK] of a text: a list over its masks of [(piece, probability), ...].

        text: one or several; for several there is such a list for each. A piece is written as it would stand in the
        text: byte-level ones with the space before them, WordPiece's continuations with ##. Special tokens are never
        proposed; the probabilities are those among all other pieces. Several masks are filled independently.

        Errors: UserError for a model without a mask, a text without [MASK], a text longer than the positions.
        """
        filled = filling.fill(self, [text] if isinstance(text, str) else list(text), top_k)
        return filled[0] if isinstance(text, str) else filled

    # ------------------------------------------------------------------------------------------------ how it runs

    @functools.cached_property
    def placed(self) -> dict:
        """The parameters on every device."""
        return jax.device_put(self.params, batches.everywhere())

    def run(self, make: Callable, batch: dict, *more, donate: tuple[int, ...] = (), **static):
        """`make(graph, **static)` compiled, of (params, batch, *more). batch: rows first, on the host; what stands in
        batch["shared"] has no rows and goes to every device. donate: places of arguments that may be overwritten."""
        key = (make.__module__, make.__qualname__, *sorted(static.items()))
        if key not in self._shared:
            self._shared[key] = jax.jit(make(self.graph, **static), donate_argnums=donate)
        if batches.mesh().size > 1:
            places = {name: batches.everywhere() if name == "shared" else batches.by_rows() for name in batch}
            batch = {name: jax.device_put(value, places[name]) for name, value in batch.items()}
        with jax.default_matmul_precision("float32"):
            return self._shared[key](self.placed, batch, *more)

    def batch(self, ids: Sequence[Sequence[int]], rows: int, width: int, open_words: list[str]) -> dict:
        """Framed ids as the model's batch, padded to [rows, width]."""
        tokens, length = batches.pad(ids, rows, width, self.tokenizer.roles.get("pad", 0))
        batch: dict = {"length": length}
        if self.reads_characters:
            batch["characters"] = self.characters(tokens, open_words)
        else:
            batch["tokens"] = self.tokenizer.target_id(tokens).astype(np.int32)
        return batch

    def characters(self, ids: np.ndarray, open_words: list[str]) -> np.ndarray:
        """ELMo's byte ids, int32 [..., 50], shifted by one as the model reads them (0 = no token)."""
        size = self.tokenizer.size
        rows = np.take(self._vocabulary_rows, np.minimum(ids, size - 1), axis=0)
        outside = ids >= size
        if outside.any():
            # Only the words of this batch: a whole set of texts may have many more.
            here, place = np.unique(ids[outside] - size, return_inverse=True)
            rows[outside] = self.tokenizer.character_rows([open_words[word] for word in here])[place]
        return rows.astype(np.int32) + 1

    @functools.cached_property
    def _vocabulary_rows(self) -> np.ndarray:
        return self.tokenizer.character_rows()
