"""What stages compute, move, read and write, where several of them do the same. Needs no torch: a plan reads it.

A forward is two FLOP for each weight and token, and the attention; a backward twice that, of frozen weights once (they need no
gradients of their own). So training every weight of a model of N takes 6 N FLOP a token, beside an adapter 4 N:

    training(p, execution, llama2_7b).flops / (p.tokens * llama2_7b.num_parameters)    # 5.94: no product for the embedding, attention added

Rates of what only CPUs do are those of one core of an EPYC with AVX-512, measured. Not counted: copies between CPU and GPU, what processes
tell each other, NF4's rounding while a model is loaded, and states saved during a training; on a GPU neither starting up, nor what is done
with values beside products. On a processor that was measured these two are: of a small model they are half of the time. `bench/hours.py`
compares a whole recipe with its plan, `bench/stage_hours.py` stages alone.
"""

import math

from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.roofline import Work, attention_flops, multiplied_parameters, table_size
from pipeline.spec import ModelSpec
from stages.runtime.launch import ALONE, Processes
from stages.runtime.lora_settings import adapter_spec, target_groups
from stages.runtime.scheme import CalibrationExecution, Observer, Windows, offloaded_bytes
from stages.runtime.training_settings import LoRAParams, TrainingExecution, TrainingParams

TOKEN_BYTES = 4  # of text: English with vocabularies of 32,000 words and more; the small model's 4,096 words make it 3.4 of Python
LARGE_VOCABULARY = 32_000

# A core, a second, of what all cores share:
PACKED = 50e6  # weights rounded and packed: 47e6 to 76e6, by bits and zero points
UNPACKED = 50e6  # weights multiplied out: 26e6 to 71e6
CLIPPED = 60e6  # weights rounded, in bf16, with one share of their group's range
ROUNDED = 130e6  # weights rounded for a forward, in bf16
# Of what one core does alone:
CUT = 1.1e9  # weights scored by magnitude (2.6e9) and gathered (2.0e9)
MERGED = 1.6e9  # weights to which an adapter of rank 16 is added
HASHED = 1.8e9  # bytes digested by sha256, on a core with instructions for it
CHECKED = 16e9  # bytes searched for nan and inf as they pass by to be digested
TOKENIZED = 2.5e6  # bytes of text

# Seconds of a core, of what is no product, counted on processors that were measured (Target.core_speed):
FLOWED = 2.3e-9  # for each value that a layer passes on in a forward
TRAINED = 3  # forwards' worth of it in a forward and backward
SCORED = 9e-9  # for each logit: its loss
COMPARED = 14e-9  # ... and the divergence from another model's
LEARNED = 12e-9  # ... its loss and gradient
DISTILLED = 22e-9  # ... the divergence from a teacher's at a temperature, and its gradient
TRAINER = 2.6  # importing transformers' Trainer, and peft and bitsandbytes with it
LLM_COMPRESSOR = 3.4  # importing llm-compressor, and its sessions

# Bytes moved in the memory of the device that computes:
ADAMW_BYTES = 28 + 12  # for each trained weight and update: weight, gradient, two moments read, three written; the gradient clipped
CLIPPING_TRAFFIC = 210  # for each weight and share of its group's range: CLIPPED on a core, at 0.4 of the 31 GB/s it copies with
ACCUMULATION_BYTES = 18  # for each trained weight and micro batch: cast to bf16 (6), its gradient written, read and added up (12)


def forward_flops(model: ModelSpec, tokens: float, length: int, head: bool = True, causal: bool = True, all_experts: bool = False) -> float:
    """Of `tokens` tokens in windows of `length`. `causal` attention skips what it masks; eager attention computes it too."""
    weights = multiplied_parameters(model) + (model.num_parameters - model.active_parameters if all_experts else 0)
    return tokens * (2 * (weights - (0 if head else table_size(model))) + attention_flops(model, length / 2 if causal else length))


def flowing(model: ModelSpec, tokens: float, length: int) -> Work:
    """What a forward does in its layers beside products: norms, rotations, activation functions, softmax of attention, casts."""
    a = model.architecture
    values = 16 * a.hidden_size + 4 * a.intermediate_size + a.num_heads * length / 2
    return Work(overhead_shared=FLOWED * tokens * a.num_layers * values)


def scoring(model: ModelSpec, tokens: float, seconds: float) -> Work:
    """What is done with every logit: SCORED, COMPARED, LEARNED or DISTILLED."""
    return Work(overhead_shared=seconds * tokens * model.architecture.vocab_size)


def scored_tokens(text: DatasetSpec, max_documents: int | None, vocab_size: int) -> float:
    """About, of the first documents or all. A small vocabulary cuts text into more of them."""
    token_bytes = TOKEN_BYTES * min(1.0, math.log(vocab_size) / math.log(LARGE_VOCABULARY))
    return read_share(text, max_documents) * text.nbytes / token_bytes


def read_share(text: DatasetSpec, max_documents: int | None) -> float:
    """Of a text, where only its first documents are read; all are taken to be of one length."""
    return min(1.0, max_documents / text.documents) if max_documents and text.documents else 1.0


def packed_weights(model: ModelSpec) -> int:
    return sum(group.count * math.prod(group.shape) for group in model.groups if not group.format.is_dense)


def reading(model: ModelSpec, times: int = 1) -> Work:
    """Of all weights; packed ones are multiplied out on the CPU."""
    return Work(disk=times * model.nbytes, cpu_shared=times * packed_weights(model) / UNPACKED)


def tokenizing(data: DatasetSpec) -> Work:
    """Of a whole split: windows are chosen from all of its tokens."""
    return Work(disk=data.nbytes, cpu=data.nbytes / TOKENIZED)


def packing(packed: ModelSpec) -> Work:
    return Work(cpu_shared=packed_weights(packed) / PACKED)


def clipping(packed: ModelSpec, observer: Observer) -> Work:
    """Of the search for each group's range, where `observer` is one."""
    return Work(cpu_shared=packed_weights(packed) * observer.steps / CLIPPED)


def calibrated_clipping(packed: ModelSpec, observer: Observer) -> Work:
    """The same by llm-compressor, on the device that calibrates."""
    return Work(nbytes=packed_weights(packed) * observer.steps * CLIPPING_TRAFFIC)


def digesting(nbytes: float) -> Work:
    """Of published files that a library wrote, read once for it."""
    return Work(disk=nbytes, cpu=nbytes / HASHED)


def counting_zeros(checkpoint: ModelSpec) -> Work:
    """Of a checkpoint that is on disk, where there must be some; any other is not read again."""
    return reading(checkpoint) if checkpoint.sparsity else Work()


def publishing(checkpoint: ModelSpec) -> Work:
    """Every byte is digested and every value looked at while it is written."""
    return Work(disk=checkpoint.nbytes, cpu=checkpoint.nbytes * (1 / HASHED + 1 / CHECKED)) + counting_zeros(checkpoint)


def merging(model: ModelSpec) -> Work:
    """Of an adapter into the weights that are read once more."""
    return reading(model) + Work(cpu=sum(group.num_parameters for group in target_groups(model)) / MERGED)


def training(
    params: TrainingParams, execution: TrainingExecution, model: ModelSpec, lora: LoRAParams | None = None, processes: Processes = ALONE
) -> Work:
    """Of one of the processes, which share each update's samples; `lora` where adapters are trained and the rest is frozen in NF4."""
    tokens = params.tokens / processes.count
    attention = tokens * attention_flops(model, params.max_length / 2)
    weights, adapter = forward_flops(model, tokens, params.max_length) - attention, adapter_spec(model, lora.rank) if lora else None
    flops = (2 if adapter else 3) * weights + 3 * attention
    again = forward_flops(model, tokens, params.max_length, head=False) if execution.gradient_checkpointing else 0
    batches = micro_batches(params, execution, processes.count)
    if adapter:
        flops += 6 * tokens * adapter.num_parameters
        nbytes = params.steps * adapter.num_parameters * ADAMW_BYTES + batches * unpacking_nf4(params, model, 3 if again else 2)
    else:
        nbytes = model.num_parameters * (params.steps * ADAMW_BYTES / processes.shards + batches * ACCUMULATION_BYTES)
    flows = flowing(model, tokens * (TRAINED + bool(again)), params.max_length)
    return params.products(flops + again) + Work(nbytes=nbytes, overhead=TRAINER) + flows


def micro_batches(params: TrainingParams, execution: TrainingExecution, processes: int = 1) -> int:
    """Of each process."""
    return params.steps * math.ceil(params.global_batch_size / processes / execution.micro_batch_size)


def unpacking_nf4(params: TrainingParams, model: ModelSpec, passes: int) -> float:
    """Bytes that a micro batch moves: a forward or a backward reads 4 bits of a weight, writes its value and reads that."""
    return passes * (0.5 + 2 * params.item) * sum(group.num_parameters for group in target_groups(model))


def calibrating(
    params: Windows,
    computing: Computing,
    execution: CalibrationExecution,
    dense: ModelSpec,
    packed: ModelSpec,
    changed: set[str],
    data: DatasetSpec,
) -> Work:
    """What llm-compressor's sequential pipeline takes whatever the quantizer, and what comes after it.

    Each layer runs twice on all windows, with eager attention and on every expert: to look at it, and to compute what the next one
    sees. The result is packed, written, and proven on one window by the calibrated model and the reloaded one, both on the CPU.
    """
    twice = 2 * forward_flops(dense, params.tokens, params.max_length, causal=False, all_experts=True)
    probe = 2 * forward_flops(dense, params.max_length, params.max_length)
    proven = Work(cpu_flops=probe) if computing.computes_in == "bf16" else Work(float32_flops=probe)
    work = computing.products(twice) + proven + flowing(dense, 2 * params.tokens, params.max_length) + tokenizing(data)
    work += Work(cpu_shared=packed_weights(packed) / ROUNDED, overhead=LLM_COMPRESSOR)
    if execution.offload == "disk":  # read to calibrate, to prove and to pack; and read once more to see whether the result loads
        work += reading(dense, 3) + Work(disk=offloaded_bytes(computing.in_memory(packed), changed) + packed.nbytes)
    else:
        work += reading(dense)
    return work + packing(packed) + publishing(packed) + reading(packed)
