"""`make parity`: in .venv-peers, where PyTorch and Transformers are. Nothing here is collected elsewhere."""

import importlib.util

import pytest

PEERS = ("torch", "transformers")
collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in PEERS) else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As few threads as the tests of JAX have beside them."""
    import torch

    torch.set_num_threads(1)
