# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from unisparse_jax.mcmc import laplace, targets


def test_gaussian(x64):
  rng = np.random.default_rng(0)
  covariance = targets.random_covariance(rng, 4, 1e6)
  value = np.linalg.eigvalsh(covariance)
  np.testing.assert_allclose(value[-1] / value[0], 1e6, rtol=1e-6)
  mean = rng.standard_normal(4)
  target = targets.gaussian(mean, covariance)
  points = mean + rng.standard_normal((5, 4)) @ np.linalg.cholesky(covariance).T
  frozen = scipy.stats.multivariate_normal(mean, covariance)
  ours = [float(target.logdensity_fn(jnp.asarray(p))) for p in points]
  np.testing.assert_allclose(
    np.array(ours) - target.log_normalizer, frozen.logpdf(points), rtol=1e-8
  )
  draws = np.asarray(target.sample(jax.random.key(0), 20_000))
  np.testing.assert_allclose(
    np.linalg.inv(np.linalg.cholesky(covariance))
    @ np.cov(draws.T)
    @ np.linalg.inv(np.linalg.cholesky(covariance)).T,
    np.eye(4),
    atol=0.06,
  )


def test_student_t(x64):
  target = targets.student_t(5.0, dim=2)
  points = np.random.default_rng(1).standard_normal((5, 2)) * 3
  ours = [float(target.logdensity_fn(jnp.asarray(p))) for p in points]
  np.testing.assert_allclose(
    np.array(ours) - target.log_normalizer,
    scipy.stats.t(5).logpdf(points).sum(1),
    rtol=1e-10,
  )
  np.testing.assert_allclose(target.covariance, np.eye(2) * 5 / 3)
  assert targets.student_t(1.0).mean is None


def test_logistic_regression(x64):
  rng = np.random.default_rng(2)
  features = rng.standard_normal((20, 3)) * 5 + 2
  features[:, 1] = 4.0  # a constant column
  labels = np.arange(20) % 2
  target = targets.logistic_regression(features, labels, prior_scale=2.0)
  assert target.dim == 3
  columns = features[:, [0, 2]]
  columns = (columns - columns.mean(0)) / columns.std(0)
  design = np.concatenate([np.ones((20, 1)), columns], axis=1)
  position = rng.standard_normal(3)
  logits = design @ position
  expected = scipy.stats.bernoulli(1 / (1 + np.exp(-logits))).logpmf(labels)
  prior = -0.5 * np.sum(position**2) / 4
  np.testing.assert_allclose(
    target.logdensity_fn(jnp.asarray(position)), expected.sum() + prior
  )
  assert np.isfinite(target.logdensity_fn(jnp.full(3, -1e4)))


@pytest.mark.parametrize(
  ("name", "rows", "columns"),
  [
    ("breast_cancer", 569, 30),
    ("breast_cancer_mean", 569, 10),
    ("digits_01", 360, 64),
    ("diabetes", 442, 10),
  ],
)
def test_data_sets(name, rows, columns):
  features, labels = targets.load_labelled(name)
  assert features.shape == (rows, columns)
  assert sorted(set(labels.tolist())) == [0, 1]
  assert 0.3 < labels.mean() < 0.7
  target = targets.load_logistic_regression(name)
  value, slope = jax.value_and_grad(target.logdensity_fn)(target.start)
  np.testing.assert_allclose(value, -rows * np.log(2), rtol=1e-5)
  assert np.all(np.isfinite(slope))


def test_csv(tmp_path):
  path = tmp_path / "data.csv"
  path.write_text("a,b,label\n1,2,0\n3,5,1\n4,1,1\n")
  features, labels = targets.load_labelled(str(path))
  np.testing.assert_array_equal(features, [[1, 2], [3, 5], [4, 1]])
  np.testing.assert_array_equal(labels, [0, 1, 1])
  path.write_text("a,label\nx,0\n")
  with pytest.raises(ValueError, match=r"name must be a CSV file of numbers"):
    targets.load_labelled(str(path))


def test_laplace(x64):
  covariance = targets.random_covariance(np.random.default_rng(3), 5, 1e4)
  target = targets.gaussian(np.arange(5.0), covariance)
  found = laplace.laplace(target.logdensity_fn, jnp.zeros(5))
  assert bool(found.is_converged)
  np.testing.assert_allclose(found.mean, np.arange(5.0), atol=1e-9)
  np.testing.assert_allclose(found.covariance, covariance, rtol=1e-6)
  posterior = targets.load_logistic_regression("diabetes")
  found = laplace.laplace(posterior.logdensity_fn, posterior.start)
  assert bool(found.is_converged)
  slope = jax.grad(posterior.logdensity_fn)(found.mean)
  assert np.max(np.abs(slope)) < 1e-6
  convex = laplace.laplace(lambda x: jnp.sum(x**2), jnp.ones(2))
  assert not bool(convex.is_converged)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"covariance must be symmetric"):
    targets.gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
  with pytest.raises(ValueError, match=r"covariance must be positive definite"):
    targets.gaussian(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))
  with pytest.raises(ValueError, match=r"labels must be 0 and 1; got"):
    targets.logistic_regression(np.eye(3), np.array([1, 2, 1]))
  with pytest.raises(ValueError, match=r"prior_scale must be > 0"):
    targets.logistic_regression(np.eye(2), np.arange(2), prior_scale=0.0)
  with pytest.raises(ValueError, match=r"name must be a known name"):
    targets.load_labelled("iris")
  with pytest.raises(ValueError, match=r"degrees must be > 0"):
    targets.student_t(-1.0)
