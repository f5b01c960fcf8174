"""mnist_eager_mlp.py: a whole training against NumPy, the small graph, each difference."""

from unittest import mock

import helpers
import numpy as np
import oracles
import pytest
import tensorflow as tf

import mnist_eager_mlp as script

RUN = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "4", "--batch-size", "9"]


def forward(images, weights):
    """Return the inputs, the hidden layer's outputs and the logits, in float64."""
    W1, b1, W2, b2 = weights
    inputs = images.reshape(len(images), -1)
    hidden = np.maximum(inputs @ W1 + b1, 0)
    return inputs, hidden, hidden @ W2 + b2


def numpy_step(images, labels, weights, moments, step):
    """Take a step of Adam in float64, forward, gradient and update by hand; return the loss."""
    inputs, hidden, logits = forward(images, weights)
    probabilities = oracles.softmax(logits)
    delta = (probabilities - np.eye(10)[labels]) / 9
    back = (delta @ weights[2].T) * (hidden > 0)
    gradients = [inputs.T @ back, back.sum(0), hidden.T @ delta, delta.sum(0)]
    # the paper's faster form, which Keras uses: epsilon is not corrected for the start
    rate = 0.001 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    for i, gradient in enumerate(gradients):
        m, v = moments[i]
        moments[i] = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weights[i] = weights[i] - rate * moments[i][0] / (np.sqrt(moments[i][1]) + 1e-7)
    return oracles.cross_entropy(probabilities, labels)


@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=["eager", "compile"])
def test_a_training_equals_numpy(flags):
    """Weights, loss, Adam, batches, the mean of an epoch, accuracy, what is written and saved."""
    folder, arms = helpers.run_main(script, RUN + flags)
    (x_train, y_train), (x_test, y_test) = script.load_data(True)
    script.keras.utils.set_random_seed(0)
    weights = [weight.numpy().astype("float64") for weight in script.build_model()]
    assert [weight.shape for weight in weights] == [(784, 300), (300,), (300, 10), (10,)]
    for weight, deviation in zip(weights, (0.03, 1, 0.03, 1)):
        assert weight.std() == pytest.approx(deviation, rel=4 / np.sqrt(2 * weight.size))
    moments, losses, accuracies = [(0.0, 0.0)] * 4, [], []
    for step in range(1, 9):
        idxs = np.random.randint(0, 2000, 9)  # with replacement
        losses.append(numpy_step(x_train[idxs] / 255, y_train[idxs], weights, moments, step))
        _, _, logits = forward(x_test / 255, weights)
        accuracies.append(np.mean(logits.argmax(1) == y_test))
    history = arms["mlp"]["history"]
    np.testing.assert_allclose(history["loss"], np.reshape(losses, (2, 4)).mean(1), rtol=1e-4)
    np.testing.assert_allclose(history["accuracy"], accuracies[3::4], atol=1.5 / 500)
    assert list(arms["mlp"]["final"].values()) == [values[1] for values in history.values()]
    # Adam divides a gradient by its own size: where it is all but zero, rounding shows
    oracles.assert_same(np.load(folder / "mlp.npz").values(), weights, atol=2e-4)
    for tag, values in history.items():
        written = [(i, pytest.approx(value)) for i, value in enumerate(values, 1)]
        assert helpers.events(folder / "mlp", tag) == written


def test_simple_example_by_hand(tmp_path, capsys):
    script.show_simple_example(tmp_path)
    *printed, piece = capsys.readouterr().out.replace("Variable a is ", "").splitlines()
    b, expected = np.arange(10.0), ["9.0", "9.0"]  # in the long form, and in shorthand
    for places in ([], [1], [6, 7, 8]):
        b[places] = 10
        expected.append(str(3 * (b + 1)))
    assert [line for line in printed if "tf.Variable" not in line] == expected
    assert "[2 3 4]" in piece
    graph = helpers.read_events(tmp_path / "simple_graph").Graph()
    assert {"d", "e", "a"} <= {node.name for node in graph.node}


@pytest.mark.parametrize(("flags", "times"), [([], 8), (["--compile"], 1)])
def test_differences_1_to_3_float32_and_compiled_parts_run_once_in_python(
    flags, times, monkeypatch
):
    adam, update = script.keras.optimizers.Adam, script.keras.optimizers.Adam.apply_gradients
    monkeypatch.setattr(script, "nn_model", nn_model := mock.Mock(wraps=script.nn_model))
    with mock.patch.object(adam, "apply_gradients", autospec=True, side_effect=update) as updates:
        script.main(RUN + flags)
    assert updates.call_count == 1
    images = [call.args[0] for call in nn_model.mock_calls]
    assert [x.shape[0] for x in images].count(9) == times
    assert {x.dtype for x in images} == {tf.float32}
    assert not any(isinstance(x, tf.Variable) for x in images)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_claim_98_percent(flags):  # ten epochs on the real images
    assert script.main(flags)["mlp"]["test_accuracy"] > 0.975
