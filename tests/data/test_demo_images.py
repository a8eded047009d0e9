"""The demo's pictures: reproducible, balanced, with splits that share nothing."""

import numpy

from edgecl.data.demo_images import CLASSES, SPLITS, render


def test_asking_for_more_images_never_changes_those_already_drawn():
    few, few_labels = render("train", 12)
    more, more_labels = render("train", 30)
    assert numpy.array_equal(few, more[:12])
    assert numpy.array_equal(few_labels, more_labels[:12])


def test_splits_share_no_image():
    drawn = [render(split, 50)[0].reshape(50, -1) for split in SPLITS]
    everything = numpy.concatenate(drawn)
    assert len(numpy.unique(everything, axis=0)) == 50 * len(SPLITS)


def test_every_class_is_drawn_equally_often():
    _, labels = render("test", 10 * len(CLASSES))
    assert numpy.bincount(labels).tolist() == [10] * len(CLASSES)


def test_mean_color_says_little_about_the_class():
    train, labels = render("train", 1000)
    test, truth = render("test", 500)
    colors, found = (images.reshape(len(images), -1, 3).mean(1) for images in (train, test))
    nearest = ((found[:, None] - colors[None]) ** 2).sum(2).argmin(1)
    assert (labels[nearest] == truth).mean() < 0.3
