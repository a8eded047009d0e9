"""RandAugment, mixup and cutmix: functions of their seeds, and every picture's label says what is in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecl.evaluate.augment import mixed, rand_augmented

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
CLASSES = 3


def of_classes(labels):
    """Pictures whose channel k is 1 where they are of class k, so that the mean of a channel is a share of a class."""
    return torch.eye(CLASSES)[labels][:, :, None, None].expand(-1, -1, 16, 16).contiguous()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_of_the_classes_in_each_picture(mixup, cutmix):
    cuts = 0
    for step in range(20):
        images, targets = mixed(
            of_classes(LABELS), LABELS, classes=CLASSES, mixup=mixup, cutmix=cutmix, seed=3, step=step
        )
        torch.testing.assert_close(images.mean((2, 3)), targets, atol=1e-5, rtol=0)
        # A pasted part leaves every pixel of one class alone.
        cuts += bool(((images == 0) | (images == 1)).all())
    assert {(True, False): cuts < 3, (False, True): cuts == 20, (True, True): 3 < cuts < 17}[
        mixup > 0, cutmix > 0
    ]


def test_a_mix_is_a_function_of_seed_and_step_and_leaves_torchs_own_draws_alone():
    def mix(seed, step):
        return mixed(
            of_classes(LABELS), LABELS, classes=CLASSES, mixup=1.0, cutmix=1.0, seed=seed, step=step
        )[0]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = mix(0, 7)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(mix(0, 7), first)
    assert not torch.equal(mix(0, 8), first)
    assert not torch.equal(mix(1, 7), first)


def test_what_happens_to_a_picture_depends_on_its_index_and_not_on_its_batch():
    images = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    indices = np.array([4, 0, 9, 2, 7, 1])

    def augment(rows, **named):
        return rand_augmented(images[rows], indices[rows], **{"magnitude": 9, "seed": 1, "epoch": 0, **named})

    whole = augment(np.arange(6))
    assert torch.equal(augment(np.array([3, 1])), whole[[3, 1]])
    assert not torch.equal(augment(np.arange(6), epoch=1), whole)
    assert not torch.equal(augment(np.arange(6), seed=2), whole)
    assert 0 <= whole.min() <= whole.max() <= 1
    # Stronger operations change more.
    moved = [
        float((augment(np.arange(6), magnitude=magnitude) - images).abs().mean()) for magnitude in (1, 25)
    ]
    assert moved[0] < moved[1]
