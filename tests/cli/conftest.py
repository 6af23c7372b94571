"""What tests of commands share."""

import pytest
import torch

from helpers.models import SMALL
from pointformer.models import Model, save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The file of a small model that finds objects by their borders."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(Model("small", SMALL, "dense", 3), path)
    return str(path)


@pytest.fixture(autouse=True)
def _same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
