"""One call for a component's folder, a pipeline's, a single file, or a hub id.

What a folder holds is told by the class that its config names; each class is one entry of
:data:`KINDS`. Networks are made as shapes alone, and their parameters filled from the file, tensor
by tensor: nothing is held twice.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxdiff import nn
from jaxdiff.pretrained import (
    autoencoder,
    clip,
    dinov2,
    dit,
    files,
    hub,
    naming,
    remedies,
    schedulers,
    sit,
    tokenizer,
    two_texts,
    unet,
)
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.loaded import Autoencoder, Denoising, TextEncoder, Vision
from jaxdiff.pretrained.schedulers import Schedule
from jaxdiff.typing import Array, PyTree

__all__ = ["KINDS", "Loaded", "Place", "load"]

Loaded: TypeAlias = Denoising | Autoencoder | TextEncoder | Vision
Place: TypeAlias = Callable[[PyTree], PyTree]
"""From parameters' shapes to where each lies: ``partial(parallel.shardings, mesh=mesh)``."""
PIPELINE = "model_index.json"
SCHEDULER = "scheduler_config.json"


class _Found(NamedTuple):
    """A config, the tensors beside it, and how they are to be loaded."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    dtype: Any
    place: Place | None

    def params(self, table: naming.Table, like: PyTree) -> PyTree:
        """Fill the parameters of a network."""
        if self.place is not None:
            like = jax.tree.map(
                lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                like,
                self.place(like),
            )
        try:
            return naming.fill(table, self.tensors, like, self.dtype)
        except naming.NamingError as error:
            said = remedies.remedy(error, self.config, table, list(self.tensors))
            error.args = (f"{self.folder}: {error}\n{said}",)
            raise
        except WeightsError as error:
            error.args = (f"{self.folder}: {error}",)
            raise


def load(path: Any, *, dtype: Any = "float32", place: Place | None = None) -> Loaded:
    """Load published weights.

    Args:
        path: a folder in the layout of diffusers or transformers, of a component (`config.json`
            and weights) or of a pipeline (`model_index.json`); a file of the weights of DiT, SiT
            or DINOv2 under the names of their repositories; or a hub id, "owner/name".
        dtype: of the parameters and the computation: float32, bfloat16, float16, or float64 where
            JAX has it.
        place: where the parameters lie, from their shapes; by default on one device. On a mesh:
            ``lambda params: parallel.shardings(params, mesh, fsdp=True)``.

    Returns:
        Parameters and pure functions of them: :class:`Denoising` of a denoising network or a
        pipeline, :class:`Autoencoder`, :class:`TextEncoder` or :class:`Vision`.

    Raises:
        FileNotFoundError: if there is no such folder or file, and it is no hub id.
        WeightsError: if it is damaged, unsafe, not complete, or of what is not supported, with the
            file's name; of a hub id, if it cannot be brought, saying what to bring by hand.
        ValueError: if a config asks for what is not supported, naming it.
        TypeError: if `dtype` is not floating point.
        ImportError: if what the extra `pretrained` brings is not installed.
    """
    dtype = naming.judged_dtype(dtype)
    where = Path(path)
    if where.is_dir():
        return _of_folder(where, dtype, place)
    if where.is_file():
        return _of_file(where, dtype, place)
    if isinstance(path, str) and hub.is_id(path):
        return _of_folder(hub.fetch(path), dtype, place)
    raise FileNotFoundError(
        f"`path` must be a folder, a file, or a hub id; got {str(path)!r}. There is no such folder "
        "or file here, and a hub id is owner/name."
    )


def _of_folder(folder: Path, dtype: Any, place: Place | None) -> Loaded:
    if (folder / PIPELINE).is_file():
        return _pipeline(folder, dtype, place)
    if (folder / "config.json").is_file():
        return _component(folder, dtype, place)
    held = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
    raise WeightsError(
        f"{folder} has no config.json and no {PIPELINE}. Give the folder of a component or of a "
        f"pipeline, or a file of weights. It holds {held}."
    )


def _component(folder: Path, dtype: Any, place: Place | None) -> Loaded:
    config, kind = _config(folder)
    tensors = files.open_weights(files.find(folder))
    return kind(_Found(folder, config, tensors, dtype, place))


def _config(folder: Path) -> tuple[dict[str, Any], "_Kind"]:
    """Read the config of a component, and find what loads it."""
    path = folder / "config.json"
    config = files.read_json(path)
    name = remedies.class_name(config)
    if name not in KINDS:
        raise WeightsError(f"{path} is of {name!r}; supported are {', '.join(KINDS)}.")
    return config, KINDS[name]


_PARTS = {
    "unet": Denoising,
    "transformer": Denoising,
    "vae": Autoencoder,
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder,
}
_BESIDE = ("scheduler", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor")
"""Parts of pipelines that need no loading of their own, or none."""


def _pipeline(folder: Path, dtype: Any, place: Place | None) -> Denoising:
    index = files.read_json(folder / PIPELINE)
    parts = [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value[:1] != [None]
    ]
    odd = [name for name in parts if name not in (*_PARTS, *_BESIDE)]
    networks = [name for name in parts if _PARTS.get(name) is Denoising]
    lone = "text_encoder_2" in parts and "text_encoder" not in parts  # SDXL's refiner
    if odd or lone or len(networks) != 1:
        raise WeightsError(
            f"{folder / PIPELINE} is a {index.get('_class_name')} of {', '.join(parts)}; supported "
            f"are pipelines of one unet or transformer, and of vae, text_encoder, text_encoder_2 "
            f"beside it, {', '.join(_BESIDE)}. Load its parts one by one, by their folders."
        )
    folders = {
        name: folder / name if (folder / name).is_dir() else folder
        for name in parts
        if name in _PARTS
    }
    missing = [name for name, part in folders.items() if not (part / "config.json").is_file()]
    if missing:
        raise WeightsError(
            f"{folder / PIPELINE} names {', '.join(missing)}; {folder} has no folder of that name "
            "with a config.json. Bring the whole pipeline."
        )
    for part in folders.values():  # before anything large is read
        _config(part)
    loaded: dict[str, Any] = {}
    for name, part in folders.items():
        loaded[name] = _component(part, dtype, place)
        if not isinstance(loaded[name], _PARTS[name]):
            raise WeightsError(
                f"{part / 'config.json'} is of {remedies.class_name(loaded[name].config)!r}, and "
                f"not that of a {name}. Is {part} the folder of another component?"
            )
    network, text = loaded[networks[0]], loaded.get("text_encoder")
    if "text_encoder_2" in loaded:
        null_is_zero = bool(index.get("force_zeros_for_empty_prompt", True))
        both = loaded["text_encoder"], loaded["text_encoder_2"]
        text = two_texts.together(*both, null_is_zero=null_is_zero)
    return network._replace(autoencoder=loaded.get("vae"), text=text)


def _of_file(path: Path, dtype: Any, place: Place | None) -> Loaded:
    tensors = _averages(files.open_weights(path))
    shapes = {key: tuple(tensors.spec(key).shape) for key in tensors}
    found = functools.partial(_Found, path, tensors=tensors, dtype=dtype, place=place)
    if "x_embedder.proj.weight" in shapes and "y_embedder.embedding_table.weight" in shapes:
        config = dit.config_of(shapes)
        named = {name: name.lower() in path.name.lower() for name in ("SiT", "DiT")}
        if sum(named.values()) != 1:
            raise WeightsError(
                f"{path} holds the weights of DiT or of SiT, whose names and shapes are the same. "
                "Let the name of the file say which: it must have one of DiT and SiT in it."
            )
        return KINDS["SiT" if named["SiT"] else "DiT"](found(config=config))
    if "patch_embed.proj.weight" in shapes and "cls_token" in shapes:
        return KINDS["Dinov2Model"](found(config=dinov2.config_of(shapes)))
    first = ", ".join(itertools.islice(shapes, 3))
    raise WeightsError(
        f"{path} has {len(shapes)} tensors, {first} ...: not the weights of DiT, SiT or DINOv2 "
        "under the names of their repositories. Of anything else give the folder, with the "
        "config.json beside the weights."
    )


class _Part(files.Tensors):
    """The tensors whose keys begin alike, without that beginning."""

    def __init__(self, tensors: files.Tensors, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]

    def __getitem__(self, key: str) -> Any:
        return self._tensors[self._prefix + key]

    def __iter__(self) -> Any:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def spec(self, key: str) -> files.Spec:
        """See :class:`files.Tensors`."""
        return self._tensors.spec(self._prefix + key)


def _averages(tensors: files.Tensors) -> files.Tensors:
    """Return the averaged weights of a checkpoint that has them beside others."""
    part = _Part(tensors, "ema.")
    return part if len(part) else tensors


def _taken(found: _Found, module: Any, method: str = "__call__") -> tuple[PyTree, Any]:
    """Take the network of a config apart: the shapes of its parameters, and its function."""
    from flax import nnx

    try:
        made = nnx.eval_shape(lambda: module.make(found.config, dtype=found.dtype))
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{found.folder}: {error}") from error
    return nn.functional(made, method)


def _autoencoder(found: _Found) -> Autoencoder:
    like, encode = _taken(found, autoencoder, "encode")
    _, decode = _taken(found, autoencoder, "decode")
    return Autoencoder(found.params(autoencoder.TABLE, like), encode, decode, found.config)


def _text(found: _Found) -> TextEncoder:
    like, apply = _taken(found, clip)
    params = found.params(clip.TABLE, like)
    length = found.config.get("max_position_embeddings", 77)
    _, _, number = found.folder.name.partition("text_encoder")  # tokenizer_2 is of text_encoder_2
    beside = (found.folder / f"../tokenizer{number}", found.folder)
    folder = next((each for each in beside if _has_tokenizer(each)), None)
    tokenize = tokenizer.missing(found.folder) if folder is None else tokenizer.read(folder, length)

    def encode(params: PyTree, tokens: Array) -> Array:
        return apply(params, tokens).tokens

    return TextEncoder(params, tokenize, encode, found.config, apply)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _vision(found: _Found) -> Vision:
    like, apply = _taken(found, dinov2)
    _, patches = _taken(found, dinov2, "patches")
    return Vision(found.params(dinov2.TABLE, like), apply, patches, found.config)


def _unet(found: _Found) -> Denoising:
    schedule = _schedule(found)
    if schedule is None:
        raise WeightsError(
            f"{found.folder} has no scheduler beside it, which says what the network was trained "
            f"on: put {SCHEDULER} there, or load the folder of the pipeline."
        )
    like, apply = _taken(found, unet)
    params = found.params(unet.TABLE, like)
    return Denoising.of(schedule, apply, params, found.config)


def _dit(found: _Found, module: Any = dit) -> Denoising:
    like, apply = _taken(found, module)
    params = found.params(module.TABLE, like)
    null = like["conditioning"]["labels"].shape[0] - 1
    schedule = _schedule(found, cuts_variance=True) if module is dit else None
    if schedule is None:
        return Denoising(module.model(apply), params, None, None, found.config, null)
    return Denoising.of(schedule, apply, params, found.config, num_classes=null)


def _schedule(found: _Found, cuts_variance: bool = False) -> Schedule | None:
    """Read the scheduler's config that lies beside a component."""
    for path in (found.folder / "../scheduler" / SCHEDULER, found.folder / SCHEDULER):
        if path.is_file():
            try:
                return schedulers.read(files.read_json(path), cuts_variance=cuts_variance)
            except WeightsError as error:
                raise WeightsError(f"{path.resolve()}: {error}") from error
    return None


_Kind: TypeAlias = Callable[[_Found], Loaded]
KINDS: dict[str, _Kind] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "Transformer2DModel": _dit,
    "DiT": _dit,
    "SiT": functools.partial(_dit, module=sit),
    "AutoencoderKL": _autoencoder,
    **dict.fromkeys(clip.ARCHITECTURES, _text),
    **dict.fromkeys(dinov2.ARCHITECTURES, _vision),
}
"""What is loaded, by the name of its class."""
