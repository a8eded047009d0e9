import numpy as np
import pytest

from edgecl.data.randomness import permutation, uniforms


def draw(seed=0, epoch=0, stream="test", count=4, length=20_000):
    return uniforms(seed, epoch, np.arange(length), stream=stream, count=count)


def correlation(a, b):
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_uniforms_fill_a_hundred_bins_evenly():
    values = draw()
    expected = values.size / 100
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 50 < chi_square < 170  # 99 degrees of freedom: 5 sigma either side


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"stream": "other"}, {"seed": 2**40}], ids=str)
def test_another_seed_epoch_or_stream_gives_unrelated_numbers(other):
    assert correlation(draw(), draw(**other)) < 0.02


def test_seed_and_epoch_cannot_stand_in_for_each_other():
    assert not np.array_equal(draw(seed=1, epoch=2), draw(seed=2, epoch=1))


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighboring_images_get_unrelated_numbers(lag):
    values = draw(count=1)
    assert correlation(values[lag:], values[:-lag]) < 0.03


def test_columns_are_unrelated():
    values = draw(count=2)
    assert correlation(values[:, 0], values[:, 1]) < 0.03


def test_numbers_do_not_depend_on_how_indices_are_batched():
    whole = draw(length=100)
    parts = [uniforms(0, 0, part, stream="test", count=4) for part in np.array_split(np.arange(100), 7)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_numbers_do_not_depend_on_how_many_are_asked_for():
    np.testing.assert_array_equal(draw(count=3), draw(count=9)[:, :3])


def test_numbers_are_the_same_on_every_machine():
    assert uniforms(7, 3, np.array([11]), stream="test", count=2).tolist() == [
        [0.19206805048293063, 0.8789451937386203]
    ]


def test_permutation_holds_every_index_once():
    assert sorted(permutation(3, 1, 1000).tolist()) == list(range(1000))


def test_first_of_a_permutation_is_uniform_over_epochs():
    firsts = [permutation(0, epoch, 10)[0] for epoch in range(2000)]
    assert np.bincount(firsts, minlength=10).min() > 140  # expected 200
