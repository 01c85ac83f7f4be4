"""Measure what an article on the theory of diffusion models claims, in its order.

    python -m experiments.theory --run-dir runs/theory

Each claim is drawn and measured: claims.json, report.md and the figures. The measurement could
come out otherwise, and where a claim is only half true the report says which half.
"""

import json
import sys
from typing import Literal

from experiments.common import command
from experiments.common.tables import markdown
from experiments.theory import dynamics, estimation, learning, processes
from experiments.theory.claim import Claim, Context, Measure
from jaxdiff import files

CLAIMS: dict[str, Measure] = {
    "Data": estimation.data_are_a_sample,
    "Generating": estimation.a_fitted_density_can_be_sampled,
    "Likelihood": estimation.likelihood_tells_candidates_apart,
    "Log-likelihood": estimation.logarithms_do_not_underflow,
    "Fitting a mixture": estimation.em_raises_the_likelihood,
    "Mixtures of images": estimation.mixtures_are_not_enough_for_images,
    "Generators": dynamics.noise_is_transported_to_data,
    "Following the gradient": dynamics.ascent_maximises_and_does_not_sample,
    "Small steps": dynamics.small_steps_sample,
    "What the network outputs": learning.score_and_noise_are_one,
    "Learning from noise": learning.noising_teaches_the_score,
    "The generator of steps": dynamics.many_small_steps_make_the_generator,
    "Score matching": learning.all_score_matching_is_one,
    "The probability flow": processes.flow_has_an_exact_likelihood,
    "Why decay": processes.decay_keeps_the_variance,
    "The closed form": processes.steps_compose_to_the_closed_form,
    "The step back": processes.the_step_back_undoes_decay_and_noise,
    "Maximum likelihood": learning.diffusion_bounds_the_likelihood,
    "To noise and back": processes.images_go_to_noise_and_back,
    "Samplers": learning.samplers_have_orders,
    "Flow matching": learning.flow_matching_is_the_same_flow_straighter,
}
SLOW = (
    "Mixtures of images",
    "Generators",
    "Following the gradient",
    "Learning from noise",
    "Score matching",
    "The probability flow",
    "Maximum likelihood",
    "Samplers",
    "Flow matching",
)
"""Left out of the smoke preset."""


@command.writes
def theory(run_dir: str, preset: Literal["full", "smoke"] = "full", seed: int = 0) -> None:
    """Measure and draw every claim.

    Args:
        run_dir: Folder of the results.
        preset: All claims at full size, or the quick ones as small as still runs every line.
        seed: Of everything random.
    """
    command.check_seed(seed)
    config = {"experiment": "theory", "preset": preset, "seed": seed}
    directory = command.open_run(run_dir, config)
    if directory is None:
        return
    ctx = Context(directory, seed, preset == "full")
    with command.compiling_for(preset):
        found = {
            name: measure(ctx) for name, measure in CLAIMS.items() if ctx.full or name not in SLOW
        }
    records = [
        {
            "name": name,
            "claim": claim.claim,
            "expected": claim.expected,
            "measured": claim.measured,
            "holds": bool(claim.holds),
            "figures": list(claim.figures),
        }
        for name, claim in found.items()
    ]
    files.write_text(directory / "claims.json", json.dumps(records, indent=2) + "\n")
    files.write_text(directory / command.REPORT, report(found))
    failing = [name for name, claim in found.items() if not claim.holds]
    print(f"{len(found) - len(failing)} of {len(found)} claims hold.")
    for name in failing:
        print(f"  not: {name}")
    print(f"Report: {directory / command.REPORT}")


def report(found: dict[str, Claim]) -> str:
    """Return the report of the claims."""
    rows = [[name, "holds" if claim.holds else "does not"] for name, claim in found.items()]
    lines = ["# The theory, measured", "", *markdown(["claim", ""], rows), ""]
    for name, claim in found.items():
        lines += [f"## {name}", "", claim.claim, "", f"Expected: {claim.expected}.", ""]
        lines += [*measured(claim), "", f"**{'Holds' if claim.holds else 'Does not hold'}.**", ""]
        lines += [claim.note, ""] if claim.note else []
        for figure in claim.figures:
            lines += [f"![{name}: {figure}]({figure})", ""]
    return "\n".join(lines)


def measured(claim: Claim) -> list[str]:
    """Return what was measured, as Markdown: a line, or a table."""
    if not isinstance(claim.measured, dict):
        return [f"Measured: {claim.measured:.4g}."]
    rows = []
    for name, value in claim.measured.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"{name} {part}".strip(), f"{number:.4g}"] for part, number in parts]
    return markdown(["measured", ""], rows)


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("theory", theory, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
