"""Print the speed table: each row is a ratio of two things timed in turns, in one run.

    python tests/benchmark.py                  # all rows
    python tests/benchmark.py mnist resnet     # those whose name holds one of the words

"The article's way" is written anew here as the article describes it. Data are made up: arithmetic
takes as long on noise. Leave the machine alone meanwhile.
"""

import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf


def seconds_in_turns(contestants, rounds=5):
    """Time the functions {name: function} in turns; return {name: least seconds a call}.

    Each is called once before, untimed, so that nothing is compiled on the clock.
    """
    for function in contestants.values():
        function()
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def show(script, figure, against, ratio, must, at_most=False):
    """Print one row of the table."""
    verdict = "ok" if (ratio <= must if at_most else ratio >= must) else "MISSED"
    print(f"{script:<26}{figure:<44}{against:<36}{ratio:>7.2f}{must:>7}  {verdict}", flush=True)


def mnist():
    """mnist_eager_mlp: an epoch's steps, eager and compiled, against the article's."""
    import mnist_eager_mlp as script

    rng = np.random.default_rng(0)
    images, labels = rng.uniform(size=(60000, 28, 28)), rng.integers(0, 10, 60000, dtype="uint8")
    ours = images.astype("float32")
    steps = 100

    def article():
        """float64 images, a new variable for each batch, the update eagerly."""
        for _ in range(steps):
            batch_x, batch_y = script.get_batch(images, labels, 100)
            batch_x, batch_y = tf.Variable(batch_x), tf.Variable(batch_y)
            batch_y = tf.one_hot(batch_y, 10)
            with tf.GradientTape() as tape:
                logits = script.nn_model(tf.cast(batch_x, tf.float32), *weights["article"])
                loss = script.loss_fn(logits, batch_y)
            gradients = tape.gradient(loss, weights["article"])
            optimizers["article"].apply_gradients(zip(gradients, weights["article"]))

    def runner(name, step):
        apply_gradients = tf.function(optimizers[name].apply)

        def run():
            for _ in range(steps):
                batch_x, batch_y = script.get_batch(ours, labels, 100)
                step(tf.constant(batch_x), tf.constant(batch_y), weights[name], apply_gradients)

        return run

    weights, optimizers = {}, {}
    for name in ("article", "eager", "compile"):
        weights[name], optimizers[name] = script.build_model(), keras.optimizers.Adam()
        optimizers[name].build(weights[name])
    compiled = tf.function(script.train_step, jit_compile=True)
    contestants = {
        "article": article,
        "eager": runner("eager", script.train_step),
        "compile": runner("compile", compiled),
    }
    times = seconds_in_turns(contestants)
    for name, must in (("eager", 2), ("compile", 7)):
        ratio = times["article"] / times[name]
        show("mnist_eager_mlp", f"steps/s, {name}", "the article's way", ratio, must)


class SecondEpoch(keras.callbacks.Callback):
    """Time the second epoch of a fit: the first one compiles and fills buffers."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


def fit_against_bound(name, model, dataset, steps, rounds=5):
    """Show images/s of `fit` on a dataset, over those on one constant batch of it."""
    constant = tf.data.Dataset.from_tensors(next(iter(dataset))).repeat()
    times = {"pipeline": [], "bound": []}
    for _ in range(rounds):
        for kind, data in (("pipeline", dataset), ("bound", constant)):
            timer = SecondEpoch()
            flags = {"epochs": 2, "steps_per_epoch": steps, "shuffle": False, "verbose": 0}
            model.fit(data, callbacks=[timer], **flags)
            times[kind].append(timer.seconds)
    ratio = min(times["bound"]) / min(times["pipeline"])
    show(name, "images/s from the second epoch", "a constant batch", ratio, 0.93)


def resnet():
    """resnet_cifar10: the input pipeline against the bound."""
    import resnet_cifar10 as script

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50000, 32, 32, 3), dtype="uint8")
    labels = rng.integers(0, 10, (50000, 1), dtype="uint8")
    dataset, _ = script.make_datasets(((images, labels), (images[:10], labels[:10])), 64, seed=0)
    model = script.build_model("resnet")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["acc"])
    fit_against_bound("resnet_cifar10", model, dataset, steps=60)


def reinforce():
    """reinforce_cartpole: environment steps, an update an episode, against the article's way."""
    import reinforce_cartpole as script

    env, (network, theirs) = script.make_env(), (script.build_model() for _ in range(2))
    optimizer = keras.optimizers.Adam()
    optimizer.build(network.trainable_variables)
    policy = script.compile_policy(network)
    update = tf.function(script.update_network, jit_compile=True)
    theirs.compile(loss="categorical_crossentropy", optimizer="adam")

    def article_action(state):
        softmax_out = theirs(state.reshape((1, -1)))
        return np.random.choice(2, p=softmax_out.numpy()[0])

    def article_update(states, actions, returns):
        """The right gradient: one-hot targets, returns as sample weights."""
        return theirs.train_on_batch(np.vstack(states), np.eye(2)[actions], sample_weight=returns)

    def our_update(states, actions, returns):
        return float(update(network, optimizer, *script.pad_episode(states, actions, returns, 200)))

    def runner(choose, learn):
        """1,200 steps, an update every 150: the mean length of an episode in five runs."""

        def run():
            state, _ = env.reset(seed=0)
            for _ in range(8):
                states, actions, rewards = [], [], []
                for _ in range(150):
                    actions.append(choose(state))
                    states.append(state)
                    state, reward, terminated, truncated, _ = env.step(actions[-1])
                    rewards.append(reward)
                    if terminated or truncated:
                        state, _ = env.reset()
                returns = script.standardise(script.discounted_returns(rewards, 0.95))
                learn(states, actions, returns)

        return run

    contestants = {
        "article": runner(article_action, article_update),
        "ours": runner(lambda state: script.get_action(policy, state), our_update),
    }
    times = seconds_in_turns(contestants)
    ratio = times["article"] / times["ours"]
    show("reinforce_cartpole", "environment steps/s", "the article's way, right gradient", ratio, 8)


ROWS = [mnist, resnet, reinforce]

if __name__ == "__main__":
    words = sys.argv[1:]
    print(f"{'script':<26}{'figure':<44}{'against':<36}{'ratio':>7}{'must':>7}")
    for row in ROWS:
        if not words or any(word in row.__doc__ for word in words):
            row()
