"""Balance a pole under noisy rewards with deep Q learning and Double Q, to see what the max costs.

Article: "Double Q reinforcement learning in TensorFlow 2" (Adventures in Machine Learning).

Deep Q learning values the next state by the largest of several noisy estimates, which is too large
on average. Double Q lets one network choose the best next action, and another, which follows it
slowly, judge what that action is worth.

    python double_q_cartpole.py                           # the article's second figure
    python double_q_cartpole.py --random-reward-std 0     # its first figure
    python double_q_cartpole.py --epochs 300 --runs 5     # mean and spread of five runs

Measured (300 episodes, seeds 0 to 4): deep Q's mean of 20 passes 180 at episode 99 +- 31, that of
Double Q at 93 +- 30; from 50 to 100 they hold 131 and 146 steps. No steadier, earlier by little.

Differences from the article:
1. Only `terminated` is stored as a terminal. The article also stored the time limit as one, and so
   taught that a pole held for 200 steps is worth nothing; in 300 episodes that cost no reward.
2. A terminal is a column of the memory, not a next state that happens to sum to zero.
3. The memory is an array whose oldest row is overwritten; `pop(0)` moves a whole list at each step.
4. An episode's length counts its last step, and `avg loss` is the mean over the steps that trained.
5. All networks, of both arms, start from the same weights.
6. Choosing an action and training are one compiled function each, for tensors of one shape.
Kept although unfair: deep Q has one network. So the arms differ in two things: who judges the next
action, and that the judge of Double Q lags behind.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4",
# ]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import statistics
import sys
import time

import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

# --- Constants ---
SCRIPT = "double_q_cartpole"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium")
ARTICLE = {"dqn": {"reward": 190}, "double": {"reward": 190}}  # "180-200", without noise
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
SAMPLE_PARTS = [4, 1, 1, 4, 1]  # columns of state, action, reward, next state, terminated
MAX_EPSILON, MIN_EPSILON, BATCH_SIZE = 1.0, 0.01, 32


# --- Command line ---
def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=1000, help="episodes of each run")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--random-reward-std", type=number(float, 0, 1000), default=1.0, help="reward's deviation")
    add("--epsilon-decay", type=number(float, 0, 1), default=0.0005, help="LAMBDA of the article")
    add("--gamma", type=number(float, 0, 1), default=0.95, help="discount of future rewards")
    add("--tau", type=number(float, 0, 1), default=0.08, help="how fast the target network follows")
    add("--runs", type=number(int, 1), default=1, help="runs of each arm, each with the next seed")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="agents to train")
    add("--gif", action="store_true", help="save a greedy episode of each arm as an animation")
    return parser


def parse_args(argv):
    """Parse `argv` strictly; None stands for the command line, in a notebook cell for no flags."""
    if argv is None and "__file__" not in globals():
        argv = []  # there sys.argv belongs to the kernel
    return build_parser().parse_args(argv)


# --- Shared helpers: the same text in every script that has them ---
class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high=2**31 - 1):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`, both included."""

    def number(text):  # argparse takes "invalid number value" from this name
        if not low <= kind(text) <= high:  # nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def select_device(device, several=False):
    """Let TensorFlow see only the device of --device ("all" if `several`); return its name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | {f"gpu:{i}": [gpu] for i, gpu in enumerate(gpus)}
    choices |= {"all": gpus} if several else {}
    chosen = choices.get("gpu:0" if device == "gpu" else device)
    if chosen is None:
        build_parser().error(f"argument --device: {device} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has started in this process
        build_parser().error(f"argument --device: too late for {device}; restart Python first")
    return ", ".join(gpu.name.removeprefix("/physical_device:") for gpu in chosen) or "CPU"


def new_run_dir(args, data, device):
    """Make the folder of this run, <logdir>/<script>/<time>; return it and the results so far."""
    name = time.strftime("%Y%m%d-%H%M%S") + ("-synthetic" if data == "synthetic" else "")
    for count in itertools.count():  # two runs may start in the same second
        run_dir = pathlib.Path(args.logdir, SCRIPT, f"{name}-{count}" if count else name)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data, "arms": {}}
    results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    results |= {"article": {} if data == "synthetic" else ARTICLE, "complete": False}
    write_results(run_dir, results)
    print(f"{SCRIPT} on {data}, device {device}, writes to {run_dir}")
    return run_dir, results


def write_results(run_dir, results):
    """Replace results.json in one step; keep it, and raise FloatingPointError, for nan or inf."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError:
        raise FloatingPointError("the loss is not finite; try another --seed") from None
    temporary = run_dir / "results.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "results.json")


def save_figure(figure, path):
    """Save a figure as PNG; show it too where this runs in a notebook."""
    figure.savefig(path, dpi=100)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)


def report(run_dir, results):
    """Print the final values beside the article's, the files, and how to see the events."""
    print(f"\n{SCRIPT} on {results['data']}, epochs: {results['config']['epochs']}")
    print(f"{'arm':<16}{'metric':<32}{'here':>12}{'article':>12}{'spread':>12}")
    for arm, record in results["arms"].items():
        final, article = record["final"], results["article"].get(arm, {})
        for metric in final | article:
            values = final.get(metric), article.get(metric), record.get("spread", {}).get(metric)
            cells = ("-" if value is None else f"{round(value, 4):,}" for value in values)
            print("{:<16}{:<32}{:>12}{:>12}{:>12}".format(arm, metric, *cells))
    print(*sorted(map(str, run_dir.glob("*.*"))), f"tensorboard --logdir {run_dir}", sep="\n")


def run_as_command(main):
    """Call `main`; a fault that can be foreseen ends in one line and an exit code."""
    try:
        return main()
    except (KeyboardInterrupt, SystemError):  # C code makes the second of the first
        code, message = 130, "interrupted: what had been finished is in the run's folder"
    except (OSError, FloatingPointError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        ours = not error.args[1:] and not hasattr(error, "op")
        code, message = 1, f"error: {reason}" + ("" if ours else "; see to that path and its disk")
    print(message, file=sys.stderr)
    if "__file__" in globals():  # a notebook's kernel stays usable
        sys.exit(code)


# --- Episodes: the same text in every script that plays ---
class EpisodeRecorder(contextlib.AbstractContextManager):
    """Records one run of an arm, in a `with` statement: an interrupted run is written, too."""

    def __init__(self, run_dir, results, arm, seed, episodes):
        self.run_dir, self.results, self.name = run_dir, results, f"{arm}, seed {seed}"
        self.history, self.every = {"reward": [], "avg loss": []}, max(1, episodes // 20)
        self.run = {"seed": seed, "history": self.history, "final": {}, "seconds": 0.0}
        new = {"history": self.history, "final": {}, "seconds": 0.0, "runs": []}
        runs = results["arms"].setdefault(arm, new)["runs"]
        runs.append(self.run)
        folder = run_dir / arm / (f"seed_{seed}" if runs[1:] else "")
        self.writer = tf.summary.create_file_writer(str(folder))
        self.bar = keras.utils.Progbar(episodes, verbose=VERBOSE % 2, stateful_metrics=["reward"])
        self.start = self.written = time.perf_counter()

    def add(self, reward, avg_loss):
        """Record an episode: its reward, and its mean loss or None before training."""
        episode = len(self.history["reward"]) + 1
        for tag, value in {"reward": reward, "avg loss": avg_loss}.items():
            self.history[tag].append(value)
            if value is not None:
                with self.writer.as_default(step=episode):
                    tf.summary.scalar(tag, value)
        self.bar.update(episode, [("reward", reward)])
        if VERBOSE == 2 and (episode == 1 or episode % self.every == 0):
            print(f"{self.name}, episode {episode}: reward {reward:.0f}")
        if time.perf_counter() - self.written > 3:
            self.__exit__()

    def __exit__(self, *error):
        self.written = time.perf_counter()
        self.run["seconds"] = self.written - self.start
        self.writer.flush()
        write_results(self.run_dir, self.results)


def summarise(record):
    """Make an arm's final values the means over its runs, its spread their standard deviations."""
    finals = [run["final"] for run in record["runs"]]
    for name, of in {"final": statistics.mean, "spread": statistics.stdev}.items():
        if name == "final" or finals[1:]:  # a single run has no spread
            record[name] = {key: of([final[key] for final in finals]) for key in finals[0]}
    record["seconds"] = sum(run["seconds"] for run in record["runs"])


def play(env, policy):
    """Play an episode with policy(state) -> action; return its reward."""
    (state, _), total, ended = env.reset(), 0.0, False
    while not ended:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total, ended = total + reward, terminated or truncated
    return total


# --- Algorithm ---
def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to the Q values of the actions (batch, 2)."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(inputs)
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def show_max_bias(seed, run_dir):
    """Draw the rewards of the article's state B 10,000 times; print and plot the means.

    Back to A pays 0, C and D pay N(1, 4). Double Q judges the largest of them by a second draw.
    """
    count = np.arange(1, 10001)
    draws, judges = np.random.default_rng(seed).normal(1, 4, (2, len(count), 3)) * [0, 1, 1]
    curves = {"Rc": draws[:, 1], "Rd": draws[:, 2], "max(0, Rc, Rd): deep Q": draws.max(1)}
    curves["the same, drawn again: Double Q"] = judges[count - 1, draws.argmax(1)]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, values in curves.items():
        print(f"mean of {label}: {values.mean():.2f}")
        axes.semilogx(count, np.cumsum(values) / count, label=label)
    axes.set(xlabel="draws", ylabel="mean", title="The largest of noisy rewards is too large")
    axes.legend()
    save_figure(figure, run_dir / "max_bias.png")


class Memory:
    """The newest `max_memory` steps, rows of one array in which a new one replaces the oldest."""

    def __init__(self, max_memory):
        self.rows, self.added = np.zeros((max_memory, sum(SAMPLE_PARTS)), "float32"), 0

    def add_sample(self, state, action, reward, next_state, terminated):
        self.rows[self.added % len(self.rows)] = (*state, action, reward, *next_state, terminated)
        self.added += 1

    def sample(self, no_samples):
        """Return rows (no_samples, 11), float32, drawn without replacement."""
        idxs = random.sample(range(min(self.added, len(self.rows))), no_samples)
        return self.rows[idxs]


def choose_action(state, best_action, eps):
    """Return a random action with probability `eps`, else the best one in a state (4,)."""
    if random.random() < eps:
        return random.randrange(2)
    return int(best_action(tf.constant(state[np.newaxis])))


def q_targets(rewards, terminals, q_choosing, q_judging, gamma):
    """Return r + gamma q_judging(s', argmax over a of q_choosing(s', a)), at a terminal r alone.

    The q are (batch, actions), all else (batch, 1). One q in both places makes it the max over a.
    """
    prim_action_tp1 = tf.argmax(q_choosing, axis=1)
    q_next = tf.gather(q_judging, prim_action_tp1, batch_dims=1)[:, tf.newaxis]
    return rewards + gamma * (1 - terminals) * q_next


def update_network(primary_network, target_network, tau):
    """Move the target's weights t the share tau to the primary's e: t (1 - tau) + e tau."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign_add(tau * (e - t))  # in this form nothing changes where both are one network


def q_learning_step(batch, primary_network, target_network, optimizer, gamma, tau):
    """Train the primary network on rows (batch, 11) of a Memory; return the loss before that."""
    states, actions, rewards, next_states, terminals = tf.split(batch, SAMPLE_PARTS, axis=1)
    taken = tf.one_hot(tf.cast(actions[:, 0], tf.int32), 2)  # (batch, 2): the other adds no loss
    with tf.GradientTape() as tape:  # states and next states in one pass: that is quicker
        q, prim_qtp1 = tf.split(primary_network(tf.concat([states, next_states], axis=0)), 2)
        targets = q_targets(rewards, terminals, prim_qtp1, target_network(next_states), gamma)
        loss = tf.reduce_mean(tf.square(taken * (tf.stop_gradient(targets) - q)))
    optimizer.apply(tape.gradient(loss, primary_network.trainable_variables))
    update_network(primary_network, target_network, tau)
    return loss


def compile_for_shape(function, shape):
    """Return function(tensor), compiled by XLA for float32 tensors of one shape."""
    compiled = tf.function(function, jit_compile=True, autograph=False)
    return compiled.get_concrete_function(tf.TensorSpec(shape))  # spares 0.1 ms of checks a call


def moving_average(rewards):
    """Return the mean of each of the rewards (episodes,) and of up to 19 before it."""
    totals = np.cumsum([0] * 20 + rewards)  # (20 + episodes,)
    return (totals[20:] - totals[:-20]) / np.minimum(np.arange(len(rewards)) + 1, 20)


# --- Training ---
def train(arm, seed, args, run_dir, results):
    """Train one run of an arm; record its episodes and final values; save the first run's model."""
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    memory, steps, eps = Memory(50000), 0, MAX_EPSILON
    primary_network = build_model()
    target_network = build_model() if arm == "double" else primary_network
    target_network.set_weights(primary_network.get_weights())
    optimizer = keras.optimizers.Adam()
    optimizer.build(primary_network.trainable_variables)  # its moments must exist before tracing
    agent = primary_network, target_network, optimizer, args.gamma, args.tau
    learn = compile_for_shape(lambda batch: q_learning_step(batch, *agent), (BATCH_SIZE, 11))
    best_action = compile_for_shape(lambda s: tf.argmax(primary_network(s), axis=1)[0], (1, 4))
    with EpisodeRecorder(run_dir, results, arm, seed, args.epochs) as recorder:
        rewards = recorder.history["reward"]
        while len(rewards) < args.epochs and steps != args.max_steps:
            state, _ = env.reset(seed=None if steps else seed)
            length, losses, ended = 0, [], False
            while not ended:
                action = choose_action(state, best_action, eps)
                next_state, _, terminated, truncated, _ = env.step(action)
                reward = np.random.normal(1.0, args.random_reward_std)
                memory.add_sample(state, action, reward, next_state, terminated)
                state, length, steps = next_state, length + 1, steps + 1
                if steps >= 3 * BATCH_SIZE:
                    losses.append(float(learn(tf.constant(memory.sample(BATCH_SIZE)))))
                to_fall = np.exp(-args.epsilon_decay * steps)  # 1 at first, then ever nearer to 0
                eps = MIN_EPSILON + (MAX_EPSILON - MIN_EPSILON) * to_fall
                ended = terminated or truncated or steps == args.max_steps
            recorder.add(length, statistics.mean(losses) if losses else None)
    averages, policy = moving_average(rewards), lambda s: choose_action(s, best_action, eps=0)
    recorder.run["final"] = {
        "reward": averages[-1],
        "episodes_to_180": int(np.argmax([*(averages > 180), True])) + 1,  # one more: never
        "greedy_reward": statistics.mean(play(env, policy) for _ in range(10)),
        "parameters": primary_network.count_params(),
    }
    summarise(results["arms"][arm])
    if seed == args.seed:
        primary_network.save(run_dir / f"{arm}.keras")
        if args.gif:
            env = gymnasium.wrappers.RenderCollection(env)
            play(env, policy)
            gif, *rest = map(keras.utils.array_to_img, env.render())
            gif.save(run_dir / f"{arm}.gif", save_all=True, append_images=rest, duration=20, loop=0)


# --- Plots ---
def plot(run_dir, results):
    """Draw the arms' reward by episode: the mean of 20 episodes, its mean and spread over runs."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, record in results["arms"].items():
        rewards = (run["history"]["reward"] for run in record["runs"])
        averages = np.array([*zip(*map(moving_average, rewards))])  # (episodes, runs)
        mean, spread = averages.mean(1), averages.std(1)
        axes.plot(mean, label={"dqn": "deep Q"}.get(arm, f"{arm.capitalize()} Q"))
        axes.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.2)
    title = "CartPole, reward N(1, {random_reward_std:g}); runs: {runs}".format(**results["config"])
    axes.set(xlabel="episode", ylabel="reward (mean of 20 episodes)", title=title)
    axes.legend()
    save_figure(figure, run_dir / "reward.png")


# --- Main ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    with contextlib.suppress(RuntimeError):  # too late once TensorFlow has started: only slower
        tf.config.threading.set_intra_op_parallelism_threads(1)  # operations are too small for two
    run_dir, results = new_run_dir(args, "CartPole", select_device(args.device))
    show_max_bias(args.seed, run_dir)
    for arm, run in itertools.product(args.arms, range(args.runs)):
        train(arm, args.seed + run, args, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
