"""Train a policy network on CartPole with REINFORCE, by the policy gradient of the article.

Article: "Policy Gradient Reinforcement Learning in TensorFlow 2" (Adventures in Machine Learning).

The network learns no Q values. For each state it gives the probability of each action. After an
episode, actions that were followed by more reward than usual become more likely, the others less.

    python reinforce_cartpole.py
    python reinforce_cartpole.py --runs 5    # five seeds: some agents learn much sooner

Result (1,500 episodes, seeds 0 to 9): in every run the mean of a hundred episodes reached 180 (the
article says 200), in the fastest by episode 285, in the slowest by 819. In the last hundred
episodes the pole stands for 173 steps in one run, and for 188 to 200 in the others.

Differences from the article:
1. The gradient is right. The article gives the returns to Keras as targets and drops the actions,
   which Keras now refuses. The usual repair runs, but its gradient is wrong: see update_network.
2. Returns that are all equal become zeros. The article divides them by zero.
3. Policy and update are compiled; episodes are padded to 200 steps, so that all have one shape.
4. Training ends after 1,500 episodes, and ten greedy episodes follow.
As in the article, an episode that reaches 200 steps ends as if the pole had fallen.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "reinforce_cartpole"
MODULES = (tf, keras, np, gymnasium)  # results.json names their versions
ARTICLE = {"reinforce": {"reward": 200}}
MAX_LENGTH = 200  # steps of an episode


# --- Model ---
# The network is the policy: its softmax says how likely each action is.
def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to action probabilities (batch, 2)."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(inputs)
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))


def get_action(policy, state):
    """Draw an action for a state (4,) with the probabilities of the policy."""
    softmax_out = policy(tf.constant(state[np.newaxis])).numpy()[0]
    # This draws the same as the article's np.random.choice(2, p=softmax_out), but faster.
    return int(np.random.random() >= softmax_out[0])


# --- Algorithm ---
# An action is judged by the rewards from its step on; good actions are made more likely.
def discounted_returns(rewards, gamma):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... for each step (length,)."""
    returns = np.zeros(len(rewards))
    reward_sum = 0.0
    for t in reversed(range(len(rewards))):
        reward_sum = rewards[t] + gamma * reward_sum
        returns[t] = reward_sum
    return returns


def standardise(returns):
    """Return the returns (length,) with mean 0 and standard deviation 1; zeros if all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


def pad_episode(states, actions, returns):
    """Return states (200, 4), actions and returns (200,), padded with zeros, and the length."""
    length = len(actions)
    padding = (0, MAX_LENGTH - length)
    states = np.pad(states, (padding, (0, 0)))
    actions = np.pad(actions, padding)
    returns = np.pad(np.float32(returns), padding)
    return [tf.constant(array) for array in (states, actions, returns, np.float32(length))]


def update_network(network, optimizer, states, actions, returns, length):
    """Take a gradient step on the loss -sum_t G_t log p(a_t | s_t) / length; return that loss.

    This increases J(theta) = E[R(tau)], the mean reward of an episode tau. Without discounting:
        grad J = grad sum P(tau) R(tau) = sum P (grad P / P) R = E[R grad log P]
        grad log P = sum_t grad log p(a_t | s_t), as theta does not change how the pole falls
        grad J = E[sum_t G_t grad log p(a_t | s_t)], as an action does not change earlier rewards

    The trap: cross-entropy is -sum(target log p), so `target = return * one_hot(action)` gives the
    right loss. But Keras computes softmax and cross-entropy in one step and takes `p - target` as
    their gradient, which is true only if the numbers of a target add up to one. With p = 1/2,
    actions 0, 0, 1, 0, 1 and returns 3, 1, 0, -1, -2 the bias of the output gets (-0.1, 0.9), not
    (-0.5, 0.5). With that gradient seed 0 reaches 18 steps in 600 episodes; with this one, 182.
    """
    with tf.GradientTape() as tape:
        # The target is the number of the action ("sparse"), no vector: -log p(a_t | s_t), (200,)
        cross_entropy = keras.losses.sparse_categorical_crossentropy(actions, network(states))
        loss = tf.reduce_sum(returns * cross_entropy) / length  # the padding adds 0
    optimizer.apply(tape.gradient(loss, network.trainable_variables))
    return loss


# --- Training ---
# An episode is played to its end, because only then its returns are known; then the network learns.
def compile_agent(network):
    """Return policy(states) and update_network as compiled functions, each for one shape."""
    policy = tf.function(network, jit_compile=True, autograph=False)
    policy = policy.get_concrete_function(tf.TensorSpec((1, 4)))
    return policy, tf.function(update_network, jit_compile=True, autograph=False)


def train_agent(seed, run):
    """Train one agent; record its episodes and final numbers; save the first seed's network."""
    args = run.args
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=MAX_LENGTH, render_mode="rgb_array")
    network = build_model()
    policy, update = compile_agent(network)
    optimizer = keras.optimizers.Adam()
    optimizer.build(network.trainable_variables)  # compiled code cannot make its variables
    log = EpisodeLog(run, "reinforce", seed)
    steps = 0
    while log.episodes < args.epochs and steps != args.max_steps:
        state, _ = env.reset(seed=None if steps else seed)  # only the first episode is seeded
        states, actions, rewards = [], [], []
        ended = False
        while not ended:
            action = get_action(policy, state)
            states.append(state)
            actions.append(action)
            state, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            steps += 1
            ended = terminated or truncated or steps == args.max_steps
        returns = standardise(discounted_returns(rewards, args.gamma))
        loss = update(network, optimizer, *pad_episode(states, actions, returns))
        log.add({"reward": [sum(rewards)], "avg loss": [float(loss)]})

    def best_action(state):
        return np.argmax(policy(tf.constant(state[np.newaxis])))

    log.finish(evaluate(env, best_action, log, network))
    if seed == args.seed:
        network.save(run.folder / "reinforce.keras")
        if args.gif:
            save_gif(env, best_action, run.folder / "reinforce.gif")


def evaluate(env, policy, log, network):
    """Play ten greedy episodes; return the final numbers of a training."""
    return {
        "reward": statistics.mean(log.record["history"]["reward"][-100:]),
        "greedy_reward": statistics.mean(play(env, policy) for _ in range(10)),
        "parameters": network.count_params(),
    }


# --- Figures ---
# The article's figure, the reward of each episode; with several runs, their mean and spread.
def plot(run):
    """Draw the reward by episode, its mean and spread over the runs."""
    figure, axes = plot_episodes(run.results["arms"], "reward")
    axes.set_title("REINFORCE on CartPole")
    figure.savefig(run.folder / "rewards.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of its arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--gamma", type=float, default=0.95, help="what a reward one step later is worth")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    with Run(parse_flags(parser, argv), "CartPole-v1") as run:
        for seed in range(run.args.seed, run.args.seed + run.args.runs):
            train_agent(seed, run)
        plot(run)
        return run.report()


# --- Frame: flags, faults, folder and results; the same text in every script ---
def make_parser(*names, default, several=False):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    device = functools.partial(select_device, several=several)
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", type=device, default="auto", help="auto, cpu, gpu, gpu:N; all only for fit")
    add("--logdir", default="log", help="each run makes a folder of its own in this one")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def select_device(name, several):
    """Let TensorFlow see only the GPUs that --device names; return the name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | ({"all": gpus} if several else {})
    choices |= {f"gpu:{number}": [gpu] for number, gpu in enumerate(gpus)}
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(choices["gpu:0" if name == "gpu" else name], "GPU")
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is not here; use {', '.join(choices)}") from None
    except RuntimeError:  # TensorFlow has already started in this process
        raise argparse.ArgumentTypeError(f"too late for {name}; restart Python first") from None
    return name


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small")
    if "://" in args.logdir:
        parser.error(f"argument --logdir: {args.logdir} is not a folder on this computer")
    return args


class Run:
    """One run: its flags in `args`, its `folder`, and the `results` that results.json keeps."""

    def __init__(self, args, data, results=None):
        """Make the folder of a new run on `data`, or go on with the `results` of --resume."""
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
            sys.stdout.reconfigure(line_buffering=True)
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args, self.folder = args, pathlib.Path(args.logdir).expanduser() / SCRIPT / name
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        self.results = {"script": SCRIPT, "config": vars(args), "data": data, "arms": {}}
        if results:
            self.folder, self.results["arms"] = pathlib.Path(args.resume), results["arms"]
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        gpus = [gpu.name for gpu in tf.config.get_visible_devices("GPU")]
        self.results["device"] = ", ".join(gpus) or "CPU"
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["complete"] = False
        with self:  # its end writes results.json
            self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{SCRIPT} on {data}, device {self.results['device']}, writes to {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Keep what was computed; end with one line after Ctrl-C or a fault of disk or network."""
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # its reader is gone, and Python would flush it at the end
        if isinstance(error, OSError) or kind is Exception:  # from Keras, if a download fails
            raise SystemExit(f"error: {kind.__name__}: {error}") from None
        if kind is not SystemExit:
            self.write()
        # NumPy may turn Ctrl-C into a SystemError; KeyboardInterrupt is then its cause.
        if KeyboardInterrupt in (kind, type(getattr(error, "__cause__", None))):
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            raise SystemExit(130) from None

    def write(self):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        try:
            text = json.dumps(self.results, indent=1, allow_nan=False)
        except ValueError:
            raise SystemExit("error: a number is not finite; try another --seed") from None
        (self.folder / "results.json.tmp").write_text(text)
        os.replace(self.folder / "results.json.tmp", self.folder / "results.json")

    def report(self):
        """Print the results beside the article's and how to go on; return the final numbers."""
        self.results["complete"] = True
        self.write()
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                print(f"{arm:<16}{metric:<34}{round(value, 4):>14,}{article.get(metric, '-'):>14}")
        for path in sorted(self.folder.glob("*.*")):
            print(f'model = keras.models.load_model("{path}")' if ".keras" in path.name else path)
        print(f'tensorboard --logdir "{self.folder}"')
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


# --- Frame, episodes: the same text in every CartPole script ---
class EpisodeLog:
    """Keeps the episodes of one training, in results.json, in TensorBoard and on the screen."""

    def __init__(self, run, arm, seed):
        self.run, self.name, self.episodes = run, f"{arm}, seed {seed}", 0
        self.record = {"seed": seed, "history": {}, "final": {}, "seconds": 0.0}
        new = {"history": self.record["history"], "final": {}, "seconds": 0.0, "runs": []}
        self.arm = run.results["arms"].setdefault(arm, new)
        self.arm["runs"].append(self.record)
        self.writer = tf.summary.create_file_writer(str(run.folder / arm / f"seed_{seed}"))
        self.start = time.perf_counter()

    def add(self, values, note=""):
        """Record an episode, {tag: list of numbers}: the mean of each list, None if it is empty."""
        self.episodes += 1
        means = {tag: statistics.mean(v) if v else None for tag, v in values.items()}
        with self.writer.as_default(step=self.episodes):
            for tag, mean in means.items():
                self.record["history"].setdefault(tag, []).append(mean)
                if mean is not None:
                    tf.summary.scalar(tag, mean)
        self.record["seconds"] = time.perf_counter() - self.start
        if self.episodes % max(1, self.run.args.epochs // 20) == 0:
            line = ", ".join(f"{tag} {mean:.4g}" for tag, mean in means.items() if values[tag])
            print(f"{self.name}, episode {self.episodes}: {line}{note}")
            self.run.write()

    def finish(self, final):
        """Record the final numbers of this training; the arm's are the means over its runs."""
        self.record["final"] = final
        self.arm["seconds"] = sum(run["seconds"] for run in self.arm["runs"])
        for metric in final:
            values = [run["final"][metric] for run in self.arm["runs"]]
            self.arm["final"][metric] = statistics.mean(values)
            if len(values) > 1:
                self.arm.setdefault("spread", {})[metric] = statistics.stdev(values)
        self.run.write()


def play(env, policy):
    """Play an episode with policy(state) -> action; return the sum of its rewards."""
    state, _ = env.reset()
    total = 0.0
    while True:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total += reward
        if terminated or truncated:
            return total


def save_gif(env, policy, path):
    """Play an episode and save it as an animation."""
    env = gymnasium.wrappers.RenderCollection(env)
    play(env, policy)
    first, *others = [keras.utils.array_to_img(picture) for picture in env.render()]
    first.save(path, save_all=True, append_images=others, duration=20, loop=0)


def moving_average(values):
    """Return the mean of each value and up to 19 before it; NaN where one of them is None."""
    values = np.array(values, "float64")
    return np.array([values[max(0, i - 19) : i + 1].mean() for i in range(len(values))])


def plot_episodes(arms, metric):
    """Draw a metric by episode, each arm's mean and spread over runs; return figure and axes."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, record in arms.items():
        histories = [training["history"][metric] for training in record["runs"]]
        length = min(len(history) for history in histories)
        averages = np.array([moving_average(history[:length]) for history in histories])
        mean, spread = averages.mean(axis=0), averages.std(axis=0)  # (length,)
        episodes = range(1, length + 1)
        axes.plot(episodes, mean, label=arm)
        axes.fill_between(episodes, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel="episode", ylabel=f"{metric} (mean of 20 episodes)")
    axes.legend()
    return figure, axes


if __name__ == "__main__":
    main()
