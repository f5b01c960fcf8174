"""bayes_mle.py against closed forms and likelihoods in NumPy; its differences from the article."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import events, run_main

tf_keras = pytest.importorskip("tf_keras")  # Python 3.14 has none
import bayes_mle as script  # noqa: E402

X = np.arange(0, 10, 0.1)
STDDEV = {"constant_noise": np.full(100, 3.0), "growing_noise": 0.5 * X + 2}
SEEDS = [pytest.param([], seed, marks=pytest.mark.slow) for seed in range(5)]


def points(arm, seed):
    """The y of an arm, (100,), by NumPy alone."""
    return 2 * X + 3 + np.random.default_rng(seed).normal(0, STDDEV[arm])


def weights_of(model):
    return np.concatenate([weight.ravel() for weight in model.get_weights()]).astype("float64")


def normals(weights):
    """The means and the standard deviations at X, (100,), by a network's weights."""
    outputs = np.outer(X, weights[: len(weights) // 2]) + weights[len(weights) // 2 :]
    if len(weights) == 2:
        return outputs[:, 0], np.ones(100)
    return outputs[:, 0], 1e-3 + np.logaddexp(0, 0.3 * outputs[:, 1])  # softplus


def nll(y, mean, stddev):
    return np.log(stddev) + np.log(2 * np.pi) / 2 + ((y - mean) / stddev) ** 2 / 2


@pytest.mark.parametrize("arm", STDDEV)
def test_differences_1_to_3_each_point_meets_its_own_normal(arm):
    """By hand: N columns in, N losses out; sigma is a standard deviation."""
    model = getattr(script, f"{arm}_model")()
    values = script.neg_log_likelihood(points(arm, 0)[:, None], model(script.x_range))
    assert values.shape == (100, 1)  # with a row of means it is (100, 100), without an error
    expected = nll(points(arm, 0), *normals(weights_of(model)))
    np.testing.assert_allclose(values[:, 0], expected, rtol=1e-4)
    assert isinstance(model, tf_keras.Model)


@pytest.mark.parametrize("arm", STDDEV)
def test_difference_4_noise_is_drawn_by_a_seed(arm):
    lin_reg, truth = getattr(script, f"{arm}_data")(np.random.default_rng(7))
    here = np.hstack([lin_reg, truth.mean(), truth.stddev()]).T
    np.testing.assert_allclose(here, [points(arm, 7), 2 * X + 3, STDDEV[arm]], rtol=1e-12)
    np.random.seed(0)
    draws = script.noise(np.tile([0.0, 4.0], (20000, 1)), 0.25, 1.5)  # no array has its name
    np.testing.assert_allclose([draws.mean(0), draws.std(0)], [[0, 0], [1.5, 2.5]], atol=0.05)


def test_difference_6_the_grid_gives_the_closed_form():
    """Of two Normals the precisions, 1 / variance, add up and weigh the means."""
    folder, arms = run_main(script, ["--epochs", "1"])
    heights = np.random.default_rng(0).normal(142, 8, 30)
    precisions = 1 / 10**2 + np.arange(31) / 8**2
    means = (130 / 10**2 + np.append(0, heights.cumsum()) / 8**2) / precisions
    history = np.array([*arms["prior"]["history"].values()])
    np.testing.assert_allclose(history, [means[1:], precisions[1:] ** -0.5], rtol=1e-7)
    assert events(folder / "prior", "mean")[-1] == (30, pytest.approx(means[-1]))
    for line, count in zip(plt.figure(1).axes[0].lines, (0, 1, 3, 10, 30)):
        density = np.exp(-nll(line.get_xdata(), means[count], precisions[count] ** -0.5))
        np.testing.assert_allclose(line.get_ydata(), density, atol=1e-6)
        assert line.get_label() == f"pupils: {count}"
    # The article's rain: of 1,000 days 900 are dry, and 70 of the 100 wet days come after them.
    assert script.bayes_theorem(likelihood=0.7, prior=0.1, evidence=0.9) == pytest.approx(70 / 900)


def check_run(shown, flags, seed, capsys):
    """The final numbers, figure, and file, loaded by the printed line, are of the fit `shown`."""
    folder, arms = run_main(script, [*flags, "--seed", str(seed)])
    printed = capsys.readouterr().out.splitlines()
    pasted = [line for line in printed if line.startswith("model = ")]
    for arm, line, number in zip(STDDEV, pasted, (2, 3), strict=True):
        exec(line, names := dict(vars(script)))
        y, weights = points(arm, seed), weights_of(names["model"])
        mean, stddev = normals(weights)
        by_hand = [weights[0], mean[0], stddev[0], stddev[-1], nll(y, mean, stddev).mean()]
        by_hand += [np.mean(np.abs(y - mean) <= 2 * stddev), len(weights)]
        estimates, final = arms[arm]["estimates"], arms[arm]["final"]
        assert list(final.values()) == pytest.approx(by_hand, rel=1e-3)
        assert final == estimates[shown] | {"parameters": len(weights)}
        assert events(folder / arm, "loss") == [*enumerate(arms[arm]["history"]["loss"], 1)]
        if shown == "fit":
            assert mean[0] > 0.3  # difference 5: a rate of 0.001 moves it by 0.03 at most
        else:
            for move in 0.01 * np.eye(len(weights)):  # the slope of the mean NLL
                low, high = (nll(y, *normals(weights + a)).mean() for a in (-move, move))
                assert abs(high - low) / 0.02 < 0.001
        axes = plt.figure(number).axes[0]
        np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([X, y], axis=1))
        bands = {band.get_label(): band.get_paths()[0].vertices for band in axes.collections[1:]}
        assert len(bands) == (len(estimates) if arm == "growing_noise" else 0)
        assert len({line.get_linestyle() for line in axes.lines}) == len(estimates)
        for line, (name, numbers) in zip(axes.lines, estimates.items(), strict=True):
            end = 9.9 * numbers["slope"] + numbers["intercept"]
            assert line.get_label() == name
            assert float(line.get_ydata()[-1]) == pytest.approx(end)
            if bands:
                edges = [y - end for x, y in bands[f"{name} +- 2 stddev"] if x > 9.89]
                assert max(edges) == pytest.approx(2 * numbers["last_stddev"], rel=1e-4)
    squares = [*arms["constant_noise"]["estimates"]["least squares"].values()]
    assert squares[:2] == pytest.approx([*np.polyfit(X, points("constant_noise", seed), 1)])


def test_the_fit_is_shown_and_saved_without_a_warning(capsys, recwarn):
    check_run("fit", ["--epochs", "4"], 0, capsys)
    assert not [warning for warning in recwarn if "lambda" in str(warning.message)]


@pytest.mark.parametrize(("flags", "seed"), [(["--epochs", "150"], 1), *SEEDS])
def test_converge_is_shown_and_saved_and_reaches_both_maxima(flags, seed, capsys):
    check_run("converged", ["--converge", *flags], seed, capsys)
