"""Check that the policy gradient is the gradient of a weighted cross-entropy, and train with it.

Article: "A simple policy gradient implementation with keras (part 1)" (dirko.github.io).

A policy should take rewarded actions more often. The article derives that plain Keras can do this:
fit the network to the actions it took, each weighted by its reward. It leaves open whether that
works. Here `identity` compares the gradients, and `agent` learns CartPole in this way.

    python keras_pg_weighted_ce.py
    python keras_pg_weighted_ce.py --arms identity    # the gradients alone, in seconds

Result (seeds 0 to 4): the gradients differ by less than 2e-7 of their length. The error of an
estimate from N samples falls as N^-0.48 to N^-0.50. The agent's last 100 episodes take 187 to 199
steps.

Differences from the article:
1. The loss is -L. Minimising the article's L = sum_i r_i log q(a_i|s_i) would teach to lose.
2. The weights are divided by the number of samples. The article's sum grows with that number.
3. An agent is trained, on CartPole; the article leaves that to its second part, which plays Pong.
   An action's weight is its discounted return, standardised, as in reinforce_cartpole.py.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
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

SCRIPT = "keras_pg_weighted_ce"
MODULES = (tf, keras, np, gymnasium)  # results.json names their versions
ARTICLE = {"identity": {}, "agent": {}}  # the article gives no numbers
GAMMA = 0.95  # what a reward one step later is worth
state_size = 4
num_actions = 2


# %% Algorithm
# A policy q(a|s) earns f(a, s), and E is the mean over the actions that it draws:
#     grad E[f] = sum_a f grad q = sum_a q f (grad q / q) = E[f grad log q]
# So N actions a_i, drawn from the policy, and their rewards r_i are enough to estimate it, as
#     grad L, with L = sum_i r_i log q(a_i|s_i) / N
# Let a = (a^1, ..., a^M) be one-hot: 1 for the action that was taken, 0 for the others. A factor to
# the power of 0 is 1, so the likelihood of that action is a product, and its log is a sum:
#     q(a|s) = prod_m q^m(s)^(a^m), log q(a|s) = sum_m a^m log q^m(s) = -H(a, q)
# H is the categorical cross-entropy. So -L, which is to be minimised, is the cross-entropy of the
# actions and the policy, with r_i / N as the weight of a sample.
def exact_gradient(q, states, rewards):
    """Return the gradient of mean_s sum_a q(a|s) f(a, s) for the kernel W of q = softmax(s W).

    States are (n, features), q and the rewards f (n, actions). By hand, with z = s W:
    dq_b / dz_a = q_b (1[a = b] - q_a), so d(sum_b q_b f_b) / dz_a = q_a (f_a - sum_b q_b f_b).
    """
    gain = rewards - np.sum(q * rewards, axis=1, keepdims=True)  # above the mean of the state
    return states.T @ (q * gain) / len(states)


def weighted_ce_gradient(policy, states, one_hot, weights):
    """Return the gradient of sum_i w_i log q(a_i|s_i) for the policy's first kernel.

    States are (N, features), one_hot actions (N, actions), weights (N,).
    """
    cross_entropy = keras.losses.CategoricalCrossentropy(reduction="sum")
    with tf.GradientTape() as tape:
        loss = cross_entropy(one_hot, policy(states), sample_weight=weights)  # this is -L
    return -tape.gradient(loss, policy.trainable_variables[0]).numpy()


def show_identity(run):
    """Record how far both gradients are from the exact one, divided by its length."""
    keras.utils.set_random_seed(run.args.seed)
    states = np.random.normal(size=(8, 3))
    rewards = np.random.normal(size=(8, 4))  # of each of four actions in each state
    policy = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax", use_bias=False)])
    q = policy(states).numpy()
    exact = exact_gradient(q, states, rewards)
    length = np.linalg.norm(exact)
    # All pairs of a state and an action, and how likely each is to be drawn
    s = np.repeat(states, 4, axis=0)  # (32, 3)
    a = np.tile(np.eye(4), (8, 1))  # (32, 4), one-hot
    r = np.ravel(rewards)  # (32,)
    p = np.ravel(q) / 8
    weighted_error = np.linalg.norm(weighted_ce_gradient(policy, s, a, p * r) - exact) / length
    train_writer = tf.summary.create_file_writer(str(run.folder / "identity"))
    samples = [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
    errors = []
    for n in samples:
        misses = []
        for _ in range(30):
            i = np.random.choice(32, n, p=p)
            misses.append(weighted_ce_gradient(policy, s[i], a[i], r[i] / n) - exact)
        errors.append(float(np.linalg.norm(misses) / np.sqrt(30) / length))  # root mean square
        print(f"identity, {n} samples: relative error {errors[-1]:.4f}")
        run.record("identity", len(errors), {"samples": n, "error": errors[-1]})
        with train_writer.as_default(step=n):
            tf.summary.scalar("error", errors[-1])
    slope, _ = np.polyfit(np.log(samples), np.log(errors), 1)
    final = {"weighted_error": float(weighted_error), "sampled_error": errors[-1]}
    run.conclude("identity", {**final, "slope": float(slope)})


# %% Model
# The network is the policy: its softmax says how likely each action is.
def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to action probabilities (batch, 2)."""
    network = keras.Sequential([keras.Input((state_size,))])
    network.add(keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal"))
    network.add(keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal"))
    network.add(keras.layers.Dense(num_actions, activation="softmax"))
    # On a GPU Keras would by default compile anew for each length of an episode.
    network.compile(keras.optimizers.Adam(), "categorical_crossentropy", jit_compile=False)
    return network


def get_action(predict, state):
    """Draw an action for a state (4,) with the probabilities of the policy."""
    softmax_out = predict(tf.constant(state[np.newaxis])).numpy()[0]
    # np.random.choice(num_actions, p=softmax_out) draws the same, but takes a sixth of a step.
    selected_action = int(np.random.random() >= softmax_out[0])
    return selected_action


# %% Training
# An episode is played to its end, because only then its returns are known; then the network learns.
def update_network(network, rewards, states, actions):
    """Take a gradient step on the cross-entropy, weighted with the returns; return that loss."""
    reward_sum = 0
    discounted_rewards = []
    for reward in reversed(rewards):
        reward_sum = reward + GAMMA * reward_sum
        discounted_rewards.append(reward_sum)
    discounted_rewards = np.array(discounted_rewards[::-1])
    advantages = discounted_rewards - np.mean(discounted_rewards)
    advantages /= max(np.std(discounted_rewards), 1e-8)  # zeros if all are equal
    states = np.vstack(states)
    one_hot = np.eye(num_actions)[actions]
    network.reset_metrics()  # or older versions of Keras return the mean loss of all calls
    return float(network.train_on_batch(states, one_hot, sample_weight=advantages))


def train_agent(seed, run):
    """Train one agent; record its episodes and final numbers; save the first seed's network."""
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    network = build_model()
    # One fixed shape of states takes a third less time.
    predict = tf.function(network, jit_compile=True).get_concrete_function(tf.TensorSpec((1, 4)))
    train_writer = start_training(run, "agent", seed)
    env.reset(seed=seed)
    steps = 0
    num_episodes = run.args.epochs
    for episode in range(1, num_episodes + 1):
        state, _ = env.reset()
        rewards = []
        states = []
        actions = []
        done = False
        while not done:
            action = get_action(predict, state)
            new_state, reward, terminated, truncated, _ = env.step(action)
            states.append(state)
            rewards.append(reward)
            actions.append(action)
            state = new_state
            done = terminated or truncated
        loss = update_network(network, rewards, states, actions)
        tot_reward = sum(rewards)
        run.record("agent", episode, {"reward": tot_reward, "avg loss": loss})
        with train_writer.as_default(step=episode):
            tf.summary.scalar("reward", tot_reward)
            tf.summary.scalar("avg loss", loss)
        if episode % max(1, num_episodes // 20) == 0:
            print(f"Episode: {episode}, Reward: {tot_reward}, avg loss: {loss:.5f}")
        steps += len(rewards)
        if run.args.max_steps and steps >= run.args.max_steps:
            break
    mean_reward = statistics.mean(run.records["agent"]["history"]["reward"][-100:])
    greedy_reward = statistics.mean(len(play(env, predict)) for _ in range(10))
    run.conclude("agent", {"reward": mean_reward, "greedy_reward": greedy_reward})
    if seed == run.args.seed:
        network.save(run.folder / "agent.keras")
        if run.args.gif:
            save_gif(env, predict, run.folder / "agent.gif")


# %% Figures
# How the error of the sampled gradient falls; the article has no figure.
def plot_identity(run):
    """Draw the error of the sampled gradient by the number of samples."""
    record = run.results["arms"]["identity"]
    samples = np.array(record["history"]["samples"])
    errors = record["history"]["error"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.loglog(samples, errors, "o", label=f"measured: N^{record['final']['slope']:.3f}")
    axes.loglog(samples, errors[0] * (samples[0] / samples) ** 0.5, label="theory: N^-0.5")
    axes.set(title="The sampled gradient", xlabel="samples N", ylabel="relative error")
    axes.legend()
    figure.savefig(run.folder / "identity.png")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="parts to run")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args = parse_flags(parser, argv)
    if args.gif and not importlib.util.find_spec("pygame"):
        parser.error("argument --gif: pygame is missing; pip install pygame")
    run = Run(args, "CartPole-v1")
    if "identity" in args.arms:
        show_identity(run)
        plot_identity(run)
    if "agent" in args.arms:
        for seed in range(args.seed, args.seed + args.runs):
            train_agent(seed, run)
        compare_rewards(run, "The agent on CartPole")
    return run.report()


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
