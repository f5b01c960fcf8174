"""Balance a pole under noisy rewards by deep Q learning and by Double Q, and compare the two.

Article: "Double Q reinforcement learning in TensorFlow 2" (Adventures in Machine Learning).

Deep Q learning takes the largest of several noisy estimates as the value of the next state, and the
largest of noisy numbers is, on average, too large. In Double Q learning one network chooses the
best next action, and a second one, which follows the first slowly, says what that action is worth.

    python double_q_cartpole.py                           # the article's second figure
    python double_q_cartpole.py --random-reward-std 0     # the article's first figure
    python double_q_cartpole.py --epochs 300 --runs 20    # twenty runs of each

Result (300 episodes, seeds 0 to 19): Double Q makes more steps in the first hundred episodes, 90
against 68 (difference 21.5 +- 7.0, its standard error), but not later (183 and 184). By the median,
its values are too large by 1.4, deep Q's by 3.0. A single run of either may say the opposite.

Differences from the article:
1. CartPole-v0 is out of date. This is CartPole-v1 with v0's limit of 200 steps.
2. Only a fallen pole is terminal, not the time limit. The memory, one table, has a column for that;
   the article's next state is then made of zeros, and its `valid_idxs` finds the others.
3. A compiled step replaces `train_on_batch`. `avg loss` leaves out steps without training.
4. The last step of an episode counts in its length. The target network starts as a copy.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import random
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # faster: the network is small
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # a GIF needs no window
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "double_q_cartpole"
MODULES = (tf, keras, np, gymnasium)  # results.json names their versions
ARTICLE = {"dqn": {}, "double": {}}  # "180-200", without noise, is all it says
MAX_EPSILON = 1
MIN_EPSILON = 0.01
LAMBDA = 0.0005  # how fast epsilon falls
GAMMA = 0.95  # what a reward one step later is worth
BATCH_SIZE = 32
TAU = 0.08  # how fast the target network follows
RANDOM_REWARD_STD = 1.0
state_size = 4
num_actions = 2


# %% Algorithm
# First the bias itself, on random numbers; then the two ways to learn from a batch of steps.
def show_max_bias():
    """Print the means of two noisy rewards, and of the largest: 3.5 (the article: around 3)."""
    Ra = np.zeros((10000,))  # for going back to A
    Rc = np.random.normal(1, 4, 10000)
    Rd = np.random.normal(1, 4, 10000)
    comb = np.vstack((Ra, Rc, Rd)).transpose()  # (10000, 3)
    max_result = np.max(comb, axis=1)
    print(f"means: Rc {np.mean(Rc):.2f}, Rd {np.mean(Rd):.2f}, largest {np.mean(max_result):.2f}")


def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to a Q value for each action (batch, 2)."""
    inputs = keras.Input((state_size,))
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(inputs)
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, keras.layers.Dense(num_actions)(x))


class Memory:
    """The newest steps, a row each: state, action, reward, next state, terminal (1) or not (0)."""

    def __init__(self, max_memory):
        self.rows = np.zeros((max_memory, 2 * state_size + 3), "float32")
        self.added = 0

    def add_sample(self, state, action, reward, next_state, terminal):
        place = self.added % len(self.rows)  # that of the oldest step, once the table is full
        self.rows[place] = [*state, action, reward, *next_state, terminal]
        self.added += 1

    def sample(self, no_samples):
        """Return rows (no_samples, 11), none of them drawn twice."""
        num_samples = min(self.added, len(self.rows))
        return tf.constant(self.rows[random.sample(range(num_samples), no_samples)])


def choose_action(q_values, eps):
    """Return a random action with probability `eps`, else the one with the largest Q value."""
    if random.random() < eps:
        return random.randint(0, num_actions - 1)
    return int(np.argmax(q_values))


def update_network(primary_network, target_network):
    """Move each weight t of the target a little towards the primary's weight e."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign(t * (1 - TAU) + e * TAU)


def train(primary_network, target_network, optimizer, batch, state):
    """Take a gradient step on a batch (n, 11); return its loss, and the Q values of `state` (1, 4).

    Q_target = r + GAMMA max_a Q(s', a) in deep Q learning. In the article's example, from A to E
    where 0 and 2 can be had, that is 0 + 0.95 x 2 = 1.9.
    Q_target = r + GAMMA Q_target_network(s', a*), a* = argmax_a Q(s', a), in Double Q learning.
    """
    states, actions, rewards, next_states, terminals = tf.split(batch, [4, 1, 1, 4, 1], axis=1)
    prim_qtp1 = primary_network(next_states)  # (batch, 2)
    if target_network is None:
        q_next = tf.reduce_max(prim_qtp1, axis=1)  # the largest of noisy values: too large
    else:
        prim_action_tp1 = tf.argmax(prim_qtp1, axis=1)
        q_from_target = target_network(next_states)
        q_next = tf.gather(q_from_target, prim_action_tp1, batch_dims=1)
    updates = rewards + GAMMA * (1 - terminals) * q_next[:, tf.newaxis]  # (batch, 1)
    taken = tf.one_hot(tf.cast(actions[:, 0], tf.int32), num_actions)  # (batch, 2)
    target_q = taken * updates  # the other action adds no loss
    with tf.GradientTape() as tape:
        prim_qt = primary_network(states)
        loss = tf.reduce_mean(tf.square(target_q - taken * prim_qt))
    optimizer.apply(tape.gradient(loss, primary_network.trainable_variables))
    if target_network is not None:
        update_network(primary_network, target_network)
    return loss, primary_network(state)


# %% Training
# In each step an agent acts, stores what it has seen, and learns from a batch of old steps.
def train_agent(arm, seed, run):
    """Train one agent; record its episodes and final numbers; save the first seed's network."""
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    memory = Memory(50000)
    primary_network = build_model()
    target_network = None
    if arm == "double":
        target_network = build_model()
        target_network.set_weights(primary_network.get_weights())
    optimizer = keras.optimizers.Adam()
    primary_network.compile(optimizer, "mse")  # so the saved network can be evaluated
    optimizer.build(primary_network.trainable_variables)  # compiled code cannot make its variables
    learn = functools.partial(train, primary_network, target_network, optimizer)
    shapes = tf.TensorSpec((BATCH_SIZE, 11)), tf.TensorSpec((1, 4))  # fixed: a third less time
    learn = tf.function(learn, jit_compile=True).get_concrete_function(*shapes)
    predict = tf.function(primary_network, jit_compile=True)
    train_writer = start_training(run, arm, seed)
    steps = 0
    num_episodes = run.args.epochs
    for episode in range(1, num_episodes + 1):
        state, _ = env.reset(seed=seed if episode == 1 else None)
        q_values = predict(tf.constant(state[np.newaxis]))
        cnt = 0
        losses = []
        done = False
        while not done:
            eps = MIN_EPSILON + (MAX_EPSILON - MIN_EPSILON) * np.exp(-LAMBDA * steps)
            action = choose_action(q_values, eps)
            next_state, _, terminated, truncated, _ = env.step(action)
            reward = np.random.normal(1.0, run.args.random_reward_std)
            memory.add_sample(state, action, reward, next_state, terminated)
            state = next_state
            cnt += 1
            steps += 1
            if memory.added < BATCH_SIZE * 3:
                q_values = predict(tf.constant(state[np.newaxis]))
            else:
                batch = memory.sample(BATCH_SIZE)
                loss, q_values = learn(batch, tf.constant(state[np.newaxis]))
                losses.append(float(loss))
            done = terminated or truncated
        avg_loss = sum(losses) / max(1, len(losses))
        run.record(arm, episode, {"reward": cnt, "avg loss": avg_loss})
        with train_writer.as_default(step=episode):
            tf.summary.scalar("reward", cnt)
            tf.summary.scalar("avg loss", avg_loss)
        if episode % max(1, num_episodes // 20) == 0:
            print(f"Episode: {episode}, Reward: {cnt}, avg loss: {avg_loss:.3f}, eps: {eps:.3f}")
        if run.args.max_steps and steps >= run.args.max_steps:
            break
    rewards = run.records[arm]["history"]["reward"]
    run.conclude(arm, evaluate(primary_network, predict, env, rewards))
    if seed == run.args.seed:
        primary_network.save(run.folder / f"{arm}.keras")
        if run.args.gif:
            save_gif(env, predict, run.folder / f"{arm}.gif")


def evaluate(network, predict, env, rewards):
    """Play ten greedy episodes; return the final numbers of a training with these rewards."""
    episodes = [play(env, predict) for _ in range(10)]
    errors = [overestimation(network, states) for states in episodes]
    averages = moving_average(rewards)
    above_180 = [average > 180 for average in averages]
    return {
        "reward": averages[-1],
        "reached_180": any(above_180),
        "episodes_to_180": above_180.index(True) + 1 if any(above_180) else None,
        "greedy_reward": statistics.mean(len(states) for states in episodes),
        "overestimation": float(np.mean(np.concatenate(errors))),
    }


def overestimation(network, states):
    """Return the largest Q of each state of an episode minus the discounted return that followed.

    A step pays 1 on average, so n steps are worth 1 + GAMMA + ... + GAMMA^(n - 1). Of an episode
    that was cut off at 200 steps the last 90 are left out, as they would have earned more.
    """
    returns = np.cumsum(GAMMA ** np.arange(len(states)))[::-1]  # the first has the most to go
    errors = np.max(network(states), axis=1) - returns
    return errors[:-90] if len(states) == 200 else errors


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=1000)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--random-reward-std", type=float, default=RANDOM_REWARD_STD, help="noise of the rewards")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="agents to train")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args = parse_flags(parser, argv)
    if args.gif and not importlib.util.find_spec("pygame"):
        parser.error("argument --gif: pygame is missing; pip install pygame")
    run = Run(args, "CartPole")
    keras.utils.set_random_seed(args.seed)
    show_max_bias()
    for arm in args.arms:
        for seed in range(args.seed, args.seed + args.runs):
            train_agent(arm, seed, run)
    compare_rewards(run, f"CartPole, each step pays N(1, {args.random_reward_std:g})")
    return run.report("# One seed says little: docs/results/README.md has the means of twenty.")


# %% Frame: flags, run folder and results; the same text in every script
def make_parser(*names, default, devices=("auto", "cpu", "gpu")):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(description=lines[0], allow_abbrev=False)
    parser.epilog = "; ".join(line.split("#")[0].strip() for line in lines if "   python" in line)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", choices=devices, default="auto", help="auto is a GPU where there is one")
    add("--logdir", type=os.path.expanduser, default="log", help="each run makes a folder in it")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - pythonw has none
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(line_buffering=True)
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name != "seed" else 0
        if value == "" or (type(value) in (int, float) and not least <= value < 2**32):
            parser.error(f"argument --{name.replace('_', '-')}: {value!r} is not allowed")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    gpus = [] if args.device == "cpu" else tf.config.list_physical_devices("GPU")
    if args.device == "gpu" and not gpus:
        parser.error("argument --device: TensorFlow finds no GPU; use auto or cpu")
    with contextlib.suppress(RuntimeError):  # TensorFlow has already started in this process
        tf.config.set_visible_devices(gpus, "GPU")
        return args
    parser.error(f"argument --device: too late for {args.device}; restart Python first")


class Run:
    """A run, new or going on with an `earlier` one: its flags, folder and results.json."""

    def __init__(self, args, data, earlier=None):
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args = args
        self.folder = pathlib.Path(args.logdir, SCRIPT, name)
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        if earlier:
            self.folder = pathlib.Path(args.resume)
        self.events = self.folder / f"resumed-{name}" if earlier else self.folder  # TensorBoard's
        device = ", ".join(gpu.name for gpu in tf.config.get_visible_devices("GPU")) or "CPU"
        self.results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data}
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["arms"] = earlier["arms"] if earlier else {}
        self.records = self.results["arms"]  # {arm: what record() and conclude() fill}
        self.clock = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        print(f"{SCRIPT} on {data}, device {device}, writes to {self.folder.as_posix()}")

    def record(self, arm, epoch, metrics):
        """Keep the metrics of an epoch, counted from 1; a repeated one replaces its record."""
        record = self.records.setdefault(arm, {"history": {}, "final": {}, "seconds": 0.0})
        for metric, value in metrics.items():
            record["history"].setdefault(metric, [])[epoch - 1 :] = [value]
        record["seconds"] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        if self.clock > self.written + 1:
            self.write()

    def conclude(self, arm, numbers):
        """Keep final numbers of an arm."""
        self.records[arm]["final"].update(numbers)
        self.write()

    def write(self, complete=False):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        text = json.dumps(self.results | {"complete": complete}, indent=1)
        (self.folder / "results.tmp").write_text(text)
        os.replace(self.folder / "results.tmp", self.folder / "results.json")
        self.written = time.perf_counter()

    def report(self, *lines):
        """Print the final numbers, the figures, and lines to paste; return the final numbers."""
        self.write(complete=True)
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                form = "," if isinstance(value, int) else ",.4g"
                here = "never" if value is None else format(value, form)
                print(f"{arm:<16}{metric:<34}{here:>14}{article.get(metric, '-'):>14}")
        print(*sorted(path.as_posix() for path in self.folder.glob("*.[gp]*")), "", sep="\n")
        name = keras.__name__
        for path in sorted(self.folder.glob("*.keras")):
            print(f'import {name}; model = {name}.models.load_model("{path.as_posix()}")')
        print(*lines, f'tensorboard --logdir "{self.folder.as_posix()}"', sep="\n")
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


# %% Frame, episodes: the same text in every CartPole script
def start_training(run, arm, seed):
    """Let `run` record a new training of an arm; return a writer for TensorBoard."""
    print(f"\n{arm}, seed {seed}")
    training = {"seed": seed, "history": {}, "final": {}, "seconds": 0.0}
    record = run.results["arms"].setdefault(arm, {"runs": [], "final": {}, "spread": {}})
    record["runs"].append(training)
    run.records = {arm: training}
    return tf.summary.create_file_writer(str(run.folder / arm / f"seed_{seed}"))


def play(env, predict):
    """Play an episode, always with the action of the largest output; return its states (n, 4)."""
    states = []
    state, _ = env.reset()
    done = False
    while not done:
        states.append(state)
        action = int(np.argmax(predict(tf.constant(state[np.newaxis]))))
        state, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    return np.array(states)


def save_gif(env, predict, path):
    """Play an episode and save it as an animation."""
    print(f"{path.name}: an episode is drawn ...")
    env = gymnasium.wrappers.RenderCollection(env)
    play(env, predict)
    first, *others = [keras.utils.array_to_img(picture) for picture in env.render()]
    first.save(path, save_all=True, append_images=others, duration=20, loop=0)


def moving_average(values):
    """Return the mean of each value and up to 19 before it."""
    return [float(np.mean(values[max(0, i - 19) : i + 1])) for i in range(len(values))]


def compare_rewards(run, title):
    """Average the final numbers of each arm over its trainings; draw its reward by episode."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    agents = {arm: record for arm, record in run.results["arms"].items() if "runs" in record}
    for arm, record in agents.items():
        for metric in record["runs"][0]["final"]:
            values = [training["final"][metric] for training in record["runs"]]
            if None not in values:
                record["final"][metric] = statistics.mean(values)
                record["spread"][metric] = statistics.stdev(values) if len(values) > 1 else 0.0
            elif set(values) == {None}:  # in all trainings; if in some, no mean is made
                record["final"][metric] = None
        histories = [training["history"]["reward"] for training in record["runs"]]
        length = min(len(history) for history in histories)
        averages = np.array([moving_average(history[:length]) for history in histories])
        episodes = range(1, length + 1)
        (line,) = axes.plot(episodes, averages.mean(axis=0), label=f"{arm}, {len(histories)} runs")
        axes.plot(episodes, averages.T, color=line.get_color(), alpha=0.2)
    axes.set(title=title, xlabel="episode", ylabel="reward (mean of 20 episodes)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(title="mean, and each run")
    figure.savefig(run.folder / "reward.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) or type(error) is Exception:  # Keras, if a download fails
            raise SystemExit(f"error: {type(error).__name__}: {error}") from None
        raise
