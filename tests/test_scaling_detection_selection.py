"""A choice is made on one half and scored on the other; what it would gain otherwise is shown."""

import numpy as np
import pytest

from scaling.detection.evaluation import auroc
from scaling.detection.selection import Choice, choose, score, split


def halves(scores, count):
    return split([f"option {k}" for k in range(len(scores))], scores, np.arange(count), np.arange(count, 2 * count))


def test_the_halves_share_no_image_and_have_all_of_them():
    first, second = halves(np.zeros((2, 20)), 10)
    assert not first.images & second.images
    assert first.images | second.images == set(range(20))
    assert first.positives.shape == second.negatives.shape == (2, 5)


def test_a_choice_cannot_score_the_images_that_it_was_made_on():
    first, second = halves(np.random.default_rng(0).normal(size=(3, 20)), 10)
    choice = choose(first)
    with pytest.raises(ValueError, match="10 of these images were used to choose"):
        score(first, choice)
    assert len(score(second, choice)[0]) == 5
    with pytest.raises(ValueError, match="not among"):
        score(second, Choice("another", 1.0, frozenset()))
    with pytest.raises(ValueError, match="at least four"):
        halves(np.zeros((2, 6)), 3)


def test_the_best_option_wins():
    scores = np.random.default_rng(0).normal(size=(3, 40))
    scores[1, :20] += 5
    first, second = halves(scores, 20)
    assert choose(first).option == "option 1"
    assert auroc(*score(second, choose(first))) > 0.95


def test_the_best_of_useless_options_is_at_chance_on_the_other_half():
    """On its own half the best of 40 looks good; 200 repetitions leave a standard error of .01."""
    rng, own, other = np.random.default_rng(1), [], []
    for _ in range(200):
        first, second = halves(rng.normal(size=(40, 40)), 20)
        choice = choose(first)
        own.append(choice.area)
        other.append(auroc(*score(second, choice)))
    error = np.std(other) / np.sqrt(len(other))
    assert abs(np.mean(other) - 0.5) < 4 * error
    assert np.mean(own) > 0.7
