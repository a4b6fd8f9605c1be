"""A kernel package may exchange classes of a model's module while it changes one model of it."""

from types import ModuleType

import pytest

from worker.model.patch import names_kept


def test_names_mean_afterwards_what_they_meant() -> None:
    module = ModuleType("modeling")
    module.Norm, module.Other = plain, other = object(), object()  # type: ignore[attr-defined]
    with names_kept(module):
        module.Norm = object()  # type: ignore[attr-defined]
        del module.Other
    assert module.Norm is plain
    assert module.Other is other
    with pytest.raises(ValueError, match="the package's own"), names_kept(module):
        module.Norm = object()  # type: ignore[attr-defined]
        raise ValueError("the package's own")
    assert module.Norm is plain
