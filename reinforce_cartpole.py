"""Train a policy network on CartPole with REINFORCE, by the policy gradient of the article.

Article: "Policy Gradient Reinforcement Learning in TensorFlow 2" (Adventures in Machine Learning).

The network learns no Q values. For each state it gives the probability of each action. After an
episode, actions that were followed by more reward than usual become more likely, the others less.

    python reinforce_cartpole.py
    python reinforce_cartpole.py --runs 5    # five seeds: some agents learn much sooner

Result (1,500 episodes, seeds 0 to 9): in every run the mean of a hundred episodes reached 180, at
episode 287 to 827. The last hundred take 173 and 177 steps in two runs, 192 to 199 in the others.

Differences from the article:
1. The gradient is right. The article gives the returns to Keras as targets and drops the actions,
   which Keras now refuses. The usual repair runs, but its gradient is wrong: see Algorithm.
2. The cross-entropy is sparse, not categorical: its target is the number of the action.
3. Returns that are all equal become zeros. The article divides them by zero.
4. Training ends after 1,500 episodes, and ten greedy ones follow. The policy is compiled.
5. CartPole-v0 is out of date. This is CartPole-v1 with v0's limit of 200 steps.
As in the article, an episode that reaches 200 steps ends as if the pole had fallen.
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

SCRIPT = "reinforce_cartpole"
MODULES = (tf, keras, np, gymnasium)  # results.json names their versions
ARTICLE = {"reinforce": {"reward": 200}}
GAMMA = 0.95  # what a reward one step later is worth
state_size = 4
num_actions = 2


# %% Model
# The network is the policy: its softmax says how likely each action is.
def build_model():
    """Return the network 4-30-30-2: states (batch, 4) to action probabilities (batch, 2)."""
    network = keras.Sequential([keras.Input((state_size,))])
    network.add(keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal"))
    network.add(keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal"))
    network.add(keras.layers.Dense(num_actions, activation="softmax"))
    # On a GPU Keras would by default compile anew for each length of an episode.
    network.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", jit_compile=False)
    return network


def get_action(predict, state):
    """Draw an action for a state (4,) with the probabilities of the policy."""
    softmax_out = predict(tf.constant(state[np.newaxis])).numpy()[0]
    # np.random.choice(num_actions, p=softmax_out) draws the same, but takes a sixth of a step.
    selected_action = int(np.random.random() >= softmax_out[0])
    return selected_action


# %% Algorithm
# Actions with a high return are made more likely. The trap: cross-entropy is -sum(target log p), so
# the target `return * one_hot(action)` gives the right loss. But Keras computes the gradient of
# softmax and cross-entropy as `p - target`, which is true only if a target's numbers sum to one.
# With p = 1/2, actions 0, 0, 1, 0, 1 and returns 3, 1, 0, -1, -2 a step of plain descent then moves
# the bias by (0.1, -0.9), not (0.5, -0.5). After 600 episodes seed 0 makes 18 steps, not 193.
# The right way: the action is the target, and the return is the weight of its loss.
def update_network(network, rewards, states, actions):
    """Take a gradient step on -mean_t(G_t log p(a_t | s_t)), G_t standardised; return that loss.

    This increases J(theta) = E[R(tau)], the mean reward of an episode tau. Without discounting:
        grad J = grad sum P(tau) R(tau) = sum P (grad P / P) R = E[R grad log P]
        grad log P = sum_t grad log p(a_t | s_t), as theta does not change how the pole falls
        grad J = E[sum_t G_t grad log p(a_t | s_t)], as an action does not change earlier rewards
    The return G_t = r_t + GAMMA G_(t+1) is summed from the end. With four steps: G_3 = r_3,
    G_2 = r_2 + GAMMA r_3, G_1 = r_1 + GAMMA r_2 + GAMMA^2 r_3, and G_0 = r_0 + GAMMA G_1.
    """
    reward_sum = 0
    discounted_rewards = []
    for reward in reversed(rewards):
        reward_sum = reward + GAMMA * reward_sum
        discounted_rewards.append(reward_sum)
    discounted_rewards = np.array(discounted_rewards[::-1])
    discounted_rewards -= np.mean(discounted_rewards)
    discounted_rewards /= max(np.std(discounted_rewards), 1e-8)  # zeros if all are equal
    states = np.vstack(states)
    actions = np.array(actions)
    network.reset_metrics()  # or older versions of Keras return the mean loss of all calls
    return float(network.train_on_batch(states, actions, sample_weight=discounted_rewards))


# %% Training
# An episode is played to its end, because only then its returns are known; then the network learns.
def train_agent(seed, run):
    """Train one agent; record its episodes and final numbers; save the first seed's network."""
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    network = build_model()
    # One fixed shape of states takes a third less time.
    predict = tf.function(network, jit_compile=True).get_concrete_function(tf.TensorSpec((1, 4)))
    train_writer = start_training(run, "reinforce", seed)
    steps = 0
    num_episodes = run.args.epochs
    for episode in range(1, num_episodes + 1):
        state, _ = env.reset(seed=seed if episode == 1 else None)
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
        run.record("reinforce", episode, {"reward": tot_reward, "avg loss": loss})
        with train_writer.as_default(step=episode):
            tf.summary.scalar("reward", tot_reward)
            tf.summary.scalar("avg loss", loss)
        if episode % max(1, num_episodes // 20) == 0:
            print(f"Episode: {episode}, Reward: {tot_reward}, avg loss: {loss:.5f}")
        steps += len(rewards)
        if run.args.max_steps and steps >= run.args.max_steps:
            break
    mean_reward = statistics.mean(run.records["reinforce"]["history"]["reward"][-100:])
    greedy_reward = statistics.mean(len(play(env, predict)) for _ in range(10))
    run.conclude("reinforce", {"reward": mean_reward, "greedy_reward": greedy_reward})
    if seed == run.args.seed:
        network.save(run.folder / "reinforce.keras")
        if run.args.gif:
            save_gif(env, predict, run.folder / "reinforce.gif")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of its arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args = parse_flags(parser, argv)
    if args.gif and not importlib.util.find_spec("pygame"):
        parser.error("argument --gif: pygame is missing; pip install pygame")
    run = Run(args, "CartPole-v1")
    for seed in range(args.seed, args.seed + args.runs):
        train_agent(seed, run)
    compare_rewards(run, "REINFORCE on CartPole")
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
