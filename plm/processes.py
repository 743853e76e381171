"""The processes of one run: who they are, a roll call before JAX starts, and who died while they train.

JAX's own runtime aborts without a word about who is missing, and waits for minutes in collectives whose partner is
gone. So process 0 first calls the roll on the coordinator's port: everyone says its number and keeps the connection
when JAX's coordinator takes over the port. A connection that breaks, or is silent for `peer_seconds`, is a process that
died: process 0 tells the others its name, and all leave with exit code 1.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

from plm.command import BAD_INPUT, complain
from plm.errors import UserError

PORT = 8476
CLUSTERS = ("auto", "slurm", "tpu", "none")
_DIED = 1
_METADATA = "computeMetadata/v1/instance/attributes"


@dataclasses.dataclass(frozen=True)
class Processes:
    """host, port: where process 0 listens; index: of this one among `count`; devices: CUDA devices of this process,
    None for all that it sees."""

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of commands that run as several processes."""

    def define(kind, name, default, meaning, **options):
        kind(name, default, meaning, flag_values=values, **options)

    define(flags.DEFINE_string, "coordinator_address", "", "HOST or HOST:PORT of process 0, as the others reach it")
    define(
        flags.DEFINE_integer,
        "coordinator_port",
        0,
        f"port of process 0; {PORT} by default, under Slurm by the job's id",
    )
    define(flags.DEFINE_integer, "num_processes", 0, "processes of the run")
    define(flags.DEFINE_integer, "process_id", -1, "which of them this is, from 0")
    flags.DEFINE_enum(
        "cluster", "auto", CLUSTERS, "who knows the processes if --num_processes does not say", flag_values=values
    )
    seconds = {"lower_bound": 1}
    define(flags.DEFINE_float, "join_seconds", 300.0, "how long processes wait for each other at the start", **seconds)
    define(flags.DEFINE_float, "peer_seconds", 60.0, "silence after which a process counts as dead", **seconds)


def find(values: flags.FlagValues, environment: Mapping[str, str] = os.environ) -> Processes | None:
    """The processes by the flags, else by Slurm's or the TPU runtime's word; None if this one is alone."""
    host, _, port = values.coordinator_address.partition(":")
    if (port and not port.isdigit()) or (port and values.coordinator_port):
        raise UserError(
            f"--coordinator_address={values.coordinator_address!r} must be HOST or HOST:PORT"
            + (", the latter without --coordinator_port" if values.coordinator_port else "")
        )
    port = int(port or values.coordinator_port)
    count, index = values.num_processes, values.process_id
    if count > 0 or index >= 0:
        if not (host and count > 0 and index >= 0):
            raise UserError("--coordinator_address, --num_processes and --process_id belong together: give all three")
        if index >= count:
            raise UserError(f"--process_id={index} must be below --num_processes={count}")
        return Processes(host, port or PORT, count, index) if count > 1 else None
    found = _by_cluster(values.cluster, environment)
    if found is None:
        if host:
            raise UserError("--coordinator_address needs --num_processes and --process_id outside of Slurm and TPU VMs")
        return None
    return dataclasses.replace(found, host=host or found.host, port=port or found.port) if found.count > 1 else None


def _by_cluster(cluster: str, environment: Mapping[str, str]) -> Processes | None:
    if cluster in ("auto", "slurm"):
        if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
            return _slurm(environment)
        if cluster == "slurm":
            raise UserError("--cluster=slurm: this process was not started by srun")
    if cluster == "tpu" or (cluster == "auto" and (_is_tpu_vm() or "," in environment.get("TPU_WORKER_HOSTNAMES", ""))):
        return of_tpu(environment)
    return None


def _slurm(environment: Mapping[str, str]) -> Processes:
    """Of a job step (`srun`). The port depends on the job: several share a node."""
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environment["SLURM_STEP_NODELIST"])
    visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    here = int(re.match(r"\d*", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0] or 1)
    local, each = int(environment.get("SLURM_LOCALID", "0")), len(visible) // here
    return Processes(
        host=first[1] + (first[2] or ""),
        port=61440 + int(environment["SLURM_JOB_ID"]) % 4096,
        count=int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]),
        index=int(environment["SLURM_PROCID"]),
        # A node's processes share its GPUs evenly, unless Slurm has given each its own.
        devices=tuple(range(local * each, (local + 1) * each)) if here > 1 and each else None,
    )


def _is_tpu_vm() -> bool:
    devices = (Path("/dev/accel0"), Path("/dev/vfio/0"))
    return any(device.exists() for device in devices) and importlib.util.find_spec("libtpu") is not None


def of_tpu(environment: Mapping[str, str] = os.environ) -> Processes:
    """Of a TPU slice: by its environment (GKE), else by the metadata server (TPU VMs)."""
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if hosts:
        return Processes(hosts[0], PORT, len(hosts), int(environment.get("TPU_WORKER_ID", "0")))
    # An entry is a host, or name:id:host.
    hosts = [entry.split(":")[-1] for entry in _metadata("worker-network-endpoints", environment).split(",")]
    return Processes(hosts[0], PORT, len(hosts), int(_metadata("agent-worker-number", environment)))


def _metadata(key: str, environment: Mapping[str, str]) -> str:
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/{_METADATA}/{key}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"this TPU VM's metadata server {server} does not say {key!r} ({error}): give --coordinator_address,"
            " --num_processes and --process_id, or --cluster=none for this host alone"
        ) from None


@contextlib.contextmanager
def joined(values: flags.FlagValues) -> Iterator[int | None]:
    """Inside, this process is one of the run's, and JAX knows it; gives its number, None if it is alone.

    Whoever leaves with an exception ends the others too; they say who it was.
    """
    processes = find(values)
    if processes is None:
        yield None
        return
    import jax

    peers = _Peers(processes, values.join_seconds, values.peer_seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Signals are heard by plm.training.preemption; JAX's service would take SIGTERM and keep it to itself.
    if "jax_enable_preemption_service" in jax.config.values:
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        processes.address,
        processes.count,
        processes.index,
        local_device_ids=list(processes.devices) if processes.devices else None,
        cluster_detection_method="deactivate",
        initialization_timeout=round(values.join_seconds),
        heartbeat_timeout_seconds=round(2 * values.peer_seconds),  # should we not notice
        shutdown_timeout_seconds=round(2 * values.peer_seconds),
    )
    peers.watch()
    try:
        yield processes.index
    except (Exception, KeyboardInterrupt) as error:
        # Leaving in the ordinary way would wait for the others, and they for us.
        peers.fail(error)
    finally:
        peers.leave()


class _Peers:
    """The connections: of process 0 to all others, of each of them to process 0. Messages are lines of JSON."""

    def __init__(self, processes: Processes, join_seconds: float, peer_seconds: float):
        self.processes, self.peer_seconds = processes, peer_seconds
        self._deadline = time.monotonic() + join_seconds
        self._left = False
        if processes.index == 0:
            self._lines = self._call_roll(join_seconds)
        else:
            self._lines = self._answer(join_seconds)

    # The roll call

    def _call_roll(self, join_seconds: float) -> "dict[int, _Line]":
        here, count = self.processes, self.processes.count
        both = socket.has_dualstack_ipv6()
        try:
            server = socket.create_server(
                ("", here.port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
            )
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {here.port} ({error.strerror}): give all processes another"
                " --coordinator_port"
            ) from None
        lines: dict[int, _Line] = {}
        with server:
            while len(lines) < count - 1:
                server.settimeout(max(self._deadline - time.monotonic(), 0.01))
                try:
                    line = _Line(server.accept()[0])
                    hello = line.read(5.0)
                except TimeoutError:
                    if time.monotonic() < self._deadline:
                        continue
                    missing = ", ".join(str(index) for index in range(1, count) if index not in lines)
                    raise UserError(
                        f"{len(lines) + 1} of {count} processes came to {here.address} in {join_seconds:g} s; not"
                        f" there: {missing}. Start each with --num_processes={count} and its own --process_id (Slurm:"
                        " by srun), or wait longer with --join_seconds"
                    ) from None
                except OSError:
                    continue
                problem = self._problem(hello, lines)
                if problem is None:
                    line.name = (
                        f"process {hello['index']} of {count} (host {hello.get('host')}, process id {hello['pid']})"
                    )
                    lines[hello["index"]] = line
                else:
                    line.send(refused=problem)
                    line.socket.close()
        for line in lines.values():
            line.send(go=True)
        return lines

    def _problem(self, hello: dict, lines: dict) -> str | None:
        if not all(isinstance(hello.get(name), int) for name in ("index", "count", "pid")):
            return "not a process of ours"
        if hello["count"] != self.processes.count:
            return f"--num_processes={hello['count']} here and {self.processes.count} in process 0 must be the same"
        if hello["index"] in lines or hello["index"] == 0:
            return f"--process_id={hello['index']} is taken by another process"
        return None

    def _answer(self, join_seconds: float) -> "dict[int, _Line]":
        here = self.processes
        while True:
            try:
                line = _Line(socket.create_connection((here.host, here.port), timeout=5.0))
                break
            except OSError as error:
                if time.monotonic() >= self._deadline:
                    raise UserError(
                        f"process {here.index} of {here.count}: process 0 did not answer at {here.address} for"
                        f" {join_seconds:g} s ({error.strerror or error}): start it, see that this host may reach that"
                        " port (--coordinator_port), or wait longer with --join_seconds"
                    ) from None
                time.sleep(0.2)
        line.name = f"process 0 of {here.count} (at {here.address})"
        line.send(index=here.index, count=here.count, host=socket.gethostname(), pid=os.getpid())
        try:
            answer = line.read(max(self._deadline - time.monotonic(), 0.01) + 5.0)
        except OSError:
            answer = {}
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "go" not in answer:
            raise UserError(
                f"process {here.index} of {here.count} reached {here.address}, but not all processes came in"
                f" {join_seconds:g} s; process 0 says which"
            )
        return {0: line}

    # Afterwards

    def watch(self) -> None:
        for line in self._lines.values():
            line.heard = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def _watch(self) -> None:
        lines, told = dict(self._lines), time.monotonic()
        while lines:
            ready = select.select([line.socket for line in lines.values()], [], [], min(1.0, self.peer_seconds / 4))[0]
            now = time.monotonic()
            if now - told > self.peer_seconds / 4:
                told = now
                for line in lines.values():
                    line.send(alive=True)
            for index, line in list(lines.items()):
                if line.socket in ready:
                    for message in line.messages():
                        if "bye" in message:
                            lines.pop(index, None)
                        elif "end" in message:
                            self._end(message["end"], message["code"])
                    if line.closed and index in lines:
                        self._end(f"{line.name} died: its log tells why", _DIED)
                elif now - line.heard > self.peer_seconds:
                    self._end(f"{line.name} was silent for {self.peer_seconds:g} s (--peer_seconds)", _DIED)

    def _end(self, reason: str, code: int) -> None:
        """Ends this process, and by process 0 all."""
        if self._left:
            return
        for line in self._lines.values():
            line.send(end=reason, code=code)
        # This is the last word: threads of JAX that still write of a lost partner have no stderr any more.
        sys.stderr.flush()
        sys.stderr = open(os.dup(2), "w", encoding="utf-8")  # noqa: SIM115
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        complain(f"{reason}; so process {self.processes.index} ends, too")
        os._exit(code)

    def fail(self, error: BaseException) -> None:
        """Ends the run because of an exception of this process."""
        code = {UserError: BAD_INPUT, KeyboardInterrupt: 128 + signal.SIGINT}.get(type(error), _DIED)
        if code == _DIED:
            # It may only be what a collective says whose partner died; then the watch tells better, and ends us.
            time.sleep(2.0)
            traceback.print_exception(error)
        elif code == BAD_INPUT:
            complain(error)
        self._left = True
        reason = f"process {self.processes.index} of {self.processes.count} failed"
        for line in self._lines.values():
            line.send(end=f"{reason} ({type(error).__name__}: {str(error)[:300]})", code=code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def leave(self) -> None:
        """Tells the others that this process has done its work."""
        if not self._left:
            self._left = True
            for line in self._lines.values():
                line.send(bye=True)


class _Line:
    """One connection; nothing that goes wrong with it raises, but in `read`."""

    def __init__(self, connection: socket.socket):
        self.socket, self.name, self.closed = connection, "", False
        self.heard = time.monotonic()
        self._buffer = b""
        connection.settimeout(5.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds: float) -> dict:
        """The next message; {} if the connection was closed. Raises OSError, TimeoutError."""
        self.socket.settimeout(seconds)
        while b"\n" not in self._buffer:
            piece = self.socket.recv(4096)
            if not piece:
                return {}
            self._buffer += piece
        self.socket.settimeout(5.0)
        text, _, self._buffer = self._buffer.partition(b"\n")
        return _parse(text)

    def messages(self) -> list[dict]:
        """What came, without waiting; sets `closed`."""
        try:
            piece = self.socket.recv(4096)
        except OSError:
            piece = b""
        self.closed = not piece
        self.heard = time.monotonic()
        *whole, self._buffer = (self._buffer + piece).split(b"\n")
        return [_parse(text) for text in whole]


def _parse(text: bytes) -> dict:
    try:
        message = json.loads(text)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
