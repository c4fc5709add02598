"""`python -m stages.runtime.measure_rates`: what this machine's processor computes a second, as one line of JSON (pipeline/rates.py).

Of a few calls the fastest counts, since others may use the cores too. They may also keep all threads from working together, where a single
one is as fast as ever in the time that it gets: then its rate is taken, which all reach together at least.
"""

import json
import time
from collections.abc import Callable

import torch

ROWS, SIDE = 1024, 512  # tokens, and inputs and outputs of a Linear layer
COPIED = 32 << 20  # bytes: more than the caches that cores have of their own
LASTS = 0.1  # seconds that one thing is measured, at least ...
FEWEST = 3  # ... and so many calls
QUIET_SHARE = 0.75  # of its threads' time that a process gets on a machine of its own: 0.9 and more


def main() -> None:
    threads = torch.get_num_threads()
    started, used = time.perf_counter(), time.process_time()
    together = {dtype: _product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    share = (time.process_time() - used) / (time.perf_counter() - started) / threads
    bandwidth = _copy()
    torch.set_num_threads(1)
    alone = {dtype: _product(dtype) for dtype in together}
    flops, float32_flops = (max(together[dtype], alone[dtype]) for dtype in together)
    rates = {"flops": flops, "float32_flops": float32_flops, "bandwidth": max(bandwidth, _copy()), "loop": _loop()}
    print(json.dumps(rates | {"threads": threads, "quiet": share > QUIET_SHARE}))


def _product(dtype: torch.dtype) -> float:
    """FLOP/s of a Linear layer."""
    tokens, weight = torch.ones(ROWS, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * ROWS * SIDE**2 / _fastest(lambda: torch.nn.functional.linear(tokens, weight))


def _copy() -> float:
    """Bytes/s read and written."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / _fastest(lambda: target.copy_(source))


def _loop() -> float:
    """Seconds of a loop of plain Python, which calls, allocates and looks up as importing and tokenizing do."""

    def loop() -> list[str]:
        found: dict[str, int] = {}
        for number in range(20_000):
            found[str(number)] = number
            if number % 7 == 0:
                found.pop(str(number // 2), None)
        return sorted(found)

    return _fastest(loop, 3 * LASTS)


def _fastest(call: Callable[[], object], lasts: float = LASTS) -> float:
    """Seconds of the fastest of several calls, the first not counted; of a single thread, seconds that it had a core."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    call()
    found: list[float] = []
    while len(found) < FEWEST or sum(found) < lasts:
        started = clock()
        call()
        found.append(clock() - started)
    return min(found)


if __name__ == "__main__":
    main()
