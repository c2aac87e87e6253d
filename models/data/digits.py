"""scikit-learn's digits in the shape of MNIST: data to train on with neither files nor network."""

import importlib

import torch
from torch.nn import functional

from layercast.models.data.dataset import DataError, Dataset, stratified

_TEST_FRACTION = 0.2
_SPLIT_SEED = 1797


def load_digits(instead_of: str) -> Dataset:
    """Return the 1,797 digits of 8×8 pixels, enlarged to 20×20 in the middle of 28×28 as MNIST's are, split 80 : 20.

    `instead_of` is the data set that the caller's recipe wants; DataError unless it is `mnist`, or when scikit-learn
    is not installed.
    """
    if instead_of != "mnist":
        raise DataError(f"`--data digits` stands in for mnist only, not for {instead_of}; give a folder")
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise DataError("`--data digits` needs scikit-learn: pip install 'layercast[digits]'") from error
    small, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(small).float().reshape(-1, 1, 8, 8) / 16
    images = functional.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    inputs = (functional.pad(images, (4, 4, 4, 4)) * 255).round().to(torch.uint8)
    targets = torch.from_numpy(labels).long()
    train, test = stratified(targets, _TEST_FRACTION, torch.Generator().manual_seed(_SPLIT_SEED))
    return Dataset(
        name="scikit-learn digits",
        licence="CC BY 4.0",
        source="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI, as scikit-learn ships it",
        labels=tuple(str(digit) for digit in range(10)),
        train_inputs=inputs[train],
        train_targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
    )
