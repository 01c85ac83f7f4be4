"""Arrays stored on disk as records: latents, embeddings, or whatever is costly to make twice.

    stored.write(folder, ({"latent": encode(x), "text": tokens(x)} for x in batches_of_images))
    stored.write_shards(folder, len(images), lambda first, last: encode(images, first, last))
    latents = stored.open(folder)

A store is a folder of .npy files, one a field and shard, that NumPy alone reads, and `index.json`,
which says what they hold, with the SHA-256 of each, and is written last: there is a whole store or
none. `write` makes one of what comes, beside its place, and renames it there; `write_shards` makes
one of rows by their numbers, in its place, and goes on where it was killed. Reading maps the files
into memory.
"""

from jaxdiff.data.stored.fingerprints import fingerprint
from jaxdiff.data.stored.layout import FORMAT, INDEX, SHARD_SIZE
from jaxdiff.data.stored.reading import Stored, open  # noqa: A004
from jaxdiff.data.stored.sharded import write_shards
from jaxdiff.data.stored.whole import write

__all__ = [
    "FORMAT",
    "INDEX",
    "SHARD_SIZE",
    "Stored",
    "fingerprint",
    "open",
    "write",
    "write_shards",
]
