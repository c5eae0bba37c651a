"""Training is the same on one device, on several, and on several machines."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from keras_blur import learners, meta, tasks
from keras_blur.backend import Runner, replicas, total
from keras_blur.distribution import ALL, Shard, mean, shard

SCRIPT = pathlib.Path(__file__).parents[1] / "replicas.py"


def test_without_a_strategy_a_share_is_all():
    assert (shard(), replicas()) == (ALL, 1)
    values = {"a": tf.range(6.0), "b": tf.constant(2.0)}
    for same in (mean(values), ALL.part(values, 0), ALL.whole(values, 0)):
        assert same["a"].numpy().tolist() == [0, 1, 2, 3, 4, 5]
        assert float(same["b"]) == 2.0
    assert total([tf.constant(3)])[0].numpy() == 3
    assert Runner().writes_files


def test_a_shard_in_a_block_has_places_in_a_row():
    values = tf.reshape(tf.range(48), (6, 4, 2))
    for index in range(2):
        own = Shard(index, 2, in_blocks=True)
        np.testing.assert_array_equal(own.part(values, 0), values[3 * index : 3 * index + 3])
        np.testing.assert_array_equal(own.part(values, 1), values[:, 2 * index : 2 * index + 2])
        np.testing.assert_array_equal(own.places(3), [3 * index, 3 * index + 1, 3 * index + 2])


@pytest.mark.parametrize("axis", [0, 1])
def test_shares_are_disjoint_and_together_all(axis):
    values = tf.reshape(tf.range(48), (6, 4, 2))
    count = 2
    parts = [Shard(index, count).part({"x": values, "n": tf.constant(5)}, axis) for index in range(count)]
    assert all(int(part["n"]) == 5 for part in parts)
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(part["x"], np.take(values, range(index, values.shape[axis], count), axis))
    with pytest.raises(ValueError, match=r"An axis of 6 cannot be split into equal shards for 4 replicas"):
        Shard(0, 4).part(values, 0)


def asked(**options):
    return [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(options)]


def result(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


def start(**options):
    return subprocess.Popen(asked(**options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(**options):
    return result(start(**options))


def free_ports(count):
    """The first of so many ports in a row that are free."""
    for first in range(20000 + 7 * (time.time_ns() % 1000), 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


def run_workers(workers, **options):
    port = free_ports(workers)
    processes = [start(worker=number, workers=workers, port=port, **options) for number in range(workers)]
    return [result(process) for process in processes]


def assert_same(found, wanted, tolerance):
    """All variables and predictions, relative to the largest of each; metrics too."""
    for name in ("values", "predicted"):
        one, other = np.array(found[name]), np.array(wanted[name])
        assert one.shape == other.shape
        if one.size:
            assert np.abs(one - other).max() <= tolerance * np.abs(other).max()
    for name, column in wanted["history"].items():
        np.testing.assert_allclose(found["history"][name], column, rtol=1e-5, err_msg=name)
    assert found["apart"] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unroll", "truncated", "es", "pes", "cma", "warpgrad", "offline"])
def test_meta_training_does_not_depend_on_the_number_of_replicas(case):
    alone = run(what="meta", case=case, replicas=0)
    assert np.ptp(alone["values"]) > 0.1
    for count in (2, 4):
        assert_same(run(what="meta", case=case, replicas=count), alone, 1e-6)
    if case == "unroll":
        assert_same(run(what="meta", case=case, replicas=2, jit=True), alone, 1e-6)


@pytest.mark.slow
def test_copies_have_the_same_networks_on_any_number_of_replicas():
    alone, two = (run(what="meta", case="unroll", replicas=count, copies=True) for count in (0, 2))
    assert_same(two, alone, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["normalised", "summed", "errors", "dropout", "whitened"])
def test_fit_does_not_depend_on_the_number_of_replicas(case):
    alone = run(what="fit", case=case, replicas=0)
    tolerance = 1e-5 if case == "whitened" else 1e-6  # Newton-Schulz iterations enlarge rounding of the sums
    for count in (1, 2, 4) if case == "errors" else (2, 4):
        assert_same(run(what="fit", case=case, replicas=count), alone, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one step", "difference", "cut", "sampler", "evograd", "scaled"])
def test_bilevel_training_does_not_depend_on_the_number_of_replicas(case):
    alone = run(what="bilevel", case=case, replicas=0)
    for count in (2, 4) if case == "one step" else (2,):
        assert_same(run(what="bilevel", case=case, replicas=count), alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "what", "case"), [(2, "meta", "pes"), (4, "meta", "unroll"), (2, "fit", "errors")])
def test_several_machines_train_as_one_device_does(workers, what, case):
    alone = run(what=what, case=case, replicas=0)
    for found in run_workers(workers, what=what, case=case):
        assert_same(found, alone, 1e-6)


@pytest.mark.slow
def test_killed_workers_go_on_to_the_same_bits(tmp_path):
    unbroken, broken = (str(tmp_path / name) for name in ("a.weights.h5", "b.weights.h5"))
    options = {"what": "meta", "case": "truncated", "epochs": 3}
    wanted = run_workers(2, **options, checkpoint=unbroken)
    port = free_ports(2)
    # They stay in the second epoch, so the checkpoint is that of the first.
    processes = [start(worker=n, workers=2, port=port, **options, checkpoint=broken, stay=1) for n in range(2)]
    try:
        deadline = time.time() + 300
        while not pathlib.Path(broken).exists():
            assert time.time() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGKILL)
            process.communicate()
    found = run_workers(2, **options, checkpoint=broken)
    for one, other in zip(found, wanted, strict=True):
        assert one["values"] == other["values"]
        assert len(one["history"]["loss"]) == 2  # the epochs that were left


def test_tasks_must_be_dealt_out_evenly(monkeypatch):
    monkeypatch.setattr(Runner, "replicas", 2)
    with pytest.raises(ValueError, match=r"`meta_batch_size` must be a multiple of the 2 replicas .* meta_batch_size=3"):
        meta.MetaTrainer(tasks.images("digits"), learners.Blur((4,)), meta.Unroll(2), meta_batch_size=3)
