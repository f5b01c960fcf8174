"""Check that the policy gradient is the gradient of a weighted cross-entropy, and train with it.

Article: "A simple policy gradient implementation with keras (part 1)".

A policy should take rewarded actions more often. The article derives that plain Keras can do this:
fit the network to the actions it took, each weighted by its reward. It leaves open whether that
works. Here the arm `identity` compares the gradients, and the arm `agent` trains with nothing but
`train_on_batch(states, actions, sample_weight=...)`.

    python keras_pg_weighted_ce.py                                  # both arms, CartPole
    python keras_pg_weighted_ce.py --arms agent --env ALE/Pong-v5   # the article's Pong

Result (seeds 0 to 4): the two gradients differ by 2e-7 of their length, and the error of an
estimate from N samples falls as N^-0.49 to N^-0.50. On CartPole the last 100 of 1,500 episodes take
187 to 199 steps. The agent loses Pong (seed 0) by 20.5 points at first, by 20.3 after 900 games.

Differences from the article:
1. The loss is -L. Minimising the article's L = sum_i r_i log q(a_i | s_i) would teach to lose.
2. The weights are divided by the number of samples. The article's sum grows with that number.
3. An agent is trained; the article stops before its Pong agent. Pong is played as in A. Karpathy's
   "Deep Reinforcement Learning: Pong from Pixels": two actions, the difference of two frames as the
   state, returns that end with each point, and one step of RMSprop every ten games.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "gymnasium[classic-control]>=1.1,<2", "ale-py>=0.10.2,<1", "matplotlib>=3.9,<4"]
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
import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "keras_pg_weighted_ce"
MODULES = (tf, keras, np, gymnasium, ale_py)  # results.json names their versions
ARTICLE = {"identity": {}, "agent": {}}  # the article gives no numbers
GAMMA = {"CartPole-v1": 0.95, "ALE/Pong-v5": 0.99}
BATCH_SIZE = 10  # episodes between two saves; in Pong also games per step of the optimizer


# --- Algorithm ---
# The identity first. A policy q(a|s) earns f(a, s), and E is the mean over the actions it draws:
#     grad E[f] = sum_a f grad q = sum_a q f (grad q / q) = E[f grad log q].
# So actions drawn from the policy are enough to estimate the gradient, and log q(a|s) is minus the
# cross-entropy of the one-hot action a and the policy.
def exact_gradient(q, states, rewards):
    """Return the gradient of mean_s sum_a q(a|s) f(a, s) for the kernel W of q = softmax(s W).

    States are (n, features), q and the rewards f (n, actions). By hand, with z = s W:
    dq_b / dz_a = q_b (1[a = b] - q_a), so d(sum_b q_b f_b) / dz_a = q_a (f_a - sum_b q_b f_b).
    """
    gain = rewards - np.sum(q * rewards, axis=1, keepdims=True)  # above the mean of the state
    return states.T @ (q * gain) / len(states)


def weighted_ce_gradient(policy, states, targets, weights):
    """Return the gradient of L = sum_i w_i log q(a_i|s_i) for the policy's first kernel.

    States are (N, features), targets are one-hot actions (N, actions), weights are (N,).
    """
    cross_entropy = keras.losses.CategoricalCrossentropy(reduction="sum")
    with tf.GradientTape() as tape:
        loss = cross_entropy(targets, policy(states), sample_weight=weights)  # this is -L
    return -tape.gradient(loss, policy.trainable_variables[0]).numpy()


def monte_carlo_gradient(policy, states, rewards, num_samples):
    """Return the estimate from `num_samples` random states, each with an action drawn by q."""
    drawn = np.random.randint(0, len(states), num_samples)
    log_q = tf.math.log(policy(states[drawn]))  # (num_samples, actions)
    actions = tf.random.categorical(log_q, 1)[:, 0].numpy()
    targets = np.eye(rewards.shape[1])[actions]
    weights = rewards[drawn, actions] / num_samples
    return weighted_ce_gradient(policy, states[drawn], targets, weights)


def show_identity(run):
    """Record how far both gradients are from the exact one, divided by its length."""
    start = time.perf_counter()
    keras.utils.set_random_seed(run.args.seed)
    states = np.random.normal(size=(8, 3))
    rewards = np.random.normal(size=(8, 4))  # of each of four actions in each state
    policy = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax", use_bias=False)])
    q = policy(states).numpy()
    exact = exact_gradient(q, states, rewards)
    length = np.linalg.norm(exact)
    # Every action in every state, weighted by how likely that pair is to be drawn
    every_state = np.repeat(states, 4, axis=0)  # (32, 3)
    every_action = np.tile(np.eye(4), (8, 1))  # (32, 4)
    weighted = weighted_ce_gradient(policy, every_state, every_action, np.ravel(q * rewards) / 8)
    final = {"weighted_error": float(np.linalg.norm(weighted - exact) / length)}
    history = {"samples": [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000], "error": []}
    with tf.summary.create_file_writer(str(run.folder / "identity")).as_default():
        for n in history["samples"]:
            misses = [monte_carlo_gradient(policy, states, rewards, n) - exact for _ in range(30)]
            error = float(np.linalg.norm(misses) / np.sqrt(30) / length)  # root mean square of 30
            history["error"].append(error)
            tf.summary.scalar("error", error, step=n)
    final["sampled_error"] = error
    final["slope"] = float(np.polyfit(np.log(history["samples"]), np.log(history["error"]), 1)[0])
    print(f"every action, weighted: off by {final['weighted_error']:.0e}")  # the table rounds to 0
    seconds = time.perf_counter() - start
    run.results["arms"]["identity"] = {"history": history, "final": final, "seconds": seconds}


# --- Environment ---
# Two games with two actions each: CartPole is learned in a minute, the article's Pong in days.
def preprocess(frames):
    """Return what moved between two frames (2, 210, 160, 3), uint8, as (6400,): -1, 0 or 1."""
    courts = frames[:, 34:194:2, ::2, 0]  # (2, 80, 80); the red channel tells all colours apart
    courts = np.float32((courts != 144) & (courts != 109))  # the ground, in play and before: 0
    return np.ravel(courts[1] - courts[0])


def make_env(game):
    """Return CartPole, or Pong with actions 0 (up), 1 (down) and differences of frames (6400,)."""
    if game == "CartPole-v1":  # as in the other scripts: the physics of v1, at most 200 steps
        return gymnasium.make(game, max_episode_steps=200, render_mode="rgb_array")
    env = gymnasium.make(game, render_mode="rgb_array")
    two_actions = gymnasium.spaces.Discrete(2)
    # In Pong the action 2 is up, and 3 is down.
    env = gymnasium.wrappers.TransformAction(env, lambda action: action + 2, two_actions)
    env = gymnasium.wrappers.FrameStackObservation(env, 2)  # after a reset the same frame twice
    differences = gymnasium.spaces.Box(-1, 1, (80 * 80,))
    return gymnasium.wrappers.TransformObservation(env, preprocess, differences)


# --- Model ---
# The networks are compiled with Keras's own cross-entropy; the weights come with each batch.
def build_cartpole_model():
    """Return the policy 4-30-30-2 of reinforce_cartpole.py: states (batch, 4) to (batch, 2)."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(inputs)
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(x)
    network = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    network.compile(keras.optimizers.Adam(), "categorical_crossentropy")
    return network


def build_pong_model():
    """Return a policy 6400-200-2 like Karpathy's; RMSprop steps once in ten games."""
    inputs = keras.Input((80 * 80,))
    x = keras.layers.Dense(200, activation="relu", kernel_initializer="he_normal")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    rmsprop = keras.optimizers.RMSprop(1e-4, rho=0.99, gradient_accumulation_steps=BATCH_SIZE)
    network.compile(rmsprop, "categorical_crossentropy")
    return network


def compile_policy(network):
    """Return the function state (n,) -> action probabilities, compiled for one state at a time."""
    policy = tf.function(lambda state: network(state[tf.newaxis])[0], jit_compile=True)
    return policy.get_concrete_function(tf.TensorSpec(network.input_shape[1:]))


# --- Training ---
# An episode at a time: play it, weight its actions by what followed them, call train_on_batch.
def collect_episode(env, policy, max_steps):
    """Play an episode; return its states (length, n), actions (length,) and rewards (length,)."""
    states, actions, rewards = [], [], []
    state, _ = env.reset()
    ended = False
    while not ended:
        softmax_out = policy(tf.constant(state)).numpy()
        action = int(np.random.random() >= softmax_out[0])  # a draw, as in reinforce_cartpole.py
        states.append(state)
        actions.append(action)
        state, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        ended = terminated or truncated or len(rewards) == max_steps
    return np.array(states), np.array(actions), np.array(rewards)


def discounted_returns(rewards, gamma, pong):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... of the rewards (length,).

    Each point of Pong, a reward of 1 or -1, ends a rally: no return counts what comes after it.
    """
    returns = np.zeros(len(rewards))
    reward_sum = 0.0
    for t in reversed(range(len(rewards))):
        if pong and rewards[t] != 0:
            reward_sum = 0.0
        reward_sum = rewards[t] + gamma * reward_sum
        returns[t] = reward_sum
    return returns


def standardise(returns):
    """Return (returns - mean) / standard deviation, shape (length,); zeros where all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


def take_over(log, episodes):
    """Let the log go on after the first `episodes` episodes of an interrupted training."""
    log.record = log.arm["runs"][0]
    log.arm["runs"] = [log.record]  # without the new one that `log` has begun
    log.arm["history"] = log.record["history"]
    for values in log.record["history"].values():
        del values[episodes:]  # these were not saved, and are played again
    log.episodes = episodes
    log.start -= log.record["seconds"]


def save_agent(network, run):
    """Write results.json first, then the network, so that no saved episode is missing there."""
    run.write()
    temporary = run.folder / "agent.tmp.keras"
    network.save(temporary)
    os.replace(temporary, run.folder / "agent.keras")


def train_agent(seed, run):
    """Train an agent; record its episodes and final numbers; save the first seed's network."""
    args = run.args
    pong = args.env == "ALE/Pong-v5"
    keras.utils.set_random_seed(seed)
    env = make_env(args.env)
    network = build_pong_model() if pong else build_cartpole_model()
    if args.resume and (run.folder / "agent.keras").exists():
        network = keras.models.load_model(run.folder / "agent.keras")
    log = EpisodeLog(run, "agent", seed)
    if args.resume:
        # variables[0] counts the calls of train_on_batch, `iterations` only every tenth in Pong
        take_over(log, int(network.optimizer.variables[0]))
    policy = compile_policy(network)
    steps = sum(log.record["history"].get("steps", []))
    max_steps = args.max_steps or np.inf
    env.reset(seed=seed + log.episodes)
    while log.episodes < args.epochs and steps < max_steps:
        states, actions, rewards = collect_episode(env, policy, max_steps - steps)
        advantages = standardise(discounted_returns(rewards, GAMMA[args.env], pong))
        targets = np.eye(2)[actions]  # one-hot
        network.reset_metrics()  # or older versions of Keras return the mean loss of all calls
        loss = network.train_on_batch(states, targets, sample_weight=advantages)
        steps += len(rewards)
        log.add({"reward": [sum(rewards)], "avg loss": [float(loss)], "steps": [len(rewards)]})
        if log.episodes % BATCH_SIZE == 0 and seed == args.seed:
            save_agent(network, run)
    if seed == args.seed:
        save_agent(network, run)

    def best_action(state):
        return np.argmax(policy(tf.constant(state)))

    env.reset(seed=seed)  # so the greedy games are the same after an interruption
    log.finish(evaluate(env, best_action, log, network))
    if args.gif and seed == args.seed:
        save_gif(env, best_action, run.folder / "agent.gif")


def evaluate(env, policy, log, network):
    """Play ten greedy episodes; return the final numbers of a training."""
    history = log.record["history"]
    return {
        "reward": statistics.mean(history["reward"][-100:]),
        "greedy_reward": statistics.mean(play(env, policy) for _ in range(10)),
        "parameters": network.count_params(),
        "steps_per_second": sum(history["steps"]) / log.record["seconds"],
    }


# --- Figures ---
# One figure for each arm; the article has none.
def plot_identity(run):
    """Draw the error of the sampled gradient by the number of samples."""
    record = run.results["arms"]["identity"]
    samples, errors = np.array(record["history"]["samples"]), np.array(record["history"]["error"])
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.loglog(samples, errors, "o", label=f"measured: N^{record['final']['slope']:.3f}")
    axes.loglog(samples, errors[0] * (samples[0] / samples) ** 0.5, label="theory: N^-0.5")
    axes.set(title="The sampled gradient", xlabel="samples N", ylabel="relative error")
    axes.legend()
    figure.savefig(run.folder / "identity.png")


def plot_agent(run):
    """Draw the rewards of the agent by episode."""
    figure, axes = plot_episodes({"agent": run.results["arms"]["agent"]}, "reward")
    axes.set_title(f"The agent on {run.args.env}")
    figure.savefig(run.folder / "agent.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--env", choices=GAMMA, default="CartPole-v1", help="what the agent plays")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="parts to run")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args, results = read_run(parser, argv)
    if args.resume and args.runs > 1:
        parser.error("argument --resume: only a run with --runs 1 can go on")
    with Run(args, args.env, results=results) as run:
        if "identity" in args.arms and "identity" not in run.results["arms"]:
            show_identity(run)
            plot_identity(run)
        if "agent" in args.arms:
            for seed in range(args.seed, args.seed + args.runs):
                train_agent(seed, run)
            plot_agent(run)
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


# --- Frame, resume: the same text in every script that can go on after an interruption ---
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names (else None).

    The flags are those of that run. Only --epochs, --max-steps and --device may change.
    """
    args = parse_flags(parser, argv)
    if args.resume is None:
        return args, None
    try:
        results = json.loads(pathlib.Path(args.resume, "results.json").read_text())
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    if results["script"] != SCRIPT:
        parser.error(f"argument --resume: {args.resume} is a run of {results['script']}.py")
    parser.set_defaults(**results["config"])
    args = parse_flags(parser, argv)
    for name in results["config"].keys() - {"epochs", "max_steps", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: must be as in the run to resume")
    return args, results


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
