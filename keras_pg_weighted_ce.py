"""Show that the policy gradient is that of a weighted cross-entropy, and train agents by it.

Article: "A simple policy gradient implementation with keras (part 1)". It follows Andrej Karpathy's
"Deep Reinforcement Learning: Pong from Pixels", whose scheme the Pong agent here keeps.

The gradient of the expected reward of a softmax policy is that of a cross-entropy between the
policy and the actions it took, each weighted by its reward. The article derives this, and leaves
open whether it holds in practice. Part 1 computes both sides; part 2 trains an agent with nothing
but `train_on_batch(states, one_hot(actions), sample_weight=advantages)`.

    python keras_pg_weighted_ce.py                                  # both parts, CartPole
    python keras_pg_weighted_ce.py --arms agent --env ALE/Pong-v5   # the article's Pong
    python keras_pg_weighted_ce.py --resume log/keras_pg_weighted_ce/20300101-120000

Measured, seeds 0 to 4: the weighted cross-entropy has the exact gradient, to 2e-7; the error of
samples falls as N^-0.49 to N^-0.50. CartPole: 187 to 199 steps in the last 100 of 1,500 episodes.
Pong, a short run: after 490 games in eight minutes it still loses by 20.4 points (at first 20.5).

Differences from the article:
1. The loss is -L. L = sum_i r_i log q(a_i | s_i) grows with the reward: who minimises it, as the
   article says, learns to lose.
2. The estimate of the expectation is a mean: the article's sum grows with the number of samples.
3. There is an agent. The article ends before its Pong; Karpathy's is written without Keras.
From Karpathy are the two actions, the differences of frames, the discount that starts anew after
each point, and RMSprop's one step in ten episodes (here each episode's mean loss counts alike).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.18,<3", "keras>=3.8,<4", "tensorboard>=2.18,<3", "ale-py>=0.10.2,<1",
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

import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from gymnasium import spaces, wrappers
from keras import layers

# --- Constants ---

SCRIPT = "keras_pg_weighted_ce"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium", "ale-py")
ARTICLE = {"identity": {}, "agent": {}}  # it holds no figures
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
NUM_SAMPLES = [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
NUM_ESTIMATES = 30  # averaged for each number of samples
HIDDEN_SIZES = {"CartPole-v1": [30, 30], "ALE/Pong-v5": [200]}
GAMMA = {"CartPole-v1": 0.95, "ALE/Pong-v5": 0.99}
UP, DOWN = 2, 3  # in Pong; RIGHT and LEFT on the joystick
BATCH_SIZE = 10  # episodes: an update of Pong's agent, and between two checkpoints

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=1500, help="episodes of the agent")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--env", choices=list(GAMMA), default="CartPole-v1", help="what the agent plays")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="parts to run")
    add("--gif", action="store_true", help="save a greedy episode as an animation")
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


# --- Resuming: the same text in every script that has --resume ---


def resume_run(args, argv):
    """Return (args, run_dir, results) of the run in --resume: only --epochs and --device change."""
    parser, run_dir, results = build_parser(), pathlib.Path(args.resume), {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((run_dir / "results.json").read_text())
    if results.get("script") != SCRIPT:
        parser.error(f"argument --resume: {run_dir} holds no run of {SCRIPT}.py that can be read")
    parser.set_defaults(**results["config"])
    args = parser.parse_args(argv)
    for name in results["config"].keys() - {"epochs", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to resume")
    results |= {"config": vars(args), "complete": False}
    print(f"{SCRIPT} on {results['data']} goes on in {run_dir}; begun with {results['versions']}")
    return args, run_dir, results


# --- Episodes: the same text in every script that plays ---


def play(env, policy):
    """Play an episode with policy(state) -> action; return its reward."""
    (state, _), total, ended = env.reset(), 0.0, False
    while not ended:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total, ended = total + reward, terminated or truncated
    return total


# --- Environment ---


def make_env(render_mode=None):
    """Return the article's CartPole: the physics of v1 with a limit of 200 steps."""
    return gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode=render_mode)


def preprocess(frame):
    """Return the court of a frame (210, 160, 3), uint8, as (80, 80) float32: 1 at ball and bats."""
    court = frame[34:194:2, ::2, 0]  # red alone tells all colours apart
    return np.float32((court != 144) & (court != 109))  # its ground, in play and before the start


def make_pong(render_mode=None):
    """Return Pong with actions 0 (up), 1 (down) and differences of frames (6400,) as states."""
    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Pong-v5", render_mode=render_mode)
    env = wrappers.TransformAction(env, (UP, DOWN).__getitem__, spaces.Discrete(2))
    env = wrappers.TransformObservation(env, preprocess, spaces.Box(0, 1, (80, 80)))
    env = wrappers.FrameStackObservation(env, 2)  # after a reset the same frame twice
    space = spaces.Box(-1, 1, (80 * 80,))
    return wrappers.TransformObservation(env, lambda courts: np.ravel(courts[1] - courts[0]), space)


# --- Model ---


def build_model(env_name, state_size):
    """Return the compiled policy: states (batch, state_size) to probabilities (batch, 2)."""
    x = inputs = keras.Input((state_size,))
    for size in HIDDEN_SIZES[env_name]:
        x = layers.Dense(size, activation="relu", kernel_initializer="he_normal")(x)
    network = keras.Model(inputs, layers.Dense(2, activation="softmax")(x))
    optimizer = keras.optimizers.Adam()
    if env_name == "ALE/Pong-v5":
        optimizer = keras.optimizers.RMSprop(1e-4, 0.99, gradient_accumulation_steps=BATCH_SIZE)
    network.compile(loss="categorical_crossentropy", optimizer=optimizer)
    return network


# --- Algorithm ---


def exact_gradient(policy, states, rewards):
    """Return the gradient of mean_s sum_a q(a|s) f(a, s) for the kernel W of q = softmax(s W).

    States (n, features), rewards f (n, actions). For z = s W, dq_b / dz_a = q_a (1[a = b] - q_b).
    """
    q = policy(states).numpy()
    gain = rewards - np.sum(q * rewards, axis=1, keepdims=True)  # over what the state promises
    return states.T @ (q * gain) / len(states)


def weighted_ce_gradient(policy, states, actions, weights):
    """Return the gradient of 1/N sum_i w_i log q(a_i|s_i): minus that of Keras's cross-entropy.

    States (N, features), actions (N,), weights (N,).
    """
    with tf.GradientTape() as tape:
        softmax_out = policy(states)
        targets = np.eye(softmax_out.shape[1])[actions]  # one-hot
        loss = keras.losses.CategoricalCrossentropy()(targets, softmax_out, sample_weight=weights)
    return -tape.gradient(loss, policy.trainable_variables[0]).numpy()


def monte_carlo_gradient(policy, states, rewards, num_samples):
    """Return the estimate from so many draws of a state and its action, each with its reward."""
    drawn = np.random.randint(0, len(states), num_samples)
    actions = tf.random.categorical(tf.math.log(policy(states[drawn])), 1)[:, 0].numpy()
    return weighted_ce_gradient(policy, states[drawn], actions, rewards[drawn, actions])


def compile_policy(network):
    """Return the function state (n,) -> action probabilities, compiled for one state at a time."""
    shape = tf.TensorSpec(network.input_shape[1:], tf.float32)
    policy = tf.function(lambda state: network(state[tf.newaxis])[0], jit_compile=True)
    return policy.get_concrete_function(shape)  # spares each call a check of its arguments


def get_action(policy, state):
    """Draw an action for a state (n,), float32, with the probabilities of the policy."""
    softmax_out = policy(tf.constant(state)).numpy()
    return np.random.choice(len(softmax_out), p=softmax_out)


def discounted_returns(rewards, gamma):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... of the rewards (length,)."""
    returns, reward_sum = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = reward_sum = rewards[t] + gamma * reward_sum
    return returns


def returns_of_points(rewards, gamma):
    """Return the discounted returns of Pong's rewards (length,): each ends with its point."""
    points = np.split(rewards, np.flatnonzero(rewards) + 1)
    return np.concatenate([discounted_returns(point, gamma) for point in points])


def standardise(returns):
    """Return (returns - mean) / standard deviation, shape (length,); zeros where all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


# --- Training ---


def show_identity(args, run_dir, results):
    """Part 1: record how far two estimates are from the exact gradient; save the policy."""
    start = time.perf_counter()
    keras.utils.set_random_seed(args.seed)
    states, rewards = np.random.normal(size=(8, 3)), np.random.normal(size=(8, 4))
    policy = keras.Sequential([keras.Input((3,)), layers.Dense(4, "softmax", use_bias=False)])
    exact = exact_gradient(policy, states, rewards)

    def relative_error(gradient):
        return float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))

    idx, actions = np.indices(rewards.shape).reshape(2, -1)  # every action in every state
    weights = 4 * (policy(states).numpy() * rewards)[idx, actions]  # Keras divides by 8 * 4, not 8
    weighted = weighted_ce_gradient(policy, states[idx], actions, weights)
    history = {"samples": NUM_SAMPLES, "error": []}
    with tf.summary.create_file_writer(str(run_dir / "identity")).as_default():
        for n in NUM_SAMPLES:
            draws = range(NUM_ESTIMATES)
            sampled = [monte_carlo_gradient(policy, states, rewards, n) for _ in draws]
            squares = [relative_error(gradient) ** 2 for gradient in sampled]
            history["error"].append(np.sqrt(np.mean(squares)).item())
            tf.summary.scalar("error", history["error"][-1], step=n)
    slope = np.polyfit(np.log(NUM_SAMPLES), np.log(history["error"]), 1)[0]
    for name, gradient in ("exact", exact), ("weighted", weighted), ("sampled", sampled[0]):
        print(f"{name:<9}gradient {gradient[0].round(5)} ..., error {relative_error(gradient):.1e}")
    print(f"the error of N samples falls as N^{slope:.3f}; expected: N^-0.5")
    final = {"weighted_error": relative_error(weighted), "sampled_error": history["error"][-1]}
    final |= {"slope": float(slope), "parameters": policy.count_params()}
    seconds = time.perf_counter() - start
    results["arms"]["identity"] = {"history": history, "final": final, "seconds": seconds}
    policy.save(run_dir / "identity.keras")


def open_checkpoint(network, run_dir):
    """Restore the last checkpoint, if there is one; return a checkpoint and its manager.

    Its `episodes` and `steps` say how far training has come. Raises OSError if it is damaged.
    """
    network.optimizer.build(network.trainable_variables)  # else its moments have no place yet
    done = {name: tf.Variable(0, dtype=tf.int64) for name in ("episodes", "steps")}
    checkpoint = tf.train.Checkpoint(model=network, optimizer=network.optimizer, **done)
    manager = tf.train.CheckpointManager(checkpoint, str(run_dir / "checkpoint"), 1)
    try:
        manager.restore_or_initialize()
    except Exception as error:  # half a file raises whatever its bytes lead to
        raise OSError(f"{manager.directory} is damaged; delete it to train anew") from error
    return checkpoint, manager


def train(args, run_dir, results):
    """Part 2: train the agent to args.epochs episodes, from its checkpoint if it has one."""
    keras.utils.set_random_seed(args.seed)
    pong = args.env == "ALE/Pong-v5"
    env = (make_pong if pong else make_env)("rgb_array")
    network = build_model(args.env, env.observation_space.shape[0])
    policy = compile_policy(network)
    checkpoint, manager = open_checkpoint(network, run_dir)
    episodes, steps = int(checkpoint.episodes), int(checkpoint.steps)
    new = {"history": {"reward": [], "avg loss": []}, "final": {}, "seconds": 0.0}
    record = results["arms"].setdefault("agent", new)
    history, start = record["history"], time.perf_counter() - record["seconds"]
    for values in history.values():
        del values[episodes:]  # what came after the checkpoint is played again
    bar = keras.utils.Progbar(args.epochs, verbose=VERBOSE % 2, stateful_metrics=["reward"])
    writer, every = tf.summary.create_file_writer(str(run_dir / "agent")), max(1, args.epochs // 20)
    env.reset(seed=args.seed + episodes)
    while episodes < args.epochs and steps != args.max_steps:
        state, _ = env.reset()
        states, actions, rewards, ended = [], [], [], False
        while not ended:
            action = get_action(policy, state)
            new_state, reward, terminated, truncated, _ = env.step(action)
            states.append(state)
            actions.append(action)
            rewards.append(reward)
            state, steps = new_state, steps + 1
            ended = terminated or truncated or steps == args.max_steps
        returns = (returns_of_points if pong else discounted_returns)(rewards, GAMMA[args.env])
        targets, advantages = np.eye(2)[actions], standardise(returns)  # (length, 2), (length,)
        loss = network.train_on_batch(np.stack(states), targets, sample_weight=advantages)
        episodes += 1
        history["reward"].append(sum(rewards))
        history["avg loss"].append(float(loss))
        with writer.as_default(step=episodes):
            tf.summary.scalar("reward", history["reward"][-1])
            tf.summary.scalar("avg loss", history["avg loss"][-1])
        if episodes % BATCH_SIZE == 0 or episodes == args.epochs or steps == args.max_steps:
            record["seconds"] = time.perf_counter() - start
            write_results(run_dir, results)
            checkpoint.episodes.assign(episodes)
            checkpoint.steps.assign(steps)
            manager.save()
        bar.update(episodes, [("reward", history["reward"][-1])])
        if VERBOSE == 2 and (episodes % every == 0 or episodes == 1):
            recent = statistics.mean(history["reward"][-every:])
            print(f"agent, episode {episodes}: reward {recent:.1f}")
    env.reset(seed=args.seed)  # the greedy games do not depend on how often training went on
    greedy = [play(env, lambda state: np.argmax(policy(state))) for _ in range(10)]
    final = {"reward": statistics.mean(history["reward"][-100:])}
    final |= {"greedy_reward": statistics.mean(greedy), "parameters": network.count_params()}
    record["final"] = final | {"steps_per_second": steps / record["seconds"]}
    if args.gif:
        env = wrappers.RenderCollection(env)
        play(env, lambda state: np.argmax(policy(state)))
        gif, *rest = (keras.utils.array_to_img(frame, scale=False) for frame in env.render())
        gif.save(run_dir / "agent.gif", save_all=True, append_images=rest, duration=40, loop=0)
    network.save(run_dir / "agent.keras")


# --- Plots ---


def plot(run_dir, results):
    """Draw the error of the sampled gradient (part 1) and the agent's rewards (part 2)."""
    for arm, record in results["arms"].items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        if arm == "identity":
            samples, errors = (np.array(values) for values in record["history"].values())
            slope = record["final"]["slope"]
            axes.loglog(samples, errors, "o", label=f"measured: slope {slope:.3f}")
            axes.loglog(samples, errors[0] * (samples / samples[0]) ** -0.5, label="slope -0.5")
            title = "The sampled policy gradient nears the exact one"
            axes.set(title=title, xlabel="samples N", ylabel="error / length of the exact gradient")
        else:
            rewards = record["history"]["reward"]
            window = min(20, len(rewards))
            averages = np.convolve(rewards, np.ones(window) / window, "valid")
            axes.plot(range(1, len(rewards) + 1), rewards, alpha=0.3, label="an episode")
            axes.plot(range(window, len(rewards) + 1), averages, label=f"average of {window}")
            title = f"Weighted cross-entropy on {results['data']}"
            axes.set(title=title, xlabel="episode", ylabel="reward")
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, run_dir / f"{arm}.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    if args.resume:
        args, run_dir, results = resume_run(args, argv)
    device = select_device(args.device)
    if not args.resume:
        run_dir, results = new_run_dir(args, args.env, device)
    if "identity" in args.arms and "identity" not in results["arms"]:
        show_identity(args, run_dir, results)
    if "agent" in args.arms:
        train(args, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
