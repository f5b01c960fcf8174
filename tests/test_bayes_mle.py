"""bayes_mle.py against closed forms and a likelihood maximised in NumPy, and its differences."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import run_main

tf_keras = pytest.importorskip("tf_keras")  # Python 3.14 has none
import bayes_mle as script  # noqa: E402

LINES = list(script.MODELS)


# --- Oracles ---
def softplus(x):
    return np.logaddexp(0, x)


def band(x, parameters):
    """Mean and standard deviation at x (n,) of the second model, from its four weights."""
    a, b, c, d = parameters
    return a * x + b, 1e-3 + softplus(0.3 * (c * x + d))


def mean_nll(y, mean, stddev):
    residuals = (y - mean) / stddev
    return np.mean(np.log(stddev) + np.log(2 * np.pi) / 2 + residuals**2 / 2)


def most_likely(x, y):
    """The second model's weights of highest likelihood: Fisher scoring, from least squares."""
    rows = np.stack([x, np.ones_like(x)], axis=1)
    slope, intercept = np.linalg.lstsq(rows, y, rcond=None)[0]
    spread = np.std(y - slope * x - intercept)
    parameters = np.array([slope, intercept, 0, np.log(np.expm1(spread)) / 0.3])
    for _ in range(100):
        mean, stddev = band(x, parameters)
        z = 0.3 * (parameters[2] * x + parameters[3])
        change = 0.3 / (1 + np.exp(-z))  # of the standard deviation with c x + d
        residuals = (y - mean) / stddev
        gradient = np.concatenate(
            [-rows.T @ (residuals / stddev), rows.T @ ((1 - residuals**2) / stddev * change)]
        )
        information = np.zeros((4, 4))
        information[:2, :2] = rows.T @ (rows / stddev[:, None] ** 2)
        information[2:, 2:] = rows.T @ (rows * (2 * change**2 / stddev**2)[:, None])
        step, size = np.linalg.solve(information, gradient), 1.0
        before = mean_nll(y, mean, stddev)
        while mean_nll(y, *band(x, parameters - size * step)) > before and size > 1e-9:
            size /= 2
        parameters = parameters - size * step
    assert np.abs(gradient).max() < 1e-4  # a maximum it is
    return parameters


# --- Bayes' theorem ---
def test_difference_5_posterior_equals_a_grid():
    """Likelihood times prior, written out over a fine grid of means, and normalised."""
    heights = np.array([135.0, 151.0, 128.0])
    grid = np.linspace(60, 220, 160001)
    logs = -((grid - 130) ** 2) / (2 * 10**2)
    logs = logs - sum((height - grid) ** 2 for height in heights) / (2 * 8**2)
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean = np.sum(weights * grid)
    stddev = np.sqrt(np.sum(weights * (grid - mean) ** 2))
    posterior = script.posterior_of_mean(heights, 130.0, 10.0, 8.0)
    np.testing.assert_allclose(posterior, (mean, stddev), rtol=1e-6)
    assert script.posterior_of_mean(heights[:0], 130.0, 10.0, 8.0) == pytest.approx((130, 10))


def test_the_articles_probabilities(capsys):
    script.show_probabilities()
    printed = capsys.readouterr().out
    # a table of a thousand days: 100 wet, 30 of them after wet ones, 70 after the 900 dry ones
    assert f"P(RT=1 | RY=0) = {70 / 900:.4f}" in printed
    assert f"P(RY=1 | RT=1) = {30 / 100:.4f}" in printed
    assert printed.count("-2.9189") == 2
    assert script.bayes_theorem(0.9, 0.01, 0.05) == pytest.approx(0.18)


def test_difference_3_scale_is_the_standard_deviation():
    # by hand: -log(2) - log(2 pi) / 2 - 1 / 2; with a variance of 2 it would be -2.2655
    expected = -np.log(2) - 0.9189385 - 0.5
    assert script.normal_log_likelihood(8.0, 10.0, 2.0) == pytest.approx(expected)
    assert float(script.tfd.Normal(10.0, 2.0).log_prob(8.0)) == pytest.approx(expected)
    x, y, stddev = script.load_data("constant_noise", 20000, 3.0, seed=0)
    assert np.std(y - 2 * x - 3) == pytest.approx(3, rel=0.02)
    x, y, stddev = script.load_data("growing_noise", 20000, 3.0, seed=0)
    np.testing.assert_allclose(stddev, 0.5 * x + 2, rtol=1e-6)
    assert np.std((y - 2 * x - 3)[x > 9.5]) == pytest.approx(0.5 * 9.75 + 2, rel=0.1)


# --- Data and models ---
def test_difference_4_data_are_the_articles_and_can_be_drawn_again():
    for arm in LINES:
        first, again, other = (script.load_data(arm, 100, 3.0, seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first[1] - other[1]).max() > 1
        assert [column.shape for column in first] == [(100, 1)] * 3
        np.testing.assert_allclose(first[0][:, 0], np.arange(0, 10, 0.1), rtol=1e-6)
    quiet = script.load_data("growing_noise", 100, 0.3, seed=0)
    np.testing.assert_allclose(quiet[2], (0.5 * quiet[0] + 2) / 10, rtol=1e-5)


@pytest.mark.parametrize("arm", LINES)
def test_difference_1_no_broadcast(arm):
    """The NLL of N points is (N, 1), and each is that of its own distribution."""
    x, y, _ = script.load_data(arm, 50, 3.0, seed=0)
    model = script.MODELS[arm]()
    values = script.neg_log_likelihood(y, model(x))
    assert values.shape == (50, 1)
    kernel, bias = (weight.astype("float64") for weight in model.get_weights())
    outputs = x @ kernel + bias
    stddev = 1.0 if arm == "constant_noise" else 1e-3 + softplus(0.3 * outputs[:, 1])
    residuals = (y[:, 0] - outputs[:, 0]) / stddev
    expected = np.log(stddev) + np.log(2 * np.pi) / 2 + residuals**2 / 2
    np.testing.assert_allclose(values.numpy()[:, 0], expected, rtol=1e-4)
    # the trap: a mean of shape (N,) makes (N, N) of it, and nobody complains
    flat = script.tfd.Normal(loc=outputs[:, 0].astype("float32"), scale=1)
    assert script.neg_log_likelihood(y, flat).shape == (50, 50)


def test_difference_2_models_are_of_tf_keras():
    assert isinstance(script.growing_noise_model(), tf_keras.Model)
    assert tf.keras.__name__.startswith("keras")  # Keras 3 is what the rest still gets


def test_describe_by_hand():
    x = np.float32([[0], [1], [2], [3], [4]])
    line = script.tfd.Normal(loc=3 * x - 1, scale=np.float32([[1], [1], [1], [1], [2]]))
    y = 3 * x - 1 + np.float32([[1.9], [-2.1], [0], [2.1], [3.9]])
    numbers = script.describe(x, y, line)
    assert numbers["coverage"] == pytest.approx(3 / 5)
    assert (numbers["slope"], numbers["intercept"]) == pytest.approx((3, -1))
    assert (numbers["first_stddev"], numbers["last_stddev"]) == (1, 2)
    squares = 1.9**2 + 2.1**2 + 2.1**2 + (3.9 / 2) ** 2
    expected = np.log(2) / 5 + np.log(2 * np.pi) / 2 + squares / 10
    assert numbers["nll"] == pytest.approx(expected, rel=1e-5)


# --- Whole runs ---
def points(arm, seed):
    """Return x, y and the true standard deviation, each (100,) float64."""
    return [column[:, 0].astype("float64") for column in script.load_data(arm, 100, 3.0, seed)]


def test_what_a_run_records():
    """The estimates from the saved weights and the data, and the prior's path, in NumPy."""
    folder, arms = run_main(script, ["--epochs", "4"])
    for arm in LINES:
        x, y, stddev = points(arm, seed=0)
        estimates = arms[arm]["estimates"]
        assert estimates["truth"]["nll"] == pytest.approx(mean_nll(y, 2 * x + 3, stddev), rel=1e-4)
        model = script.MODELS[arm]()
        model.load_weights(folder / f"{arm}.weights.h5")
        kernel, bias = model.get_weights()
        assert abs(bias[0]) > 0.3  # difference 5: a rate of 0.001 moves it by 0.03 at most
        fit = estimates["fit"]
        assert (fit["slope"], fit["intercept"]) == pytest.approx((kernel[0, 0], bias[0]), rel=1e-3)
        assert {**fit, "parameters": kernel.size + bias.size} == arms[arm]["final"]
    squares = arms["constant_noise"]["estimates"]["least squares"]
    expected = np.polyfit(*points("constant_noise", seed=0)[:2], 1)
    np.testing.assert_allclose((squares["slope"], squares["intercept"]), expected, rtol=1e-4)
    expected = [(1 / 10**2 + n / 8**2) ** -0.5 for n in range(1, 31)]
    np.testing.assert_allclose(arms["prior"]["history"]["stddev"], expected, rtol=1e-6)


def check_converged(flags, seed):
    """Run with --converge, and hold its estimates to the independent ones."""
    _, arms = run_main(script, [*flags, "--converge", "--seed", str(seed)])
    line = arms["constant_noise"]["estimates"]["converged"]
    expected = np.polyfit(*points("constant_noise", seed)[:2], 1)
    assert (line["slope"], line["intercept"]) == pytest.approx(tuple(expected), abs=0.02)
    band_of_noise = arms["growing_noise"]["estimates"]
    x, y, _ = points("growing_noise", seed)
    best = mean_nll(y, *band(x, most_likely(x, y)))
    assert band_of_noise["converged"]["nll"] == pytest.approx(best, abs=0.01)
    assert 0.9 <= band_of_noise["converged"]["coverage"] <= 1
    return band_of_noise["fit"]["nll"] - band_of_noise["converged"]["nll"]


def test_converge_reaches_both_maxima():
    assert check_converged(["--epochs", "150"], seed=1) > 0.01  # which the fit had not


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_claim_the_maximum_is_reached(seed):
    check_converged([], seed)
