"""A `tf.distribute.TPUStrategy` on a machine without a TPU: its cores are logical CPU devices.

Variables made in its scope, batches that it deals out and functions that it traces go through
TensorFlow's own code for TPU; what is traced cannot be executed here, but `program.py` cuts out of
it what each core would run. It leans on private names of the TensorFlow release in
requirements-verify.txt.
"""

from __future__ import annotations

import collections

import numpy as np
import tensorflow as tf
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

HOST = "/job:localhost/replica:0/task:0/device:"


def logical_cpus(count: int) -> None:
    """Makes so many CPU devices; before anything else is done with TensorFlow."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)


class _Resolver(tf.distribute.cluster_resolver.TPUClusterResolver):
    """Says that this host has so many TPU cores."""

    def __init__(self, cores: int):
        super().__init__(tpu="local")
        self._cores = cores

    def get_tpu_system_metadata(self) -> TPUSystemMetadata:
        device = collections.namedtuple("device", "name device_type memory_limit incarnation")
        devices = [device(f"{HOST}TPU:{core}", "TPU", 0, 0) for core in range(self._cores)]
        return TPUSystemMetadata(self._cores, num_hosts=1, num_of_cores_per_host=self._cores, topology=None, devices=devices)


def tpu_strategy(cores: int) -> tf.distribute.TPUStrategy:
    """The strategy, after `logical_cpus(cores)`."""
    strategy = tf.distribute.TPUStrategy(_Resolver(cores))
    devices = [f"{HOST}CPU:{core}" for core in range(cores)]
    host = devices[0]
    inner = strategy.extended
    inner._tpu_devices = np.array(devices, dtype=object)[:, None]
    inner._host_device = host
    inner._device_input_worker_devices = collections.OrderedDict([(host, devices)])
    inner._host_input_worker_devices = collections.OrderedDict([(host, [host] * cores)])
    return strategy
