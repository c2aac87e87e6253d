"""A torch engine that computes with fewer threads than the thread that runs it would."""

import torch

from layercast.server.engines.base import Engine, Inputs, Outputs


class Confined:
    """Runs `engine` with `threads` threads of torch; what else the calling thread does keeps its own number."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self.name = engine.name
        self.device = engine.device
        self.engine = engine
        self._threads = threads

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        before = torch.get_num_threads()
        if before == self._threads:
            return self.engine.run(inputs)
        torch.set_num_threads(self._threads)
        try:
            return self.engine.run(inputs)
        finally:
            torch.set_num_threads(before)
