"""What the tests of the two CartPole Q scripts share: a watched run, and Adam in NumPy."""

import json
import pathlib

import gymnasium
import numpy as np
import tensorflow as tf


class Watched:
    """A run of `script.main`, in this process, and all that passed through it."""

    def __init__(self, script, flags, folder, patch):
        self.eps, self.memories, self.losses, self.traces = [], [], [], []
        originals = script.choose_action, script.Memory, script.compile_for_shape
        choose_action, memory, compile_for_shape = originals
        q_learning_step = script.q_learning_step

        def watched_choice(state, best_action, eps):
            self.eps += [eps] if eps > 0 else []  # without the greedy episodes
            return choose_action(state, best_action, eps)

        def watched_memory(max_memory):
            self.memories.append(memory(max_memory))
            return self.memories[-1]

        def watched_compile(function, shape):
            compiled = compile_for_shape(function, shape)
            if shape == (1, 4):
                return compiled

            def learn(batch):
                assert isinstance(batch, tf.Tensor)
                self.losses.append(float(compiled(batch)))
                return self.losses[-1]

            return learn

        def watched_step(batch, primary_network, target_network, *rest):
            with tf.init_scope():  # the weights before the first step
                start = primary_network.get_weights(), target_network.get_weights()
            self.traces.append((primary_network, target_network, *start, tf.executing_eagerly()))
            return q_learning_step(batch, primary_network, target_network, *rest)

        patch.setattr(script, "choose_action", watched_choice)
        patch.setattr(script, "Memory", watched_memory)
        patch.setattr(script, "compile_for_shape", watched_compile)
        patch.setattr(script, "q_learning_step", watched_step)
        self.numbers, self.results, self.folder = run(script, flags, folder)


def run(script, flags, folder="log"):
    """Call `script.main`; return what it returns, its results.json and its folder."""
    numbers = script.main([*flags, "--logdir", str(folder)])
    (path,) = pathlib.Path(folder).glob("*/*/results.json")
    return numbers, json.loads(path.read_text()), path.parent


def limit_steps(script, monkeypatch, steps):
    """Give the script's CartPole another time limit: within 8 steps no pole can fall."""

    def make(name, max_episode_steps, **options):
        assert (name, max_episode_steps) == ("CartPole-v1", 200)
        return original(name, max_episode_steps=steps, **options)

    original = gymnasium.make
    monkeypatch.setattr(script.gymnasium, "make", make)


class Scripted:
    """An environment whose episodes have the lengths that are given; after them, one step each."""

    def __init__(self, lengths):
        self.lengths, self.left = iter(lengths), 0

    def reset(self, seed=None):
        self.left = next(self.lengths, 1)
        return np.zeros(4, "float32"), {}

    def step(self, action):
        self.left -= 1
        return np.ones(4, "float32"), 1.0, False, self.left == 0, {}


def make_batch(rng, size=32):
    """Return rows of a Memory: states, actions, rewards, next states, terminals; all side by side.

    The first row's next state is zero and no terminal; the second is a terminal, and not zero.
    """
    states, next_states = rng.normal(size=(2, size, 4))
    actions, rewards = rng.integers(0, 2, (size, 1)), rng.normal(1, 1, (size, 1))
    terminals = (rng.uniform(size=(size, 1)) < 0.2).astype(float)
    next_states[0], terminals[0], terminals[1] = 0, 0, 1
    return np.hstack((states, actions, rewards, next_states, terminals)).astype("float32")


def numpy_targets(batch, q_choosing, q_judging, gamma):
    """Return r + gamma q_judging(s', argmax q_choosing(s')), row by row: (batch,)."""
    targets = []
    for row, choosing, judging in zip(batch, q_choosing, q_judging):
        best = 0 if choosing[0] >= choosing[1] else 1
        targets.append(row[5] if row[10] else row[5] + gamma * judging[best])
    return np.array(targets)


def numpy_adam(weights, gradients, moments, step):
    """Return the weights and moments after step number `step` of Adam, as Keras defines it."""
    new_weights, new_moments = [], []
    for weight, gradient, (m, v) in zip(weights, gradients, moments):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.001 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        new_weights.append(weight - rate * m / (np.sqrt(v) + 1e-7))
        new_moments.append((m, v))
    return new_weights, new_moments
