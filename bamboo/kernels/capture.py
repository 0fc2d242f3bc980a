"""Work that is repeated without a word from the host: CUDA graphs."""

from collections.abc import Callable

import torch


def captured(
    work: Callable[[], None], device: torch.device, *, generator: torch.Generator | None = None
) -> Callable[[], None]:
    """Return what repeats the work: on a GPU the replay of a CUDA graph, elsewhere the work itself.

    The work reads and writes tensors that stay where they are, and never waits for the device. On a GPU it runs twice
    before it is captured, for compilers and libraries, and so changes its tensors, but not the state of the generator.
    """
    if device.type != "cuda":
        return work
    random_state = None if generator is None else generator.get_state()
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        if generator is not None and random_state is not None:
            generator.set_state(random_state)
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            work()
    return graph.replay
