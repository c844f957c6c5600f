import json

import pytest
import torch

from data.files import canonical_json, sha256_bytes
from world_model import MarketModel, ModelFileError
from world_model.storage import DESCRIPTION_FILE, WEIGHTS_FILE, read_model, write_model


@pytest.fixture
def saved(make_network, make_model, tmp_path):
    model = make_model(
        make_network(), elites=(3, 1), mean=0.3, std=2.0, delta_std=0.1, variance_scale=torch.tensor([1.0, 2.0, 3.0])
    )
    folder = tmp_path / "model"
    model.save(folder)
    return model, folder


def rewrite_description(folder, change):
    """Change model.json and make its own hash right again, as a careful forger would."""
    path = folder / DESCRIPTION_FILE
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    path.write_text(json.dumps({**content, "sha256": sha256_bytes(canonical_json(content).encode())}))


def test_round_trip_is_bit_identical(saved):
    model, folder = saved
    again = MarketModel.load(folder, model.fields)
    assert again.fields == model.fields
    assert again.config == model.config
    assert again.elites == (3, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(model.predict(features), again.predict(features), strict=True):
        assert torch.equal(ours, theirs)


def test_folder_holds_two_plain_files_and_equal_models_equal_bytes(saved, tmp_path):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION_FILE, WEIGHTS_FILE]
    digest = model.save(tmp_path / "second")
    assert digest == json.loads((folder / DESCRIPTION_FILE).read_text())["sha256"]
    for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
        assert (folder / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_existing_folder_is_never_overwritten(saved):
    model, folder = saved
    before = (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(FileExistsError):
        model.save(folder)
    assert (folder / WEIGHTS_FILE).read_bytes() == before


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_model(tmp_path / "model", {"a": torch.zeros(1)}, {"bad": float("nan")})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("position", [0, 40, -1])
def test_one_flipped_byte_in_the_weights_is_found(saved, position):
    _, folder = saved
    blob = bytearray((folder / WEIGHTS_FILE).read_bytes())
    blob[position] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(blob)
    with pytest.raises(ModelFileError, match=r"weights\.safetensors: sha256: expected"):
        MarketModel.load(folder)


def test_truncated_weights_are_found(saved):
    _, folder = saved
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-4])
    with pytest.raises(ModelFileError, match="sha256"):
        MarketModel.load(folder)


def test_edited_description_is_found(saved):
    _, folder = saved
    path = folder / DESCRIPTION_FILE
    path.write_text(path.read_text().replace('"f1"', '"f9"'))
    with pytest.raises(ModelFileError, match=r"model\.json: sha256"):
        MarketModel.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_damaged_or_foreign_description_is_refused(saved, text):
    _, folder = saved
    (folder / DESCRIPTION_FILE).write_text(text)
    with pytest.raises(ModelFileError, match=r"model\.json"):
        MarketModel.load(folder)


@pytest.mark.parametrize("name", [DESCRIPTION_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=name):
        MarketModel.load(folder)


def test_other_fields_are_refused_by_name(saved, make_fields):
    model, folder = saved
    swapped = (model.fields[0], model.fields[2], model.fields[1])
    with pytest.raises(ModelFileError, match="expected 'f1' in column 1, was 'f2'"):
        MarketModel.load(folder, swapped)
    with pytest.raises(ModelFileError, match="expected 3 columns"):
        MarketModel.load(folder, make_fields(2))


def test_elites_that_contradict_the_weights_are_refused(saved):
    _, folder = saved
    rewrite_description(folder, lambda content: content.update(elites=[0, 1]))
    with pytest.raises(ModelFileError, match=r"expected \(0, 1\), weights say \(3, 1\)"):
        MarketModel.load(folder)


def test_config_that_does_not_fit_the_weights_is_refused(saved):
    _, folder = saved
    rewrite_description(folder, lambda content: content["config"].update(hidden=[8, 7]))
    with pytest.raises(ModelFileError, match="do not fit"):
        MarketModel.load(folder)


def test_another_format_is_refused_even_if_intact(saved):
    _, folder = saved
    rewrite_description(folder, lambda content: content.update(format=99))
    with pytest.raises(ModelFileError, match="format: expected 1, was 99"):
        MarketModel.load(folder)


def test_unknown_config_key_is_refused(saved):
    _, folder = saved
    rewrite_description(folder, lambda content: content["config"].update(surprise=1))
    with pytest.raises(ModelFileError, match="surprise"):
        MarketModel.load(folder)


def test_weights_with_nan_are_refused(make_network, make_model, tmp_path):
    model = make_model(make_network())
    with torch.no_grad():
        model.network.weights[1][0, 0, 0] = torch.nan
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"network\.weights\.1: expected finite"):
        MarketModel.load(tmp_path / "model")


def test_bytes_that_are_no_safetensors_are_refused(tmp_path):
    write_model(tmp_path / "model", {"a": torch.zeros(1)}, {})
    blob = b"not safetensors"
    (tmp_path / "model" / WEIGHTS_FILE).write_bytes(blob)
    rewrite_description(tmp_path / "model", lambda content: content.update(weights_sha256=sha256_bytes(blob)))
    with pytest.raises(ModelFileError, match="expected safetensors"):
        read_model(tmp_path / "model")
