"""A notice that the machine is wanted elsewhere: stop between two steps, on all processes at the same one.

SIGTERM (a scheduler, a preempted virtual machine going down, `kill`) and SIGUSR1 (what launch.slurm asks Slurm to send
before the time limit) ask for a stop: the loop ends the step it is in, saves it and leaves with
`plm.command.INTERRUPTED`. A second signal leaves at once, with the same code and nothing saved: checkpoints are whole
or not there, so the run goes on from the one before.

Processes agree on the step by computing: each step goes along with one number, the largest of their notices, which all
of them read one step later. That needs no clock and no coordinator, and costs no waiting. JAX's own service for this
(`multihost_utils.reached_preemption_sync_point`) hears SIGTERM only, within a second, and never a second one.
"""

import os
import signal
import socket
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plm.command import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers signal a process and also its parent, which passes it on (srun, `kill` of a group): that is one notice.
SAME_NOTICE_SECONDS = 2.0


class Preempted(SystemExit):
    """The run stopped after `step`, which is saved; ends the process with exit code INTERRUPTED."""

    def __init__(self, step: int):
        super().__init__(INTERRUPTED)
        self.step = step


class Notice:
    """Hears the signals from entering to leaving. Only a main thread can: elsewhere there is never a notice.

    mesh: the devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._received = threading.Event()
        self._shared = _Largest(mesh) if jax.process_count() > 1 else None

    def __enter__(self) -> "Notice":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python calls handlers between two of its instructions only, and the main thread may wait for a device, or for
        # a process that died, for ever. The interpreter writes a signal's number to this socket at once.
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True, name="preemption").start()
        return self

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._mouth.close()  # ends the thread, which closes the other end
        self._before = {}

    def _listen(self) -> None:
        with self._ear as ear:
            while numbers := ear.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self._received.is_set():
            if time.monotonic() - self._first < SAME_NOTICE_SECONDS:
                return
            os.write(2, f"{number.name} again: leaving at once\n".encode())
            os._exit(INTERRUPTED)
        self._first = time.monotonic()
        self._received.set()
        print(f"{number.name}: saving after this step, then leaving", file=sys.stderr, flush=True)

    def stops_here(self) -> bool:
        """Whether the run stops before its next step: to be asked once before each, by every process."""
        if self._shared is None:
            return self._received.is_set()
        return self._shared.of_the_call_before(self._received.is_set())


class _Largest:
    """The logical or of a truth value over all processes, one call late."""

    def __init__(self, mesh: Mesh):
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        shape = (mesh.size,)

        def constant(value: int) -> jax.Array:
            return jax.make_array_from_callback(shape, sharding, lambda index: np.full(shape, value, np.int32)[index])

        self._values = {False: constant(0), True: constant(1)}
        self._compute = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def of_the_call_before(self, value: bool) -> bool:
        before, self._pending = self._pending, self._compute(self._values[value])
        return before is not None and bool(before)
