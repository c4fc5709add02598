"""Train the small Llama that the quickstart compresses: `python assets/train_small_model.py --out assets/small-llama`.

Shape: hidden 256, 8 query and 4 KV heads of 64 (so that 6 query heads still divide by 128), MLP 768, 4 layers, 4,096
byte-level BPE tokens, tied embedding: 4.98 M parameters. Hidden matrices are trained with Muon (Jordan et al., 2024;
torch.optim.Muon), which needs about half the tokens of AdamW here; embedding and norms with AdamW (Loshchilov & Hutter,
2019). bf16 autocast over fp32 weights; on a CPU set OMP_WAIT_POLICY=PASSIVE.

The run writes `<out>.training/state.pt` every 200 updates and carries on from it after an interruption.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Letters, digits in threes, punctuation, line ends and indentation apart: the split that Llama 3 made common.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", core.token_to_id("<|endoftext|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One flat [tokens] tensor, each text led by its begin-of-text token."""
    return torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in ids], dtype=torch.int32)


def learning_rate_factor(update: int, updates: int) -> float:
    """Warm up over 2 %, hold, then fall linearly to zero over the last 60 %."""
    progress = update / updates
    return min(1.0, (update + 1) / (0.02 * updates), (1 - progress) / 0.6)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, length: int) -> float:
    """Mean nats a token over consecutive windows of `length`."""
    windows = tokens[: len(tokens) // length * length].view(-1, length).long()
    total = sum(model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16))
    return total / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "small-llama")
    parser.add_argument("--tokens", type=float, default=16.4e6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-updates", type=int, help="stop early (for timing)")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch = args.out.with_suffix(".training")
    scratch.mkdir(parents=True, exist_ok=True)

    train_texts, eval_texts = ([text for _, text in documents(split)] for split in ("train", "eval"))
    if not (scratch / "tokenizer").exists():
        train_tokenizer(train_texts, 4096, args.length).save_pretrained(scratch / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch / "tokenizer")
    train, held_out = encode(tokenizer, train_texts), encode(tokenizer, eval_texts)
    bytes_per_token = sum(len(text.encode()) for text in eval_texts) / len(held_out)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out, {bytes_per_token:.3f} bytes a token", flush=True)

    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=args.length, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.02, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    updates = int(args.tokens / args.batch / args.length)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda u: learning_rate_factor(u, updates)) for o in optimizers]
    stateful = [model, *optimizers, *schedules]
    first, state_file = 0, scratch / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state["update"]
        for item, saved in zip(stateful, state["stateful"], strict=True):
            item.load_state_dict(saved)

    windows = len(train) // args.length - 1
    started, recent = time.time(), []
    for update in range(first, min(updates, args.max_updates or updates)):
        generator = torch.Generator().manual_seed(update)  # the batch is a function of the update: resuming needs no RNG state
        picks = torch.randint(windows * args.length, (args.batch,), generator=generator)
        batch = torch.stack([train[i : i + args.length] for i in picks]).long().to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedules):
            item.step()
        model.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"update {update}: the loss is {recent[-1]}")
        if (update + 1) % 50 == 0 or update + 1 == args.max_updates:
            speed = (update + 1 - first) * args.batch * args.length / (time.time() - started)
            print(f"update {update + 1}/{updates} loss {sum(recent[-50:]) / len(recent[-50:]):.4f} {speed:,.0f} tokens/s", flush=True)
        if (update + 1) % 200 == 0:
            torch.save({"update": update + 1, "stateful": [item.state_dict() for item in stateful]}, scratch / "state.tmp")
            (scratch / "state.tmp").replace(state_file)
    if args.max_updates:
        return

    model = model.to("cpu", torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    nats = loss_of(model, held_out, args.length)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "training_tokens": updates * args.batch * args.length,
        "corpus_tokens": len(train), "heldout_nats_per_token": nats, "heldout_bytes_per_token": bytes_per_token,
        "heldout_bits_per_byte": nats / math.log(2) / bytes_per_token,
    }  # fmt: skip
    (args.out.parent / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
