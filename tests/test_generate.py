"""Generation: what is kept of a text changes no word of the continuation, and a token costs the same at any length."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fixtures import children

from plm.errors import UserError
from plm.inference import generation
from plm.inference.model import save

READERS = ["gpt", "elmo", "lstm", "towers"]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def endless(model):
    """The model with an end of document that is never the likeliest, and smaller numbers: the random LSTM is chaotic,
    so that the last bit of a score would become another word 50 pieces later."""
    params = jax.tree.map(lambda leaf: 0.4 * leaf, model.params)
    params["embedding"]["tokens"]["table"][model.tokenizer.role("eod")] = 0
    return dataclasses.replace(model, params=params)


def rereads(monkeypatch):
    """Memories that keep nothing, as for models from outside the package: every row is read again for every piece."""
    made = generation._Memory.__init__

    def without(self, *arguments):
        made(self, *arguments)
        self.keeps = False

    monkeypatch.setattr(generation._Memory, "__init__", without)


@pytest.mark.parametrize("name", READERS)
def test_what_is_kept_changes_no_word(models, name, monkeypatch):
    """Prompts of several lengths beside each other; 60 pieces go past the 40 positions of the Transformers."""
    model = models[name] if name == "elmo" else endless(models[name])
    prompts = ["Bake limo", "Keli ra bakelimo zazu, keli ra", "Mo"]
    wanted = {}
    for options in ({"temperature": 0}, {"seed": 3, "top_k": 20, "top_p": 0.9}):
        wanted[str(options)] = model.generate(prompts, 60, **options)
    assert all(wanted.values())
    rereads(monkeypatch)
    for options in ({"temperature": 0}, {"seed": 3, "top_k": 20, "top_p": 0.9}):
        assert model.generate(prompts, 60, **options) == wanted[str(options)]


def test_greedy_text_follows_the_largest_score_and_forgets_half_past_the_positions(models):
    """By hand, without the package's own loop."""
    model = endless(models["gpt"])
    prompt, n, longest = "bake limo", 60, 40
    tokenizer = model.tokenizer
    text = model.generate(prompt, n, temperature=0)
    ids = tokenizer.encode([prompt])[0]
    window = list(ids)

    @jax.jit
    def logits(tokens):
        module = model.graph.bind(model.params)
        return module.heads["causal"].logits(module({"tokens": tokens}, {})[0]["hidden"])[0]

    for _ in range(n):
        scores = np.array(logits(np.array([window + [0] * (longest - len(window))]))[len(window) - 1])
        scores[tokenizer.role("unk")] = -np.inf
        if len(window) == longest:
            window = window[longest // 2 :]
        window.append(int(scores.argmax()))
        ids.append(window[-1])
    assert prompt + text == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_every_piece_runs_one_program_of_one_shape(models, name):
    """Time per piece is flat: whatever has been written, a piece is one call of one compiled program on one token."""
    model = dataclasses.replace(endless(models[name]), _shared={})
    calls = []
    run = type(model).run

    def counted(self, make, batch, *more, **options):
        shapes = {key: np.shape(value) for key, value in batch.items()}
        calls.append((make.__name__, tuple(sorted(shapes.items())), tuple(x.shape for x in jax.tree.leaves(more))))
        return run(self, make, batch, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "run", counted)
        model.generate("Bake", 30, top_k=5)
    first, *others = calls
    assert first[0] == "_read_program"
    assert len(others) == 29
    assert set(others) == {others[0]}
    assert others[0][0] == "_next_program"
    tokens = dict(others[0][1])["tokens"]
    assert tokens == (1, 1)
    programs = {key[1]: found for key, found in model._shared.items() if isinstance(key, tuple)}
    assert [programs[name]._cache_size() for name in ("_read_program", "_next_program")] == [1, 1]


def test_sampling_depends_on_the_seed_and_not_on_the_other_prompts(models):
    model = models["elmo"]
    both = model.generate(["Bake limo", "Keli ra"], 8, top_k=10, seed=3)
    assert model.generate("Bake limo", 8, top_k=10, seed=3) == both[0]
    assert model.generate("Bake limo", 8, top_k=10, seed=4) != both[0]
    assert not any(special in text for text in both for special in ("<UNK>", "<S>", "</S>"))


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(models):
    model = endless(models["gpt"])
    whole = model.generate("Bake limo", 30, seed=1)
    stop = whole[20:23]
    cut = model.generate("Bake limo", 30, seed=1, stop=["never there", stop])
    assert cut == whole[: whole.index(stop)]


def test_draws():
    def options(**settings):
        return generation.Options(
            **{"tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "stop": ()} | settings
        )

    shares = np.array([0.5, 0.3, 0.15, 0.05])
    scores = np.log(shares).astype(np.float32)
    rng = np.random.default_rng(0)

    def drawn(**settings):
        found = [generation.draw(scores.copy(), options(**settings), rng) for _ in range(4000)]
        return np.bincount(found, minlength=4) / 4000

    assert np.abs(drawn() - shares).max() < 0.03
    assert np.abs(drawn(top_k=2) - np.array([5, 3, 0, 0]) / 8).max() < 0.03
    assert np.abs(drawn(top_p=0.7) - np.array([5, 3, 0, 0]) / 8).max() < 0.03, "the fewest pieces with that share"
    assert np.abs(drawn(top_p=0.01) - np.array([1, 0, 0, 0])).max() == 0
    assert np.abs(drawn(temperature=0.5) - shares**2 / (shares**2).sum()).max() < 0.03
    assert drawn(temperature=0)[0] == 1


def test_what_cannot_be_generated_is_said_in_one_line(models):
    model = models["gpt"]
    for call, words in (
        (lambda: models["bert"].generate("keli"), "cannot continue a text"),
        (lambda: model.generate("keli", temperature=-1), "temperature=-1"),
        (lambda: model.generate("keli", temperature=float("nan")), "temperature=nan"),
        (lambda: model.generate("keli", 0), "tokens=0"),
        (lambda: model.generate("keli", top_p=0), "top_p=0 must be above 0"),
        (lambda: model.generate("keli", stop=[""]), "not empty"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_odd_prompts(models):
    for name in READERS:
        texts = models[name].generate(["", "a\0b", "😀 שלום", "x" * 1000], 3, seed=1)
        assert len(texts) == 4


def test_the_commands(models, tmp_path):
    save(models["gpt"], tmp_path / "gpt")
    save(models["bert"], tmp_path / "bert")
    (tmp_path / "prompts").write_text("Keli mo\n\nBake limo\n")
    gpt, bert = (f"--model={tmp_path / name}" for name in ("gpt", "bert"))
    runs = {
        "one": ("plm.generate", gpt, "--prompt=Keli mo", "--tokens=5", "--seed=2", "--stop=q", "--top_p=0.9", "--json"),
        "file": ("plm.generate", gpt, f"--prompts={tmp_path / 'prompts'}", "--tokens=3", "--temperature=0"),
        "fill": ("plm.fill_mask", bert, "--text=Keli [MASK] ra [MASK].", "--top_k=3", "--json"),
        "masked": ("plm.generate", bert, "--prompt=Keli mo"),
        "both": ("plm.generate", gpt),
        "causal": ("plm.fill_mask", gpt, "--text=Keli [MASK]"),
        "none": ("plm.fill_mask", bert, "--text=Keli"),
    }
    started = {name: children.start(*run, output=tmp_path / f"{name}.log") for name, run in runs.items()}
    codes = {name: child.wait() for name, child in started.items()}
    said = {name: child.text.strip() for name, child in started.items()}
    refused = ("masked", "both", "causal", "none")
    assert codes == {name: 2 if name in refused else 0 for name in runs}, said
    row = json.loads(said["one"])
    wanted = models["gpt"].generate("Keli mo", 5, seed=2, stop=["q"], top_p=0.9)
    assert row == {"prompt": "Keli mo", "text": wanted}
    texts = models["gpt"].generate(["Keli mo", "Bake limo"], 3, temperature=0)
    assert said["file"] == f"Keli mo{texts[0]}\nBake limo{texts[1]}".strip()
    guesses = models["bert"].fill_mask("Keli [MASK] ra [MASK].", 3)
    found = [json.loads(line)["guesses"] for line in said["fill"].splitlines()]
    assert [[piece for piece, _ in one] for one in found] == [[piece for piece, _ in one] for one in guesses]
    for name in refused:
        assert said[name].startswith("error: ")
        assert "\n" not in said[name]
