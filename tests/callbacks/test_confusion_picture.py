"""`ConfusionPicture` against scikit-learn's confusion matrix."""

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.metrics import confusion_matrix
from watching import events, make_data, make_module, make_trainer

from split_lightning.callbacks import ConfusionPicture, confusion_picture
from split_lightning.callbacks.confusion_picture import draw_confusion


def by_sklearn(module, batches):
    module.eval()
    with torch.no_grad():
        pairs = [(y, module(x).argmax(1)) for x, y in batches]
    targets, predicted = (torch.cat(part) for part in zip(*pairs, strict=True))
    return confusion_matrix(targets, predicted, labels=[0, 1, 2])


def test_the_last_validation_and_the_test_are_drawn(tmp_path, monkeypatch):
    drawn = []

    def note(counts, classes, part):
        drawn.append((part, counts.numpy(), classes))
        return draw_confusion(counts, classes, part)

    monkeypatch.setattr(confusion_picture, "draw_confusion", note)
    module, data = make_module(), make_data()
    logger = TensorBoardLogger(tmp_path, name="", version="tb")
    trainer = make_trainer(tmp_path, [ConfusionPicture(tmp_path)], logger=logger)
    trainer.fit(module, datamodule=data)
    (part, counts, classes), fitted = drawn[-1], len(drawn)
    assert (part, fitted) == ("val", 1)
    assert classes == ["class 0", "class 1", "class 2"]
    validated = [(x, y) for _, x, y, *_ in data.val_dataloader()]
    assert (counts == by_sklearn(module, validated)).all()
    assert counts.sum() == 12

    trainer.test(module, datamodule=data, verbose=False)
    part, counts, _ = drawn[-1]
    assert (part, len(drawn)) == ("test", 2)
    assert (counts == by_sklearn(module, data.test_dataloader())).all()
    assert counts.sum() == 20
    images = events(tmp_path / "tb").Tags()["images"]
    assert {"val/confusion", "test/confusion"} <= set(images)
    assert (tmp_path / "confusion.png").stat().st_size > 5_000


def test_nothing_validated_nothing_drawn(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="tb")
    trainer = make_trainer(tmp_path, [ConfusionPicture(tmp_path)], logger=logger)
    trainer.fit(make_module(), datamodule=make_data(val_share=0.0))
    assert events(tmp_path / "tb").Tags()["images"] == []
    assert not (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_numbers_are_written_where_there_is_room(num_classes):
    counts = torch.eye(num_classes, dtype=torch.long) * 7
    counts[1, 0] = 3  # of class 1, three were taken for class 0
    names = [f"n{i}" for i in range(num_classes)]
    axes = draw_confusion(counts, names, "test").axes[0]
    total = 7 * num_classes + 3
    assert axes.get_title().endswith(f"{7 * num_classes} of {total} right")
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    if num_classes <= 20:
        assert len(texts) == num_classes + 1
        assert texts[(0, 1)] == "3"  # x: predicted, y: true
    else:
        assert texts == {}
    shares = axes.get_images()[0].get_array()
    assert shares[1, 0] == pytest.approx(0.3)
