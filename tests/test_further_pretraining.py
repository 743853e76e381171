"""Published weights trained further: `init.from` of ELMo's and OpenAI's own files, and what must be said first."""

import shutil

import jax
import numpy as np
import pytest
import test_weights_elmo
import test_weights_openai
from fixtures import children, corpus
from fixtures.children import RUNS

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.training import checkpoint, loop
from plm.training import config as configs


@pytest.fixture(autouse=True)
def compiled_once(cache):
    before = children.quick_compiles()
    yield
    children.restore(before)


def config_like(kind: str, text, foreign, objective: str, **settings):
    """The toy run `kind` with the model of a foreign folder."""
    config = configs.load(f"{RUNS}:{kind}", {"data.source": f"text:{text}", "total_steps": 1, "eval.batches": 1})
    config.unlock()
    config.model = foreign.config.model.copy_and_resolve_references().unlock()
    config.objectives = {}
    configs.add_objective(config, objective)
    configs.apply(config, {"checkpoint.keep_at": (0,), **settings})
    return configs.validate(config.lock())


def begun_with(workdir) -> dict[str, np.ndarray]:
    """The parameters before the first update, by stored name."""
    return dict(checkpoint.paths_and_leaves(checkpoint.restore_params(workdir, 0)[0]))


def test_elmo_gets_a_vocabulary_and_a_softmax_of_the_corpus(tmp_path, capsys):
    source = test_weights_elmo.write_files(
        tmp_path / "elmo", test_weights_elmo.OPTIONS, test_weights_elmo.drawn_arrays(test_weights_elmo.OPTIONS)
    )
    text = corpus.write(tmp_path / "corpus.txt")
    foreign = weights.read(source)
    settings = {"init.from": str(source), "data.tokenizer.vocab": 64}
    config = config_like("lanes", text, foreign, "bidirectional", **settings)
    with pytest.raises(UserError, match=r"lacks 2 parameters of this model: heads/bidirectional/.*init\.allow_missing"):
        loop.train(config, tmp_path / "refused")
    config = config_like("lanes", text, foreign, "bidirectional", **settings, **{"init.allow_missing": "^heads/"})
    loop.train(config, tmp_path / "run")
    assert "missing" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "run/tokenizer").size == 64
    begun, taken = begun_with(tmp_path / "run"), dict(checkpoint.paths_and_leaves(foreign.params))
    assert {name for name in begun if name not in taken} == {
        "heads/bidirectional/bias",
        "heads/bidirectional/table/table",
    }
    for name, array in taken.items():
        np.testing.assert_array_equal(begun[name], array, err_msg=name)


@pytest.mark.slow
def test_gpt_brings_its_vocabulary(tmp_path):
    source = test_weights_openai.write_files(tmp_path / "gpt", test_weights_openai.drawn_arrays())
    text = corpus.write(tmp_path / "corpus.txt")
    foreign = weights.read(source)
    # The toy run pads its tables to another multiple than the reader does.
    settings = {"init.from": str(source), "data.tokenizer.kind": "bpe", "seq_len": 8}
    loop.train(config_like("blocks", text, foreign, "causal", **settings), tmp_path / "run")
    assert Tokenizer.load(tmp_path / "run/tokenizer").fingerprint == foreign.tokenizer.fingerprint
    begun, taken = begun_with(tmp_path / "run"), dict(checkpoint.paths_and_leaves(foreign.params))
    assert begun.keys() == taken.keys()
    table = "embedding/tokens/table"
    assert begun[table].shape == (16, test_weights_openai.WIDTH)
    np.testing.assert_array_equal(begun.pop(table), taken.pop(table)[:16])
    for name, array in taken.items():
        np.testing.assert_array_equal(begun[name], array, err_msg=name)
    shutil.rmtree(source)
    assert jax.tree.leaves(checkpoint.restore_params(tmp_path / "run")[0])  # the run is complete in itself
