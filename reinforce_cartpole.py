"""Train a softmax policy on CartPole by REINFORCE, with the gradient that the article meant.

Article: "Policy Gradient Reinforcement Learning in TensorFlow 2" (Adventures in Machine Learning).

No values are learned: a network turns a state into action probabilities. After each episode every
action taken becomes likelier or less likely, by the discounted rewards that came after it.

    python reinforce_cartpole.py
    python reinforce_cartpole.py --runs 5     # five seeds: the variance is part of the story

Measured (1,500 episodes, seeds 0 to 9): every run came to a hundred-episode mean of 180 (article:
200), the first at episode 285, the last at 819; nine end above it, one at 173. Half a minute a run.

The trap. Cross-entropy is -sum(target * log p), so `target = return * one_hot(action)` looks right,
and its loss is. But Keras fuses softmax and cross-entropy, and the fused gradient `p - target` only
holds for targets that sum to one. With p = 1/2, actions 0, 0, 1, 0, 1 and returns 3, 1, 0, -1, -2
the output's bias should get (-0.5, 0.5), and gets (-0.1, 0.9): seed 0 ends at 18 steps, not 182,
after 600 episodes. The cure: targets stay one-hot, the return multiplies the cross-entropy outside.

Differences from the article:
1. The gradient is right. The article hands the returns to Keras as targets and drops the actions:
   today's Keras refuses that, and the repair that suggests itself is the trap.
2. Returns that are all equal become zero; divided by their standard deviation they were NaN.
3. Episodes are padded to the limit of 200 steps, so that one compiled update fits them all.
4. The policy answers through one compiled function; eager calls take twenty times as long.
5. Training ends, after 1,500 episodes, and ten greedy ones are played. `--runs` sets more seeds.
Kept although unusual: an episode that reaches the limit ends as if the pole had fallen.
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
import statistics
import sys
import time

import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from keras import layers

# --- Constants ---

SCRIPT = "reinforce_cartpole"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium")
ARTICLE = {"reinforce": {"reward": 200}}
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
NUM_ACTIONS = 2
HIDDEN_SIZE = 30

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=1500, help="episodes of each run")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--gamma", type=number(float, 0, 1), default=0.95, help="discount of a reward one step on")
    add("--runs", type=number(int, 1), default=1, help="runs of each arm, with seeds that follow")
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


def plot_rewards(axes, record, label, window=20):
    """Draw an arm's reward: moving average over episodes, its mean and spread over the runs."""
    length = min(len(run["history"]["reward"]) for run in record["runs"])
    rewards = np.array([run["history"]["reward"][:length] for run in record["runs"]], "float64")
    window = max(1, min(window, length))
    averages = np.array([np.convolve(row, np.ones(window) / window, "valid") for row in rewards])
    mean, spread = averages.mean(0), averages.std(0)  # (length - window + 1,)
    episodes = np.arange(window, window + len(mean))
    (line,) = axes.plot(episodes, mean, label=label)
    axes.fill_between(episodes, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)


# --- Environment ---


def make_env(render_mode=None):
    """Return the article's CartPole: the physics of v1 with a limit of 200 steps."""
    return gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode=render_mode)


# --- Model ---


def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to action probabilities (batch, 2)."""
    inputs = keras.Input((4,))
    x = layers.Dense(HIDDEN_SIZE, activation="relu", kernel_initializer="he_normal")(inputs)
    x = layers.Dense(HIDDEN_SIZE, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(NUM_ACTIONS, activation="softmax")(x))


# --- Algorithm ---


def compile_policy(network):
    """Return the function state (n,) -> action probabilities, compiled for one state at a time."""
    policy = tf.function(lambda state: network(state[tf.newaxis])[0], jit_compile=True)
    return policy.get_concrete_function(tf.TensorSpec(network.input_shape[1:]))  # fewer checks


def get_action(policy, state):
    """Draw an action for a state (n,), float32, with the probabilities of the policy."""
    softmax_out = policy(tf.constant(state)).numpy()
    return np.argmax(np.cumsum(softmax_out) > np.random.random())  # 0 where they are nan


def discounted_returns(rewards, gamma):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... of the rewards (length,)."""
    returns, reward_sum = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = reward_sum = rewards[t] + gamma * reward_sum
    return returns


def standardise(returns):
    """Return (returns - mean) / standard deviation, shape (length,); zeros where all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


def pad_episode(states, actions, discounted_rewards, limit):
    """Return the arrays as tensors of `limit` rows, zero from the episode's length on, and that."""
    length = len(actions)
    padding = (0, limit - length)
    states, actions = np.pad(states, (padding, (0, 0))), np.pad(actions, padding)
    discounted_rewards = np.pad(np.float32(discounted_rewards), padding)
    arrays = states, actions, discounted_rewards, np.float32(length)
    return tuple(map(tf.constant, arrays))  # (limit, 4), (limit,), (limit,), ()


def update_network(network, optimizer, states, actions, discounted_rewards, length):
    """Take a gradient step on -1/length sum_t G_t log p(a_t | s_t) of pad_episode's; return it."""
    with tf.GradientTape() as tape:
        # -log p(a_t | s_t). Integer targets stand for one-hot ones, and leave no way into the trap.
        cross_entropy = keras.losses.sparse_categorical_crossentropy(actions, network(states))
        loss = tf.reduce_sum(discounted_rewards * cross_entropy) / length  # padding: G_t = 0
    optimizer.apply(tape.gradient(loss, network.trainable_variables))
    return loss


# --- Training ---


def train(seed, args, run_dir, results):
    """Train one run, of args.epochs episodes; save the first run's network."""
    keras.utils.set_random_seed(seed)
    env, network, optimizer = make_env(), build_model(), keras.optimizers.Adam()
    optimizer.build(network.trainable_variables)  # its moments must exist before the tracing
    policy, update = compile_policy(network), tf.function(update_network, jit_compile=True)
    limit, steps = env.spec.max_episode_steps, 0
    with EpisodeRecorder(run_dir, results, "reinforce", seed, args.epochs) as recorder:
        for episode in range(args.epochs):
            state, _ = env.reset(seed=None if episode else seed)
            rewards, states, actions, ended = [], [], [], False
            while not ended:
                action = get_action(policy, state)
                new_state, reward, terminated, truncated, _ = env.step(action)
                states.append(state)
                rewards.append(reward)
                actions.append(action)
                state, steps = new_state, steps + 1
                ended = terminated or truncated or steps == args.max_steps
            discounted_rewards = standardise(discounted_returns(rewards, args.gamma))
            tensors = pad_episode(states, actions, discounted_rewards, limit)
            recorder.add(sum(rewards), float(update(network, optimizer, *tensors)))
            if steps == args.max_steps:
                break
    final = recorder.run["final"]
    final["reward"] = statistics.mean(recorder.history["reward"][-100:])
    greedy = [play(env, lambda state: np.argmax(policy(state))) for _ in range(10)]
    final |= {"greedy_reward": statistics.mean(greedy), "parameters": network.count_params()}
    if seed == args.seed:
        network.save(run_dir / "reinforce.keras")


# --- Plots ---


def plot(run_dir, results):
    """Draw the reward of each run, their mean and its spread, as a moving average."""
    record = results["arms"]["reinforce"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in record["runs"]:
        plot_rewards(axes, {"runs": [run]}, f"seed {run['seed']}")
    if len(record["runs"]) > 1:
        plot_rewards(axes, record, "mean and spread")
    title = f"REINFORCE on {results['data']}"
    axes.set(title=title, xlabel="episode", ylabel="reward, average of 20 episodes")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, run_dir / "rewards.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers, means over the runs."""
    args = parse_args(argv)
    device = select_device(args.device)
    run_dir, results = new_run_dir(args, "CartPole-v1", device)
    for seed in range(args.seed, args.seed + args.runs):
        train(seed, args, run_dir, results)
    record = results["arms"]["reinforce"]
    summarise(record)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return record["final"]


if __name__ == "__main__":
    run_as_command(main)
