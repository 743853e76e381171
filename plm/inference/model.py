"""A trained model for inference: `model = plm.load("runs/bert")`, then `.embed`, `.generate`, `.fill_mask`.

Every text is run by itself, in float32, without dropout and with fresh LSTM states, framed as the model's pretraining
framed its text:

| pretrained on | a text is read as |
| --- | --- |
| sentence pairs (`data.layout=pairs`: BERT) | `[CLS] text [SEP]`, all of it segment 0 |
| lanes with sentence markers (tokenizer `words`: ELMo) | `<S> text </S>`; the backward tower reads it from `</S>` on |
| running text without markers (GPT, the byte-level models of the comparison) | the text as it is, nothing added |

Vectors of what frames a text are never returned. Two towers: features are the forward tower's, then the backward
one's, both at the same token (each has read that token and all before it, or all after it).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import ModelGraph, build
from plm.randomness import generator
from plm.training import checkpoint
from plm.training import config as configs
from plm.training.record import CONFIG

Text = str | Sequence[str]

MASK = "[MASK]"  # how users write a masked place, whatever the tokenizer calls it
SHORTEST = 16  # tokens of the smallest shape
BATCH_TOKENS = 4096  # rows x tokens of a full batch, about
CNN_WORDS = 256  # distinct words that pass ELMo's convolutions together
POOLINGS = ("mean", "first", "last")
LANGUAGE_HEADS = ("causal", "bidirectional", "masked")


def split_source(spec: str) -> tuple[str, int | None]:
    """`SRC[@STEP]` -> (SRC, step, None for the newest)."""
    source, at, step = spec.rpartition("@")
    if not at or "/" in step:
        return spec, None
    if not step.isdigit():
        raise UserError(f"model {spec!r}: what follows @ must be the step of a checkpoint, a whole number")
    return source, int(step)


def load(source: str, *, random: bool = False, allow_missing: str = "", vocabulary: str = "") -> "Model":
    """The model in a run's workdir (config.json, tokenizer/, checkpoints/), a converted or a foreign folder.

    source: `SRC` (the newest whole checkpoint) or `SRC@STEP`. random: the same architecture with the parameters that
    the run began with (`config.seeds.init`), no checkpoint needed: the control of every measurement. allow_missing,
    vocabulary: of a foreign folder, see `plm.weights.read`.

    Errors: UserError when a part is missing or damaged, or the parameters are not those of the config.
    """
    workdir, step = split_source(str(source))
    if step is None and not is_run(workdir):
        return _load_foreign(workdir, random, allow_missing, vocabulary)
    config, tokenizer = read_run(workdir)
    graph = build(config, tokenizer.size, tuple(config.objectives), jnp.float32)
    if random:
        return Model(config, tokenizer, graph, initial_params(config, graph), 0, workdir)
    params, step = checkpoint.restore_params(workdir, step)
    _check(graph, params, workdir)
    return Model(config, tokenizer, graph, jax.device_put(params), step, workdir)


def _load_foreign(source: str, random: bool, allow_missing: str, vocabulary: str) -> "Model":
    foreign = weights.read(source, allow_missing=allow_missing, vocabulary=vocabulary)
    graph = build(foreign.config, foreign.tokenizer.size, tuple(foreign.config.objectives), jnp.float32)
    params = initial_params(foreign.config, graph) if random else jax.device_put(foreign.params)
    return Model(foreign.config, foreign.tokenizer, graph, params, 0, source, foreign.report)


def is_run(folder: epath.PathLike) -> bool:
    """Whether a folder is a run's workdir or a converted one, with a config of this project."""
    path = epath.Path(folder) / CONFIG
    return path.exists() and b'"objectives"' in path.read_bytes()


def save(model: "Model", folder: epath.PathLike) -> None:
    """Writes a folder that `load` reads: config.json, tokenizer/ and the parameters as the checkpoint of its step."""
    folder = epath.Path(folder)
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER) as saved:
        saved.save({"params": model.params}, model.step, force=True)
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


class _Lookup:
    """Stands in for the character encoder: rows of vectors made once for each distinct word."""

    def __init__(self, table: jax.Array):
        self.table = table

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.table, ids, axis=0, mode="clip")


@dataclasses.dataclass(frozen=True)
class _Read:
    """Texts as ids: `ids[i]` with the frame; unit u of text i is positions spans[i][u] = (start, stop)."""

    ids: list[list[int]]
    spans: list[np.ndarray]
    open_words: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A tokenizer, a model and its parameters. step: of the checkpoint; source: where it came from.

    `dataclasses.replace(model, params=...)` gives another one that shares the compiled programs.
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
        return (), ()

    @property
    def n_layers(self) -> int:
        """Layers that `embed` can return; 0 is the embedding."""
        if "n_layers" not in self._shared:
            batch = self._batch([[0]], 1, SHORTEST, [])
            layers = jax.eval_shape(lambda p: self.graph.bind(p)(batch, {}, layers=True)[0]["layers"], self.params)
            self._shared["n_layers"] = layers.shape[0]
        return self._shared["n_layers"]

    def initial(self) -> "Model":
        """This model before training; compiled programs are shared."""
        return dataclasses.replace(self, params=initial_params(self.config, self.graph), step=0)

    # ----------------------------------------------------------------------------------------------------- embed

    def embed(
        self,
        texts: Sequence[Text],
        layers: int | str | slice | Sequence[int] = -1,
        units: str = "words",
        *,
        pooling: str = "mean",
    ) -> list[np.ndarray]:
        """Contextual vectors: a float32 array [units, features] a text, [layers, units, features] for several layers.

        Args:
          texts: strings, or lists of words. A string's words stand between white space, and the tokenizer splits
            punctuation off as it does in running text; a list's words are taken as they are.
          layers: a number (0 the embedding, -1 the top), several, a slice, or "all".
          units: "words" or "subwords". A word's vector is that of its pieces pooled; a word of which the tokenizer
            leaves nothing (control characters alone) has zeros.
          pooling: "mean", "first" or "last" piece.

        Texts are sorted by length and padded to few shapes (powers of two), each compiled once.

        Errors: UserError for a text longer than the model's positions, an unknown option, a layer that is not there.
        """
        result: list[np.ndarray | None] = [None] * len(texts)
        for index, vectors in self.embed_each(texts, layers, units, pooling=pooling):
            result[index] = vectors
        return result

    def embed_each(
        self,
        texts: Sequence[Text],
        layers: int | str | slice | Sequence[int] = -1,
        units: str = "words",
        *,
        pooling: str = "mean",
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the text, its vectors as `embed` gives them), shortest texts first; holds one batch at a time."""
        if units not in ("words", "subwords"):
            raise UserError(f"units={units!r} must be 'words' or 'subwords'")
        if pooling not in POOLINGS:
            raise UserError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
        wanted, several = self._layers(layers)
        read = self._read(texts, units)
        for rows, vectors in self._vectors(read, wanted):
            for row, index in enumerate(rows):
                pooled = _pool(vectors[:, row], read.spans[index], pooling)
                yield index, pooled if several else pooled[0]

    def tokenize(self, texts: Sequence[Text]) -> list[list[str]]:
        """The pieces of each text, one for every vector of `units="subwords"`."""
        before, after = map(len, self.frame)
        read = self._read(texts, "subwords", any_length=True)
        return [self.tokenizer.pieces(ids[before : len(ids) - after]) for ids in read.ids]

    def _layers(self, layers) -> tuple[tuple[int, ...], bool]:
        n = self.n_layers
        if isinstance(layers, str) and layers == "all":
            return tuple(range(n)), True
        if isinstance(layers, slice):
            return tuple(range(n)[layers]), True
        several = not isinstance(layers, int | np.integer)
        wanted = list(layers) if several else [layers]
        for layer in wanted:
            if not isinstance(layer, int | np.integer) or not -n <= layer < n:
                raise UserError(f"layers={layers!r}: {layer!r} must be a number from {-n} to {n - 1}, or say 'all'")
        return tuple(int(layer) % n for layer in wanted), several

    def _read(self, texts: Sequence[Text], units: str, *, any_length: bool = False) -> _Read:
        if isinstance(texts, str):
            raise UserError("texts must be a list: strings, or lists of words; for one text give [text]")
        before, after = (list(part) for part in self.frame)
        words = [text.split() if isinstance(text, str) else list(text) for text in texts]
        numbers: dict[tuple[bool, str], int] = {}
        for text, split in zip(texts, words, strict=True):
            for word in split:
                if not isinstance(word, str):
                    raise UserError(f"texts must be strings or lists of words, not lists of {type(word).__name__}")
                numbers.setdefault((isinstance(text, str), word), len(numbers))
        # No rule of any tokenizer looks across white space, so each distinct word is read once.
        encoded, open_words = self._read_words(list(numbers))
        ids, spans = [], []
        for text, split in zip(texts, words, strict=True):
            pieces = [encoded[numbers[isinstance(text, str), word]] for word in split]
            flat = [piece for word in pieces for piece in word]
            ends = len(before) + np.cumsum([len(word) for word in pieces], dtype=np.int64)
            if units == "subwords":
                ends = len(before) + 1 + np.arange(len(flat))
            starts = np.concatenate([[len(before)], ends[:-1]])[: len(ends)]
            ids.append([*before, *flat, *after])
            spans.append(np.stack([starts, ends], axis=1).astype(np.int64))
        if self.longest is not None and not any_length:
            for index, text_ids in enumerate(ids):
                if len(text_ids) > self.longest:
                    raise UserError(
                        f"text {index} has {len(text_ids)} pieces with what frames it and the model reads at most"
                        f" {self.longest} (model.max_positions): cut it into shorter texts"
                    )
        return _Read(ids, spans, open_words)

    def _read_words(self, words: list[tuple[bool, str]]) -> tuple[list[list[int]], list[str]]:
        """Ids of each (of running text?, word); ids from tokenizer.size on index the list of unknown words."""
        tokenizer = self.tokenizer
        running = [word for is_running, word in words if is_running]
        given = [[word] for is_running, word in words if not is_running]
        of_running, open_words = tokenizer.encode_open(running) if running else ([], [])
        of_given = tokenizer.encode_words(given) if given else []
        if tokenizer.kind == "words":
            unknown, known = tokenizer.role("unk"), {word: i for i, word in enumerate(open_words)}
            for (word,), ids in zip(given, of_given, strict=True):
                if ids == [unknown] and word != tokenizer.vocabulary[unknown]:
                    ids[0] = tokenizer.size + known.setdefault(word, len(known))
            open_words = list(known)
        first, second = iter(of_running), iter(of_given)
        return [next(first if is_running else second) for is_running, _ in words], open_words

    def _vectors(self, read: _Read, layers: tuple[int, ...]) -> Iterator[tuple[list[int], np.ndarray]]:
        """(indices of texts, float32 [layers, rows, T, features]), batch by batch."""
        table = None
        if self.reads_characters:
            table, read = self._context_free(read)
        program = self._program("layers", _layers_program, layers=layers, looked_up=table is not None)
        for rows, n_rows, width in _batches([len(ids) for ids in read.ids], self.longest):
            batch = self._batch([read.ids[row] for row in rows], n_rows, width, None if table is not None else [])
            if table is not None:
                batch["vectors"] = table
            with jax.default_matmul_precision("float32"):
                vectors = program(self.params, batch)
            yield rows, np.asarray(vectors)

    def _context_free(self, read: _Read) -> tuple[jax.Array, _Read]:
        """(vectors of the distinct words [padded, width], `read` with ids that index them).

        ELMo's convolutions look at one word alone and are most of its arithmetic: each word passes them once.
        """
        everything = np.fromiter((i for ids in read.ids for i in ids), np.int64)
        distinct, places = np.unique(everything, return_inverse=True)
        borders = np.cumsum([len(ids) for ids in read.ids])[:-1]
        ids = [part.tolist() for part in np.split(places, borders)] if read.ids else []
        characters = self._characters(distinct, read.open_words)
        program = self._program("words", _words_program)
        n = -(-max(len(distinct), 1) // CNN_WORDS)
        padded = np.zeros((n * CNN_WORDS, *characters.shape[1:]), characters.dtype)
        padded[: len(characters)] = characters
        with jax.default_matmul_precision("float32"):
            parts = [program(self.params, part) for part in np.split(padded, n)]
        # A power of two of rows, so that the programs that read the table see few shapes.
        parts += [jnp.zeros_like(parts[0])] * (_power_of_two(n) - n)
        return jnp.concatenate(parts), dataclasses.replace(read, ids=ids)

    def _characters(self, ids: np.ndarray, open_words: list[str]) -> np.ndarray:
        """ELMo's byte ids, int32 [..., 50], shifted by one as the model reads them (0 = no token)."""
        size = self.tokenizer.size
        rows = np.take(self._vocabulary_rows, np.minimum(ids, size - 1), axis=0)
        outside = ids >= size
        if outside.any():
            rows[outside] = self.tokenizer.character_rows(open_words)[ids[outside] - size]
        return rows.astype(np.int32) + 1

    @functools.cached_property
    def _vocabulary_rows(self) -> np.ndarray:
        return self.tokenizer.character_rows()

    def _batch(self, ids: Sequence[Sequence[int]], rows: int, width: int, open_words: list[str] | None) -> dict:
        """The model's batch, padded to [rows, width]. open_words: None when ids index a table of vectors."""
        tokens = np.full((rows, width), self.tokenizer.roles.get("pad", 0) if open_words is not None else 0, np.int64)
        length = np.ones(rows, np.int32)  # rows that only pad see one token: softmax over nothing is not a number
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            length[row] = max(len(text), 1)
        batch: dict = {"length": length}
        if open_words is None:
            batch["tokens"] = tokens.astype(np.int32)
        elif self.reads_characters:
            batch["characters"] = self._characters(tokens, open_words)
        else:
            batch["tokens"] = self.tokenizer.target_id(tokens).astype(np.int32)
        if self.config.model.get("segments"):
            batch["segments"] = np.zeros((rows, width), np.int32)
        return batch

    def _program(self, name: str, make: Callable, **static) -> Callable:
        key = (name, *sorted(static.items()))
        if key not in self._shared:
            self._shared[key] = jax.jit(make(self.graph, **static))
        return self._shared[key]

    # -------------------------------------------------------------------------------------------------- generate

    def generate(
        self,
        prompt: str | Sequence[str],
        tokens: int = 40,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str | list[str]:
        """Continues a prompt, or each of several: the new text alone, at most `tokens` pieces of it.

        temperature: 0 takes the likeliest piece, 1 samples from the model's probabilities; top_k: only among the
        likeliest k (0 = all). The same seed gives the same text. Ends early where the model ends the sentence (ELMo)
        or the document. UNK, padding and the like are never drawn. Two towers: the forward one writes. The whole
        window is read again for every new piece; past the model's positions it slides.

        Errors: UserError for a model that sees both sides, an empty prompt where the tokenizer has no start, and
        options out of range.
        """
        head = self._head()
        if head == "masked":
            raise UserError(
                f"{self.source} was trained to fill masks (direction={self.direction!r}) and cannot continue a text:"
                " use fill_mask, or a causal or bidirectional model"
            )
        if tokens < 1 or temperature < 0 or top_k < 0:
            raise UserError(
                f"tokens={tokens} must be at least 1, temperature={temperature:g} and top_k={top_k} at least 0"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokenizer, roles = self.tokenizer, self.tokenizer.roles
        encoded, open_words = tokenizer.encode_open(prompts)
        starts = list(self.frame[0]) if "bos" in roles else []
        ids = [starts + list(text) for text in encoded]
        for text, read in zip(prompts, ids, strict=True):
            if not read and "eod" not in roles:
                raise UserError(f"prompt {text!r} holds nothing for the tokenizer to read: give some text")
        ids = [read or [roles["eod"]] for read in ids]
        ends = {roles[role] for role in ("eos", "eod") if role in roles}
        never = np.array([i for role, i in roles.items() if i not in ends], np.int64)
        drawn = [generator(seed, "generate", row) for row in range(len(ids))]
        width = _bucket(max(map(len, ids)) + tokens, self.longest)
        new: list[list[int]] = [[] for _ in ids]
        going = set(range(len(ids)))
        for _ in range(tokens):
            windows = [(before + after)[-width:] for before, after in zip(ids, new, strict=True)]
            last = np.array([[len(window) - 1] for window in windows], np.int32)
            scores = self._scores(windows, width, last, open_words, head)[:, 0]
            scores[:, never] = -np.inf
            for row in sorted(going):
                token = _draw(scores[row], temperature, top_k, drawn[row])
                if token in ends:
                    going.discard(row)
                else:
                    new[row].append(token)
            if not going:
                break
        texts = [self._continued(before, after) for before, after in zip(encoded, new, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def _continued(self, before: list[int], after: list[int]) -> str:
        """The text of `after` as it stands behind that of `before`, its leading space included."""
        head, whole = self.tokenizer.decode(before), self.tokenizer.decode([*before, *after])
        return whole[len(head) :] if whole.startswith(head) else " " + self.tokenizer.decode(after)

    def _head(self) -> str:
        names = [name for name in LANGUAGE_HEADS if name in self.config.objectives]
        if not names:
            raise UserError(f"{self.source} has no language model's head: it was trained for {self.config.objectives}")
        return names[0]

    def _scores(self, ids, width: int, positions: np.ndarray, open_words: list[str], head: str) -> np.ndarray:
        """Logits, float32 [n, P, vocabulary], at positions [n, P] of n rows of ids."""
        program = self._program("scores", _scores_program, head=head)
        with jax.default_matmul_precision("float32"):
            return np.array(program(self.params, self._batch(ids, len(ids), width, open_words), positions))

    # ------------------------------------------------------------------------------------------------- fill mask

    def fill_mask(self, text: str | Sequence[str], top_k: int = 5) -> list:
        """The likeliest pieces for each [MASK] of a text: a list over its masks of [(piece, probability), ...].

        text: one or several; for several there is such a list for each. A piece is written as it would stand in the
        text: byte-level ones with the space before them, WordPiece's continuations with ##. Special tokens are never
        proposed; the probabilities are those among all other pieces. Several masks are filled independently.

        Errors: UserError for a model without a mask, a text without [MASK], a text longer than the positions.
        """
        if self._head() != "masked":
            raise UserError(
                f"{self.source} was trained to continue text (direction={self.direction!r}) and cannot fill masks:"
                " use generate, or a masked model"
            )
        if top_k < 1:
            raise UserError(f"top_k={top_k} must be at least 1")
        texts = [text] if isinstance(text, str) else list(text)
        mask = self.tokenizer.role("mask")
        before, after = (list(part) for part in self.frame)
        ids = []
        for one in texts:
            if MASK not in one:
                raise UserError(f"text {one!r} has no {MASK}: write it where a piece is to be filled in")
            ids.append([*before, *self._masked_ids(one, mask), *after])
        longest = max(map(len, ids))
        if self.longest is not None and longest > self.longest:
            raise UserError(
                f"a text has {longest} pieces and the model reads at most {self.longest} (model.max_positions)"
            )
        places = [[at for at, i in enumerate(row) if i == mask] for row in ids]
        positions = np.zeros((len(ids), _power_of_two(max(map(len, places)))), np.int32)
        for row, found in enumerate(places):
            positions[row, : len(found)] = found
        scores = self._scores(ids, _bucket(longest, self.longest), positions, [], "masked").astype(np.float64)
        scores[..., list(self.tokenizer.roles.values())] = -np.inf
        filled = [[self._best(scores[row, slot], top_k) for slot in range(len(at))] for row, at in enumerate(places)]
        return filled[0] if isinstance(text, str) else filled

    def _masked_ids(self, text: str, mask: int) -> list[int]:
        """Ids of a text in which each [MASK] is the mask token, in place of one piece and the space before it."""
        tokenizer = self.tokenizer
        ids: list[int] = []
        for number, part in enumerate(re.split(re.escape(MASK), text)):
            if number:
                ids.append(mask)
            stripped = part.strip()
            if not stripped:
                continue
            if tokenizer.lossless and number and not part[0].isspace():
                # Directly behind the mask: no space before it, unlike at the start of a sentence.
                ids += tokenizer.backend.encode(stripped, add_special_tokens=False).ids
            else:
                ids += tokenizer.encode([stripped])[0]
        return ids

    def _best(self, scores: np.ndarray, top_k: int) -> list[tuple[str, float]]:
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities, kind="stable")[: min(top_k, np.count_nonzero(probabilities))]
        return [(self._written(int(i)), float(probabilities[i])) for i in best]

    def _written(self, piece: int) -> str:
        if self.tokenizer.lossless:
            return self.tokenizer.backend.decode([piece], skip_special_tokens=False)
        return self.tokenizer.pieces([piece])[0].removesuffix("</w>")


# ------------------------------------------------------------------------------------------------ programs for devices


def _layers_program(graph: ModelGraph, layers: tuple[int, ...], looked_up: bool) -> Callable:
    def program(params, batch):
        model = graph.bind(params)
        if looked_up:
            batch = dict(batch)
            model.embedding.characters = _Lookup(batch.pop("vectors"))
            batch["characters"] = batch.pop("tokens")
        outputs, _ = model(batch, {}, layers=True)
        return jnp.stack([outputs["layers"][layer] for layer in layers]).astype(jnp.float32)

    return program


def _words_program(graph: ModelGraph) -> Callable:
    return lambda params, characters: graph.bind(params).embedding.characters(characters)


def _scores_program(graph: ModelGraph, head: str) -> Callable:
    def program(params, batch, positions):
        model = graph.bind(params)
        outputs, _ = model(batch, {})
        hidden = outputs["forward"] if "forward" in outputs else outputs["hidden"]
        return model.heads[head].logits(jnp.take_along_axis(hidden, positions[..., None], axis=1))

    return program


# ---------------------------------------------------------------------------------------------------------------- rest


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _bucket(n: int, longest: int | None) -> int:
    """The padded length of n tokens."""
    width = max(SHORTEST, _power_of_two(n))
    return width if longest is None else min(width, longest)


def _batches(lengths: Sequence[int], longest: int | None) -> Iterator[tuple[list[int], int, int]]:
    """(indices, rows, width) of batches, shortest texts first; one number of rows for each width."""
    by_width: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        by_width.setdefault(_bucket(lengths[index], longest), []).append(index)
    for width, indices in by_width.items():
        rows = min(max(BATCH_TOKENS // width, 1), _power_of_two(len(indices)))
        for first in range(0, len(indices), rows):
            yield indices[first : first + rows], rows, width


def _pool(vectors: np.ndarray, spans: np.ndarray, pooling: str) -> np.ndarray:
    """[layers, T, features] -> [layers, units, features]; a unit without positions is zeros."""
    starts, stops = spans[:, 0], spans[:, 1]
    counts = stops - starts
    if (counts == 1).all():
        return vectors[:, starts]
    result = np.zeros((vectors.shape[0], len(spans), vectors.shape[2]), vectors.dtype)
    there = counts > 0
    if pooling == "first":
        result[:, there] = vectors[:, starts[there]]
    elif pooling == "last":
        result[:, there] = vectors[:, stops[there] - 1]
    elif there.any():
        # Units follow each other without gaps, so each sum ends where the next begins.
        sums = np.add.reduceat(vectors[:, : stops[-1]], starts[there], axis=1)
        result[:, there] = sums / counts[there][None, :, None].astype(vectors.dtype)
    return result


def _draw(scores: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    scores = scores.astype(np.float64) / temperature
    if top_k and top_k < len(scores):
        scores[scores < np.partition(scores, -top_k)[-top_k]] = -np.inf
    cumulative = np.cumsum(np.exp(scores - scores.max()))
    return min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")), len(scores) - 1)
