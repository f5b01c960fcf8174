"""Print the speed table: each row is a ratio of two things timed in turns, in one run.

    python tests/benchmark.py                  # all rows
    python tests/benchmark.py mnist resnet     # those whose name holds one of the words

"The article's way" is written anew here as the article describes it. Data are made up: arithmetic
takes as long on noise. Leave the machine alone meanwhile. stable-baselines3's rows are left out
where it cannot be imported, by this Python or by the one that SB3_PYTHON names.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from unittest import mock

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
        apply, own = optimizers[name].apply_gradients, weights[name]
        update = tf.function(lambda gradients: apply(zip(gradients, own)))

        def run():
            for _ in range(steps):
                batch_x, batch_y = script.get_batch(ours, labels, 100)
                step(tf.constant(batch_x), tf.constant(batch_y), own, update)

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
    args = argparse.Namespace(batch_size=64, seed=0)
    dataset, _ = script.make_datasets((images, labels), (images[:10], labels[:10]), args)
    model = script.build_model("resnet")
    fit_against_bound("resnet_cifar10", model, dataset, steps=60)


class ArticleDuelingNetwork(keras.Model):
    """The article's DQModel with its value stream, called layer by layer."""

    def __init__(self):
        super().__init__()
        sizes = {
            "dense1": 30,
            "dense2": 30,
            "adv_dense": 30,
            "adv_out": 2,
            "v_dense": 30,
            "v_out": 1,
        }
        for name, units in sizes.items():
            activation = None if name.endswith("out") else "relu"
            layer = keras.layers.Dense(units, activation, kernel_initializer="he_normal", name=name)
            setattr(self, name, layer)

    def call(self, inputs):
        x = self.dense2(self.dense1(inputs))
        adv = self.adv_out(self.adv_dense(x))
        return self.v_out(self.v_dense(x)) + adv - tf.reduce_mean(adv, axis=1, keepdims=True)


def article_q_network(dueling):
    """Return the article's network, built and compiled."""
    dense, he = keras.layers.Dense, {"activation": "relu", "kernel_initializer": "he_normal"}
    layers = [dense(30, **he), dense(30, **he), dense(2)]
    network = ArticleDuelingNetwork() if dueling else keras.Sequential(layers)
    network(np.zeros((1, 4), "float32"))
    network.compile(optimizer=keras.optimizers.Adam(), loss="mse")
    return network


def article_q_agent(dueling):
    """Return play(steps), which trains Double Q the article's way and returns its steps a second.

    A list of tuples, networks called eagerly, NumPy between them, `train_on_batch`, and one
    assignment a variable.
    """
    import gymnasium

    primary, target = article_q_network(dueling), article_q_network(dueling)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200)
    memory, rows = [], np.arange(32)
    states = [env.reset(seed=0)[0]]  # the last one is where the agent is

    def train():
        batch = random.sample(memory, 32)
        state, action, reward = (np.array([sample[i] for sample in batch]) for i in range(3))
        following = np.array([np.zeros(4) if s[3] is None else s[3] for s in batch])
        target_q = primary(state).numpy()
        best = np.argmax(primary(following).numpy(), axis=1)
        q_from_target = target(following).numpy()
        valid = following.sum(axis=1) != 0
        reward[valid] += 0.95 * q_from_target[rows[valid], best[valid]]
        target_q[rows, action] = reward
        loss = primary.train_on_batch(state, target_q)
        for t, e in zip(target.trainable_variables, primary.trainable_variables):
            t.assign(t * (1 - 0.08) + e * 0.08)
        return loss

    def play(steps):
        start = time.perf_counter()
        for _ in range(steps):
            greedy = random.random() >= 0.01
            action = (
                int(np.argmax(primary(states[-1].reshape(1, -1))))
                if greedy
                else env.np_random.integers(2)
            )
            state, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            reward = np.random.normal(1.0, 1.0)
            memory.append((states.pop(), action, reward, None if done else state))
            if len(memory) > 50000:
                memory.pop(0)
            if len(memory) >= 96:
                train()
            states.append(env.reset()[0] if done else state)
        return steps / (time.perf_counter() - start)

    return play


# Two programs that read a number of steps a line, play them, and answer with steps a second.
OUR_Q_AGENT = """
import contextlib, importlib, io, json, sys, tempfile, time
script, settings, flags = importlib.import_module(sys.argv[1]), sys.argv[2], sys.argv[3:]
notes = []
vars(script).update(json.loads(settings))
class Stopwatch(script.Run):
    def record(self, arm, epoch, metrics):
        super().record(arm, epoch, metrics)
        notes.append((sum(self.records[arm]["history"]["reward"]), time.perf_counter()))
script.Run = Stopwatch
print("ready", flush=True)
for line in sys.stdin:
    notes.clear()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main([*flags, "--max-steps", line.strip(), "--logdir", folder])
    first, last = next(note for note in notes if note[0] >= 500), notes[-1]  # all is compiled
    print((last[0] - first[0]) / (last[1] - first[1]), flush=True)
"""
STABLE_BASELINES3 = """
import sys, time
import gymnasium, torch
from stable_baselines3 import DQN
torch.set_num_threads(1)  # faster than two, for a network of this size
model = DQN(
    "MlpPolicy", gymnasium.make("CartPole-v1", max_episode_steps=200), learning_rate=1e-3,
    buffer_size=50000, learning_starts=96, batch_size=32, tau=0.08, gamma=0.95, train_freq=1,
    gradient_steps=1, target_update_interval=1, exploration_initial_eps=0.01,
    exploration_final_eps=0.01, policy_kwargs={"net_arch": [30] * int(sys.argv[1])}, device="cpu",
)
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    model.learn(int(line), reset_num_timesteps=False)
    print(int(line) / (time.perf_counter() - start), flush=True)
"""


def child_agent(python, code, *arguments):
    """Return play(steps), which has a program play them, or None where it cannot start."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "PYTHONPATH": sys.path[0]}
    command = [python, "-c", code, *arguments]
    process = subprocess.Popen(command, env=env, text=True, bufsize=1, **pipes)
    if process.stdout.readline() != "ready\n":
        return None

    def play(steps):
        process.stdin.write(f"{steps}\n")
        return float(process.stdout.readline())

    return play


def q_learning():
    """double_q_cartpole, dueling_q_cartpole: environment steps/s, with a gradient step each."""
    sb3_python = os.environ.get("SB3_PYTHON", sys.executable)
    for script, hidden_layers, settings, *flags in (
        ("double_q_cartpole", "2", '{"LAMBDA": 1}', "--arms", "double"),
        ("dueling_q_cartpole", "3", '{"EPSILON_MIN_ITER": 1}', "--arms", "dueling"),
    ):
        contestants = {
            "here": (child_agent(sys.executable, OUR_Q_AGENT, script, settings, *flags), 6000),
            "the article's way": (article_q_agent(script.startswith("dueling")), 300),
            "stable-baselines3": (child_agent(sb3_python, STABLE_BASELINES3, hidden_layers), 1000),
        }
        if contestants["stable-baselines3"][0] is None:
            del contestants["stable-baselines3"]
            print(f"{script:<26}stable-baselines3 is not installed: its row is left out")
        rates = {name: [] for name in contestants}
        for i in range(6):  # in turns; the first one warms up
            for name, (play, steps) in contestants.items():
                rates[name] += [play(steps)][: i > 0]
        medians = {name: np.median(values) for name, values in rates.items()}
        print({name: round(float(value)) for name, value in medians.items()}, "steps/s")
        article_must = 30 if script.startswith("dueling") else 22
        for name, must in (("the article's way", article_must), ("stable-baselines3", 2.5)):
            if name in medians:
                show(script, "steps/s", name, medians["here"] / medians[name], must)


class Enough(Exception):
    """Ends a run that has been watched for long enough."""


def atari_seconds_in_turns(script, others, steps=30, turns=40):
    """Time the script's own loop while it trains, and the others, for some steps each in turns.

    The turns are short, as the machine's pace may change. `others` is {name: function(steps)}.
    Returns {name: seconds of each turn's step}, with "here" for the script.
    """
    times, count = {"here": [], **{name: [] for name in others}}, itertools.count(-100)
    choose_action, start = script.choose_action, 0.0

    def watched(*arguments):
        nonlocal start
        step = next(count)  # from 0 on all is compiled
        if step > 0 and step % steps == 0:
            times["here"].append((time.perf_counter() - start) / steps)
            for name, function in others.items():
                function(2)  # untimed: its weights come back into the caches
                start = time.perf_counter()
                function(steps)
                times[name].append((time.perf_counter() - start) / steps)
            if step == steps * turns:
                raise Enough
        if step >= 0 and step % steps == 0:
            start = time.perf_counter()
        return choose_action(*arguments)

    mean_of_its_fall = {"MAX_EPSILON": 0.55, "MIN_EPSILON": 0.55}
    patches = mock.patch.multiple(script, choose_action=watched, **mean_of_its_fall)
    flags = ["--delay-training", "50", "--replay-size", "20000"]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.suppress(Enough))
        stack.enter_context(patches)
        script.main([*flags, "--logdir", folder])
    return times


def article_atari_agent(script):
    """Return play(steps): the article's way, float32 frames on the last axis, eager networks."""
    env = script.gymnasium.make("ALE/SpaceInvaders-v5", frameskip=(2, 5))
    primary, target = (article_atari_network() for _ in range(2))
    size, rows = 20000, np.arange(32)
    frames = np.full((105, 80, size), 0.5, "float32")  # full, as it is most of the time
    actions, rewards = np.zeros(size, "int32"), np.zeros(size, "float32")
    terminals = np.zeros(size, bool)

    def preprocess(image):
        return tf.image.resize(tf.image.rgb_to_grayscale(image), (105, 80)) / 255

    def train():
        drawn = np.random.randint(4, size, 32)
        states, following = (np.zeros((32, 105, 80, 3), "float32") for _ in range(2))
        for i, index in enumerate(drawn):
            states[i] = frames[:, :, index - 3 : index]
            following[i] = frames[:, :, index - 2 : index + 1]
        target_q, updates = primary(states).numpy(), rewards[drawn]
        best, valid = np.argmax(primary(following).numpy(), axis=1), ~terminals[drawn]
        judged = target(following).numpy()
        updates[valid] += 0.99 * judged[rows, best][valid]
        target_q[rows, actions[drawn]] = updates
        primary.train_on_batch(states, target_q)
        for t, e in zip(target.trainable_variables, primary.trainable_variables):
            t.assign(t * (1 - 0.08) + e * 0.08)

    first = preprocess(env.reset(seed=0)[0])
    stack, count = tf.Variable(np.repeat(first.numpy(), 3, axis=2)), itertools.count()

    def play(steps):
        for step in itertools.islice(count, steps):
            action = env.action_space.sample()
            if random.random() >= 0.55:
                action = int(np.argmax(primary(tf.reshape(stack, (1, 105, 80, 3)).numpy())))
            image, reward, terminated, _, _ = env.step(action)
            frame = preprocess(image)
            for i in range(2):
                stack[:, :, i].assign(stack[:, :, i + 1])
            stack[:, :, 2].assign(frame[:, :, 0])
            frames[:, :, step] = frame[:, :, 0]
            actions[step], rewards[step], terminals[step] = action, reward, terminated
            train()
            if terminated:
                env.reset()

    play(40)  # untimed: fills the memory, compiles
    return play


def article_atari_network():
    """Return the article's network for three frames (105, 80, 3), compiled."""
    dense = lambda units, **rest: keras.layers.Dense(  # noqa: E731
        units, kernel_initializer="he_normal", **rest
    )
    inputs = keras.Input((105, 80, 3))
    x = keras.layers.Conv2D(16, 8, 4, activation="relu")(inputs)
    x = keras.layers.Flatten()(keras.layers.Conv2D(32, 4, 2, activation="relu")(x))
    adv, v = dense(6)(dense(256, activation="relu")(x)), dense(1)(dense(256, activation="relu")(x))
    network = keras.Model(inputs, v + adv - keras.ops.mean(adv, axis=1, keepdims=True))
    network.compile(optimizer=keras.optimizers.Adam(), loss=keras.losses.Huber())
    return network


def space_invaders():
    """dueling_q_spaceinvaders: environment steps, with a gradient step each; bytes of a frame."""
    import dueling_q_spaceinvaders as script

    networks = script.DQModel(256, 6), script.DQModel(256, 6)
    adam = keras.optimizers.Adam(6.25e-5, epsilon=1.5e-4)
    adam.build(networks[0].trainable_variables)
    learn = tf.function(functools.partial(script.train, *networks, adam))
    frames, actions = np.zeros((32, 4, 105, 80), "uint8"), np.zeros(32, "uint8")
    batch = frames, actions, np.zeros(32, "float32"), np.zeros(32, "float32")

    def step_alone(steps):
        for _ in range(steps):
            float(learn(*batch))

    others = {"step": step_alone, "article": article_atari_agent(script)}
    times = atari_seconds_in_turns(script, others)
    median = {name: np.median(values) for name, values in times.items()}
    print({name: f"{1 / value:.1f}" for name, value in median.items()}, "steps/s")
    name = "dueling_q_spaceinvaders"
    show(name, "environment steps/s", "the article's way", median["article"] / median["here"], 4)
    ratio = median["here"] / median["step"]
    show(name, "time of a step of the loop", "its compiled train step alone", ratio, 1.2, True)
    slot = np.dtype(script.SLOT).itemsize
    show(name, "bytes of replay a frame", "105 x 80 = 8,400", slot, 8500, True)


def reinforce():
    """reinforce_cartpole: environment steps, an update an episode, against the article's way."""
    import reinforce_cartpole as script

    env = script.gymnasium.make("CartPole-v1", max_episode_steps=200)
    network, theirs = script.build_model(), script.build_model()
    shape = tf.TensorSpec((1, 4))
    predict = tf.function(network, jit_compile=True).get_concrete_function(shape)
    theirs.compile(loss="categorical_crossentropy", optimizer="adam")

    def article_action(state):
        softmax_out = theirs(state.reshape((1, -1)))
        return np.random.choice(2, p=softmax_out.numpy()[0])

    def article_update(rewards, states, actions):
        """The right gradient: one-hot targets, returns as sample weights."""
        returns, total = [], 0
        for reward in rewards[::-1]:
            total = reward + 0.95 * total
            returns.append(total)
        returns = np.array(returns[::-1])
        returns = (returns - np.mean(returns)) / max(np.std(returns), 1e-8)
        return theirs.train_on_batch(np.vstack(states), np.eye(2)[actions], sample_weight=returns)

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
                learn(rewards, states, actions)

        return run

    contestants = {
        "article": runner(article_action, article_update),
        "ours": runner(
            lambda state: script.get_action(predict, state),
            lambda *episode: script.update_network(network, *episode),
        ),
    }
    times = seconds_in_turns(contestants)
    ratio = times["article"] / times["ours"]
    show("reinforce_cartpole", "environment steps/s", "the article's way, right gradient", ratio, 8)


def gap():
    """gap_cats_dogs: the input pipeline, with its cache, against the bound."""
    import gap_cats_dogs as script

    def image(i):  # each epoch of 60 batches goes 1.25 times through them, as in the script
        return tf.random.stateless_uniform([100, 100, 3], (i, i), 0, 256, tf.int32), i % 2

    dataset = tf.data.Dataset.range(3072).map(image)
    dataset = dataset.map(lambda image, label: (tf.cast(image, tf.uint8), label)).cache()
    dataset = dataset.shuffle(3072, seed=0).repeat().batch(64).prefetch(tf.data.AUTOTUNE)
    model = script.build_model("gap")
    fit_against_bound("gap_cats_dogs", model, dataset, steps=60)


def transfer():
    """transfer_resnet50: seven epochs of the arm resnet50, its features computed once or anew."""
    import transfer_resnet50 as script

    build_tl_model, seconds, built = script.build_tl_model, {}, []

    def timed_build(weights):
        start = time.perf_counter()
        model = build_tl_model(weights)
        built.append(time.perf_counter() - start)  # as long for few images as for many
        return model

    for name, flags in {"once": [], "anew": ["--no-cache-features"]}.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            flags = ["--synthetic", "--weights", "none", "--arms", "resnet50", *flags]
            settings = {"SYNTHETIC_COUNTS": (1440, 216, 144), "build_tl_model": timed_build}
            with mock.patch.multiple(script, **settings):
                script.main([*flags, "--logdir", folder])
            (path,) = pathlib.Path(folder).glob("*/*/results.json")
            whole = json.loads(path.read_text())["arms"]["resnet50"]["seconds"]
            seconds[name] = whole - built[-1]
    ratio = seconds["anew"] / seconds["once"]
    show("transfer_resnet50", "7 epochs, resnet50", "--no-cache-features", ratio, 5)


ROWS = [mnist, gap, transfer, resnet, q_learning, space_invaders, reinforce]

if __name__ == "__main__":
    words = sys.argv[1:]
    print(f"{'script':<26}{'figure':<44}{'against':<36}{'ratio':>7}{'must':>7}")
    for row in ROWS:
        if not words or any(word in row.__doc__ for word in words):
            row()
