"""What a model that is not there would do on this machine: its bytes and products, at the rates that were measured."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.speed import Speed
    from quant.size import Size

# A model's weights leave room for the rest of the system.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens a second; None for a model that does not fit into memory."""

    size: "Size"
    prefill: float | None
    decode: float | None

    @property
    def fits(self) -> bool:
        return self.decode is not None


def forecast(size: "Size", speed: "Speed", memory_bytes: float) -> Forecast:
    """Decode reads a token's bytes, and prefill makes its products, as fast as in what was measured."""
    from quant.fit import rates

    if size.n_bytes > MEMORY_SHARE * memory_bytes:
        return Forecast(size, None, None)
    return Forecast(size, *rates(size.work, speed.read_rate, speed.product_rate))
