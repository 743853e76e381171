"""Devices that are not there: a TPU slice as its compiler knows it, or GPUs by description."""

import dataclasses
import importlib.util
import os
import re

import numpy as np

from plm.errors import UserError
from plm.training.chips import CHIPS, Chip, chip

TPUS = ("v4", "v5e", "v5p", "v6e")
# JAX shows a v4 chip's two cores as one device; its description shows two unless told.
_SETTINGS = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """name: as given; platform: "tpu" | "gpu"; kind: of a device, as JAX calls it; devices: `jax.Device`s to compile
    for, or None for GPUs, which are only counted."""

    name: str
    platform: str
    kind: str
    count: int
    devices: list | None

    @property
    def chip(self) -> Chip:
        return chip(self.kind)


def describe(name: str, gpu: str = "NVIDIA H100 80GB HBM3") -> Topology:
    """`v5e:16x16`, `v4:4x4x4`, ... (through libtpu) or `gpu:8` (devices of kind `gpu`).

    Raises:
      UserError: a name that is not understood, a slice that does not exist, libtpu that is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in (*TPUS, "gpu"):
        raise UserError(
            f"--topology={name!r} must be {'|'.join(TPUS)}:SHAPE in chips, for example v5e:16x16 or v4:4x4x4, or gpu:8"
        )
    generation, shape = match[1], match[2]
    if generation == "gpu":
        if "x" in shape or not int(shape):
            raise UserError(f"--topology={name!r} must be gpu:COUNT, for example gpu:8")
        if chip(gpu) is None:
            known = ", ".join(kind for kind in CHIPS if not kind.startswith("TPU"))
            raise UserError(f"--gpu={gpu!r} is not in the table of chips (plm/training/chips.py): {known}")
        return Topology(name, "gpu", gpu, int(shape), None)
    devices = _tpu(name, generation, shape)
    return Topology(name, "tpu", devices[0].device_kind, len(devices), devices)


def _tpu(name: str, generation: str, shape: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: compiling for a TPU needs its compiler: pip install 'plm[plan]'")
    # libtpu asks the cloud's metadata server who it is, unless told; any single host will do for compiling.
    # It also lets one process in at a time, for the sake of a chip that is not opened here.
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    import jax
    from jax.experimental import topologies

    sizes = [int(size) for size in shape.split("x")]
    # v4 and v5p slices have three dimensions; a host has 2 x 2 chips, or one where there is just one.
    dimensions = 3 if generation in ("v4", "v5p") else 2
    options = dict(_OPTIONS.get(generation, {}))
    if len(sizes) != dimensions:
        example = "2x2x4" if dimensions == 3 else "4x4"
        raise UserError(
            f"--topology={name!r}: a {generation} slice has {dimensions} dimensions, like {generation}:{example}"
        )
    if np.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" in str(error):
            raise UserError(f"--topology={name!r} is no slice that the TPU compiler knows ({error})") from None
        raise UserError(f"--topology={name}: the TPU compiler does not start ({error})") from None
