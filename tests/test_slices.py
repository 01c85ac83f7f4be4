"""Meshes over slices, what their programs move, and restarts on other numbers of devices."""

import dataclasses
import functools
import json
import types

import jax
import pytest
from servers import free_port
from test_parallel import HERE, finish, start

from experiments.common.command import Refusal
from experiments.common.devices import Running, parts_for, sharing
from jaxdiff.devices.collectives import Collective, collectives
from jaxdiff.devices.slices import arrange
from jaxdiff.training import parallel, run


def tpus(count, per_slice=8):
    """Chips of TPU v4 slices of 2 x 2 x 2, four to a process, the slices dealt out by turns."""
    of_slices = [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v4",
            coords=(3 * i % 2, 3 * i // 2 % 2, 3 * i // 4 % 2),  # not in the order of the chips
            core_on_chip=0,
            slice_index=number,
            process_index=count * (i // 4) + number,
            id=number * per_slice + i,
        )
        for i in range(per_slice)
        for number in range(count)
    ]
    return sorted(of_slices, key=lambda each: (each.process_index, each.id))


def others(platform, slices):
    return [
        types.SimpleNamespace(platform=platform, device_kind="one", slice_index=number, id=i)
        for i, number in enumerate(slices)
    ]


def ids(grid):
    return [[each.id for each in row] for row in grid]


@pytest.mark.parametrize(("data", "fsdp"), [(2, 8), (4, 4), (8, 2), (16, 1)])
def test_rows_of_a_mesh_are_of_one_tpu_slice_and_slices_follow_each_other(data, fsdp):
    grid = arrange(tpus(2), data, fsdp, by_network=True)
    assert grid.shape == (data, fsdp)
    assert [each.slice_index for each in grid.flat] == [0] * 8 + [1] * 8


def test_devices_of_a_tpu_slice_are_ordered_by_where_they_are():
    grid = arrange(tpus(2), 4, 4, by_network=True)
    for row in grid:  # a plane of the torus, whichever
        assert any(len({each.coords[axis] for each in row}) == 1 for axis in range(3))
    given = arrange(tpus(2), 4, 4)
    assert ids(given) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_gpus_are_ordered_by_node_and_cpus_as_they_come():
    by_turns = [0, 1] * 4
    assert ids(arrange(others("gpu", by_turns), 2, 4)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert ids(arrange(others("cpu", by_turns), 2, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids(arrange(others("cpu", by_turns), 2, 4, slices=by_turns)) == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


def test_an_axis_that_no_slice_holds_is_refused_unless_asked_for():
    nodes = others("gpu", [0] * 4 + [1] * 4)
    with pytest.raises(ValueError, match="`fsdp` must divide the 4 devices of a slice; got 8"):
        arrange(nodes, 1, 8)
    assert ids(arrange(nodes, 1, 8, slices=1)) == [[*range(8)]]
    with pytest.raises(ValueError, match="`devices` must be as many of each slice; got 3, 5"):
        arrange(others("gpu", [0] * 3 + [1] * 5), 4, 2)
    for slices, said in (
        (3, "divide the number of devices, 8"),
        ([0, 1], "each of the 8 devices"),
        (0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=f"`slices` must.*{said}"):
            arrange(nodes, 4, 2, slices=slices)
    with pytest.raises(TypeError, match="`slices` must be a whole number"):
        parallel.make_mesh(jax.device_count(), slices=1.5)


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "replica_groups={}": (tuple(range(8)),),
    "replica_groups=[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "replica_groups=mesh['a'=2,'b'=4] {'b'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": (
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ),
    "replica_groups=mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
}


@pytest.mark.parametrize("written", GROUPS)
def test_groups_are_read_however_they_are_written(written):
    line = f"  %one.1 = f32[4,8]{{1,0}} all-reduce(%x), channel_id=1, {written}, to_apply=%add"
    assert collectives(line, 8) == [Collective("all-reduce", 128, GROUPS[written])]


@pytest.mark.parametrize(
    ("call", "num_bytes", "moved"),
    [
        ("(f32[8]{0}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y)", 40, 60.0),
        ("f32[8]{0} all-gather(%x)", 32, 24.0),
        ("(f32[2]{0:T(128)}, f32[8]{0}, u32[], u32[]) all-gather-start(%x)", 32, 24.0),
        ("((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%x, %y)", 48, 36.0),
        ("f32[2]{0} reduce-scatter(%x)", 32, 24.0),
        ("pred[16]{0} all-to-all(%x)", 16, 12.0),
    ],
)
def test_bytes_are_those_of_the_whole_array(call, num_bytes, moved):
    (found,) = collectives(f"  ROOT %one = {call}, replica_groups=[2,4]<=[8], dimensions={{0}}", 8)
    assert (found.num_bytes, found.moved) == (num_bytes, moved)
    assert not found.crosses([0] * 4 + [1] * 4)
    assert found.crosses([0, 1] * 4)


def test_a_permutation_crosses_where_a_pair_does():
    line = "%x = f32[4] collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    (found,) = collectives(line, 4)
    assert found.moved == 16.0
    assert not found.crosses([0, 0, 1, 1])
    assert found.crosses([0, 1, 1, 1])


def test_what_is_not_a_collective_or_is_of_one_device_moves_nothing():
    lines = (
        "%all-reduce.1 = f32[] add(%a, %b)",
        "%a = f32[4] all-reduce-done(%b)",
        "%a = f32[4] all-reduce(%b), replica_groups={{0},{1}}",
    )
    assert collectives("\n".join(lines), 2) == []
    with pytest.raises(ValueError, match="groups of a collective are not known"):
        collectives("%a = f32[4] all-reduce(%b), replica_groups=?", 2)


@functools.cache
def found(num_processes):
    script = HERE / "slices_run.py"
    if num_processes == 1:
        running = [start(8, script)]
    else:
        port = free_port()
        running = [start(4, script, port, i) for i in range(num_processes)]
    return [json.loads(out.splitlines()[-1]) for out in finish(running)][0]


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4), (4, 2)])
def test_gradients_alone_cross_slices_and_as_many_bytes_as_the_arithmetic_says(data, fsdp):
    results = found(1)
    mesh = results["meshes"][f"{data} x {fsdp}"]
    # docs/pods.md: the shards of the gradient, 8 P / N (D - 1) / D
    said = 8 * results["params"] / fsdp * (data - 1) / data
    # gradients of one axis, biases, are reduced before they are split; metrics are scalars
    assert said <= mesh["crossing"] < 1.1 * said
    assert mesh["kinds across"] == ["all-reduce"]
    if fsdp > 1:  # in another order parameters cross too, and twice: gathered, and their gradients
        assert mesh["in the order of jax.devices()"] > said + 4 * results["params"] / 2


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mesh_of_slices_ends_with_the_parameters_of_one_device(num_processes):
    for name, mesh in found(num_processes)["meshes"].items():
        print(name, mesh)
        slices = [i % 2 for row in mesh["ids"] for i in row]
        assert slices == sorted(slices)
        assert mesh["distance"] < 1e-5
        assert mesh["first"] == pytest.approx(1, rel=1e-6)
        if num_processes == 2:  # the rows of a process are not those that its devices need
            assert mesh["processes"] != sorted(mesh["processes"])


def test_a_run_on_eight_then_four_then_eight_devices_ends_as_the_unharmed_one():
    results = found(1)["elastic"]
    assert results["parts"] == [1, 2, 1]
    assert results["distance"] < 1e-5


def recorded(folder, running):
    run.write_record(folder, {"num_steps": 1}, also={"running": running})
    return folder


def test_a_batch_is_taken_in_parts_where_a_run_began_with_fewer_rows_a_device(tmp_path, capsys):
    eight = parallel.mode_of_one_device()._replace(num_shards=8, accumulate=1)
    began = Running(parallel="mesh").began(32, eight)
    assert began["rows_per_device"] == 4
    mode = Running().mode(32, recorded(tmp_path, began))
    assert mode.accumulate == 8
    assert "taken in 8 parts, for 4 rows a device" in capsys.readouterr().err
    assert Running(accumulate=2).mode(32, tmp_path).accumulate == 2
    assert Running().mode(4, tmp_path).accumulate == 1
    assert capsys.readouterr().err == ""


def test_a_run_without_such_a_record_takes_its_batch_whole(tmp_path):
    assert Running().mode(32).accumulate == 1
    assert Running().mode(32, tmp_path).accumulate == 1
    of_before = dataclasses.asdict(Running()) | {"accumulate": 4}
    assert Running().mode(32, recorded(tmp_path, of_before)).accumulate == 1


def test_parts_are_the_fewest_that_keep_the_rows():
    assert [parts_for(12, most) for most in (None, 12, 11, 6, 5, 4, 1)] == [1, 1, 2, 2, 3, 3, 12]


def test_a_number_of_devices_that_cannot_share_a_batch_is_refused_with_those_that_can():
    assert sharing(128, 6) == " 4 or 8 devices would share it."
    assert sharing(4, 8) == " 4 devices would share it."
    assert sharing(128, 8) == ""
    count = jax.device_count()
    with pytest.raises(Refusal, match="--slices: `slices` must divide"):
        Running(parallel="mesh", slices=count + 1).mode(32)
    with pytest.raises(Refusal, match="--slices 2 needs --parallel mesh"):
        Running(slices=2).start()
