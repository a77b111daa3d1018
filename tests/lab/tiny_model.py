"""Make the tiny model: a Llama with random weights that vLLM serves for real.

    python tests/lab/tiny_model.py DIR

Nothing can be downloaded, so the model is made on the spot, in about a second, by what the
engine's image holds (torch, transformers, tokenizers).  The same program makes the same bytes, and
a second run on a finished DIR does nothing.  The folder appears whole or not at all.

It has no special token at all, so an answer is as long as `max_tokens` asks: a test holds a stream
open on purpose, and knows that `finish_reason` will be `length`.  Its letters are ASCII, so that
each token is a piece of text of its own (half of a UTF-8 letter would be held back).
"""

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

# Part of the folder's identity: raise it when a change here changes the bytes.
VERSION = 1
SEED = 20260101
VOCABULARY_TOKENS = 512
# Long enough to hold a stream for a minute at the model's 450 tokens a second.
CONTEXT_TOKENS = 32768

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

SYLLABLES = [consonant + vowel for consonant in "bdklm" for vowel in "aeiou"]


def corpus(lines: int) -> list[str]:
    """Lines of made-up words, the same on every run: what the tokenizer learns its merges from."""
    rng = random.Random(SEED)

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3)))

    return [" ".join(word() for _ in range(12)) for _ in range(lines)]


def write_tokenizer(folder: Path) -> None:
    """Train the BPE tokenizer and write it with its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        initial_alphabet=[chr(code) for code in range(ord("!"), ord("~") + 1)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(400), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2))


def write_weights(folder: Path) -> None:
    """Write a Llama of two layers whose weights are random, the same on every run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY_TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # A head of 32 is the smallest that the CPU's attention kernel takes.
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def make(folder: Path) -> bool:
    """Make the model at `folder`; return False if this very model is there already."""
    stamp = folder / ".made"
    if stamp.is_file() and stamp.read_text() == str(VERSION):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_tokenizer(part)
        write_weights(part)
        (part / ".made").write_text(str(VERSION))
        # Every user of the lab's hosts reads it, whoever made it.
        part.chmod(0o755)
        for path in part.iterdir():
            path.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def main() -> int:
    """Make the model named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: tiny_model.py DIR", file=sys.stderr)
        return 2
    # Transformers looks for a hub on import otherwise.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder = Path(sys.argv[1]).absolute()
    print(f"{folder}: {'made' if make(folder) else 'already there'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
