"""The sizes of the benchmark, imported by both sides; no JAX and no torch here."""

import dataclasses

MODELS = ("bert", "gpt", "bilm")


@dataclasses.dataclass(frozen=True)
class Size:
    """width, layers, heads: Transformers; cells, projection, lstm_layers: each of the biLM's two towers."""

    vocabulary: int = 8192
    batch: int = 16
    length: int = 128
    dropout: float = 0.1
    width: int = 256
    layers: int = 4
    heads: int = 4
    cells: int = 512
    projection: int = 128
    lstm_layers: int = 2
    softmax_chunk: int = 512
    dtype: str = "float32"

    @property
    def predictions(self) -> int:
        """Masked positions in a row: BERT's 15%, 20 of 128."""
        return max(round(0.15 * self.length + 0.5), 1)
