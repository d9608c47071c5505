"""Seeded tiny checkpoints of further architectures of vLLM: encoders, decoders with a head, embedding models."""

import json
from pathlib import Path

from tiny_models import (
    TEXT,
    _sentence_transformer,
    _spread,
    bert_cross_encoder,
    gemma_tokenizer,
    modernbert_cross_encoder,
    qwen3_tokenizer,
    set_config,
    xlm_roberta_tokenizer,
)

GELU, IDENTITY = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
# A pair as a user's template writes it. The instruction is the message of role system.
PAIR = (
    "{% for m in messages %}{% if m.role == 'system' %}task: {{ m.content }}\n{% endif %}{% endfor %}"
    "query: {{ messages[-2].content }}\ndocument: {{ messages[-1].content }}\nrelevance:"
)


def electra_cross_encoder(folder: Path) -> Path:
    """ms-marco-electra-base: two segments, and embeddings of the size of its states."""
    from transformers import ElectraConfig, ElectraForSequenceClassification

    bert_cross_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"vocab_size": config["vocab_size"], "embedding_size": 64, "max_position_embeddings": 256}
    model = ElectraForSequenceClassification(ElectraConfig(**SMALL, **sizes, num_labels=1))
    _spread(model)
    model.save_pretrained(folder)
    return folder


def camembert_cross_encoder(folder: Path) -> Path:
    """crossencoder-camembert: RoBERTa's layers under the name of CamemBERT, positions from 2 on."""
    from transformers import CamembertConfig, CamembertForSequenceClassification

    size = xlm_roberta_tokenizer(folder)
    config = CamembertConfig(
        **SMALL, vocab_size=size, max_position_embeddings=258, type_vocab_size=1, pad_token_id=1, num_labels=1
    )
    model = CamembertForSequenceClassification(config)
    _spread(model)
    model.classifier.out_proj.weight.data *= 8
    model.classifier.out_proj.bias.data.fill_(-5)
    model.save_pretrained(folder)
    return folder


def distilbert_cross_encoder(folder: Path) -> Path:
    """DistilBERT with one label: its head has a layer before the classifier."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    bert_cross_encoder(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = DistilBertConfig(
        vocab_size=size, dim=64, hidden_dim=128, n_layers=2, n_heads=2, num_labels=1, max_position_embeddings=256
    )
    model = DistilBertForSequenceClassification(config)
    _spread(model)
    model.save_pretrained(folder)
    return folder


def eurobert_cross_encoder(folder: Path) -> Path:
    """EuroBERT with one label: its head has a layer before the classifier, too."""
    from transformers import EuroBertConfig, EuroBertForSequenceClassification

    modernbert_cross_encoder(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = EuroBertConfig(
        **SMALL, vocab_size=size, num_key_value_heads=2, num_labels=1, max_position_embeddings=256, pad_token_id=3
    )
    model = EuroBertForSequenceClassification(config)
    _spread(model)
    model.save_pretrained(folder)
    return folder


def llama_tokenizer(folder: Path, *, eos: bool = False) -> int:
    """Llama's and Mistral's kind of tokenizer: BPE over text with spaces as U+2581, byte fallback, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    text = TEXT + " task: query: document: relevance: true false true false [INST] [/INST] passage"
    answers = ["true", "false", "yes", "no"] * 4  # tokens without a space before them
    learner.train_from_iterator([text] * 4 + answers, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [w for w, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if w not in base]
    vocab = {piece: number for number, piece in enumerate([*base, *words])}
    model = models.BPE(vocab, [tuple(m) for m in learnt["merges"]], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.decoder = normalizers.Replace(" ", "\u2581"), decoders.Replace("\u2581", " ")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    end = " </s>" if eos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{end}",
        pair=f"<s> $A{end} <s>:1 $B:1{end and ' </s>:1'}",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=2048).save_pretrained(folder)
    return len(vocab)


# Architecture -> (tokenizer's maker, further settings of its configuration).
DECODERS = {
    "Qwen2": (qwen3_tokenizer, {}),
    "Qwen3": (qwen3_tokenizer, {"head_dim": 32}),
    "Llama": (llama_tokenizer, {}),
    "Mistral": (llama_tokenizer, {"sliding_window": None, "head_dim": 32}),
    "Gemma": (gemma_tokenizer, {"head_dim": 32}),
    "Gemma2": (gemma_tokenizer, {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}),
    "Gemma3": (gemma_tokenizer, {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}),
}


def decoder(
    folder: Path, name: str, head: str = "ForSequenceClassification", template: str | None = PAIR, **more
) -> Path:
    """A fine-tuned decoder: with a head of one label, or as a language model (head="ForCausalLM")."""
    import transformers

    make, own = DECODERS[name]
    size = make(folder) or 1024
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(
        **SMALL,
        **{**own, **more},
        vocab_size=size + (-size) % 64,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if head == "ForSequenceClassification":
        config.num_labels = 1
    model = getattr(transformers, f"{name}{head}")(config)
    _spread(model)
    model.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text("{{ bos_token }}" * (tokenizer.bos_token is not None) + template)
    return folder


def e5_mistral(folder: Path) -> Path:
    """e5-mistral-7b-instruct: Mistral; its tokenizer ends every text with </s>, whose state is the vector."""
    from transformers import MistralConfig, MistralModel

    size = llama_tokenizer(folder, eos=True)
    sizes = {"vocab_size": size + (-size) % 64, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    config = MistralConfig(**SMALL, **sizes, sliding_window=None)
    model = MistralModel(config)
    _spread(model)
    model.save_pretrained(folder)
    _sentence_transformer(folder, "lasttoken", old_layout=True, max_length=2048)
    return folder


def embedding_gemma(folder: Path) -> Path:
    """embeddinggemma-300m: Gemma 3 that looks both ways, the mean of its states, two Dense layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma3TextConfig, Gemma3TextModel

    size = gemma_tokenizer(folder)
    config = Gemma3TextConfig(
        **SMALL,
        vocab_size=size + (-size) % 64,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    model = Gemma3TextModel(config)
    _spread(model)
    model.save_pretrained(folder)
    _sentence_transformer(folder, "mean", old_layout=True, max_length=2048)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["idx"], modules[2]["name"], modules[2]["path"] = 4, "4", "4_Normalize"
    torch.manual_seed(11)
    for number, (rows, columns) in enumerate(((96, 64), (64, 96)), 2):
        path = folder / f"{number}_Dense"
        path.mkdir(exist_ok=True)
        identity = {"bias": False, "activation_function": IDENTITY}
        (path / "config.json").write_text(json.dumps({"in_features": columns, "out_features": rows, **identity}))
        save_file({"linear.weight": torch.randn(rows, columns) * 0.2}, path / "model.safetensors")
        kind = "sentence_transformers.models.Dense"
        modules.insert(number, {"idx": number, "name": str(number), "path": path.name, "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def nomic_embed(folder: Path, *, hub: bool = True) -> Path:
    """nomic-embed-text-v1.5: BERT with rotary positions and a gated MLP, the mean of its states.

    hub: config.json as the published one, which names code of its own; else as transformers 5 saves it.
    """
    from transformers import NomicBertConfig, NomicBertModel

    bert_cross_encoder(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rope = {"rope_type": "default", "rope_theta": 700.0}
    config = NomicBertConfig(
        **SMALL, vocab_size=size, max_position_embeddings=256, layer_norm_eps=1e-5, rope_parameters=rope
    )
    model = NomicBertModel(config)
    _spread(model)
    model.save_pretrained(folder)
    _sentence_transformer(folder, "mean", old_layout=True, max_length=8192)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))
    if hub:
        code = "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig"
        own = {
            "activation_function": "swiglu",
            "architectures": ["NomicBertModel"],
            "auto_map": {"AutoConfig": code},
            "causal": False,
            "layer_norm_epsilon": 1e-5,
            "max_trained_positions": 256,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "model_type": "nomic_bert",
            "n_embd": 64,
            "n_head": 2,
            "n_inner": 128,
            "n_layer": 2,
            "n_positions": 8192,
            "prenorm": False,
            "qkv_proj_bias": False,
            "rotary_emb_base": 700,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "rotary_scaling_factor": 2,
            "type_vocab_size": 2,
            "use_rms_norm": False,
            "vocab_size": size,
        }
        (folder / "config.json").write_text(json.dumps(own))
    return folder


def ettin_reranker(folder: Path, *, bias: bool = False) -> Path:
    """ettin-reranker: a bare ModernBERT, cls pooling, and the head as Dense, LayerNorm and Dense modules."""
    import torch
    from safetensors.torch import save_file
    from transformers import ModernBertConfig, ModernBertModel

    modernbert_cross_encoder(folder)
    model = ModernBertModel(ModernBertConfig.from_pretrained(folder))
    _spread(model)
    model.save_pretrained(folder)
    set_config(folder, id2label=None, label2id=None)
    _sentence_transformer(folder, "cls", old_layout=False, max_length=256)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    torch.manual_seed(5)
    random = torch.randn
    dense = {"linear.weight": random(64, 64) * 0.2} | ({"linear.bias": random(64) * 0.3} if bias else {})
    parts = (
        ("Dense", {"in_features": 64, "out_features": 64, "bias": bias, "activation_function": GELU}, dense),
        ("LayerNorm", {"dimension": 64}, {"norm.weight": 1 + random(64) * 0.3, "norm.bias": random(64) * 0.3}),
        (
            "Dense",
            {"in_features": 64, "out_features": 1, "bias": True, "activation_function": IDENTITY},
            {"linear.weight": random(1, 64) * 0.3, "linear.bias": random(1)},
        ),
    )
    for number, (kind, config, weights) in enumerate(parts, 2):
        path = folder / f"{number}_{kind}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(weights, path / "model.safetensors")
        place = {"idx": number, "name": str(number), "path": path.name}
        modules.append(place | {"type": f"sentence_transformers.base.modules.{kind.lower()}.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def colbert(folder: Path, kind: str = "Bert", **said) -> Path:
    """A late interaction model as PyLate 1.6.0 saves it: an encoder, a Dense layer, two markers in the tokenizer.

    said: keys of config_sentence_transformers.json; without any a query is filled with [MASK], which nothing sees.
    """
    import string

    import torch
    import transformers
    from safetensors.torch import save_file

    {"Bert": bert_cross_encoder, "ModernBert": modernbert_cross_encoder}[kind](folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.pad_token = tokenizer.mask_token
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config").from_pretrained(folder)
    config.vocab_size = len(tokenizer)
    model = getattr(transformers, f"{kind}Model")(config)
    _spread(model)
    model.save_pretrained(folder)
    set_config(folder, id2label=None, label2id=None)
    torch.manual_seed(5)
    (folder / "1_Dense").mkdir(exist_ok=True)
    dense = {"in_features": 64, "out_features": 32, "bias": False, "activation_function": IDENTITY}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(dense | {"use_residual": False}))
    save_file({"linear.weight": torch.randn(32, 64) * 0.2}, folder / "1_Dense" / "model.safetensors")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    # The length of what was encoded last.
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 23, "do_lower_case": False}))
    own = {
        "model_type": "ColBERT",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 24,
        "document_length": 60,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
        "do_query_expansion": True,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(own | said))
    return folder
