"""Lists of weights have as many bytes as the published files: their names and shapes are those."""

import json
import math

import pytest
from peers import common

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PUBLISHED = [
    ("unet_sd15", "F32", 3_438_167_534),  # of CompVis/stable-diffusion-v1-4
    ("unet_sd15", "F16", 1_719_125_304),  # of runwayml/stable-diffusion-v1-5
    ("unet_sd21", "F32", 3_463_726_498),  # of stabilityai/stable-diffusion-2-1, and -base
    ("unet_sdxl", "F32", 10_270_077_736),  # of stabilityai/stable-diffusion-xl-base-1.0
    ("unet_sdxl", "F16", 5_135_149_760),
    ("autoencoder_sd", "F32", 334_643_276),  # of Stable Diffusion 1.4, 1.5 and 2.1
    ("autoencoder_flux", "F32", 335_306_212),  # of Step1X-Edit, whose autoencoder is FLUX's
    ("clip_sd15", "F32", 492_265_879),  # of CompVis/stable-diffusion-v1-4
    ("clip_sd21", "F32", 1_361_597_018),
    ("clip_sdxl_2", "F32", 2_778_702_264),
    ("dinov2_base", "F32", 346_345_912),
    ("dinov2_giant", "F32", 4_546_005_432),
]
"""The sizes that the hub says, as of 2026, of files of safetensors."""


NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@pytest.mark.parametrize(("name", "dtype", "size"), PUBLISHED)
def test_lists_have_the_bytes_of_the_published_files(name, dtype, size):
    assert size in sizes(common.read_keys(name), dtype)


def test_the_autoencoder_of_sdxl_has_the_new_names_of_attention():
    def new(key):
        *first, last, kind = key.split(".")
        return ".".join([*first, NEW_NAMES.get(last, last), kind])

    shapes = {new(key): shape for key, shape in common.read_keys("autoencoder_sd").items()}
    assert 334_643_268 in sizes(shapes, "F32")


def sizes(shapes, dtype):
    """What a file of these may have: a header of all names, shapes and offsets, and the numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in sorted(shapes.items()):
        whole = key.endswith("position_ids")
        start, end = end, end + math.prod(shape) * (8 if whole else BYTES[dtype])
        header[key] = {
            "dtype": "I64" if whole else dtype,
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + end, 8 + length + -length % 8 + end  # filled up to 8 since 2023
