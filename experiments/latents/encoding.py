"""The second stage: latents and captions of all pictures, made once and stored."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command import Refusal, refusing
from experiments.common.options import CountOrNone, Within
from experiments.latents import autoencoder as autoencoders
from experiments.latents import coding
from experiments.latents.autoencoder import Autoencoder
from jaxdiff import data, files, pretrained
from jaxdiff.data import Captioned, Records, stored
from jaxdiff.devices import map_rows
from jaxdiff.typing import PyTree

FOLDER = "latents"
SHARD_SIZE = 4096
_LEARNED_FROM = 20_000
"""Captions at most that a tokenizer is learned from."""
_MEASURED = 2048
"""Pictures at most that the scale of latents is measured on."""
TEXT_LEARNED, TEXT_STORED = "learned", "stored"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How captions become numbers."""

    num_tokens: Annotated[int, Within(257)] = 512
    """Of the vocabulary that is learned from the captions, which begins with the 256 bytes."""
    length: CountOrNone = None
    """Tokens of a caption at most; as many as the longest has, unless given."""
    text_weights: str | None = None
    """Folder or hub id of an imported text encoder, whose vectors are stored in place of tokens;
    unless given the denoiser learns an encoder of its own."""


class Text(NamedTuple):
    """How prompts become what the denoiser is given.

    Attributes:
        kind: "learned", tokens for an encoder that the denoiser learns; or "stored", the vectors
            of an imported one.
        encode: texts -> {"tokens", "mask"}, NumPy arrays (B, L, ...).
        num_tokens: of the vocabulary, of tokens.
        length: tokens at most.
        width: of the vectors.
        record: what says it again, as JSON holds it.
    """

    kind: str
    encode: Any
    num_tokens: int
    length: int
    width: int
    record: Mapping[str, Any]


def learn(captions: Sequence[str], encoding: Encoding) -> Text:
    """Return the text of captions: a tokenizer learned from them, or an imported encoder.

    Raises:
        Refusal: naming the option.
    """
    if encoding.text_weights is not None:
        return imported(encoding.text_weights)
    with refusing(TypeError, ValueError, ImportError, say="--num-tokens or --length: "):
        tokenizer = data.learn_tokenizer(
            list(captions)[:_LEARNED_FROM], num_tokens=encoding.num_tokens, length=encoding.length
        )
    return _learned(tokenizer)


def of_record(record: Mapping[str, Any], text_weights: str | None = None) -> Text:
    """Return the text that a store's record says.

    Args:
        record: its part of the attributes.
        text_weights: where an imported encoder lies now, if not where it did.

    Raises:
        Refusal: if the encoder is gone, or another one.
    """
    if record["kind"] == TEXT_LEARNED:
        if text_weights is not None:
            raise Refusal("--text-weights must be left out: this run learned its text encoder.")
        return _learned(data.Tokenizer.from_record(record["tokenizer"]))
    found = imported(text_weights or record["weights"])
    if found.record["fingerprint"] != record["fingerprint"]:
        raise Refusal(
            f"--text-weights {text_weights or record['weights']} holds another encoder than the "
            "captions were encoded by. Give that one's folder."
        )
    return found


def _learned(tokenizer: Any) -> Text:
    record = {"kind": TEXT_LEARNED, "tokenizer": tokenizer.to_record()}
    return Text(TEXT_LEARNED, tokenizer, tokenizer.num_tokens, tokenizer.length, 0, record)


def imported(weights: str) -> Text:
    """Return the text of an imported encoder, frozen.

    Raises:
        Refusal: if it cannot be loaded, or is none.
    """
    errors = (FileNotFoundError, pretrained.WeightsError, ValueError, ImportError)
    with refusing(*errors, say="--text-weights: "):
        loaded = pretrained.load(weights)
    encoder = loaded.text if isinstance(loaded, pretrained.Denoising) else loaded
    if not isinstance(encoder, pretrained.TextEncoder) or encoder.pools:
        raise Refusal(
            f"--text-weights must be one text encoder with its tokenizer, such as CLIP's; "
            f"{weights} holds the kind {type(loaded).__name__}."
        )
    params, tokenize, run = encoder.params, encoder.tokenize, map_rows(encoder.encode)
    end = encoder.config.get("eos_token_id")

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        with refusing(pretrained.WeightsError, say="--text-weights: "):
            tokens = tokenize(texts)
        last = np.argmax(tokens if end in (None, 2) else tokens == end, axis=1)
        mask = np.arange(tokens.shape[1]) <= last[:, None]
        vectors = np.asarray(run(params, tokens))
        return {"tokens": vectors.astype(np.float16), "mask": mask}

    found = encode([""])
    record = {"kind": TEXT_STORED, "weights": weights, "fingerprint": stored.fingerprint(params)}
    return Text(TEXT_STORED, encode, 0, tokenize.length, found["tokens"].shape[-1], record)


class Store(NamedTuple):
    """Latents that were made, and what they say of themselves.

    Attributes:
        records: "mean", "deviation" and "text" of each picture.
        autoencoder: the hash of the one that made them.
        scale: 1 over the deviation of a latent.
        shift: the mean of a latent.
        text: how captions became numbers.
        latent_shape: (h, w, c) of one.
        shape: (H, W, C) of a picture.
    """

    records: Records
    autoencoder: str
    scale: float
    shift: float
    text: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    shape: tuple[int, int, int]


def write(
    folder: files.Path,
    autoencoder: Autoencoder,
    params: PyTree,
    pictures: Captioned,
    encoding: Encoding,
    *,
    config: autoencoders.Config,
    devices: list[jax.Device] | None = None,
    progress: bool = False,
) -> None:
    """Encode all pictures and captions, or what is left of them; a finished store is left as it is.

    Args:
        folder: of the store.
        autoencoder: what encodes.
        params: its parameters.
        pictures: to be encoded.
        encoding: of the captions.
        config: of the autoencoder.
        devices: which share the work.
        progress: say on stderr how far it is.

    Raises:
        Refusal: if another store is there, or a caption cannot be taken.
    """
    encode, _ = coding.make_coders(autoencoder, devices)
    captions = pictures.captions(np.arange(min(len(pictures), _LEARNED_FROM)))
    text = learn(captions, encoding)
    count = min(len(pictures), _MEASURED)
    chosen = np.linspace(0, len(pictures) - 1, count).astype(np.int64)
    scale, shift = scale_and_shift(*encode(params, pictures.rows(chosen)["image"]))
    attributes = {
        autoencoders.AUTOENCODER: stored.fingerprint(params),
        "scale": scale,
        "shift": shift,
        "text": dict(text.record),
        "latent_shape": list(autoencoder.latent_shape),
        "shape": list(autoencoder.shape),
        "seed": config.seed,
    }

    def make(first: int, last: int) -> dict[str, Any]:
        rows = np.arange(first, last)
        mean, deviation = encode(params, pictures.rows(rows)["image"])
        with refusing(ValueError, say="A caption cannot be taken: "):
            said = text.encode(pictures.captions(rows))
        return {"mean": mean, "deviation": deviation, "text": said}

    def said(done: int, of: int) -> None:
        if progress and sys.stderr.isatty():
            print(f"\r{done} of {of} files", end="" if done < of else "\n", file=sys.stderr)

    with refusing(ValueError, say=f"--run-dir: {folder}: "):
        stored.write_shards(
            folder,
            len(pictures),
            make,
            shard_size=SHARD_SIZE,
            attributes=attributes,
            progress=said,
            mine=(jax.process_index(), jax.process_count()),
        )


def scale_and_shift(mean: np.ndarray, deviation: np.ndarray) -> tuple[float, float]:
    """Return what gives latents the mean 0 and the variance 1.

    Args:
        mean: of the Gaussians of some of them, (N, h, w, c).
        deviation: likewise.
    """
    shift = float(np.mean(mean, dtype=np.float64))
    power = np.mean((mean - shift) ** 2 + deviation**2, dtype=np.float64)
    return float(power**-0.5), shift


def read(folder: files.Path, remedy: str) -> Store:
    """Open a store.

    Args:
        folder: of it.
        remedy: what makes one.

    Raises:
        Refusal: if there is none.
        UnreadableError: if it is damaged.
    """
    try:
        records = stored.open(folder)
    except data.NotPreparedError as error:
        raise Refusal(f"{error}{remedy}") from error
    found = records.attributes
    height, width, channels = found["latent_shape"]
    rows, columns, colours = found["shape"]
    return Store(
        records,
        autoencoders.fingerprint_of(found, f"{folder}"),
        float(found["scale"]),
        float(found["shift"]),
        found["text"],
        (height, width, channels),
        (rows, columns, colours),
    )


def check_maker(store: Store, params: PyTree, folder: files.Path) -> None:
    """Refuse latents that another autoencoder made.

    Raises:
        Refusal: saying what would do.
    """
    if store.autoencoder != stored.fingerprint(params):
        raise Refusal(
            f"{folder} holds latents of another autoencoder than the run's: it was trained on, or "
            "replaced, after they were made. Remove that folder and encode again, then train the "
            "denoiser in a folder of its own; or bring back the autoencoder."
        )


def check_trained_on(store: Store, record: Mapping[str, Any], folder: files.Path) -> None:
    """Refuse a denoiser that was trained on other latents.

    Raises:
        Refusal: saying what would do.
    """
    if (
        record.get(autoencoders.AUTOENCODER) != store.autoencoder
        or record.get("text") != store.text
    ):
        raise Refusal(
            f"{folder} was trained on other latents or captions than there are now. Train it anew "
            "in a folder of its own, or bring back what it was trained on."
        )


def said(store: Store) -> dict[str, Any]:
    """Return what a run's record says of the latents that it is trained on."""
    return {autoencoders.AUTOENCODER: store.autoencoder, "text": dict(store.text)}


def unscaled(store: Store, z: np.ndarray) -> np.ndarray:
    """Return latents as the autoencoder has them, of those that the denoiser sees."""
    return np.asarray(z / store.scale + store.shift, jnp.float32)
