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


def qwen3_tokenizer(folder: Path, *, text: str = TEXT, append: str | None = None) -> None:
    """A byte-level BPE tokenizer with Qwen3's normalizer, splitting and added tokens, and a small vocabulary.

    `append` is put behind every text, as Qwen3-Embedding's tokenizer does with <|endoftext|>.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

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
        [text] * 4, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    for token in QWEN3_ADDED:
        control = token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file"))
        tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)])
    assert len(tokenizer.encode("yes").ids) == len(tokenizer.encode("no").ids) == 1
    if append:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {append}",
            pair=f"$A {append} $B:1 {append}:1",
            special_tokens=[(append, tokenizer.token_to_id(append))],
        )
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


def set_config(folder: Path, **values) -> Path:
    """Write values into a checkpoint's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def xlm_roberta_tokenizer(folder: Path) -> int:
    """A sentencepiece-like Unigram tokenizer with XLM-RoBERTa's special tokens; returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaTokenizer

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    pieces.train_from_iterator([TEXT] * 4, trainer)
    learnt = [tuple(p) for p in json.loads(pieces.to_str())["model"]["vocab"] if p[0] != "<unk>"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*special, *learnt, ("<mask>", 0.0)]
    XLMRobertaTokenizer(vocab=vocab, model_max_length=256).save_pretrained(folder)
    return len(vocab)


def _xlm_roberta_config(vocab_size: int, **more):
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=258,  # positions begin at pad_token_id + 1
        type_vocab_size=1,
        pad_token_id=1,
        **more,
    )


def xlm_roberta_cross_encoder(folder: Path) -> Path:
    """bge-reranker-v2-m3, base and large: XLM-RoBERTa with one label."""
    from transformers import XLMRobertaForSequenceClassification

    model = XLMRobertaForSequenceClassification(_xlm_roberta_config(xlm_roberta_tokenizer(folder), num_labels=1))
    _spread(model)
    # The scores of these weights lie close together: spread them, and move them to the middle.
    model.classifier.out_proj.weight.data *= 8
    model.classifier.out_proj.bias.data.fill_(-5)
    model.save_pretrained(folder)
    return folder


def modernbert_cross_encoder(folder: Path) -> Path:
    """gte-reranker-modernbert-base: ModernBERT with one label, mean pooling and alternating local attention."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 4,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    cls, sep, pad = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    config = ModernBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=256,
        global_attn_every_n_layers=3,
        local_attention=16,
        classifier_pooling="mean",
        num_labels=1,
        pad_token_id=pad,
        bos_token_id=cls,
        eos_token_id=sep,
        cls_token_id=cls,
        sep_token_id=sep,
    )
    model = ModernBertForSequenceClassification(config)
    _spread(model)
    model.save_pretrained(folder)
    return folder


def mxbai_rerank_v2(folder: Path) -> Path:
    """mxbai-rerank-v2: a Qwen2 causal LM that answers "0" or "1"."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    qwen3_tokenizer(folder, text=TEXT + " You are a search relevance expert. binary judgment Relevance: 0 1 query: .\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    _spread(model, tokenizer.convert_tokens_to_ids(["1", "0"]))
    model.save_pretrained(folder)
    return folder


def zerank2(folder: Path) -> Path:
    """zerank-2: a Qwen3 causal LM with the sentence-transformers module that reads the logit of "Yes"."""
    from transformers import AutoTokenizer

    qwen3_reranker(folder)
    qwen3_tokenizer(folder, text=TEXT + " Yes Yes Yes")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yes = tokenizer.convert_tokens_to_ids("Yes")
    assert tokenizer.encode("Yes", add_special_tokens=False) == [yes]
    modules = [
        {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    # The real checkpoint's ids: "Yes" is 9454 in Qwen3's vocabulary.
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 9454, "false_token_id": null}')
    return folder


def gemma_tokenizer(folder: Path) -> int:
    """Gemma's kind of tokenizer: BPE over text with spaces as U+2581, byte fallback, <bos> in front."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AddedToken, GemmaTokenizer

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    text = TEXT + " A: B: Given a query A and a passage B, determine whether Yes or No Yes No 'Yes' 'No'"
    learner.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused98>"]
    special += ["<start_of_turn>", "<end_of_turn>"]
    base = [*special, "\n", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [p for p, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if p not in base]
    vocab = {piece: number for number, piece in enumerate([*base, *pieces])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[tuple(m) for m in learnt["merges"]], model_max_length=2048)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n", "\n\n")])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return len(vocab)


def bge_reranker_v2_gemma(folder: Path) -> Path:
    """bge-reranker-v2-gemma: a Gemma causal LM whose logit of "Yes" is the score."""
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

    size = gemma_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yes = tokenizer.convert_tokens_to_ids("Yes")
    assert tokenizer.encode("Yes") == [tokenizer.bos_token_id, yes]
    config = GemmaConfig(
        vocab_size=size + (-size) % 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = GemmaForCausalLM(config)
    _spread(model)
    model.save_pretrained(folder)
    return folder


def _sentence_transformer(folder: Path, pooling: str, *, old_layout: bool, max_length: int) -> None:
    """The sentence-transformers files of an embedding model. `old_layout`: as written before release 5.4."""
    names = ("Transformer", "Pooling", "Normalize")
    prefix = "sentence_transformers.models." if old_layout else "sentence_transformers.sentence_transformer.modules."
    if old_layout:
        types = [prefix + name for name in names]
        mode = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
        data = {f"pooling_mode_{flag}": name == pooling for name, flag in mode.items()}
    else:
        types = ["sentence_transformers.base.modules.transformer.Transformer", f"{prefix}pooling.Pooling"]
        types.append(f"{prefix}normalize.Normalize")
        data = {"pooling_mode": pooling, "include_prompt": True}
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": t} for i, (p, t) in enumerate(zip(paths, types, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(data))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))


def bert_embedding(folder: Path) -> Path:
    """bge-small: BERT with the first token's state as embedding."""
    from transformers import BertConfig, BertModel

    bert_cross_encoder(folder)
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    _spread(model)
    model.save_pretrained(folder)
    _sentence_transformer(folder, "cls", old_layout=True, max_length=256)
    return folder


def xlm_roberta_embedding(folder: Path) -> Path:
    """multilingual-e5: XLM-RoBERTa with the mean of all states."""
    from transformers import XLMRobertaModel

    model = XLMRobertaModel(_xlm_roberta_config(xlm_roberta_tokenizer(folder)), add_pooling_layer=False)
    _spread(model)
    model.save_pretrained(folder)
    _sentence_transformer(folder, "mean", old_layout=False, max_length=256)
    return folder


def qwen3_embedding(folder: Path) -> Path:
    """Qwen3-Embedding: the last token's state; the tokenizer ends every text with <|endoftext|>."""
    from transformers import Qwen3Config, Qwen3Model

    qwen3_reranker(folder)
    model = Qwen3Model(Qwen3Config.from_pretrained(folder))
    _spread(model)
    model.save_pretrained(folder)
    qwen3_tokenizer(folder, append="<|endoftext|>")
    # The real checkpoint says ForCausalLM and has the weights of the bare model.
    set_config(folder, architectures=["Qwen3ForCausalLM"])
    _sentence_transformer(folder, "lasttoken", old_layout=True, max_length=2048)
    return folder
