"""Rules that the tables of models share: those of a layer, and of blocks of diffusers."""

from jaxdiff.pretrained.naming import Rule, Table

__all__ = ["attention", "layer", "norm", "residual"]


def norm(source: str, path: str) -> Table:
    """Return the rules of a normalisation.

    Args:
        source: regular expression of its name in the file.
        path: of the module, filled with the groups of `source`.
    """
    return (
        Rule(rf"{source}\.weight", f"{path}.scale"),
        Rule(rf"{source}\.bias", f"{path}.bias"),
    )


def layer(source: str, path: str, layout: str, part: tuple[int, int] | None = None) -> Table:
    """Return the rules of a dense layer or a convolution, given as :func:`norm` is."""
    return (
        Rule(rf"{source}\.weight", f"{path}.kernel", layout, part),
        Rule(rf"{source}\.bias", f"{path}.bias", "same", part),
    )


def residual(source: str, path: str) -> Table:
    """Return the rules of a :class:`jaxdiff.nn.residual.ResidualBlock`, given likewise."""
    return (
        *norm(rf"{source}\.norm1", f"{path}.norm_in"),
        *layer(rf"{source}\.conv1", f"{path}.conv_in", "conv"),
        *layer(rf"{source}\.time_emb_proj", f"{path}.modulation", "linear"),
        *norm(rf"{source}\.norm2", f"{path}.norm_out"),
        *layer(rf"{source}\.conv2", f"{path}.conv_out", "conv"),
        *layer(rf"{source}\.conv_shortcut", f"{path}.shortcut", "linear"),
    )


def attention(source: str, path: str) -> Table:
    """Return the rules of attention among pixels, under its new and its first names."""
    return (
        *norm(rf"{source}\.group_norm", f"{path}.norm"),
        *layer(rf"{source}\.(?:to_q|query)", f"{path}.qkv", "linear", (0, 3)),
        *layer(rf"{source}\.(?:to_k|key)", f"{path}.qkv", "linear", (1, 3)),
        *layer(rf"{source}\.(?:to_v|value)", f"{path}.qkv", "linear", (2, 3)),
        *layer(rf"{source}\.(?:to_out\.0|proj_attn)", f"{path}.projection", "linear"),
    )
