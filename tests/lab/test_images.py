"""Images whose answers can be found again by looking at the pixels."""

import sys
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.lab.experiments import vision, vision_cost
from palimpsest.lab.image_training import ImageTraining, Seer, parameters
from palimpsest.lab.images import Digits, ImageBatch, NamedImages, Scenes
from palimpsest.lab.images.drawn_scenes import BLUE, CLASSES, KINDS, RED
from palimpsest.lab.images.image_task import ImageTask
from palimpsest.lab.tasks import Key
from palimpsest.models.vision import VisionConfig, VisionTransformer


def drawn(kind: str, count: int = 30):
    batch = Scenes(kinds=(kind,)).draw(count, Key("test", 0, 0))
    first = sum(CLASSES[k] for k in KINDS[: KINDS.index(kind)])
    return [(image.permute(1, 2, 0).numpy(), int(label) - first) for image, label in zip(batch.images, batch.labels)]


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask, each the places of its pixels."""
    left, found = set(zip(*np.nonzero(mask))), []
    while left:
        seed = left.pop()
        part, waiting = [seed], deque([seed])
        while waiting:
            y, x = waiting.popleft()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    part.append(near)
                    waiting.append(near)
        found.append(np.array(part))
    return found


def of_colour(image: np.ndarray, colour) -> np.ndarray:
    return (image == np.array(colour)).all(-1)


def test_discs_can_be_counted():
    for image, label in drawn("counting"):
        colours = {tuple(c) for c in image.reshape(-1, 3).tolist()} - {(0, 0, 0)}
        discs = 0
        for colour in colours:
            for part in parts(of_colour(image, colour)):
                high, wide = np.ptp(part, 0) + 1
                discs += len(part) < high * wide  # a square fills its box
        assert discs == label + 1


def test_which_side_can_be_seen():
    for image, label in drawn("relation"):
        red, blue = (np.argwhere(of_colour(image, c)).mean(0) for c in (RED, BLUE))
        down, across = red - blue
        side = (0 if across < 0 else 1) if abs(across) > abs(down) else (2 if down < 0 else 3)
        assert side == label


def test_a_way_can_be_walked():
    answers = []
    for image, label in drawn("maze"):
        floor = ~(image == 235).all(-1)
        red = tuple(np.argwhere(of_colour(image, RED))[0])
        blue = tuple(np.argwhere(of_colour(image, BLUE))[0])
        part = next(p for p in parts(floor) if red in set(map(tuple, p)))
        assert len(parts(floor)) == 2
        assert (blue in set(map(tuple, part))) == (label == 0)
        answers.append(label)
    assert 5 < sum(answers) < 25


@pytest.mark.parametrize("task", [Scenes(size=32), Digits(size=16)])
def test_the_key_names_the_batch_and_the_splits_share_no_image(task):
    pytest.importorskip("sklearn") if task.name == "digits" else None
    assert isinstance(task, ImageTask)
    draw = lambda split, seed, step: task.draw(24, Key(split, seed, step))
    assert all(a.equal(b) for a, b in zip(draw("train", 1, 2), draw("train", 1, 2)))
    assert not draw("train", 1, 2).images.equal(draw("train", 1, 3).images)
    seen = {image.numpy().tobytes() for i in range(40) for image in draw("train", 0, i).images}
    asked = {image.numpy().tobytes() for i in range(40) for image in draw("test", 0, i).images}
    assert not seen & asked
    batch = draw("train", 0, 0)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (24, task.channels, task.size, task.size)
    assert 0 <= batch.labels.min() <= batch.labels.max() < task.num_classes


def test_named_images_come_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    from PIL import Image

    for split in ("train", "test"):
        for name, colour in (("cat", 40), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 20), (colour + i, 0, 10)).save(tmp_path / split / name / f"{i}.png")
    task = NamedImages(path=str(tmp_path), size=8, num_classes=2, image="image")
    batch = task.draw(6, Key("test", 0, 0))
    assert batch.images.shape == (6, 3, 8, 8)
    assert ((batch.images[:, 0, 0, 0] > 100).long() == batch.labels).all()
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="has no column"):
        NamedImages(path=str(tmp_path), num_classes=2).draw(1, Key("test", 0, 0))
    with pytest.raises(ValueError, match="num_classes is 1"):
        NamedImages(path=str(tmp_path), num_classes=1, image="image").draw(6, Key("test", 0, 0))


def test_an_unknown_name_is_told(monkeypatch):
    def load_dataset(name, split):
        raise FileNotFoundError(f"no data set {name}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="check the name, the split and the network"):
        NamedImages(path="nobody/nothing").draw(1, Key("train", 0, 0))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Scenes(size=18), "multiple of 4"),
        (lambda: Scenes(kinds=("counting", "beauty")), "choose from counting, relation, maze"),
        (lambda: Scenes(cells=1), "cells is 1"),
        (lambda: Scenes(size=64.0), "size is 64.0"),
        (lambda: Digits(size=12), "multiple of 8"),
        (lambda: NamedImages(train="test"), "give two splits"),
    ],
)
def test_impossible_images_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


class Sides:
    """The class tells the split: 0 of training images, 1 of test images; the pixels tell nothing."""

    name, size, channels, num_classes, kinds = "sides", 8, 1, 2, ("sides",)

    def __init__(self):
        self.drawn = []

    def draw(self, count: int, key: Key) -> ImageBatch:
        self.drawn.append(key)
        images = torch.from_numpy(key.generator().integers(0, 256, (count, 1, 8, 8), np.uint8))
        label = {"train": 0, "test": 1}[key.split]
        return ImageBatch(images, torch.full((count,), label), torch.zeros(count, dtype=torch.long))


def test_what_is_learnt_is_of_the_training_split_alone(monkeypatch):
    monkeypatch.setattr(ImageTraining, "_task", lambda self: {"task": "sides"})
    base = VisionConfig(patch_size=4, hidden_size=16, num_layers=1, num_heads=4, head_dim=4, intermediate_size=32)
    shared = {
        "who": Seer("kda", {}),
        "task": (sides := Sides()),
        "base": base,
        "steps": 20,
        "evaluate_every": 10,
        "lr": 1e-2,
    }
    point = ImageTraining(**shared, images_per_step=8, test_images=16, pictures=1)
    point.prepare()
    found = point.run("cpu", lambda *_: None)
    assert found["curve"][-1]["train_loss"] < 0.3  # learnt it has
    assert [row["accuracy"] for row in found["rows"]] == [0.0]  # what it was taught, however often it was tested
    assert np.shape(found["pictures"][0]["left"]["rows"]) == (2, 2)
    assert {key.step for key in sides.drawn if key.split == "train"} == set(range(20))


def test_all_who_see_have_the_parameters_of_the_base():
    deep = vision.points("scenes")[3].config
    assert parameters(deep) == sum(p.numel() for p in VisionTransformer(deep).parameters())
    for point in vision.points("scenes")[:10]:
        extra = 0 if point.config.positions == "none" else point.config.hidden_size * 144
        assert parameters(point.config) - extra == pytest.approx(parameters(point._base), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": 0.9, "decay": 0.2}, "more than the run"),
        ({"task": None}, "give a task on images"),
    ],
)
def test_impossible_image_trainings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(vision.points("tiny")[0], **changes).prepare()


def test_a_resolution_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="resolution 18 is no multiple"):
        replace(vision_cost.points("tiny")[0], resolutions=(18,)).prepare()
