"""Make bloom-tiny, the model that ships with Raceme: tokenizer, training, checkpoint.

    apt-get install bible-kjv                      # the text, and the program that prints it
    bible -f 'gen1:1-rev22:21' </dev/null > kjv.txt
    python -m compute.models.train_bloom_tiny --text kjv.txt --out compute/models/bloom-tiny

The text is the King James Version; its copyright has expired (Debian's copyright file of
``bible-kjv-text``). One chapter in twenty is held out. Training stops when the held-out loss
has not improved for ``--patience`` evaluations or when the processor time is spent; the best
weights are rounded to bfloat16, evaluated again in that form, and written in the Hugging Face
layout as two shards with an index.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 2048
CONTEXT_TOKENS = 256
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]


def read_chapters(path: Path) -> list[str]:
    """Chapters in order, one verse a line, without the ``Ge1:1`` references."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"^(\S+?\d+):\d+\s+(.*)$", line)
        if match:
            chapters.setdefault(match[1], []).append(match[2].strip())
    if not chapters:
        raise SystemExit(f"{path}: no line like 'Ge1:1 In the beginning ...'")
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def train_tokenizer(chapters: list[str], out: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        chapters,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def epochs(tokens: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of ``[batch, CONTEXT_TOKENS + 1]``, every epoch cut at another offset, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shift = int(torch.randint(CONTEXT_TOKENS, (1,), generator=generator))
        count = (len(tokens) - shift - 1) // CONTEXT_TOKENS
        starts = shift + CONTEXT_TOKENS * torch.randperm(count, generator=generator)
        for group in starts.split(batch):
            if len(group) == batch:
                yield torch.stack([tokens[s : s + CONTEXT_TOKENS + 1] for s in group.tolist()])


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean nats per token over the held-out stream, in windows of CONTEXT_TOKENS."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, CONTEXT_TOKENS):
        window = tokens[start : start + CONTEXT_TOKENS + 1]
        logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    model.train()
    return total / count


def learning_rate(progress: float) -> float:
    """Short warm-up, a plateau, then a straight line to zero; ``progress`` runs from 0 to 1."""
    return min(1.0, progress / 0.01, max(0.0, (1.0 - progress) / 0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what `bible -f gen1:1-rev22:21` prints")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--cpu-minutes", type=float, default=60.0, help="processor time to spend at most")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {CONTEXT_TOKENS} tokens a step")
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps")
    parser.add_argument("--patience", type=int, default=8, help="evaluations without improvement")
    parser.add_argument("--seed", type=int, default=1611)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    from transformers import BloomConfig, BloomForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    chapters = read_chapters(options.text)
    training = [text for index, text in enumerate(chapters) if index % 20 != 19]
    kept_back = [text for index, text in enumerate(chapters) if index % 20 == 19]
    tokenizer = train_tokenizer(training, options.out)

    def stream(texts: list[str]) -> torch.Tensor:
        ids: list[int] = []
        for text in texts:
            ids += [*tokenizer(text).input_ids, 2]
        return torch.tensor(ids)

    train_tokens, test_tokens = stream(training), stream(kept_back)
    print(f"{len(chapters)} chapters, {len(train_tokens)} training and {len(test_tokens)} held-out tokens")

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 8, "n_head": 4, "pad_token_id": 3}
    model = BloomForCausalLM(BloomConfig(**sizes, hidden_dropout=0.1, use_cache=False))
    blocks = list(model.transformer.h.parameters())
    matrices = [p for p in blocks if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    best, stale, started = float("inf"), 0, time.process_time()
    best_state = model.state_dict()
    for step, batch in enumerate(epochs(train_tokens, options.batch, options.seed)):
        spent = (time.process_time() - started) / 60
        progress = max(step / options.steps, spent / options.cpu_minutes)
        if step % options.evaluate_every == 0 or progress >= 1:
            held_out = held_out_loss(model, test_tokens)
            print(f"step {step}  {spent:.1f} CPU minutes  held-out loss {held_out:.4f}", flush=True)
            if held_out < best:
                best, stale = held_out, 0
                best_state = {key: value.clone() for key, value in model.state_dict().items()}
            else:
                stale += 1
            if progress >= 1 or stale > options.patience:
                break
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad()

    model.load_state_dict(best_state)
    model.to(torch.bfloat16).to(torch.float32)
    final = held_out_loss(model, test_tokens)
    model.config.hidden_dropout = 0.0
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(options.out, max_shard_size="2500KB")
    minutes = (time.process_time() - started) / 60
    facts = {
        "held_out_loss_nats": round(final, 4),
        "steps": step,
        "cpu_minutes": round(minutes, 1),
        "training_tokens": len(train_tokens),
        "held_out_tokens": len(test_tokens),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
