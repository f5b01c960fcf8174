"""mnist_eager_mlp.py against NumPy, and each of its differences from the article."""

import numpy as np
import oracles
import pytest
import tensorflow as tf

import mnist_eager_mlp as script


def numpy_step(images, labels, weights, moments, step):
    """One step of Adam on the network, in float64: forward, gradient and update by hand."""
    outputs, rows = oracles.mlp(images.reshape(len(images), -1), weights), np.arange(len(labels))
    probabilities = oracles.softmax(outputs[-1])
    loss = -np.log(probabilities[rows, labels]).mean()
    delta = (probabilities - np.eye(10)[labels]) / len(labels)
    gradients = oracles.mlp_gradients(outputs, weights, delta)
    # the paper's faster form, which Keras uses: epsilon is not corrected for the start
    rate = 0.001 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    for i, gradient in enumerate(gradients):
        m, v = moments[i]
        moments[i] = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weights[i] = weights[i] - rate * moments[i][0] / (np.sqrt(moments[i][1]) + 1e-7)
    return loss


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_training_steps_equal_numpy(compiled):
    script.keras.utils.set_random_seed(3)
    weights = script.build_model()
    expected = [weight.numpy().astype("float64") for weight in weights]
    moments = [(0.0, 0.0)] * 4
    optimizer = script.keras.optimizers.Adam()
    optimizer.build(weights)
    step = tf.function(script.train_step, jit_compile=True) if compiled else script.train_step
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        images, labels = rng.uniform(size=(8, 28, 28)).astype("float32"), rng.integers(0, 10, 8)
        loss = step(tf.constant(images), tf.constant(labels), weights, optimizer)
        assert float(loss) == pytest.approx(numpy_step(images, labels, expected, moments, i), 1e-5)
        # Adam divides a gradient by its own size: where it is all but zero, rounding shows
        for weight, value in zip(weights, expected):
            assert np.abs(weight.numpy() - value).max() < 2e-5 * i


def test_initial_weights():
    script.keras.utils.set_random_seed(0)
    W1, b1, W2, b2 = script.build_model()
    assert [w.shape.as_list() for w in (W1, b1, W2, b2)] == [[784, 300], [300], [300, 10], [10]]
    assert np.std(W1.numpy()) == pytest.approx(0.03, rel=0.02)
    assert np.std(W2.numpy()) == pytest.approx(0.03, rel=0.1)
    assert np.std(b1.numpy()) == pytest.approx(1.0, rel=0.15)


def test_simple_example_by_hand(tmp_path, capsys):
    script.show_simple_example(tmp_path)
    printed = capsys.readouterr().out.replace(".", "")
    steps = ["a is 90", "[ 3  6  9 12 15 18 21 24 27 30]", "[ 3 33  9 12 15 18 21 24 27 30]"]
    steps += ["[ 3 33  9 12 15 18 33 33 33 30]", "[2 3 4]", "[0 1 0 0 0 0 0 0 0 0]"]
    places = [printed.index(step) for step in steps]
    assert places == sorted(places)


def test_get_batch_draws_pairs_with_replacement():
    np.random.seed(0)
    x, y = np.arange(50.0).reshape(50, 1, 1), np.arange(50)
    batch_x, batch_y = script.get_batch(x, y, 2000)
    assert np.array_equal(batch_x[:, 0, 0], batch_y)
    assert np.bincount(batch_y, minlength=50).min() > 15


def test_differences_1_to_4_and_a_run_that_learns(monkeypatch, tmp_path):
    inputs, eager_updates = [], []
    nn_model, adam_apply = script.nn_model, script.keras.optimizers.Adam.apply

    def watched_model(x_input, *weights):
        inputs.append((x_input, x_input.shape[0], tf.executing_eagerly()))
        return nn_model(x_input, *weights)

    def watched_apply(self, gradients, trainable_variables=None):
        eager_updates.append(tf.executing_eagerly())
        return adam_apply(self, gradients, trainable_variables)

    monkeypatch.setattr(script, "nn_model", watched_model)
    monkeypatch.setattr(script.keras.optimizers.Adam, "apply", watched_apply)
    flags = ["--synthetic", "--epochs", "2", "--batch-size", "99"]
    eager = script.main(flags)["mlp"]
    assert {x_input.dtype for x_input, _, _ in inputs} == {tf.float32}
    assert not any(isinstance(x_input, tf.Variable) for x_input, _, _ in inputs)
    in_training = [eagerly for _, size, eagerly in inputs if size == 99]
    assert in_training == [True] * 2 * (2000 // 99)
    assert eager_updates == [False]  # traced once, for all steps
    assert eager["test_accuracy"] > 0.9  # of ten classes
    assert eager["loss"] < eager["first_loss"]
    (path,) = tmp_path.glob("log/*/*/mlp.npz")
    script.keras.utils.set_random_seed(0)
    for weight, saved in zip(script.build_model(), np.load(path).values()):
        assert np.abs(saved - weight.numpy()).max() > 1e-3

    inputs.clear()
    compiled = script.main([*flags, "--compile"])["mlp"]
    assert [eagerly for _, size, eagerly in inputs if size == 99] == [False]
    assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_claim_98_percent(flags):
    """Ten epochs on the real images; the article's record is 0.98."""
    assert script.main(flags)["mlp"]["test_accuracy"] > 0.975
