"""Runs of the latents command so small that a test makes one."""

import jax

from experiments.latents.__main__ import main

AUTOENCODER = {
    "image-size": 16,
    "num-scenes": 48,
    "widths": (4, 8),
    "latent-channels": 2,
    "batch-size": 8,
    "num-steps": 4,
    "warmup-steps": 1,
    "optimizer": "adamw",
    "ema-decay": 0.5,
    "eval-examples": 8,
    "checkpoint-every": 2,
    "log-every": 2,
}
DENOISER = {
    "width": 16,
    "depth": 1,
    "num-heads": 2,
    "text-width": 16,
    "text-depth": 1,
    "batch-size": 8,
    "num-steps": 4,
    "warmup-steps": 1,
    "optimizer": "adamw",
    "ema-decay": 0.5,
    "checkpoint-every": 2,
    "log-every": 2,
}
JUDGING = {
    "num-prompts": 6,
    "guidance-scales": (2.0,),
    "sample-steps": 2,
    "likelihood-examples": 2,
    "likelihood-tolerance": 1.0,
    "judge-steps": 2,
}


def words(given):
    """Options as a command line has them."""
    made = []
    for name, value in given.items():
        made.append(f"--{name}")
        made += [str(each) for each in (value if isinstance(value, tuple) else (value,))]
    return made


def run(capsys, subcommand, run_dir, *argv):
    """Run a subcommand as a user's process would, in this one; return code, stdout, stderr."""
    given = [subcommand, "--run-dir", run_dir, *argv]
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        try:
            code = main([str(word) for word in given])
        except SystemExit as stop:  # tyro's own refusals
            code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err
