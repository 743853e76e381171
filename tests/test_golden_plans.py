"""The papers' models on 256 chips of v5e as the TPU compiler sees them: that they fit, and by how much.

Without libtpu these are skipped; `make test-plan` brings it. A plan takes minutes to compile.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from fixtures import children

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: make test-plan"
    ),
]
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
GIB = 2**30
GOLDEN = {
    # name: flags, parameters, GiB of parameters and optimizer on a chip, GiB at the peak, operations a token
    "bert-large": (
        ("bert.py:large,phase=2", "--config.batch_size=4096"),
        336_226_108,
        3.76,
        9.48,
        1.992e9,
    ),
    "gpt-117m": (("gpt.py:base", "--config.mesh.tensor=4"), 116_534_784, 0.33, 0.92, 7.528e8),
    "elmo": (("elmo.py:original", "--config.mesh.tensor=2"), 500_651_471, 1.87, 3.18, 8.229e8),
}


def plan(tmp_path, config: str, *flags: str, topology: str = "v5e:16x16") -> tuple[int, dict | str]:
    arguments = (f"--config={EXPERIMENTS / config}", f"--topology={topology}", "--json", *flags)
    child = children.start("plm.plan", *arguments, output=tmp_path / "out")
    code = child.wait(1800)
    lines = child.text.splitlines()
    if "{" not in lines:
        return code, child.text
    return code, json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1]))


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_papers_models_fit_on_256_chips(name, tmp_path):
    flags, parameters, state, peak, per_token = GOLDEN[name]
    code, got = plan(tmp_path, *flags)
    assert code == 0, got
    memory = got["memory"]
    assert (got["chips"], got["fits"], got["exact"], got["parameters"]) == (256, True, True, parameters)
    assert (memory["parameters"] + memory["optimizer"]) / GIB == pytest.approx(state, rel=0.02)
    # Other versions of the compiler schedule otherwise.
    assert memory["peak"] / GIB == pytest.approx(peak, rel=0.15)
    assert memory["evaluation_peak"] <= memory["available"]
    assert got["flops"]["token"] == pytest.approx(per_token, rel=0.01)
    assert not any("whole batch" in line or "logits" in line for line in got["warnings"]), got["warnings"]


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    flags = ("--config.batch_size=512", "--config.remat=none", "--config.model.layers=2")
    code, got = plan(tmp_path, "bert.py:large,phase=2", *flags, topology="v5e:2x2")
    assert code == 1, got
    assert got["memory"]["free"] < 0
    assert got["tried"][-1]["fits"]
    assert not any(attempt["fits"] for attempt in got["tried"][:-1])


def test_slices_that_do_not_exist_are_refused_in_one_line(tmp_path):
    for topology in ("v5e:3x5", "v4:2x2", "v5p:2x2"):
        code, shown = plan(tmp_path, "gpt.py:tiny", topology=topology)
        assert code == 2
        assert shown.splitlines()[-1].startswith(f"error: --topology='{topology}'"), shown


@pytest.mark.parametrize(("topology", "chips"), [("v4:2x2x1", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("v5e:1x1", 1)])
def test_other_generations(topology, chips, tmp_path):
    code, got = plan(tmp_path, "gpt.py:tiny", topology=topology)
    assert (code, got["chips"], got["fits"]) == (0, chips, True)
