"""Image data: opened by name, batched in an order that depends on (seed, step), scaled in JAX.

    images = load_images("digits", "train")
    for batch in batches(images, 128, seed=0, start_step=step):     # {"x0": uint8, "cond": int32}
        x0 = dequantize(key, batch["x0"], images.num_levels)        # inside the jitted update

Importing this package needs JAX and NumPy only; `load_images` imports tensorflow_datasets and
`batches` grain when called. TensorFlow is never imported.
"""

from jaxdiff.data.description import Description
from jaxdiff.data.images import Images
from jaxdiff.data.pipeline import batch_indices, batches
from jaxdiff.data.scaling import bin_width, centers, dequantize, to_levels
from jaxdiff.data.source import NotPreparedError, default_data_dir, load_images

__all__ = [
    "Description",
    "Images",
    "NotPreparedError",
    "batch_indices",
    "batches",
    "bin_width",
    "centers",
    "default_data_dir",
    "dequantize",
    "load_images",
    "to_levels",
]
