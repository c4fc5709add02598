"""How fast and how dear, by the roofline: what computes at `flops` and reads at `bandwidth` takes the longer of the two times.

A decode step reads every weight and the whole KV cache once and computes little, so bandwidth binds it until a batch is so large
that each byte read serves `ridge` FLOP (Williams et al., 2009, https://doi.org/10.1145/1498765.1498785). A prefill computes on
thousands of tokens for each byte, so compute binds it. Example: 7 B parameters at 16 bits are 14 GB; at 2 TB/s a token takes 7 ms, at
4 bits a quarter of that; an A100 (312 TFLOP/s, 2 TB/s) has its ridge at 156 FLOP/byte.

    step = decode_seconds_per_token(spec, target, context=4096, batch=8)     # None: the target states no flops or no bandwidth
    print(8 / step, "tokens/s at most")
    cost = dollars(seconds(Work(flops=6 * tokens * spec.num_parameters), target), target)

Times to serve are bounds that engines approach from above: they count neither kernel launches nor what GPUs tell each other. Packed
weights are multiplied at the 16-bit rate, after unpacking. Times of stages take a stated `utilisation`.
"""

from typing import Literal

from pipeline.layout import Frozen
from pipeline.spec import ModelSpec
from pipeline.target import Target

UTILISATION = 0.4  # of the peak: Llama 3 405B trained at 0.38 to 0.43 (https://arxiv.org/abs/2407.21783, table 4)
MEASURED_UTILISATION = 0.7  # of what a processor was measured to reach with a Linear layer of middling size
# Times slower than bf16, where a target does not say: 312 to 19.5 TFLOP/s (A100 data sheet), as torch uses TF32 only if told (2 on an
# RTX 4090); and 2.3 measured on a core with AVX-512 BF16.
FLOAT32_GPU = 16
FLOAT32_CPU = 2
CORE_FLOPS = 2e11  # FLOP/s in bf16 of a core beside GPUs: 210e9 measured on one of an EPYC with AVX-512 BF16 ...
STARTING, STARTED = 6.0, 0.17  # seconds of a core: the server's imports before the first stage, and of a stage's process
CORES = 8  # ... and how many there are at least, where the target does not say: clouds rent an A100 with 12 and more


def nominal_bytes(parameters: float, bits: float) -> float:
    """Bytes of that many weights without scales or anything else, as textbooks count."""
    return parameters * bits / 8


class Work(Frozen):
    """What a stage computes and moves. Works that follow each other add."""

    flops: float = 0  # FLOP at the 16-bit rate
    float32_flops: float = 0  # FLOP of products in float32, which no matrix unit of a GPU speeds up
    nbytes: float = 0  # moved between a processor and its memory
    disk: float = 0  # bytes read from and written to files
    cpu: float = 0  # seconds that one core works alone, on a machine with GPUs too ...
    cpu_shared: float = 0  # ... seconds of one core for what all cores share there ...
    cpu_flops: float = 0  # ... and FLOP in bf16 that they compute together
    overhead: float = 0  # seconds of a core for starting, imports and calls, counted where it is known how fast the cores are ...
    overhead_shared: float = 0  # ... and for what is done with every value and no product, by all cores together

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


def usual_utilisation(target: Target) -> float:
    """The share of the target's FLOP/s and bandwidth that stages reach: less of a data sheet's than of what was measured."""
    return MEASURED_UTILISATION if target.core_speed else UTILISATION


def seconds(work: Work, target: Target, utilisation: float | None = None, devices: int = 1) -> float | None:
    """Time of that work on `devices` of the target's processors, each at that share of its peak. None where a peak is not known.

    Files are read and written, and CPUs work, while GPUs wait.
    """
    utilisation = usual_utilisation(target) if utilisation is None else utilisation
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation: {utilisation} is not a share of the peak; write a number above 0 and up to 1")
    slower = target.flops / target.float32_flops if target.flops and target.float32_flops else FLOAT32_GPU if target.gpus else FLOAT32_CPU
    compute = work.flops + work.float32_flops * slower
    cores = target.cores or (CORES if target.gpus else 1)
    cpu = (work.cpu + work.cpu_shared / cores) / (target.core_speed or 1)
    if target.core_speed:
        cpu += (work.overhead + work.overhead_shared / cores) / target.core_speed
    if target.gpus:
        cpu += work.cpu_flops / (CORE_FLOPS * cores * utilisation)
    else:
        compute += work.cpu_flops
    times = []
    for amount, rate in ((compute, target.flops), (work.nbytes, target.bandwidth)):
        if amount and rate is None:
            return None
        if rate is not None:
            times.append(amount / (rate * utilisation * devices))
    return max(times, default=0.0) + work.disk / target.disk_bandwidth + cpu


def dollars(duration: float | None, target: Target) -> float | None:
    """What that many seconds cost: the whole target is paid for, used or not. None where time or price is not known."""
    return None if duration is None or target.price is None else target.price * duration / 3600


def ridge(target: Target) -> float | None:
    """FLOP per byte read from which compute binds and not bandwidth. None where a peak is not known."""
    return None if target.flops is None or target.bandwidth is None else target.flops / target.bandwidth


def decode_work(spec: ModelSpec, context: int, batch: int) -> Work:
    """One decode step: a token for each of `batch` sequences that are `context` tokens long.

    Weights and cache are read once. Of an untied embedding only a row per token is read. Of a mixture of experts, each token
    reads its active share; tokens choose independently, so that a large batch reads all.
    """
    cache = spec.kv_cache.bytes_per_token * context * batch
    touched = 1 - (1 - spec.active_parameters / spec.num_parameters) ** batch
    compute = 2 * multiplied_parameters(spec) + attention_flops(spec, context)
    return Work(flops=batch * compute, nbytes=_weights_read(spec) * touched + cache)


def decode_seconds_per_token(spec: ModelSpec, target: Target, context: int, batch: int) -> float | None:
    """Seconds of one decode step, the least time between two tokens of a sequence; `batch` over it is tokens/s of all together.

    Tensor parallelism splits weights, cache and work over the target's GPUs. None where the target states no peak.
    """
    if ridge(target) is None:
        return None
    return seconds(decode_work(spec, context, batch), target, utilisation=1, devices=target.devices)


def decode_bound(spec: ModelSpec, target: Target, context: int, batch: int) -> Literal["bandwidth", "compute"] | None:
    """Which side of the ridge a decode step is on."""
    edge = ridge(target)
    if edge is None:
        return None
    work = decode_work(spec, context, batch)
    return "compute" if work.flops / work.nbytes >= edge else "bandwidth"


def crossover_batch(spec: ModelSpec, target: Target, context: int) -> float | None:
    """The batch from which compute binds a decode step of sequences that long, all experts being read by then.

    None where a peak is not known, and where each sequence's own cache takes longer to read than to compute on: then no batch is enough.
    """
    if target.flops is None or target.bandwidth is None:
        return None
    computing = (2 * multiplied_parameters(spec) + attention_flops(spec, context)) / target.flops
    reading = spec.kv_cache.bytes_per_token * context / target.bandwidth
    return _weights_read(spec) / target.bandwidth / (computing - reading) if computing > reading else None


def prefill_tokens_per_second(spec: ModelSpec, target: Target, context: int) -> float | None:
    """At most, over one prompt of `context` tokens; its attention is causal and its last token alone meets the head.

    None where the target states no peak.
    """
    if ridge(target) is None:
        return None
    body = multiplied_parameters(spec) - table_size(spec)
    work = Work(flops=context * (2 * body + attention_flops(spec, context) / 2), nbytes=_weights_read(spec))
    duration = seconds(work, target, utilisation=1, devices=target.devices)
    assert duration, "both peaks are known"
    return context / duration


def table_size(spec: ModelSpec) -> int:
    """Weights of the embedding, or of the head."""
    return spec.architecture.vocab_size * spec.architecture.hidden_size


def multiplied_parameters(spec: ModelSpec) -> int:
    """Weights that a token is multiplied with, at two FLOP each: not those of an embedding, unless it is tied and so the head too."""
    return spec.active_parameters - (0 if spec.architecture.tied else table_size(spec))


def _weights_read(spec: ModelSpec) -> int:
    """Bytes of all weights but an untied embedding."""
    embeddings = tuple(group for group in spec.groups if group.kind == "embedding" and not spec.architecture.tied)
    return spec.nbytes - spec.model_copy(update={"groups": embeddings}).nbytes


def attention_flops(spec: ModelSpec, context: float) -> float:
    """Of one token against `context` earlier ones: a dot product and a weighted sum, for each layer and query head."""
    a = spec.architecture
    return 4.0 * a.num_layers * a.num_heads * a.head_dim * context
