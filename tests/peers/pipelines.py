"""What diffusers' pipelines make of tiny weights, from given noise. See `common` for how to run it.

The folders are those of `text_to_image_cases`. Steps are "trailing" and end at x0, which are equal
steps of time; latents begin with the standard deviation of the process, not with 1; and latents of
images are the means, where the source draws them.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import text_to_image_cases as cases
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peers.common import Golden, drawn, integers, last, main

PROMPT, NEGATIVE = "the cat in", "a cat"
SCALE = 5.0


def opened(kind: Any, folder: Path, **options: Any) -> Any:
    """Open a pipeline, with steps as here and prompts cut to what its tiny encoders take."""
    made = kind.from_pretrained(folder, **options)
    made.scheduler = DDIMScheduler.from_config(
        made.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    for tokenizer in (made.tokenizer, getattr(made, "tokenizer_2", made.tokenizer)):
        tokenizer.model_max_length = 9
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def determined(eps: torch.Tensor) -> Iterator[None]:
    """Let pipelines take this noise, and means of latents."""
    images = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_"

    def mean(encoded: Any, generator: Any = None, sample_mode: str = "sample") -> Any:
        return encoded.latent_dist.mode()

    with (
        mock.patch.multiple(f"{images}img2img", randn_tensor=lambda *_, **__: eps.clone()),
        mock.patch(f"{images}img2img.retrieve_latents", mean),
        mock.patch.multiple(f"{images}inpaint", randn_tensor=lambda *_, **__: eps.clone()),
        mock.patch(f"{images}inpaint.retrieve_latents", mean),
    ):
        yield


def results(run: Callable[..., Any]) -> dict[str, np.ndarray]:
    """Return latents and images of a pipeline."""
    latents = last(run(output_type="latent").images)
    return {"latents": latents, "images": run(output_type="np").images}


def pipelines(seed: int, larger: int) -> Golden:
    torch.set_grad_enabled(False)
    height, width, num_steps = 8, 8 + 8 * larger, 5 << larger
    noise = drawn("noise", (1, 4, height // 2, width // 2), seed, 1.7).astype(np.float32)
    levels = integers("image", (height, width, 3), seed, 256).astype(np.uint8)
    paint = np.zeros((height, width), np.uint8)
    paint[2:, width // 2 :] = 255
    eps = torch.from_numpy(noise)
    x = torch.from_numpy(np.moveaxis(levels, 2, 0)[None].astype(np.float32) / 127.5 - 1)
    mask = torch.from_numpy((paint >= 128).astype(np.float32))[None, None]
    asked = {"num_inference_steps": num_steps, "guidance_scale": SCALE}
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **asked}
    size = {"height": height, "width": width}
    unsafe = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    arrays: dict[str, Any] = {"noise": last(noise), "image": levels, "mask": paint}

    def keep(name: str, run: Callable[..., Any]) -> None:
        arrays.update({f"{name}_{part}": value for part, value in results(run).items()})

    with tempfile.TemporaryDirectory() as name, determined(eps):
        folder = Path(name)
        text = cases.text_pipeline(folder / "text")
        made = opened(StableDiffusionPipeline, text, **unsafe)
        first = eps * float(1.0 - made.scheduler.alphas_cumprod[-1]) ** 0.5
        keep("text", lambda **to: made(**given, **size, latents=first, **to))
        edited = opened(StableDiffusionImg2ImgPipeline, text, **unsafe)
        keep("edited", lambda **to: edited(**given, image=x, strength=0.6, **to))
        painted = opened(
            StableDiffusionInpaintPipeline,
            cases.text_pipeline(folder / "inpainting", "unet_inpainting"),
            **unsafe,
        )
        edits = {"image": x, "mask_image": mask}
        begun = {"painted": {"latents": first}, "half_painted": {"strength": 0.6}}
        for part, how in begun.items():  # noise alone is not scaled there
            keep(part, lambda how=how, **to: painted(**given, **size, **edits, **how, **to))
        two = opened(StableDiffusionXLPipeline, cases.two_text_pipeline(folder / "two"))
        for part, negative in (("two_texts", NEGATIVE), ("zeros", None)):
            words = {**given, "negative_prompt": negative}
            keep(part, lambda words=words, **to: two(**words, **size, latents=first, **to))
        tokens, *_, pooled, _ = two.encode_prompt(PROMPT, do_classifier_free_guidance=True)
        arrays |= {"tokens": tokens, "pooled": pooled}
    words = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_steps": num_steps, "scale": SCALE}
    return Golden(words, {}, seed, {key: np.asarray(value) for key, value in arrays.items()})


if __name__ == "__main__":
    main({"pipelines": pipelines})
