"""Seeded tiny checkpoints of families whose hub repositories do not load as they are.

jina-reranker-v2, gte-multilingual-reranker and llama-nemotron-rerank name code of their own in config.json;
Qwen3-VL-Reranker has a vision tower; the 6b model of ctxl-rerank-v2 is a Mistral. The keys of config.json and the names
of the weights are those of the real repositories.
"""

import json
import re
from pathlib import Path

import tiny_models

# XLM-RoBERTa's names -> those of jinaai's flash-attention layout (convert_roberta_weights_to_flash.py there).
JINA_NAMES = (
    (r"^roberta\.embeddings\.LayerNorm", "roberta.emb_ln"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"attention\.output\.dense", "mixer.out_proj"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(?<!mixer\.)output\.dense", "mlp.fc2"),
    (r"output\.LayerNorm", "norm2"),
)


def _save(folder: Path, weights: dict, config: dict) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def jina_reranker_v2(folder: Path) -> Path:
    """jina-reranker-v2-base-multilingual: XLM-RoBERTa's computation, other names, query, key and value in one."""
    import torch
    from safetensors.torch import load_file

    tiny_models.xlm_roberta_cross_encoder(folder)
    old = load_file(folder / "model.safetensors")
    weights = {}
    for name, weight in old.items():
        if ".self.key." in name or ".self.value." in name:
            continue
        if ".self.query." in name:
            weight = torch.cat([old[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.self.query", "mixer.Wqkv")
        for pattern, new in JINA_NAMES:
            name = re.sub(pattern, new, name)
        weights[name] = weight
    before = json.loads((folder / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = {
        "_name_or_path": "jina-reranker-v2-base-multilingual",
        "architectures": ["XLMRobertaForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "auto_map": {
            "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": "modeling_xlm_roberta.XLMRobertaModel",
            "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification",
        },
        "bos_token_id": 0,
        "classifier_dropout": None,
        "emb_pooler": None,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02,
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-5,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "type_vocab_size": 1,
        "use_cache": False,
        "use_flash_attn": True,
        "vocab_size": before["vocab_size"],
        **{key: before[key] for key in sizes},
    }
    _save(folder, weights, config)
    return folder


def gte_multilingual_reranker(folder: Path) -> Path:
    """gte-multilingual-reranker-base: an encoder with NTK-scaled rotary positions and a gated MLP."""
    import torch

    vocab_size = tiny_models.xlm_roberta_tokenizer(folder)
    hidden, inner, layers, heads = 64, 96, 2, 2
    shapes = {
        "new.embeddings.word_embeddings.weight": (vocab_size, hidden),
        "new.embeddings.token_type_embeddings.weight": (1, hidden),
        "new.pooler.dense.weight": (hidden, hidden),
        "classifier.weight": (1, hidden),
    }
    norms = ["new.embeddings.LayerNorm"]
    biases = {"new.pooler.dense.bias": hidden, "classifier.bias": 1}
    for n in range(layers):
        layer = f"new.encoder.layer.{n}."
        shapes |= {
            layer + "attention.qkv_proj.weight": (3 * hidden, hidden),
            layer + "attention.o_proj.weight": (hidden, hidden),
            layer + "mlp.up_gate_proj.weight": (2 * inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
        biases |= {layer + "attention.qkv_proj.bias": 3 * hidden, layer + "attention.o_proj.bias": hidden}
        biases |= {layer + "mlp.down_proj.bias": hidden}
        norms += [layer + "attn_ln", layer + "mlp_ln"]
    torch.manual_seed(7)
    weights = {name: torch.randn(shape) * 0.15 for name, shape in shapes.items()}
    weights |= {name: torch.randn(size) * 0.1 for name, size in biases.items()}
    for name in norms:
        weights |= {f"{name}.weight": 1 + torch.randn(hidden) * 0.1, f"{name}.bias": torch.randn(hidden) * 0.1}
    weights["classifier.weight"] *= 3
    impl = "Alibaba-NLP/new-impl--"
    tasks = ("MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification")
    config = {
        "_name_or_path": "Alibaba-NLP/gte-multilingual-reranker-base",
        "architectures": ["NewForSequenceClassification"],
        "attention_probs_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": impl + "configuration.NewConfig",
            "AutoModel": impl + "modeling.NewModel",
            **{f"AutoModelFor{task}": f"{impl}modeling.NewFor{task}" for task in tasks},
        },
        "classifier_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "max_position_embeddings": 512,
        "model_type": "new",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pack_qkv": True,
        "pad_token_id": 1,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": 8.0, "type": "ntk"},
        "rope_theta": 20000,
        "torch_dtype": "float16",
        "transformers_version": "4.39.1",
        "type_vocab_size": 1,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
        "vocab_size": vocab_size,
    }
    _save(folder, weights, config)
    return folder


def qwen3_vl_reranker(folder: Path, *, tied: bool = True) -> Path:
    """Qwen3-VL-Reranker: Qwen3 with a vision tower; the answer is the logit of "yes" against "no"."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tiny_models.qwen3_tokenizer(
        folder, text=tiny_models.TEXT + " Given a search query candidates answer the query. NULL"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("image_pad", "video_pad", "vision_start")}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    model = Qwen3VLForConditionalGeneration(config)
    tiny_models._spread(model, tokenizer.convert_tokens_to_ids(["yes", "no"]))
    model.save_pretrained(folder)
    # As transformers 4.57 wrote the real one.
    saved = json.loads((folder / "config.json").read_text())
    rope = saved["text_config"].pop("rope_parameters")
    saved["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    saved["vision_config"].pop("rope_parameters", None)
    if not tied:  # the 8B model says so at the top alone
        del saved["text_config"]["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps({**saved, "transformers_version": "4.57.0.dev0"}))
    both = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen3VLProcessor"}
    both |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"longest_edge": 16777216, "shortest_edge": 65536}
    kind = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(both | kind))
    kind = {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(both | kind))
    return folder


CTXL_TEXT = (
    tiny_models.TEXT + " Check whether a given document contains information helpful to answer the query.\n<Document> "
    "\n<Query>  ?? ! ?? ! question: \n \n passage:"
)


def ctxl_rerank_v2(folder: Path) -> Path:
    """ctxl-rerank-v2 1b and 2b: a Qwen3 causal LM whose logit of vocabulary id 0, "!", is the score."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tiny_models.qwen3_tokenizer(folder, text=CTXL_TEXT)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    tiny_models._spread(model, [0])
    model.save_pretrained(folder)
    return folder


MISTRAL_ADDED = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
MISTRAL_ADDED += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<pad>", "[control_8]", "[control_9]")


def mistral_tokenizer(folder: Path) -> int:
    """Mistral's kind of tokenizer: BPE with byte fallback, a U+2581 in front of a text, <s> before it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaTokenizer

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    learner.train_from_iterator([CTXL_TEXT] * 4, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    base = [*MISTRAL_ADDED, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [p for p, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if p not in base]
    vocab = {piece: number for number, piece in enumerate([*base, *pieces])}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=[tuple(m) for m in learnt["merges"]], model_max_length=2048, add_bos_token=True
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in MISTRAL_ADDED])
    tokenizer.save_pretrained(folder)
    return len(vocab)


def ctxl_rerank_v2_mistral(folder: Path) -> Path:
    """ctxl-rerank-v2 6b: a Mistral causal LM whose logit of vocabulary id 0, "<unk>", is the score."""
    from transformers import MistralConfig, MistralForCausalLM

    size = mistral_tokenizer(folder)
    config = MistralConfig(
        vocab_size=size + (-size) % 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        sliding_window=None,
    )
    model = MistralForCausalLM(config)
    tiny_models._spread(model, [0])
    model.save_pretrained(folder)
    return folder


LLAMA3_ADDED = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>")
LLAMA3_ADDED += ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")


def llama3_tokenizer(folder: Path) -> int:
    """Llama 3's kind of tokenizer: byte-level BPE, <|begin_of_text|> before a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tiny_models.QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CTXL_TEXT] * 4, trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in LLAMA3_ADDED])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", begin)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def llama_nemotron_rerank(folder: Path, *, temperature: float = 0.5) -> Path:
    """llama-nemotron-rerank: Llama whose tokens all see one another, their mean, a head, a temperature."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    size = llama3_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=size + (-size) % 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        num_labels=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    model = LlamaForSequenceClassification(config)
    tiny_models._spread(model)
    model.save_pretrained(folder)
    code = "llama_bidirectional_model.LlamaBidirectional"
    return tiny_models.set_config(
        folder,
        architectures=["LlamaBidirectionalForSequenceClassification"],
        auto_map={
            "AutoConfig": f"{code}Config",
            "AutoModelForSequenceClassification": f"{code}ForSequenceClassification",
        },
        model_type="llama_bidirec",
        pooling="avg",
        temperature=temperature,
        problem_type="regression",
    )


def jina_reranker_v3(folder: Path) -> Path:
    """jina-reranker-v3: Qwen3 and a projector of 512, and the two token ids that vLLM's class knows."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    tiny_models.qwen3_tokenizer(folder, text=tiny_models.TEXT + " passages passage id relevance relevant ranking")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = {"<|embed_token|>": 151670, "<|rerank_token|>": 151671}
    tokenizer["model"]["vocab"] |= tokens
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": number, "content": token, **kept} for token, number in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids([str(AddedToken(token)) for token in tokens]) == [*tokens.values()]
    config = Qwen3Config(
        vocab_size=151680,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3Model(config)
    tiny_models._spread(model)
    model.save_pretrained(folder)
    weights = {f"model.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(8)
    weights |= {"projector.0.weight": torch.randn(32, 64) * 0.2, "projector.2.weight": torch.randn(512, 32) * 0.2}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return tiny_models.set_config(
        folder, architectures=["JinaForRanking"], auto_map={"AutoModel": "modeling.JinaForRanking"}, model_type="qwen3"
    )
