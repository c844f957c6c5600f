import importlib

import pytest


@pytest.mark.parametrize("package", ["serving", "export", "benchmarks"])
def test_every_public_name_exists_and_the_list_is_sorted(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name
