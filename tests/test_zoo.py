"""The zoo that is shipped, and its export into a cache."""

import shutil

import pytest

from layercast.models import zoo
from layercast.models.artefact import module_from_card
from layercast.models.card import Card
from layercast.models.manifest import Manifest

FLOORS = {"mnist": 0.965, "mlp": 0.965, "resnet": 0.85, "transformer": 0.98}


def test_four_trained_models_are_shipped_small():
    assert set(zoo.names()) == set(FLOORS)
    assert sum((zoo.directory(name) / "weights.safetensors").stat().st_size for name in zoo.names()) < 12_000_000


@pytest.mark.parametrize("name", FLOORS)
def test_a_card_tells_what_its_model_can_do(name):
    card = Card.read(zoo.directory(name))
    assert card.metrics["accuracy"] >= FLOORS[name]
    if name == "transformer":
        assert card.metrics["classes"]["spam"]["f1"] >= 0.93
    assert not module_from_card(zoo.directory(name)).training
    assert card.preprocessing
    assert card.data["licence"]
    assert len(card.labels) == card.outputs[0].shape[1]


def test_the_first_start_exports_and_the_second_finds_it(tmp_path):
    source = tmp_path / "zoo"
    shutil.copytree(zoo.directory("mnist"), source / "mnist")
    said: list[str] = []
    first = zoo.ensure_exported(tmp_path / "cache", report=said.append, zoo=source)
    assert any("exporting mnist" in line for line in said)
    assert Manifest.read(first / "mnist" / "1").architecture == "MNISTClassifier"
    said.clear()
    assert zoo.ensure_exported(tmp_path / "cache", report=said.append, zoo=source) == first
    assert not said


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(zoo.ZooError, match="cannot be written"):
        zoo.ensure_exported(tmp_path / "file")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="mnist"):
        zoo.directory("mnits")
