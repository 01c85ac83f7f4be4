"""Records of every kind through one pipeline, stored ones, and what makes them ready for a loss."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdiff import data, losses, processes, rows
from jaxdiff.data import stored

KEY = jax.random.key(0)


def take(iterator, count):
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def signals(count=10):
    rng = np.random.default_rng(0)
    return {
        "signal": rng.normal(size=(count, 5)).astype(np.float32),
        "text": {"tokens": rng.integers(0, 9, (count, 3)), "length": np.arange(count)},
    }


# --- One pipeline ---------------------------------------------------------------------------


class Own:
    """Records of a user's own, which know nothing of this library."""

    def __len__(self):
        return 10

    def rows(self, indices):
        return {"index": indices, "square": (indices**2)[:, None] * np.ones(3)}


def kinds(tmp_path):
    arrays = signals()
    stored.write(tmp_path / "store", [arrays], shard_size=4)
    return data.from_arrays(arrays), stored.open(tmp_path / "store")


def test_records_of_every_kind_are_read_in_the_same_order(tmp_path):
    in_memory, on_disk = kinds(tmp_path)
    assert all(isinstance(each, data.Records) for each in (in_memory, on_disk, Own()))
    readers = [take(data.batches(each, 4, seed=3), 6) for each in (in_memory, on_disk, Own())]
    for step, (one, two, own) in enumerate(zip(*readers, strict=True)):
        indices = data.batch_indices(10, 4, 3, step)
        np.testing.assert_array_equal(own["index"], indices)
        np.testing.assert_array_equal(own["square"][:, 2], indices**2)
        assert jax.tree.structure(one) == jax.tree.structure(two)
        for read in (one, two):
            wanted = jax.tree.map(lambda leaf, i=indices: leaf[i], signals())
            jax.tree.map(np.testing.assert_array_equal, read, wanted)
            assert read["signal"].dtype == np.float32


@pytest.mark.parametrize("count", [1, 2])
def test_records_are_shared_by_processes_and_resumed_at_any_step(tmp_path, count):
    for records in kinds(tmp_path):
        whole = take(data.batches(records, 4, seed=1), 5)
        for p in range(count):
            options = {"process_index": p, "process_count": count, "start_step": 2}
            for step, share in enumerate(take(data.batches(records, 4, seed=1, **options), 3)):
                mine = slice(p * 4 // count, (p + 1) * 4 // count)
                wanted = jax.tree.map(lambda leaf, s=mine: leaf[s], whole[step + 2])
                jax.tree.map(np.testing.assert_array_equal, share, wanted)


def test_arrays_are_not_copied_and_refuse_writing():
    array = np.zeros((4, 2))
    records = data.from_arrays({"x": array})
    array[1] = 7.0
    np.testing.assert_array_equal(records.rows(np.array([1]))["x"], [[7.0, 7.0]])
    assert "Arrays('arrays', 4 x" in repr(records)


class Scalar(Own):
    def rows(self, indices):
        return {"index": 3}


class Empty(Own):
    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: data.from_arrays(np.zeros(3)), TypeError, "`arrays` must be arrays by name"),
        (lambda: data.from_arrays({}), ValueError, "`arrays` must have one leading axis"),
        (lambda: data.from_arrays({"x": np.zeros((0, 3))}), ValueError, r"\['x'\] \(0, 3\)"),
        (lambda: data.from_arrays({"x": 3.0}), ValueError, "one leading axis"),
        (
            lambda: data.from_arrays({"x": np.zeros(3), "y": np.zeros(4)}),
            ValueError,
            r"\['x'\] \(3,\), \['y'\] \(4,\)",
        ),
        (lambda: data.from_arrays({"x": ["a", "b"]}), TypeError, r"`arrays\['x'\]\[0\]` must hold"),
        (lambda: data.batches(np.zeros(3), 1, seed=0), TypeError, "`records` must have a length"),
        (lambda: data.batches(Empty(), 1, seed=0), ValueError, "0 examples of the data set"),
        (lambda: data.batches(Scalar(), 1, seed=0), ValueError, "`records.rows` must give one row"),
    ],
)
def test_what_are_no_records_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- Stored arrays --------------------------------------------------------------------------


def test_a_store_gives_back_what_was_written_however_it_was_cut(tmp_path):
    arrays = signals(23)
    latent = np.random.default_rng(1).normal(size=(23, 2, 2)).astype(ml_dtypes.bfloat16)
    for number, sizes in enumerate(([23], [1] * 23, [7, 9, 7], [16, 7])):
        ends = np.cumsum([0, *sizes])
        examples = (
            jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], {**arrays, "latent": latent})
            for a, b in zip(ends, ends[1:], strict=False)
        )
        folder = tmp_path / str(number)
        stored.write(folder, examples, shard_size=8, attributes={"scale": 0.18215})
        found = stored.open(folder)
        assert len(found) == 23
        assert found.attributes == {"scale": 0.18215}
        order = np.random.default_rng(2).permutation(23)
        got = found.rows(order)
        assert got["latent"].dtype == ml_dtypes.bfloat16
        wanted = jax.tree.map(lambda leaf, i=order: leaf[i], {**arrays, "latent": latent})
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        index = json.loads((folder / "index.json").read_text())
        assert [shard["num_examples"] for shard in index["shards"]] == [8, 8, 7]
    with pytest.raises(IndexError, match=r"0\.\.22"):
        found.rows(np.array([23]))


def test_a_store_is_whole_or_not_there(tmp_path):
    def failing():
        yield signals(8)
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        stored.write(tmp_path / "store", failing(), shard_size=4)
    assert os.listdir(tmp_path) == []
    stored.write(tmp_path / "store", [signals()])
    with pytest.raises(FileExistsError, match="holds something already"):
        stored.write(tmp_path / "store", [signals()])
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "index", "format"])
def test_a_damaged_store_is_refused_naming_the_file(tmp_path, harm):
    stored.write(tmp_path / "s", [signals()], shard_size=4)
    file, index = tmp_path / "s" / "00001-0.npy", tmp_path / "s" / "index.json"
    raw = bytearray(file.read_bytes())
    if harm == "flip":
        raw[-1] ^= 1
        file.write_bytes(raw)
        stored.open(tmp_path / "s", verify=False)
    elif harm == "cut":
        file.write_bytes(raw[:-1])
    elif harm == "gone":
        file.unlink()
    elif harm == "index":
        index.write_text(index.read_text()[:-40])
    else:
        index.write_text(index.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(data.UnreadableError) as caught:
        stored.open(tmp_path / "s")
    named = index if harm in ("index", "format") else file
    assert str(named) in str(caught.value)


def test_stores_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(data.NotPreparedError, match="`folder` must be a store"):
        stored.open(tmp_path)
    other = {**signals(), "signal": np.zeros((10, 6), np.float32)}
    for examples, error, said in (
        ([], ValueError, "`examples` must give one at least"),
        ([signals(), other], ValueError, r"`examples\[1\]` must be like those before"),
        ([{"x": np.zeros(3), "y": np.zeros(2)}], ValueError, "one leading axis"),
        ([{"x": np.array(["a"])}], TypeError, "must hold numbers"),
        ([{"a/b": np.zeros(3)}], TypeError, "without a slash"),
    ):
        with pytest.raises(error, match=said):
            stored.write(tmp_path / "s", examples)
    assert os.listdir(tmp_path) == []


# --- What was read, made ready --------------------------------------------------------------


def images(count=8):
    rng = np.random.default_rng(3)
    levels = rng.integers(0, 17, (count, 4, 4, 1)).astype(np.uint8)
    return {"image": levels, "label": np.arange(count, dtype=np.int32) % 3}


def seen(params, key, batch):
    """A loss that reports what it is given."""
    del params
    shown = jnp.sum(batch["x0"], axis=(1, 2, 3))
    extra = {"cond": batch["cond"]} if "cond" in batch else {}
    return shown, {"noise": rows.uniform(key, shown.shape[0]), **extra}


def apply(params, x_t, t, cond=None, *, key=None):
    del t, cond, key
    return x_t * params["w"]


def test_a_prepared_loss_splits_its_key_as_a_loss_of_levels_always_did():
    """The bits of every run of before: the first half of the key dequantises."""
    denoising = losses.denoising(apply, processes.cosine(), drop_cond=0.5, null_cond=3)
    made = data.prepared(denoising, data.dequantized_images(17))
    batch, params = images(), {"w": jnp.float32(0.5)}

    @jax.jit
    def by_hand(key, batch):
        key_data, key_loss = jax.random.split(key)
        x0 = data.dequantize(key_data, batch["image"], 17)
        return denoising(params, key_loss, {"x0": x0, "cond": batch["label"]})

    for key in (KEY, rows.part_key(KEY, 3, 2, 64)):
        got, wanted = jax.jit(made)(params, key, batch), by_hand(key, batch)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("flip", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rows_that_a_batch_numbers_are_prepared_as_in_the_whole(flip):
    prepare = data.dequantized_images(17, flip=flip)
    batch, numbers = images(), np.array([5, 0, 7])
    whole = prepare((), KEY, batch)
    part = jax.tree.map(lambda leaf: leaf[numbers], batch)
    numbered = rows.Rows(jnp.asarray(numbers), jnp.full(3, 8))
    got = prepare((), KEY, {**part, "rows": numbered})
    np.testing.assert_array_equal(got["x0"], whole["x0"][numbers])
    assert got["rows"] is numbered
    kept = {}

    def look(params, key, batch):
        kept.update(batch)
        return batch["x0"][:, 0, 0, 0], {}

    data.prepared(look, lambda frozen, key, batch: {"x0": batch["image"] * 1.0})(
        (), KEY, {**part, "rows": numbered}
    )
    assert kept["rows"] is numbered  # also where `prepare` says nothing of it


def test_flips_mirror_half_of_the_images_and_draw_by_row():
    count = 400
    levels = np.random.default_rng(4).integers(0, 17, (count, 2, 3, 1)).astype(np.uint8)
    made = data.dequantized_images(17, flip=True)((), KEY, {"image": levels})
    back = np.asarray(data.to_levels(made["x0"], 17))
    straight = (back == levels).all(axis=(1, 2, 3))
    mirrored = (back == levels[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (straight | mirrored).all()
    # 200 expected; the standard error is 10.
    assert abs(int(mirrored.sum()) - 200) < 40
    first = data.dequantized_images(17, flip=True)((), KEY, {"image": levels[:7]})
    np.testing.assert_array_equal(first["x0"], made["x0"][:7])
    plain = data.dequantized_images(17)((), KEY, {"image": levels})
    assert "cond" not in plain
    np.testing.assert_array_equal(plain["x0"], data.dequantize(KEY, levels, 17))


def encoded(count, **options):
    rng = np.random.default_rng(5)
    return {
        "mean": rng.normal(size=(count, 2, 2, 3)).astype(np.float32),
        "deviation": rng.uniform(0.1, 2.0, (count, 2, 2, 3)).astype(np.float32),
        **options,
    }


def test_latents_are_drawn_about_their_means_by_row():
    text = {"tokens": np.arange(12).reshape(6, 2), "mask": np.ones((6, 2), bool)}
    batch = encoded(6, text=text, label=np.arange(6))
    prepare = data.latents(scale=0.5, shift=0.25)
    part = jax.tree.map(lambda leaf: leaf[1::2], batch)

    @jax.jit
    def drawn(key, batch, part):
        """The whole; a part of it, by its key as under pmap, or by numbers; and the noise."""
        numbered = rows.Rows(jnp.asarray([1, 3, 5]), jnp.full(3, 6))
        by_key = prepare((), rows.part_key(key, 1, 2, 6), part)["x0"]
        by_number = prepare((), key, {**part, "rows": numbered})["x0"]
        return prepare((), key, batch), by_key, by_number, rows.normal(key, batch["mean"])

    made, by_key, by_number, noise = drawn(KEY, batch, part)
    wanted = 0.5 * (batch["mean"] + batch["deviation"] * noise - 0.25)
    assert made.keys() == {"x0", "cond", "label"}
    assert made["x0"].dtype == jnp.float32
    np.testing.assert_allclose(made["x0"], wanted, atol=1e-6)  # the compiler's own order of sums
    jax.tree.map(np.testing.assert_array_equal, made["cond"], text)
    np.testing.assert_array_equal(by_key, made["x0"][1::2])
    np.testing.assert_array_equal(by_number, made["x0"][1::2])


def test_latents_have_the_moments_of_their_rows():
    count = 4000
    one = jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=0), encoded(1))
    x0 = np.asarray(data.latents(scale=2.0, shift=-1.0)((), KEY, one)["x0"], np.float64)
    mean, std = 2.0 * (one["mean"][0] + 1.0), 2.0 * one["deviation"][0]
    errors = np.abs(x0.mean(axis=0) - mean) / std * count**0.5
    of_variance = np.abs(x0.var(axis=0) / std**2 - 1.0) * (count / 2) ** 0.5
    print("standard errors", errors.max(), of_variance.max())
    assert max(errors.max(), of_variance.max()) < 4.0
    plain = data.latents(scale=2.0, shift=-1.0, deviations=False)
    for batch in (one, {"mean": one["mean"]}):
        made = plain((), KEY, batch)
        assert made.keys() == {"x0"}
        np.testing.assert_array_equal(made["x0"], np.float32(2) * (one["mean"] + np.float32(1)))
    halves = jax.tree.map(lambda leaf: leaf.astype(np.float16), one)
    assert data.latents(scale=np.float64(2))((), KEY, halves)["x0"].dtype == jnp.float32


def test_what_is_frozen_prepares_and_gets_no_gradient():
    def prepare(frozen, key, batch):
        del key
        return {"x0": batch["signal"] @ frozen["encoder"]}

    def loss(params, key, batch):
        del key
        return jnp.sum(batch["x0"] * params["w"][None], axis=-1), {}

    batch = {"signal": np.ones((4, 3))}

    def mean(w, encoder):
        frozen = {"encoder": encoder}
        value, _ = data.prepared(loss, prepare, frozen=frozen)({"w": w}, KEY, batch)
        return jnp.mean(value)

    of_params, of_frozen = jax.grad(mean, argnums=(0, 1))(jnp.ones(2), jnp.full((3, 2), 2.0))
    np.testing.assert_allclose(of_params, [6.0, 6.0])
    np.testing.assert_array_equal(of_frozen, np.zeros((3, 2)))


def nothing(frozen, key, batch):
    return {"image": batch["image"]}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.prepared(seen, 3), TypeError, "`prepare` must be a function"),
        (lambda: data.prepared(seen, lambda batch: batch), TypeError, "does not take 3 arguments"),
        (lambda: data.prepared(3, nothing), TypeError, "`loss_fn` must be a function"),
        (
            lambda: data.prepared(seen, nothing)({}, KEY, images()),
            ValueError,
            '`prepare` must return "x0"; got image',
        ),
        (
            lambda: data.prepared(seen, lambda f, k, b: b["image"])({}, KEY, images()),
            TypeError,
            "`prepare` must return",
        ),
        (lambda: data.dequantized_images(1), ValueError, "`num_levels` must be in 2..256"),
        (lambda: data.dequantized_images(17, flip=1), TypeError, "`flip` must be true or false"),
        (
            lambda: data.dequantized_images(17)((), KEY, {"x0": 1}),
            ValueError,
            '`batch` must hold "image"; got x0',
        ),
        (lambda: data.latents(scale=0.0), ValueError, "`scale` must"),
        (lambda: data.latents(shift=jnp.inf), ValueError, "`shift` must"),
        (lambda: data.latents(deviations=1), TypeError, "`deviations` must be true or false"),
        (
            lambda: data.latents()((), KEY, {"mean": np.zeros((2, 3))}),
            ValueError,
            '`batch` must hold "deviation"; got mean',
        ),
        (
            lambda: data.latents()((), KEY, {"mean": np.zeros((2, 3)), "deviation": np.ones(2)}),
            ValueError,
            r'batch\["deviation"\] must have the shape of batch\["mean"\], \(2, 3\); got \(2,\)',
        ),
        (
            lambda: data.latents()((), KEY, encoded(2, mean=np.zeros((2, 2, 2, 3), int))),
            TypeError,
            r'batch\["mean"\]` must hold floating-point numbers',
        ),
    ],
)
def test_what_prepares_nothing_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
