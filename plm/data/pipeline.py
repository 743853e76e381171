"""batch = f(seed, step): rows of a layout, fields of the objectives, placed on the devices that hold them."""

from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

ROWS = PartitionSpec(("data", "fsdp"))


class Batches:
    """Global batches of `batch_size` rows as a function of the step, each process making only the rows it holds.

    layout: gives rows (`plm.data.pretrain`); objectives: add fields to them; draw: (step, rows) -> the named random
    numbers of these rows; characters: ids -> uint16 [..., 50] for a model that reads characters, else None;
    target_id: closes the vocabulary of inputs that are looked up in a table; host_only: names not sent to devices.
    """

    def __init__(self, layout, objectives: Sequence, *, batch_size, draw, mesh, characters, target_id, host_only):
        self.layout, self.objectives, self.batch_size, self.draw = layout, objectives, batch_size, draw
        self.characters, self.target_id, self.host_only = characters, target_id, host_only
        self.row_sharding = NamedSharding(mesh, ROWS)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        held = self.row_sharding.addressable_devices_indices_map((batch_size,)).values()
        spans = [index[0].indices(batch_size)[:2] for index in held]
        self.first, self.last = min(s for s, _ in spans), max(e for _, e in spans)

    def local(self, step: int) -> dict:
        """This process's rows of the batch of `step`, NumPy arrays rows first; `shared` holds what has no rows."""
        rows = range(self.first, self.last)
        batch = dict(self.layout.rows(step, rows))
        draw = self.draw(step, rows)
        for objective in self.objectives:
            batch |= objective.fields(batch, draw)
        for name in ("tokens", "tokens_backward"):
            if name not in batch:
                continue
            if self.characters is None:
                batch[name] = self.target_id(batch[name]).astype(np.int32)
            else:
                # ELMo's convention: ids shifted by one, so that 0 means "no token here".
                batch[name.replace("tokens", "characters")] = self.characters(batch.pop(name)).astype(np.int32) + 1
        batch["row"] = np.arange(rows.start, rows.stop, dtype=np.int32)
        return {name: array for name, array in batch.items() if name not in self.host_only}

    def place(self, batch: dict) -> dict:
        """Host arrays -> global arrays: rows over (data, fsdp), `shared` on every device."""
        shared = batch.get("shared")
        rows = {name: array for name, array in batch.items() if name != "shared"}
        if jax.process_count() == 1:
            placed = jax.device_put(rows, self.row_sharding)
            return placed if shared is None else placed | {"shared": jax.device_put(shared, self.replicated)}

        def spread(array):
            def rows_of(index):
                start, stop, _ = index[0].indices(self.batch_size)
                return array[start - self.first : stop - self.first]

            return jax.make_array_from_callback((self.batch_size, *array.shape[1:]), self.row_sharding, rows_of)

        placed = {name: spread(array) for name, array in rows.items()}
        if shared is not None:
            everywhere = {
                name: jax.make_array_from_callback(
                    np.shape(a), self.replicated, lambda index, a=a: np.asarray(a)[index]
                )
                for name, a in shared.items()
            }
            placed["shared"] = everywhere
        return placed

    def __call__(self, step: int) -> dict:
        """The placed batch of `step`."""
        return self.place(self.local(step))

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffer: int = 4) -> Iterator[dict]:
        """Placed batches of steps start .. stop - 1, made ahead by threads; starting anywhere costs nothing."""
        steps = grain.MapDataset.range(start, stop).map(self.local)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        for batch in steps.to_iter_dataset(options):
            yield self.place(batch)
