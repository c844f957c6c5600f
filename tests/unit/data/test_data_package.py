"""The public surface of `data` and what importing it costs."""

import subprocess
import sys

import pytest

import data
from data import BarsError, DataError, HistoryError, ReplayError


def test_every_exported_name_exists_and_the_list_is_sorted() -> None:
    assert all(getattr(data, name) is not None for name in data.__all__)
    constants = [name for name in data.__all__ if name.isupper()]
    classes = [name for name in data.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in data.__all__ if name[0].islower()]
    assert data.__all__ == sorted(constants) + sorted(classes) + sorted(functions)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bars'"):
        _ = data.Bars


def test_import_for_serving_loads_neither_pandas_nor_pyarrow_nor_torch_nor_configs() -> None:
    code = (
        "import sys, data, data.scaler, data.files, data.fields\n"
        "heavy = {'pandas', 'pyarrow', 'torch', 'arch', 'mlflow', 'gymnasium', 'matplotlib', 'configs', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whole_package_loads_neither_torch_nor_configs() -> None:
    code = (
        "import sys, data\n"
        "[getattr(data, name) for name in data.__all__]\n"
        "heavy = {'torch', 'mlflow', 'gymnasium', 'matplotlib', 'configs', 'pydantic', 'arch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [BarsError, HistoryError, ReplayError])
def test_every_error_is_a_data_error_and_a_value_error(error: type[Exception]) -> None:
    assert issubclass(error, DataError)
    assert issubclass(error, ValueError)
