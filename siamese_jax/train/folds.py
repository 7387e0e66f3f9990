"""A fold of the training classes as validation: no class is in two folds, or in training as well.

`data.fold=1/4` does so for a run; `compare --folds=4` makes a run of each fold.
"""

import logging
from dataclasses import replace

import numpy as np

from siamese_jax.data.records import Records
from siamese_jax.errors import UserError
from siamese_jax.train.fitting import all_asked, class_sizes, held_folds
from siamese_jax.train.loop import evaluated

log = logging.getLogger(__name__)


def take_fold(records: Records, named: str, seed: int) -> Records:
    """The same with a fold of the training classes, such as "1/4", as the validation split."""
    number, count = map(int, named.split("/"))
    train = records.label[np.isin(records.split, ("train", "validation"))]
    usable = int((class_sizes(train)[1] > 1).sum())
    if usable < 2 * count:
        raise UserError(
            f"data.fold={named}: {usable} training classes have two images or more; each fold "
            "needs two, for among images of one class every answer is right"
        )
    if (records.split == "validation").any():
        log.warning("data.fold=%s: the images for validation join the training images", named)
    folds = folds_as_validation(records, count, seed)
    if len(folds) < count:
        raise UserError(
            f"data.fold={named}: classes share so many images that {count - len(folds)} of the "
            "folds leave nothing to train on; take fewer folds"
        )
    made = folds[number - 1]
    if "validation" not in evaluated(made):
        said = "no image of this fold has another of its class to find"
        raise UserError(f"data.fold={named}: {said}")
    return made


def folds_as_validation(records: Records, count: int, seed: int) -> list[Records]:
    """The same once for each fold of the training classes, with that as the validation split.

    Args:
      records: split already; a validation split that is there joins the training images first.
      count: of the folds; fewer where there are not as many classes.
      seed: of the deal; the folds of one seed share no class.

    Raises:
      UserError: fewer than four classes of two images or more.
    """
    split = np.where(records.split == "validation", "train", records.split)
    train = np.flatnonzero(split == "train")
    records = all_asked(records, split == "train")
    made = []
    for held, asked in held_folds(records.label[train], count, seed):
        label, chosen = records.label.copy(), np.isin(np.arange(len(records)), train[held])
        label[chosen] = asked[held]
        named = np.where(chosen, "validation", split)
        made.append(replace(records, split=named, label=label))
    return made
