"""Data: read in an order that depends on (seed, step), made ready for the loss in JAX.

    images = load_images("digits", "train")     # or load_folder, from_arrays, stored.open
    for batch in batches(images, 128, seed=0, start_step=step):
        ...                                     # {"image": uint8, "label": int32}
    loss_fn = prepared(losses.denoising(...), dequantized_images(images.num_levels))
    tokenized(scenes.Scenes(40_000), tokenizer)          # {"image", "text"}: with captions

Whatever has a length and gives its rows by index is `Records`, and all are read by one pipeline;
`prepared` turns what was read into the {"x0", "cond"} of a loss, inside the compiled update.

Importing this package needs JAX and NumPy only; `load_images` imports tensorflow_datasets,
`load_folder` Pillow, `batches` grain, `mirror` fsspec and `learn_tokenizer` tokenizers when called.
TensorFlow is never imported.
"""

from jaxdiff.data import scenes, stored
from jaxdiff.data.captions import Captioned, Tokenized, tokenized
from jaxdiff.data.description import Description
from jaxdiff.data.errors import NotPreparedError, UnreadableError
from jaxdiff.data.folder import load_folder
from jaxdiff.data.images import Images
from jaxdiff.data.mirror import Mirrored, mirror
from jaxdiff.data.pipeline import batch_indices, batches
from jaxdiff.data.prepare import Prepare, dequantized_images, latents, prepared
from jaxdiff.data.records import Arrays, Records, from_arrays
from jaxdiff.data.scaling import bin_width, centers, dequantize, to_levels
from jaxdiff.data.source import default_data_dir, load_images
from jaxdiff.data.tokenizer import Tokenizer, learn_tokenizer

__all__ = [
    "Arrays",
    "Captioned",
    "Description",
    "Images",
    "Mirrored",
    "NotPreparedError",
    "Prepare",
    "Records",
    "Tokenized",
    "Tokenizer",
    "UnreadableError",
    "batch_indices",
    "batches",
    "bin_width",
    "centers",
    "default_data_dir",
    "dequantize",
    "dequantized_images",
    "from_arrays",
    "latents",
    "learn_tokenizer",
    "load_folder",
    "load_images",
    "mirror",
    "prepared",
    "scenes",
    "stored",
    "to_levels",
    "tokenized",
]
