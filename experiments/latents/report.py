"""The report of a run, for readers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from experiments.common import command, evaluations
from experiments.common.command import Refusal
from experiments.common.tables import markdown
from experiments.latents.denoiser import STAGE
from experiments.latents.drawing import Trained
from jaxdiff import files

if TYPE_CHECKING:
    from experiments.latents.evaluating import Judging


def write(
    trained: Trained,
    directory: files.Path,
    judging: "Judging",
    results: Mapping[str, Any],
    best: float,
    beside: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the report.

    Args:
        trained: the run.
        directory: of the run.
        judging: how it was judged.
        results: what was found.
        best: the scale of guidance that was found best.
        beside: as :func:`read_beside` returns it.
    """
    config, record = trained.config, STAGE.recorded(directory)
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    steps = evaluations.steps(trained.step, config.num_steps)
    count = sum(leaf.size for leaf in jax.tree.leaves(trained.params))
    of_autoencoder = sum(leaf.size for leaf in jax.tree.leaves(trained.decoder))
    attention = f", {config.text_attention} attention to text" if config.network == "dit" else ""
    return f"""\
# {trained.autoencoder_config.data}: {config.network} of {config.space}{attention}, {steps}

![samples](samples.png)

{_summary(trained, results)}

{_obeyed_table(results, best)}

{_words(judging, results)}

![the same noise at each guidance scale](guidance.png)

![between two prompts](between.png)

Each row goes from a prompt of the samples above to the one below it: what is followed is the mean \
of the two denoisers, weighted by the shares.

![from noise to pictures](reverse.png)

![from pictures to noise](noising.png)

![loss](loss.png)

{_beside(results, beside)}

## What produced it

Denoiser: {count:,} parameters, config hash `{record.get("hash")}`. Autoencoder: \
{of_autoencoder:,} parameters, latents {" x ".join(map(str, trained.store.latent_shape))} of \
pictures {" x ".join(map(str, trained.store.shape))}. {record.get("device")}. {versions}. Commit \
{record.get("git_commit")}. All of it: [denoiser/config.json](denoiser/config.json), \
[evaluation.json](evaluation.json).
"""


def _summary(trained: Trained, results: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    rows = [
        ("psnr", "reconstruction of pictures held out, PSNR in dB", ".2f"),
        ("ssim", "the same, SSIM", ".4f"),
        ("frechet_of_reconstructions", "the same, Fréchet distance of 4 x 4 means", ".3f"),
        (
            "frechet",
            "Fréchet distance of pictures drawn at the best guidance scale",
            ".3f",
        ),
        ("frechet_of_halves", "of two halves of the real ones", ".3f"),
        ("best_guidance_scale", "best guidance scale", "g"),
    ]
    lines += [
        f"| {said} | {results[name]:{form}} |" for name, said, form in rows if name in results
    ]
    if "bits_per_dim" in results:
        what = "of pixels, given the caption"
        what += "" if trained.config.space == "pixels" else ", an upper bound"
        lines.append(f"| bits per dimension {what} | {_bits(results)} |")
    if "latent_bits_per_dim" in results:
        of = results["latent_bits_per_dim"], results["decoder_bits_per_dim"]
        lines.append(f"| of these in latents, in the decoder | {of[0]:.3f}, {of[1]:.3f} |")
    return "\n".join(lines)


def _obeyed_table(results: Mapping[str, Any], best: float) -> str:
    """Return what was obeyed at the best scale, a row a cell, by factor."""
    if "obeyed" not in results:
        return ""
    at = f"{best:g}"
    parts = [f"## Prompts obeyed at guidance {at}, in percent\n"]
    for prefix in ("", "two_objects_", "several_objects_"):
        names = [n for n in results["obeyed"] if _kind(n) == prefix]
        if not names:
            continue
        factors = [n for n in results["obeyed"][names[0]][at] if not n.endswith("_stderr")]
        factors = ["all", *(n for n in factors if n != "all")]
        parts.append("| prompts | judge | " + " | ".join(factors) + " |")
        parts.append("|---" * (len(factors) + 2) + "|")
        for name in names:
            rows = {
                "trained": results["obeyed"][name][at],
                "templates": results["obeyed_by_templates"].get(name, {}).get(at),
                "trained, prompts shuffled": results["obeyed_shuffled"][name][at],
                "trained, real pictures": results["ceiling"][name],
                "templates, real pictures": results["ceiling_by_templates"].get(name),
                "trained, reconstructions": results["ceiling_of_reconstructions"][name],
            }
            parts += [
                f"| {name.replace('_', ' ')} | {judge} | "
                + " | ".join(_percent(found, factor) for factor in factors)
                + " |"
                for judge, found in rows.items()
                if found is not None
            ]
        parts.append("")
    return "\n".join(parts)


def _kind(name: str) -> str:
    return next((p for p in ("two_objects_", "several_objects_") if name.startswith(p)), "")


def _bits(results: Mapping[str, Any]) -> str:
    return f"{results['bits_per_dim']:.3f} ± {results['bits_per_dim_stderr']:.3f}"


def _percent(found: Mapping[str, float], factor: str) -> str:
    if factor not in found:
        return ""
    return f"{100 * found[factor]:.1f} ± {100 * found[f'{factor}_stderr']:.1f}"


def _words(judging: "Judging", results: Mapping[str, Any]) -> str:
    if "obeyed" not in results:
        return ""
    return f"""\
{judging.num_prompts} prompts a row, pictures by {judging.sampler} in {judging.sample_steps} \
steps; ± is the standard error. "All" is shape, colour and place of one object; of two, both \
shapes, each with its colour, and the relation; of several, number, shape and colour. Held out are \
combinations that neither stage saw in training: a colour of each shape, and in "held out order" a \
second shape to each first. The trained judge has learned on real scenes of all combinations; \
templates are fitted by least squares and have learned nothing."""


def _beside(results: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> str:
    if not beside:
        return ""
    return f"## Beside another\n\n{side_by_side({'this run': results, **beside})}"


def read_beside(judging: "Judging") -> dict[str, dict[str, Any]]:
    """Return what the run that is to stand beside was found to be worth, by its folder's name.

    Raises:
        Refusal: if it was not judged.
    """
    if judging.beside is None:
        return {}
    folder = command.path_of(judging.beside, "--beside")
    found = evaluations.numbers(folder)
    if not found:
        raise Refusal(
            f"--beside {folder} has no {evaluations.EVALUATION} that can be read. Judge that run "
            "first, by evaluate."
        )
    return {folder.name: found}


def side_by_side(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of what runs were found to be worth, a column a run, by their names."""
    columns = [_figures(found) for found in runs.values()]
    rows = list(dict.fromkeys(row for column in columns for row in column))
    return "\n".join(
        markdown(["", *runs], [[row, *(column.get(row, "") for column in columns)] for row in rows])
    )


def _figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Return what is compared of a run, as it is shown."""
    found = {}
    if "bits_per_dim" in results:
        most = "at most " if "latent_bits_per_dim" in results else ""
        found["bits per dimension of pixels, given the caption"] = most + _bits(results)
    if "frechet" in results:
        found["Fréchet distance of pictures"] = f"{results['frechet']:.3f}"
    if "best_guidance_scale" in results:
        found["best guidance scale"] = best = f"{results['best_guidance_scale']:g}"
        for name, by_scale in results.get("obeyed", {}).items():
            row = f"prompts obeyed at it, {name.replace('_', ' ')}, in percent"
            found[row] = _percent(by_scale[best], "all")
    return found
