"""Gaussians of prompts' features: the fit, the densities, draws, and axes as integers."""

import numpy as np
import pytest

from lori.gaussians import (
    GAUSSIAN_NAMES,
    Array,
    Gaussians,
    as_float32,
    fit_gaussian,
    joined,
    log_likelihoods,
    log_likelihoods_in_numpy,
)
from lori.native import MODULE
from lori.prompt_statistics import NUM_FEATURES, Background, PromptStatistics
from tests.lori.features import NUM_PROMPTS, draw


def covariance_of(gaussians: Gaussians) -> Array:
    """Return the covariance (F, F) of the first Gaussian, from the inverse that its axes and its variance give."""
    axes = gaussians.axes[0] * gaussians.scales[0][:, None].astype(np.float64)
    covariance: Array = float(gaussians.variances[0]) * np.linalg.inv(np.eye(NUM_FEATURES) - axes.T @ axes)
    return covariance


def spread(seed: int, count: int = 2000) -> Array:
    """Return features (P, F) with variances of up to about 32 in a few directions, and of 1 in the others."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((5, NUM_FEATURES)) * np.linspace(0.1, 0.4, 5)[:, None]
    return random.standard_normal((count, NUM_FEATURES)) + random.standard_normal((count, 5)) @ directions + seed


def test_log_likelihoods_are_those_of_the_covariance() -> None:
    gaussians, z = fit_gaussian(spread(3)), spread(4, 6)
    covariance = covariance_of(gaussians)
    difference = z - gaussians.means[0]
    distances = np.einsum("pf,pf->p", difference, np.linalg.solve(covariance, difference.T).T)
    exact = -0.5 * (distances + np.linalg.slogdet(covariance)[1])
    ours = np.array([log_likelihoods(gaussians.components, row)[0] for row in z])
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def random_gaussians(count: int, num_axes: int, num_features: int, seed: int = 0) -> Gaussians:
    random = np.random.default_rng(seed)
    means, variances = random.standard_normal((count, num_features)), random.uniform(0.5, 2, count)
    axes = random.integers(-127, 128, (count, num_axes, num_features), dtype=np.int8)
    scales = random.uniform(0, 0.2, (count, num_axes)) / (127 * np.sqrt(num_axes * num_features))
    return Gaussians(as_float32(means), axes, as_float32(scales), as_float32(variances))


@pytest.mark.needs("kernels")
@pytest.mark.parametrize(("num_axes", "num_features"), [(1, 5), (3, 16), (7, 37), (64, NUM_FEATURES)])
def test_the_compiled_log_likelihoods_are_those_of_numpy(num_axes: int, num_features: int) -> None:
    one, other = (random_gaussians(3, num_axes, num_features, seed) for seed in (1, 2))
    components = [(one, 2), (other, 0), (one, 0), (other, 1)]
    for z in 10 * np.random.default_rng(3).standard_normal((5, num_features)):
        expected = log_likelihoods_in_numpy(components, z)
        assert len({*expected}) == len(components)
        np.testing.assert_allclose(log_likelihoods(components, z), expected, rtol=1e-9)


@pytest.mark.needs("kernels")
def test_the_compiled_gaussians_are_checked() -> None:
    means, axes, scales, variances = (getattr(random_gaussians(2, 3, 16), name) for name in GAUSSIAN_NAMES)
    determinants = np.zeros(2)
    gaussians = MODULE.Gaussians(means, axes, scales, variances, determinants)
    for arrays in (
        (means[:, :15], axes, scales, variances, determinants),
        (means[:1], axes, scales, variances, determinants),
        (means, axes[:1], scales, variances, determinants),
        (means, axes[:, :2], scales, variances, determinants),
        (means, axes, scales[:1], variances, determinants),
        (means, axes, scales, variances[:1], determinants),
        (means, axes, scales, variances, determinants[:1]),
    ):
        with pytest.raises(ValueError, match="do not have the shapes of the same Gaussians"):
            MODULE.Gaussians(*map(np.ascontiguousarray, arrays))  # type: ignore[arg-type]  # one by one they have their types
    for index, z, fault in ((2, np.zeros(16), "does not exist"), (0, np.zeros(15), "another number of features")):
        with pytest.raises(ValueError, match=fault):
            MODULE.log_likelihoods([gaussians], [index], z)
    with pytest.raises(ValueError, match="an index for each"):
        MODULE.log_likelihoods([gaussians], [0, 1], np.zeros(16))


def test_the_fit_has_the_mean_and_the_covariance_of_its_prompts() -> None:
    z = spread(5)
    gaussians = fit_gaussian(z, shrinkage=0.0)
    covariance = covariance_of(gaussians)
    np.testing.assert_allclose(gaussians.means[0], z.mean(0), rtol=1e-4, atol=1e-5)
    assert np.trace(covariance) == pytest.approx(z.var(0).sum(), rel=1e-2)
    values, vectors = np.linalg.eigh(np.cov(z.T))
    np.testing.assert_allclose(vectors[:, -3:].T @ covariance @ vectors[:, -3:], np.diag(values[-3:]), rtol=1e-2, atol=0.3)


def test_half_of_the_covariance_is_the_background_s() -> None:
    z = spread(5)
    np.testing.assert_allclose(covariance_of(fit_gaussian(z, shrinkage=1.0)), np.eye(NUM_FEATURES), atol=1e-6)
    trace = np.trace(covariance_of(fit_gaussian(z)))
    assert trace == pytest.approx((z.var(0).sum() + NUM_FEATURES) / 2, rel=1e-3)


def test_draws_have_the_mean_and_the_covariance_of_their_gaussian() -> None:
    one, other = (fit_gaussian(spread(seed)) for seed in (5, 6))
    drawn = joined([one, other]).draw(20_000, seed=0)
    assert drawn.shape == (2, 20_000, NUM_FEATURES)
    for gaussian, z in zip((one, other), drawn, strict=True):
        covariance = covariance_of(gaussian)
        # Both within five standard errors.
        assert (np.abs(z.mean(0) - gaussian.means[0]) < 5 * np.sqrt(covariance.diagonal() / len(z))).all()
        error = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()) * 2 / len(z))
        assert (np.abs(np.cov(z.T) - covariance) < 5 * error).all()


def test_prompts_of_weight_0_do_not_count(background: Background) -> None:
    z = background.whiten(np.concatenate([draw(6), draw(7, 5.0)]))
    weights = np.repeat([1.0, 0.0], NUM_PROMPTS)
    np.testing.assert_array_equal(fit_gaussian(z, weights).means, fit_gaussian(z[:NUM_PROMPTS]).means)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0, 1e3])
def test_the_axes_of_any_prompts_can_be_read(factor: float) -> None:
    """The axes of prompts that differ much in a few features only are nearly as long as allowed, and far from round."""
    z = draw(9, count=200)
    z[:, :3] *= factor
    z[:, 3:] /= factor
    gaussians = fit_gaussian(z, shrinkage=1e-9)
    read = PromptStatistics.from_bytes("a", PromptStatistics("a" * 64, "b" * 64, gaussians).to_bytes()).gaussians
    assert np.isfinite(log_likelihoods(read.components, z[0])).all()
    distances = -2 * np.array([log_likelihoods(read.components, row)[0] for row in z]) - read.log_determinants
    assert (distances >= 0).all()


def test_the_order_of_gaussians_does_not_change_their_likelihoods(background: Background) -> None:
    parts = [fit_gaussian(background.whiten(draw(seed, 2.0))) for seed in range(7)]
    [z] = background.whiten(draw(3, 2.0, count=1))
    forward, backward = log_likelihoods(joined(parts).components, z), log_likelihoods(joined(parts[::-1]).components, z)
    np.testing.assert_array_equal(forward, backward[::-1])
    np.testing.assert_array_equal(forward[:3], log_likelihoods(joined(parts[:3]).components, z))
