"""What several test files compare with: networks in NumPy, scripted games, and watched data."""

import types

import helpers
import numpy as np
import pytest
import tensorflow as tf


# --- Weights and gradients ---
def assert_same(weights, others, atol=0.0):
    """Compare two lists of arrays, by default to the last bit."""
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7 if atol else 0, atol=atol)


def smallest_move(weights, others):
    """Return how far the least moved of two lists of arrays has moved."""
    return min(np.abs(one - other).max() for one, other in zip(weights, others, strict=True))


def gradient_of(network, update):
    """Return what update(optimizer) returns, and the gradient: by it plain descent moves."""
    sgd, before = tf.keras.optimizers.SGD(1.0), network.get_weights()
    sgd.build(network.trainable_variables)
    returned = update(sgd)
    gradient = [old - new for old, new in zip(before, network.get_weights())]
    network.set_weights(before)
    return returned, gradient


def mlp(x, weights):
    """Return the inputs and each layer's outputs, in float64: ReLU, and none at the end."""
    outputs = [np.asarray(x, "float64")]
    for i in range(0, len(weights), 2):
        x = outputs[-1] @ weights[i].astype("float64") + weights[i + 1]
        outputs.append(np.maximum(x, 0) if i + 2 < len(weights) else x)
    return outputs


def mlp_gradients(outputs, weights, delta):
    """Return the weights' gradients, given `mlp`'s outputs and the gradient by the last ones."""
    gradients = []
    for i in reversed(range(0, len(weights), 2)):
        inputs = outputs[i // 2]
        gradients = [inputs.T @ delta, delta.sum(0), *gradients]
        delta = (delta @ weights[i].T) * (inputs > 0)
    return gradients


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


# --- Data ---
def labels_of(dataset, count=-1):
    """Return the labels of each of a dataset's first batches."""
    return [labels.numpy().ravel().tolist() for _, labels in dataset.take(count)]


def numbered(count, *shape):
    """Return images whose every pixel is their number, and the numbers as labels."""
    numbers = np.arange(count)
    pixels = numbers.astype("uint8").reshape(-1, *[1] * len(shape))
    return np.broadcast_to(pixels, (count, *shape)), numbers


def check_shuffle(make_train_dataset, size, batch_size):
    """Images 0 to size - 1 are shuffled, not batches, and by the seed; return two passes."""

    def two_passes(seed):
        tf.keras.utils.set_random_seed(0)
        return labels_of(make_train_dataset(seed), 2 * size // batch_size)

    batches = two_passes(0)
    assert batches == two_passes(0) != two_passes(1)
    first, second = batches[: size // batch_size], batches[size // batch_size :]
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(size))
    assert not set(map(frozenset, first)) & set(map(frozenset, second))  # batch().shuffle() does
    return first, second


def check_test_accuracy(script, count):
    """The newest run's saved models take pixels, and its test images were `count` unseen ones."""
    images, labels = zip(*script.synthetic_photographs(count))
    images = np.stack([script.pre_process_image(image, 0)[0] for image in images])
    folder, results = helpers.newest_results(".")
    for arm, record in results["arms"].items():
        model = tf.keras.models.load_model(folder / f"{arm}.keras")
        expected = np.mean((model(images).numpy()[:, 0] > 0.5) == np.array(labels))
        assert record["final"]["test_accuracy"] == pytest.approx(expected, abs=1e-6)


# --- Q learning on CartPole ---
class Scripted:
    """Episodes of the given lengths, then of 3 steps; the states are 1, 2, 3, ..."""

    def __init__(self, *lengths, falls=True):
        self.lengths, self.falls, self.left, self.actions = iter(lengths), falls, 0, []
        self.shown = 0

    def state(self):
        self.shown += 1
        return np.full(4, self.shown, "float32")

    def reset(self, seed=None):
        self.left = next(self.lengths, 3)
        return self.state(), {}

    def step(self, action):
        assert self.left > 0, "a step after the end"
        self.actions.append(action)
        self.left -= 1
        ended = self.left == 0
        return self.state(), 1.0, ended and self.falls, ended and not self.falls, {}


def watch_trainings(script, monkeypatch, flags, env=None):
    """Run main; return its folder, its arms, and of each training what it did.

    In a scripted `env` the Q values are 0 and s in state s, and the losses 1, 2, 3, ...
    """
    trainings, losses = [], tf.Variable(0.0)
    train, play, choose_action = script.train, script.play, script.choose_action

    class Memory(script.Memory):
        def __init__(self, max_memory):
            super().__init__(max_memory)
            trainings.append(types.SimpleNamespace(memory=self, choices=[], played=[]))

    def watched_train(primary_network, target_network, optimizer, batch, state):
        with tf.init_scope():  # a training calls it once, to compile it
            networks = [net for net in (primary_network, target_network) if net is not None]
            trainings[-1].starts = [network.get_weights() for network in networks]
            trainings[-1].networks, trainings[-1].optimizer = networks, optimizer
            if env:  # the last state's number, unchanged, is the last action's value
                weights = [np.zeros_like(weight) for weight in networks[0].get_weights()]
                for kernel in weights[::2]:
                    kernel[-1, -1] = 1
                networks[0].set_weights(weights)
        if env:
            return losses.assign_add(1.0), primary_network(state)
        return train(primary_network, target_network, optimizer, batch, state)

    def watched_play(env, predict):
        trainings[-1].played.append(play(env, predict))
        trainings[-1].q = predict(tf.ones((1, 4))).numpy()
        return trainings[-1].played[-1]

    def watched_choice(q_values, eps):
        trainings[-1].choices.append((float(q_values[0][1]), eps))
        return choose_action(q_values, eps)

    def scripted_make(name, max_episode_steps, **options):
        assert (name, max_episode_steps) == ("CartPole-v1", 200)
        return env

    changed = {"Memory": Memory, "train": watched_train, "play": watched_play}
    for name, value in (changed | {"choose_action": watched_choice}).items():
        monkeypatch.setattr(script, name, value)
    if env:
        monkeypatch.setattr(script.gymnasium, "make", scripted_make)
    folder, arms = helpers.run_main(script, flags)
    return folder.resolve(), arms, trainings


def dense_layers(model):
    """Return [(name, units, activation, kernel's initializer)] of the dense layers of a model."""
    layers = [layer for layer in model.layers if isinstance(layer, tf.keras.layers.Dense)]
    activations = [layer.activation.__name__ for layer in layers]
    initializers = [type(layer.kernel_initializer).__name__ for layer in layers]
    units = [layer.units for layer in layers]
    return list(zip([layer.name for layer in layers], units, activations, initializers))


def random_batch(seed=0):
    """Return states, actions, rewards, next states and terminals of 32 steps."""
    rng = np.random.default_rng(seed)
    states, next_states = rng.normal(size=(2, 32, 4)).astype("float32")
    actions, rewards = rng.integers(0, 2, 32, "int32"), rng.normal(1, 1, 32).astype("float32")
    terminals = (rng.uniform(size=32) < 0.2).astype("float32")
    next_states[0], terminals[:2] = 0, [0, 1]  # a zero that is no terminal, and a terminal
    return states, actions, rewards, next_states, terminals


def train_as_the_article(network, judge, batch, optimizer, loss, gamma):
    """Take a step the article's way, targets set in NumPy, then `train_on_batch`; return its loss.

    `judge` says what the best next actions are worth: the target network, or `network` itself.
    """
    states, actions, rewards, next_states, terminals = batch
    chooser, judged = network(next_states).numpy(), judge(next_states).numpy()
    if judge is not network:
        assert (chooser.argmax(axis=1) != judged.argmax(axis=1)).any(), "it has nothing to judge"
    target_q = network(states).numpy()
    for i in range(32):
        future = 0 if terminals[i] else gamma * judged[i, chooser[i].argmax()]
        target_q[i, actions[i]] = rewards[i] + future
    network.compile(optimizer, loss)
    return network.train_on_batch(states, target_q)
