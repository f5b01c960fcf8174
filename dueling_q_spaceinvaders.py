"""Teach a dueling Q network Space Invaders from its screen, with 200,000 frames to draw from.

Article: "Atari Space Invaders and Dueling Q RL in TensorFlow 2" (Adventures in Machine Learning).

The streams of dueling_q_cartpole.py, above convolutions that see three grey frames at a time.

    python dueling_q_spaceinvaders.py    # days on a CPU: stop it and go on later by --resume

Measured (seed 0, 221 games): 161 points at random, 167 in the last 50; greedily 0 (see README.md).

Differences from the article:
1. A sampled state ends with the frame in which its action was chosen; the article's, one earlier.
2. No stack crosses the start of an episode: its first frame, never stored there, is repeated.
3. A full memory is drawn from all over; the article's from 32 slots at first, then one more a step.
4. Frames are uint8 in a file, 8,400 bytes each, not float32 with the frames as last axis.
5. The advantages' mean is over the actions, not the batch; the target network starts as a copy.
6. Epsilon falls until step 50,000 + 500,000; the article's jumps. `avg loss` has no -1 in it.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "gymnasium[classic-control]>=1.1,<2", "ale-py>=0.10.2,<1", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import sys
import time

import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

# --- Constants ---
SCRIPT = "dueling_q_spaceinvaders"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium", "ale-py")
ARTICLE = {"dueling": {}}  # its figure rises over 1,500 episodes; it names 60 points at number 50
POST_PROCESS_IMAGE_SIZE, NUM_FRAMES, NUM_ACTIONS, CHECKPOINT_SECONDS = (105, 80), 3, 6, 180
EPSILON, GAMMA, TAU, BATCH_SIZE = (1.0, 0.1), 0.99, 0.08, 32  # epsilon's first and last value
STEP = [("action", "u1"), ("reward", "f4"), ("terminal", "?"), ("start", "?")]  # and its frame:
SLOT = [("frame", "u1", POST_PROCESS_IMAGE_SIZE), *STEP, ("number", "i8")]  # the number last


# --- Command line ---
def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=1500, help="episodes to play")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--replay-size", type=number(int, 100, 10**8), default=200000, help="frames to draw from")
    add("--delay-training", type=number(int, BATCH_SIZE), default=50000, help="random steps first")
    add("--epsilon-min-iter", type=number(int, 1), default=500000, help="steps of epsilon's fall")
    add("--gif-every", type=number(int, 1), default=50, help="episodes from one GIF to the next")
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
    args = parser.parse_args(argv, argparse.Namespace(**results["config"]))
    for name in results["config"].keys() - {"epochs", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to resume")
    results |= {"config": vars(args), "complete": False}
    old = [f"{p} {v}" for p, v in results["versions"].items() if importlib.metadata.version(p) != v]
    print(f"{SCRIPT} goes on in {run_dir}" + (f"; warning: it was begun with {old}" if old else ""))
    return args, run_dir, results


# --- Environment ---
def image_preprocess(image):
    """Return an RGB image (210, 160, 3), uint8, as grey (105, 80), uint8: means of 2x2 points."""
    grey = image @ np.float32([0.2989, 0.5870, 0.1140])  # as in tf.image.rgb_to_grayscale
    rows = grey[::2] + grey[1::2]  # (105, 160)
    return np.uint8((rows[:, ::2] + rows[:, 1::2]) / 4 + 0.5)


def make_space_invaders():
    """Return SpaceInvaders-v0: states (NUM_FRAMES, 105, 80), uint8; a reset repeats one frame."""
    gymnasium.register_envs(ale_py)
    dynamics = {"frameskip": (2, 5), "repeat_action_probability": 0.25}  # v5's 4 skips all bombs
    env = gymnasium.make("ALE/SpaceInvaders-v5", render_mode="rgb_array", **dynamics)
    env = gymnasium.wrappers.RenderCollection(env)  # keeps the episode's pictures for a GIF
    space = gymnasium.spaces.Box(0, 255, POST_PROCESS_IMAGE_SIZE, np.uint8)
    env = gymnasium.wrappers.TransformObservation(env, image_preprocess, space)
    return gymnasium.wrappers.FrameStackObservation(env, NUM_FRAMES)


# --- Algorithm ---
def DQModel(hidden_size, num_actions):
    """Return the network: states (batch, NUM_FRAMES, 105, 80), uint8, to Q (batch, num_actions)."""
    he = {"kernel_initializer": "he_normal"}
    inputs = keras.Input((NUM_FRAMES, *POST_PROCESS_IMAGE_SIZE), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(keras.layers.Permute((2, 3, 1))(inputs))  # frames last
    x = keras.layers.Conv2D(16, (8, 8), (4, 4), activation="relu", name="conv1")(x)
    x = keras.layers.Conv2D(32, (4, 4), (2, 2), activation="relu", name="conv2")(x)
    x = keras.layers.Flatten()(x)  # (batch, 2816)
    adv = keras.layers.Dense(hidden_size, "relu", name="adv_dense", **he)(x)
    adv = keras.layers.Dense(num_actions, name="adv_out", **he)(adv)  # (batch, num_actions)
    v = keras.layers.Dense(hidden_size, "relu", name="v_dense", **he)(x)
    v = keras.layers.Dense(1, name="v_out", **he)(v)  # (batch, 1)
    norm_adv = adv - keras.ops.mean(adv, axis=1, keepdims=True)  # axis 1: of each state
    return keras.Model(inputs, keras.layers.Add()([v, norm_adv]))


class Memory:
    """The newest frames, each with the step that led to it, in a file that outlives a kill."""

    def __init__(self, path, max_memory):
        size, free = max_memory * np.dtype(SLOT).itemsize, shutil.disk_usage(path.parent).free
        if not path.exists() or path.stat().st_size != size:
            print(f"{path} is to hold {max_memory:,} frames in {size / 1e9:.2f} GB")
            if size > free:
                raise OSError(f"there are but {free / 1e9:.2f} GB for it; lower --replay-size")
            np.zeros(max_memory, SLOT).tofile(path)  # no hole: a disk filled later does no harm
        self.slots = np.memmap(path, SLOT, "r+")
        self.added = int(self.slots["number"].max())

    def add_sample(self, frame, action=0, reward=0.0, terminal=False, start=False):
        """Overwrite the oldest frame by (105, 80); no step leads to the `start` of an episode."""
        self.added += 1
        slot = frame, action, reward, terminal, start, self.added
        self.slots[self.added % len(self.slots)] = slot

    def sample(self, no_samples):
        """Draw steps, each one alike, of those whose frames are all here; return their parts."""
        size, starts = len(self.slots), self.slots["start"]
        oldest = max(1, self.added - size + 2)  # a kill may have left the next slot half written
        drawn = np.empty((0, NUM_FRAMES + 1), int)
        while len(drawn) < no_samples:
            window = np.random.randint(oldest, self.added + 1, (no_samples, 1))
            for _ in range(NUM_FRAMES):  # to the left the frame before; of a start, itself
                window = np.hstack([window[:, :1] - 1 + starts[window[:, :1] % size], window])
            whole = (window[:, 0] >= oldest) & ~starts[window[:, -1] % size]
            drawn = np.concatenate([drawn, window[whole]])[:no_samples]
        slots = self.slots[drawn[:, -1:] % size]
        columns = (slots[name].astype("float32") for name in ("action", "reward", "terminal"))
        return self.slots["frame"][drawn % size], *columns  # (n, NUM_FRAMES + 1, 105, 80), 3 (n, 1)


def choose_action(state, best_action, eps):
    """Return a random action with probability `eps`, else the best one in a state."""
    if np.random.random() < eps:
        return np.random.randint(NUM_ACTIONS)
    return int(best_action(state[np.newaxis]))


def q_targets(rewards, terminals, q_choosing, q_judging, gamma):
    """Return r + gamma q_judging(s', argmax over a of q_choosing(s', a)), at a terminal r alone.

    The q are (batch, actions), all else (batch, 1). One q in both places makes it the max over a.
    """
    prim_action_tp1 = tf.argmax(q_choosing, axis=1)
    q_next = tf.gather(q_judging, prim_action_tp1, batch_dims=1)[:, tf.newaxis]
    return rewards + gamma * (1 - terminals) * q_next


def update_network(primary_network, target_network):
    """Move the target's weights t the share TAU to the primary's e: t (1 - TAU) + e TAU."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign_add(TAU * (e - t))


def dueling_q_step(frames, actions, rewards, terminals, primary_network, target_network, optimizer):
    """Train the primary network on what Memory.sample returned; return the loss before that."""
    states, next_states = frames[:, :-1], frames[:, 1:]  # (batch, NUM_FRAMES, 105, 80)
    prim_qtp1, q_from_target = primary_network(next_states), target_network(next_states)
    targets = q_targets(rewards, terminals, prim_qtp1, q_from_target, GAMMA)  # (batch, 1)
    taken = tf.one_hot(tf.cast(actions[:, 0], tf.int32), NUM_ACTIONS)  # the others add no loss
    with tf.GradientTape() as tape:  # the targets stand outside: they count as constants
        loss = keras.losses.Huber()(taken * targets, taken * primary_network(states))
    optimizer.apply(tape.gradient(loss, primary_network.trainable_variables))
    update_network(primary_network, target_network)
    return loss


def save_gif(frames, path):
    """Write frames (210, 160, 3) as an animation of the article's size, 20 a second as played."""
    gif = (keras.utils.array_to_img(f, scale=False).quantize().resize((320, 480)) for f in frames)
    next(gif).save(path, save_all=True, append_images=gif, duration=50, loop=0)


# --- Training ---
def train(args, run_dir, results):
    """Play and learn up to args.epochs episodes, from the run's last checkpoint if it has one."""
    keras.utils.set_random_seed(args.seed)
    primary_network, target_network = (DQModel(256, NUM_ACTIONS) for _ in range(2))
    target_network.set_weights(primary_network.get_weights())
    optimizer, done = keras.optimizers.Adam(), tf.Variable([0, 0])  # episodes, steps
    optimizer.build(primary_network.trainable_variables)  # its moments must exist before tracing
    agent = [primary_network, target_network, optimizer]
    checkpoint = tf.train.Checkpoint(agent=agent, done=done)
    manager = tf.train.CheckpointManager(checkpoint, str(run_dir / "checkpoint"), 1)
    try:
        manager.restore_or_initialize()
    except Exception as error:  # half a file raises whatever its bytes lead to
        raise OSError(f"{manager.directory} is damaged; delete it to train anew") from error
    frames = tf.TensorSpec((BATCH_SIZE, NUM_FRAMES + 1, *POST_PROCESS_IMAGE_SIZE), tf.uint8)
    learn = tf.function(lambda *batch: dueling_q_step(*batch, *agent), jit_compile=True)
    learn = learn.get_concrete_function(frames, *[tf.TensorSpec((BATCH_SIZE, 1))] * 3)  # no checks
    adv = keras.Model(primary_network.inputs, primary_network.get_layer("adv_out").output)
    best_action = tf.function(lambda s: tf.argmax(adv(s), axis=1)[0], jit_compile=True)  # as Q's
    episodes, steps = done.numpy().tolist()  # what came after the checkpoint is played again
    new = {"history": {"reward": [], "avg loss": []}, "final": {}, "seconds": 0.0}
    record = results["arms"].setdefault("dueling", new)
    record["history"] = history = {key: v[:episodes] for key, v in record["history"].items()}
    start = time.perf_counter() - record["seconds"]

    def save():
        record["seconds"] = time.perf_counter() - start
        write_results(run_dir, results)
        done.assign([episodes, steps])
        manager.save()

    writer = tf.summary.create_file_writer(str(run_dir / "dueling"))
    env = make_space_invaders()
    env.reset(seed=args.seed + episodes)  # now, not for each game: it loads the cartridge anew
    memory = Memory(run_dir / "replay", args.replay_size) if episodes < args.epochs else None
    try:
        while episodes < args.epochs and steps != args.max_steps:
            (state, _), total, losses, ended = env.reset(), 0.0, [], False
            memory.add_sample(state[-1], start=True)
            while not ended:
                eps = np.interp(steps - args.delay_training, [0, args.epsilon_min_iter], EPSILON)
                action = choose_action(state, best_action, eps)
                state, reward, terminated, truncated, _ = env.step(action)
                memory.add_sample(state[-1], action, reward, terminated)
                total, steps = total + reward, steps + 1
                if min(steps, memory.added) > args.delay_training:
                    losses.append(float(learn(*memory.sample(BATCH_SIZE))))
                ended = terminated or truncated or steps == args.max_steps
            episodes += 1
            history["reward"].append(total)
            history["avg loss"].append(float(np.mean(losses)) if losses else None)
            with writer.as_default(step=episodes):
                tf.summary.scalar("reward", total)
                if losses:
                    tf.summary.scalar("avg loss", np.mean(losses))
            if episodes % args.gif_every == 0:
                save_gif(env.render(), run_dir / f"episode_{episodes}.gif")
            print(f"episode {episodes}, step {steps}: {total:.0f} points, eps {eps:.3f}")
            write_results(run_dir, results)
            if time.perf_counter() - start - record["seconds"] > CHECKPOINT_SECONDS:
                save()
    finally:
        save()
    greedy = []
    for _ in range(10):
        (state, _), total, ended = env.reset(), 0.0, False
        while not ended:
            state, reward, terminated, truncated, _ = env.step(choose_action(state, best_action, 0))
            total, ended = total + reward, terminated or truncated
        greedy.append(total)
        if total == max(greedy):
            save_gif(env.render(), run_dir / "best.gif")
    final = {"greedy_reward": sum(greedy) / 10, "parameters": primary_network.count_params()}
    record["final"] = {"reward": np.mean(history["reward"][-20:]).item(), "steps": steps} | final
    primary_network.save(run_dir / "dueling.keras")


# --- Plots ---
def plot(run_dir, results):
    """Draw the reward by episode and its moving average."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rewards = results["arms"]["dueling"]["history"]["reward"]
    averages = [np.mean(rewards[max(0, i - 20) : i]) for i in range(1, len(rewards) + 1)]
    axes.plot(rewards, alpha=0.3, label="an episode")
    axes.plot(averages, label="mean of 20")
    axes.set(xlabel="episode", ylabel="reward (points)", title="Space Invaders, Dueling Q")
    axes.legend()
    save_figure(figure, run_dir / "reward.png")


# --- Main ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    if args.resume:
        args, run_dir, results = resume_run(args, argv)
    device = select_device(args.device)
    if not args.resume:
        run_dir, results = new_run_dir(args, "ALE/SpaceInvaders-v5", device)
    train(args, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    (run_dir / "replay").unlink(missing_ok=True)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
