"""Seeded tiny checkpoints with the layouts of the real families. Nothing is downloaded."""

import json
import re
import shutil
from pathlib import Path

# The added tokens of Qwen3's tokenizer in their order; the first 14 and the fim/repo ones are control tokens.
QWEN3_ADDED = re.findall(
    r"\S+",
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>",
)
# Qwen2's pre-tokenizer pattern, as in its tokenizer.json.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no". Given a web search query, retrieve relevant passages that answer the query '
    "The capital of China is Beijing. Gravity attracts bodies. system user assistant Instruct Query Document think "
    "中国的首都是北京。 搜索引擎 检索 相关性 yes no yes no"
)


def qwen3_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with Qwen3's normalizer, splitting and added tokens, and a small vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    for token in QWEN3_ADDED:
        control = token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file"))
        tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)])
    assert len(tokenizer.encode("yes").ids) == len(tokenizer.encode("no").ids) == 1
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "add_bos_token": False,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _spread(model, rows: list[int] | None = None) -> None:
    """Weights large enough that scores differ between texts; with 0.02 every score is 0.5."""
    import torch

    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.fill_(1.0)
        if rows:
            # Rows of "yes" and "no": far apart.
            model.get_output_embeddings().weight[rows] *= 3


def qwen3_reranker(folder: Path, *, tied: bool = True, layers: int = 2) -> Path:
    """Original Qwen3-Reranker layout: a causal LM. tied=False has its own lm_head, as the 8B model."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    qwen3_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    _spread(model, tokenizer.convert_tokens_to_ids(["yes", "no"]))
    model.save_pretrained(folder)
    return folder


def qwen3_seq_cls(folder: Path, original: Path) -> Path:
    """The conversion of an original Qwen3-Reranker: one label whose row is lm_head["yes"] - lm_head["no"]."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(original)
    causal = Qwen3ForCausalLM.from_pretrained(original, dtype=torch.float32)
    model = Qwen3ForSequenceClassification.from_pretrained(original, num_labels=1, dtype=torch.float32)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        head = causal.get_output_embeddings().weight
        model.score.weight[0] = head[yes] - head[no]
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder / name)
    return folder


def bert_cross_encoder(folder: Path, *, num_labels: int = 1) -> Path:
    """A BERT cross-encoder with a WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator([TEXT] * 4, vocab_size=600, min_frequency=1, show_progress=False)
    tokenizer.save_model(str(folder))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=256).save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        num_labels=num_labels,
    )
    model = BertForSequenceClassification(config)
    _spread(model)
    model.save_pretrained(folder)
    return folder
