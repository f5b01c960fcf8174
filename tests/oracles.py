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


def watch_photographs(script, monkeypatch):
    """Return two lists that a run fills: the images it decodes, its shuffles' windows."""
    decoded, windows = [], []
    photographs, make_datasets = script.synthetic_photographs, script.make_datasets

    def noted(image, label):
        tf.py_function(lambda: decoded.append(1), [], [])
        return image, label

    def watched(sets, batch_size, window, seed):
        windows.append(window)
        return make_datasets(sets, batch_size, window, seed)

    monkeypatch.setattr(script, "synthetic_photographs", lambda n: photographs(n).map(noted))
    monkeypatch.setattr(script, "make_datasets", watched)
    return decoded, windows


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


def train_scripted(script, monkeypatch, env, *flags):
    """Train in `env` an agent with Q values 0 and 5 and losses 1, 2, 3; return record, memory."""
    memories, losses = [], iter(range(1, 10000))

    class Memory(script.Memory):
        def __init__(self, max_memory):
            super().__init__(max_memory)
            memories.append(self)

    def learn(rows):
        loss = next(losses)
        return (loss, 10 * loss) if hasattr(script, "overestimation") else loss

    def compile_agent(*args):
        return learn, lambda states: tf.constant([[0.0, 5.0]])

    monkeypatch.setattr(script.gymnasium, "make", lambda *args, **options: env)
    monkeypatch.setattr(script, "Memory", Memory)
    monkeypatch.setattr(script, "compile_agent", compile_agent)
    return helpers.run_main(script, ["--arms", "double", *flags])[1]["double"], memories[0]


ENDINGS = [  # does the pole fall, flags, the terminals among the steps of lengths 5, 4 and 6
    (True, ["--epochs", "3"], [4, 8, 14]),
    (False, ["--epochs", "3"], []),  # the time limit
    (True, ["--max-steps", "12"], [4, 8]),  # the last episode is cut off
]


def check_memory(script, monkeypatch, falls, flags, terminals):
    """What the agent saw and did is stored, and only a fall is a terminal; return the memory."""
    env = Scripted(5, 4, 6, falls=falls)
    record, memory = train_scripted(script, monkeypatch, env, *flags)
    lengths = record["history"]["reward"]
    assert lengths == ([5, 4, 3] if "--max-steps" in flags else [5, 4, 6])
    assert memory.added == sum(lengths)
    assert np.flatnonzero(memory.terminals).tolist() == terminals
    states = [*range(1, 6), *range(7, 11), *range(12, 18)][: memory.added]
    assert memory.states[: memory.added, 3].tolist() == states
    assert memory.next_states[: memory.added, 3].tolist() == [state + 1 for state in states]
    assert memory.actions[: memory.added].tolist() == env.actions[: memory.added]
    return memory


def check_means(script, monkeypatch, first, *flags):
    """The step number `first` is the first that trains: the means are over those that do."""
    lengths = [first - 6, 5, 4, 2]
    env = Scripted(*lengths)
    record, _ = train_scripted(script, monkeypatch, env, "--epochs", "4", *flags)
    means = [None, None, (1 + 2 + 3 + 4) / 4, (5 + 6) / 2]
    expected = {"reward": lengths, "avg loss": means}
    if hasattr(script, "overestimation"):
        expected["mean q"] = [mean and 10 * mean for mean in means]
    assert record["history"] == expected


def random_actions(script, monkeypatch, level, steps, *flags):
    """Train one episode; return for each step whether epsilon was above `level`."""
    env = Scripted(steps)
    monkeypatch.setattr(script.random, "random", lambda: level)
    monkeypatch.setattr(script.random, "randrange", lambda actions: -1)
    train_scripted(script, monkeypatch, env, "--epochs", "1", *flags)
    assert set(env.actions) <= {-1, 1}
    return [action == -1 for action in env.actions[:steps]]


def watch_networks(script, monkeypatch, flags):
    """Train; return for each agent its networks and their first weights."""
    agents, compile_agent = [], script.compile_agent

    def watched(*args):
        networks = [network for network in args[-3:-1] if network is not None]
        agents.append((networks, [network.get_weights() for network in networks]))
        return compile_agent(*args)

    monkeypatch.setattr(script, "compile_agent", watched)
    script.main(flags)
    return agents


def random_batch(seed=0):
    """Return states, actions, rewards, next states and terminals of 32 steps."""
    rng = np.random.default_rng(seed)
    states, next_states = rng.normal(size=(2, 32, 4)).astype("float32")
    actions, rewards = rng.integers(0, 2, 32, "int32"), rng.normal(1, 1, 32).astype("float32")
    terminals = (rng.uniform(size=32) < 0.2).astype("float32")
    next_states[0], terminals[:2] = 0, [0, 1]  # a zero that is no terminal, and a terminal
    return states, actions, rewards, next_states, terminals


def target_q(batch, q, q_chooser, q_judge, gamma=0.95):
    """As the article: in each row of `q` the entry of the action taken is changed."""
    _, actions, rewards, _, terminals = batch
    changed = q.copy()
    for i in range(32):
        future = 0 if terminals[i] else gamma * q_judge[i, q_chooser[i].argmax()]
        changed[i, actions[i]] = rewards[i] + future
    return changed


def check_compiled_agent(script, networks, copies, before=(), behind=()):
    """It does what `train` and `update_network` do uncompiled, with the article's Adam."""
    args = types.SimpleNamespace(gamma=0.95, tau=0.08)
    learn, q_values = script.compile_agent(*before, *networks, args)
    adam = tf.keras.optimizers.Adam(0.001)
    adam.build(copies[0].trainable_variables)
    for step in range(3):
        batch = random_batch(step)
        results = learn(tf.constant(np.column_stack(batch).astype("float32")))
        expected = script.train(batch, *copies, adam, 0.95, *behind)
        np.testing.assert_allclose(results, expected, rtol=1e-4)
        if copies[1] is not None:
            script.update_network(*copies, 0.08)
            assert_same(networks[1].get_weights(), copies[1].get_weights(), atol=1e-5)
    states = batch[0]
    np.testing.assert_allclose(networks[0](states), copies[0](states), atol=1e-4)
    np.testing.assert_allclose(q_values(states[:1]), copies[0](states[:1]), atol=1e-4)
