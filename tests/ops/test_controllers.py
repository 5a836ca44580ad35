"""KL controllers and running moments."""

import json

import pytest
import torch

import rlhf_kernels as rk


def test_fixed_controller_does_not_move():
    controller = rk.FixedKLController(0.1)
    assert controller.update(50.0, 1000) == 0.1
    assert controller.value == 0.1


def test_adaptive_controller_follows_ziegler():
    controller = rk.AdaptiveKLController(0.2, target=6.0, horizon=10000)
    # kl / target - 1 = 0.1, inside the clip.
    assert controller.update(6.6, 256) == pytest.approx(0.2 * (1 + 0.1 * 256 / 10000), rel=1e-12)
    before = controller.value
    controller.update(torch.tensor(60.0), 256)
    assert controller.value == pytest.approx(before * (1 + 0.2 * 256 / 10000), rel=1e-12)
    before = controller.value
    controller.update(0.0, 256)
    assert controller.value == pytest.approx(before * (1 - 0.2 * 256 / 10000), rel=1e-12)


def test_adaptive_controller_reaches_its_target():
    controller = rk.AdaptiveKLController(1.0, target=2.0, horizon=1000)
    for _ in range(500):
        # A policy whose KL falls as the coefficient rises: 2 at 0.25.
        controller.update(0.5 / controller.value, 100)
    assert controller.value == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("make", [lambda: rk.FixedKLController(0.3), None])
def test_controller_state_round_trips(make):
    make = make or (lambda: rk.AdaptiveKLController(0.3, 1.0, 100))
    controller, other = make(), make()
    controller.update(9.0, 50)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.value == controller.value
    assert other.update(2.0, 10) == controller.update(2.0, 10)


def test_running_moments_equal_those_of_all_data():
    torch.manual_seed(0)
    # A large common offset: E[x^2] - mean^2 would lose everything.
    data = torch.randn(1000, dtype=torch.float64) * 3 + 1e8
    moments = rk.RunningMoments()
    for part in data.split([1, 2, 0, 300, 697]):
        moments.update(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(float(data.mean()), rel=1e-14)
    assert moments.std == pytest.approx(float(data.std()), rel=1e-6)


def test_running_moments_see_kept_elements_only():
    moments = rk.RunningMoments()
    assert (moments.mean, moments.std) == (0.0, 1.0)
    moments.update(
        torch.tensor([[1.0, torch.nan], [3.0, torch.inf]]), torch.tensor([[1, 0], [1, 0]])
    )
    assert (moments.mean, moments.std) == (2.0, pytest.approx(2.0**0.5))
    moments.update(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert moments.count == 2


def test_running_moments_state_round_trips():
    moments, other = rk.RunningMoments(), rk.RunningMoments()
    moments.update(torch.tensor([1.0, 2.0, 5.0]))
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for m in (moments, other):
        m.update(torch.tensor([7.0, 8.0]))
    assert (other.count, other.mean, other.std) == (moments.count, moments.mean, moments.std)


def test_bad_values_raise_and_change_nothing():
    controller = rk.AdaptiveKLController(0.2, 6.0, 100)
    with pytest.raises(ValueError, match="current_kl"):
        controller.update(float("nan"), 1)
    assert controller.value == 0.2
    moments = rk.RunningMoments()
    moments.update(torch.ones(2))
    with pytest.raises(ValueError, match="finite"):
        moments.update(torch.tensor([1.0, torch.inf]))
    assert moments.count == 2
    for make in (
        lambda: rk.FixedKLController(-1.0),
        lambda: rk.AdaptiveKLController(0.1, 0.0, 100),
        lambda: rk.AdaptiveKLController(0.1, 1.0, float("inf")),
    ):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(TypeError):
        moments.update(torch.ones(2, dtype=torch.complex64))
