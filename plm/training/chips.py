"""What is known of accelerators: peak speed and memory of one device, from the makers' data sheets. Imports no JAX."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 operations a second (a multiply-add is two). memory: bytes that programs may use: what the
    TPU compiler says of a chip; of a GPU its size less 5% for the driver, the libraries and fragmentation. links: bytes
    a second that all of a TPU's links to its neighbours carry together; None where it hangs on how devices are joined.
    """

    flops: float
    memory: float
    links: float | None = None


_A100, _A100_80 = Chip(312e12, 0.95 * 40 * GIB), Chip(312e12, 0.95 * 80 * GIB)
_H100 = Chip(989.4e12, 0.95 * 80 * GIB)

# The key is what JAX calls the device (`device_kind`), or its beginning up to the memory size.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * GIB, 300e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 200e9),
    "TPU v5e": Chip(197e12, 15.75 * GIB, 200e9),
    "TPU v5": Chip(459e12, 95.74 * GIB, 600e9),
    "TPU v5p": Chip(459e12, 95.74 * GIB, 600e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 448e9),
    "TPU v6e": Chip(918e12, 31.25 * GIB, 448e9),
    "NVIDIA A100-SXM4": _A100,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100-PCIE": _A100,
    "NVIDIA A100 80GB PCIe": _A100_80,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": Chip(756e12, 0.95 * 80 * GIB),
    "NVIDIA H200": Chip(989.4e12, 0.95 * 141e9),
}


def chip(device_kind: str) -> Chip | None:
    """What is known of a device kind; None for one that is not in the table."""
    if device_kind in CHIPS:
        return CHIPS[device_kind]
    return next((c for name, c in CHIPS.items() if "-" in name and device_kind.startswith(f"{name}-")), None)


def peak_flops(device_kind: str, compute: str = "bfloat16") -> float | None:
    """Peak operations a second of one device in bfloat16; None for a device that is not known, and in float32.

    (In float32 the answer depends on how products are split into bfloat16 or TF32 passes.)
    """
    known = chip(device_kind)
    return known.flops if known and compute == "bfloat16" else None


def model_flops_utilisation(
    flops: float, seconds: float, device_kind: str, devices: int, compute: str = "bfloat16"
) -> float | None:
    """Part of the devices' peak that `flops` in `seconds` are, by formula; None where the peak is not known."""
    peak = peak_flops(device_kind, compute)
    return None if peak is None or seconds <= 0 else flops / seconds / (devices * peak)
