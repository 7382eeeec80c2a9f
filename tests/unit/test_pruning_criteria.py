"""Scores against formulas worked out by hand or in numpy's float64."""

import numpy as np
import torch

from deploy.pruning import criteria

ROWS = torch.tensor([[3.0, -4.0], [1.0, 0.0], [0.0, 0.0]])


def test_l1_is_the_sum_of_absolute_weights() -> None:
    assert criteria.l1_norm(ROWS).tolist() == [7.0, 1.0, 0.0]


def test_l2_is_the_euclidean_norm() -> None:
    assert criteria.l2_norm(ROWS).tolist() == [5.0, 1.0, 0.0]


def test_gamma_sums_absolute_scales_of_coupled_norms() -> None:
    assert criteria.batch_norm_gamma(torch.tensor([[-2.0, 0.5], [0.0, 1.0]])).tolist() == [2.5, 1.0]


def test_taylor_is_the_squared_first_order_change_of_the_loss() -> None:
    # 3 * 2 + (-4) * 1 = 2 and its square 4: contributions may cancel before they are squared.
    gradients = torch.tensor([[2.0, 1.0], [5.0, 9.0], [7.0, 7.0]])
    assert criteria.taylor(ROWS, gradients).tolist() == [4.0, 25.0, 0.0]


def test_taylor_predicts_the_change_of_a_linear_loss_exactly() -> None:
    weight = torch.randn(4, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    loss = (weight * slope).sum()
    loss.backward()
    assert weight.grad is not None
    with torch.no_grad():
        for unit, score in enumerate(criteria.taylor(weight, weight.grad)):
            without = weight.clone()
            without[unit] = 0.0
            change = loss - (without * slope).sum()
            torch.testing.assert_close(score, change.square())


def test_median_distance_agrees_with_numpy_and_is_least_for_the_filter_in_the_middle() -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = rows.numpy()
    expected = np.array([sum(np.linalg.norm(one - other) for other in plain) for one in plain])
    np.testing.assert_allclose(criteria.geometric_median_distance(rows).numpy(), expected, rtol=1e-9)
    line = torch.tensor([[0.0], [1.0], [5.0]])
    assert criteria.geometric_median_distance(line).argmin().item() == 1


def test_path_norm_multiplies_what_makes_a_unit_with_what_reads_it() -> None:
    assert criteria.path_norm(ROWS, torch.tensor([[1.0], [2.0], [3.0]])).tolist() == [5.0, 2.0, 0.0]
    assert criteria.path_norm(ROWS, None).tolist() == [5.0, 1.0, 0.0]


def test_random_scores_repeat_for_a_seed_and_differ_between_seeds() -> None:
    one, again, other = (criteria.random_scores(8, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert one.tolist() == again.tolist() != other.tolist()


def test_relative_scores_have_mean_one_and_zeros_stay_zeros() -> None:
    assert criteria.relative(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert criteria.relative(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
