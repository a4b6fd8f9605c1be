"""What is set before torch computes."""

import os

import pytest

from worker.utils import torch_setup


def test_the_cache_of_onednn_is_bounded_where_nobody_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = torch_setup.ONEDNN_CACHE
    monkeypatch.delenv(name, raising=False)
    torch_setup.prepare()
    assert os.environ[name] == value
    monkeypatch.setenv(name, "7")
    torch_setup.prepare()
    assert os.environ[name] == "7"
