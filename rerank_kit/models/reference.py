"""Scores of each family by transformers in float32, written from model cards. Tests compare vLLM's scores to them."""

import json
from pathlib import Path
from typing import Any

from rerank_kit.models.card_prompts import CAUSAL, PROMPT_IDS, jina_v3_prompt, qwen3_prompt_ids
from rerank_kit.models.checkpoint import read_checkpoint
from rerank_kit.models.late_reference import late_score
from rerank_kit.models.pair import Pair
from rerank_kit.settings import ConfigError


def reference_scores(
    model: Path,
    kind: str,
    pairs: list[Pair],
    instruction: str | None,
    max_length: int,
    *,
    own_prompt: bool = False,
    template: str | None = None,
    tokens: tuple[int, int | None] | None = None,
) -> list[float]:
    """Scores by transformers in float32 on the CPU.

    Args:
        model: checkpoint folder.
        kind: Profile.reference: a key of CAUSAL (causal_yes_no is the model card of Qwen3-Reranker),
            chat_template (a prompt and score tokens or a head of the checkpoint's own), sequence_classification (the
            converted Qwen3-Reranker and cross-encoders with a head), llama_bidirectional (llama-nemotron-rerank),
            listwise (jina-reranker-v3, each pair as a list of one), jina_reranker_v2, gte_multilingual_reranker,
            late_interaction (MaxSim) or embedding (cosine, pooled as the checkpoint's Pooling module says).
        pairs: N pairs.
        instruction: default instruction; None = the checkpoint's saved default prompt, else the model card's.
        max_length: tokens of the longest prompt.
        own_prompt: the checkpoint's chat template in place of the family's prompt, rendered by transformers; head,
            tokens, divisor and activation stay the family's. Always so with chat_template.
        template: TEMPLATE of the user, with own_prompt; None = the checkpoint's own.
        tokens: SCORE_TOKENS of the user, with chat_template; None = those of the checkpoint's LogitScore module.

    Returns:
        N scores.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    network = _network(model, kind)
    instruction = instruction or _saved_prompt(model)

    def ids_of(pair: Pair):
        if own_prompt or kind == "chat_template":
            return torch.tensor([_chat_ids(tokenizer, model, pair, instruction, max_length, template)])
        return torch.tensor([PROMPT_IDS.get(kind, qwen3_prompt_ids)(tokenizer, pair, instruction, max_length)])

    scores = []
    with torch.inference_mode():
        for pair in pairs:
            if kind == "chat_template":
                scores.append(torch.sigmoid(_own_logit(network, ids_of(pair), model, tokens)).item())
            elif kind in CAUSAL:
                _, yes, no, divisor = CAUSAL[kind]
                logits = network(ids_of(pair)).logits[0, -1]
                logit = logits[yes if isinstance(yes, int) else tokenizer.convert_tokens_to_ids(yes)]
                if no is not None:
                    logit = logit - logits[tokenizer.convert_tokens_to_ids(no)]
                scores.append((logit if divisor is None else torch.sigmoid(logit / divisor)).item())
            elif kind == "llama_bidirectional":
                ids = ids_of(pair)
                # LlamaBidirectionalForSequenceClassification of NVIDIA: every token sees every other one.
                seen = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
                states = network.model(ids, attention_mask=seen).last_hidden_state[0]
                temperature = json.loads((model / "config.json").read_text("utf-8")).get("temperature") or 1
                scores.append((network.score(states.mean(0))[0] / temperature).item())
            elif kind == "modernbert_modules":
                batch = tokenizer([pair.query], [pair.document], truncation=True, max_length=max_length)
                states = network(**batch.convert_to_tensors("pt")).last_hidden_state[0]
                vector = states[0] if read_checkpoint(model).pooling == ("cls",) else states.mean(0)
                for layer in _dense_layers(model):
                    vector = layer(vector)
                scores.append(_activation(model)(vector[0]).item())
            elif kind in ("sequence_classification", "jina_reranker_v2", "gte_multilingual_reranker"):
                if "Qwen" in type(network).__name__:
                    scores.append(torch.sigmoid(network(ids_of(pair)).logits[0, 0]).item())
                else:
                    # Lists, as in sentence-transformers: transformers drops the second of two strings when it is empty.
                    both = ([pair.query], [pair.document])
                    batch = tokenizer(*both, truncation=True, max_length=max_length, return_tensors="pt")
                    scores.append(_activation(model)(network(**batch).logits[0, 0]).item())
            elif kind == "listwise":  # a list of one document
                scores += _list_scores(network, tokenizer, torch, pair.query, [pair.document])
            elif kind == "late_interaction":
                scores.append(late_score(model, tokenizer, network, _dense_layers(model), pair, max_length))
            elif kind == "embedding":
                modes, dense = read_checkpoint(model).pooling, _dense_layers(model)
                first, second = (
                    _embedding(tokenizer, network, t, max_length, modes, dense) for t in (pair.query, pair.document)
                )
                scores.append(torch.cosine_similarity(first, second, dim=0).item())
            else:
                raise ValueError(f"unknown reference {kind!r}")
    return scores


def listwise_scores(model: Path, query: str, documents: list[str]) -> list[float]:
    """Scores of one list by transformers in float32, as rerank() of jina-reranker-v3's card makes them.

    Without its cuts (2048 tokens a document, 512 the query), for 125 documents at most: beyond, it makes two prompts.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return _list_scores(_network(model, "listwise"), tokenizer, torch, query, documents)


def _list_scores(network, tokenizer, torch, query: str, documents: list[str]) -> list[float]:
    base, projector = network
    ids = tokenizer(jina_v3_prompt(query, documents), return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        states = base(ids).last_hidden_state[0]
        marks = [tokenizer.convert_tokens_to_ids(token) for token in ("<|embed_token|>", "<|rerank_token|>")]
        found, asked = (projector(states[ids[0] == mark]) for mark in marks)
        return torch.cosine_similarity(found, asked, dim=-1).tolist()


def _network(model: Path, kind: str):
    """The transformers model of a checkpoint, in float32."""
    import torch
    import transformers

    if kind == "jina_reranker_v2":
        return _jina_reranker_v2(model)
    if kind == "listwise":
        return _jina_reranker_v3(model)
    config = None
    loader = transformers.AutoModelForSequenceClassification
    if kind == "gte_multilingual_reranker":
        loader, config = _gte(model)
    elif kind == "llama_bidirectional":
        own = json.loads((model / "config.json").read_text("utf-8"))
        kept = {k: v for k, v in own.items() if k not in ("auto_map", "model_type", "architectures", "temperature")}
        config = transformers.LlamaConfig(**kept, num_labels=1)
        loader = transformers.LlamaForSequenceClassification
    elif kind == "qwen3_vl_reranker":
        loader = transformers.Qwen3VLForConditionalGeneration
    elif kind == "zerank2":  # zerank-1's config.json names code on the hub, which only replaces predict()
        loader = transformers.AutoModelForCausalLM
        own = json.loads((model / "config.json").read_text("utf-8"))
        config = transformers.Qwen3Config(**{k: v for k, v in own.items() if k not in ("auto_map", "model_type")})
    elif kind in CAUSAL or (kind == "chat_template" and not _classifies(model)):
        loader = transformers.AutoModelForCausalLM
    elif kind in ("embedding", "modernbert_modules", "late_interaction"):
        loader = transformers.AutoModel
        if "NomicBertModel" in (read_checkpoint(model).architectures or ()):
            loader, config = _nomic(model)
    # Of transformers' kernels only this one caps Gemma 2's attention (attn_logit_softcapping).
    more: dict[str, Any] = {}
    if "Gemma2" in (model / "config.json").read_text("utf-8"):
        more["attn_implementation"] = "eager"
    # Without a word on it transformers asks on the terminal whether to run code that config.json names.
    more |= {"config": config, "dtype": torch.float32, "trust_remote_code": False}
    try:
        return loader.from_pretrained(model, **more).eval()
    except ImportError as exc:
        own = json.loads((model / "config.json").read_text("utf-8"))
        method = (own.get("quantization_config") or {}).get("quant_method")
        if not method:
            raise
        why = " ".join(str(exc).split())[:200]
        raise ConfigError(
            f"{model} has weights in {method}, which transformers cannot load here ({why}): compare the "
            "checkpoint from which it was made, and judge this one by your own relevance data"
        ) from exc


# Names in jina-reranker-v2's checkpoint -> names in XLM-RoBERTa. Its hub repository converts in the other direction.
JINA_NAMES = (
    ("roberta.emb_ln", "roberta.embeddings.LayerNorm"),
    ("encoder.layers.", "encoder.layer."),
    ("mixer.out_proj", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("norm2", "output.LayerNorm"),
)


def _jina_reranker_v2(model: Path):
    """jina-reranker-v2 as transformers' XLM-RoBERTa, which computes the same under other weight names.

    Source: modeling_xlm_roberta.py of jinaai/jina-reranker-v2-base-multilingual, and the conversion beside it.
    """
    from safetensors.torch import load_file
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = {k: v for k, v in read_checkpoint(model).config.items() if k not in ("auto_map", "architectures")}
    network = XLMRobertaForSequenceClassification(XLMRobertaConfig(**{**config, "num_labels": 1})).float()
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            for theirs, ours in JINA_NAMES:
                name = name.replace(theirs, ours)
            if "mixer.Wqkv" in name:
                for part, rows in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                    weights[name.replace("mixer.Wqkv", f"attention.self.{part}")] = rows
            else:
                weights[name] = weight
    network.load_state_dict(weights)
    return network.eval()


def _jina_reranker_v3(model: Path):
    """(Qwen3 without a head, projector) of jina-reranker-v3."""
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen3Config, Qwen3Model

    own = json.loads((model / "config.json").read_text("utf-8"))
    config = Qwen3Config(**{k: v for k, v in own.items() if k not in ("auto_map", "model_type", "architectures")})
    base = Qwen3Model.from_pretrained(model, config=config, dtype=torch.float32, trust_remote_code=False).eval()
    weights = {k: v for file in sorted(model.glob("*.safetensors")) for k, v in load_file(file).items()}
    rows = {n: weights[f"projector.{n}.weight"].float() for n in (0, 2)}
    return base, lambda states: torch.relu(states @ rows[0].T) @ rows[2].T


def _gte(model: Path):
    """(class, config) of gte-multilingual-reranker in transformers, which reads the checkpoint's weight names.

    NTK scaling by a factor f multiplies the base by f and divides the frequencies by f ** (2 / head size).
    transformers calls that linear scaling. Source: NTKScalingRotaryEmbedding in modeling.py of Alibaba-NLP/new-impl.
    """
    try:
        from transformers import GteConfig, GteForSequenceClassification
    except ImportError as exc:
        raise ConfigError("the reference of gte-multilingual-reranker needs a transformers release with GTE") from exc
    config = dict(read_checkpoint(model).config)
    scaling, theta = config.pop("rope_scaling", None), config.pop("rope_theta", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        if scaling.get("type") != "ntk" or scaling.get("mixed_b") is not None:
            raise ConfigError(f"no reference for rope_scaling {scaling}")
        stretch = scaling["factor"] ** (2 * config["num_attention_heads"] / config["hidden_size"])
        rope = {"rope_type": "linear", "factor": stretch, "rope_theta": theta * scaling["factor"]}
    kept = {k: v for k, v in config.items() if k not in ("auto_map", "architectures", "model_type")}
    return GteForSequenceClassification, GteConfig(**kept, rope_parameters=rope)


def _nomic(model: Path):
    """(class, config) of nomic-embed-text in transformers, by the names of config.json in its hub's code.

    Source: NomicBertConfig in configuration_hf_nomic_bert.py of nomic-ai/nomic-bert-2048, and its docstring.
    """
    from transformers import NomicBertConfig, NomicBertModel

    own = json.loads((model / "config.json").read_text("utf-8"))
    if "n_embd" not in own:  # saved by transformers itself
        return NomicBertModel, NomicBertConfig.from_pretrained(model)
    config = NomicBertConfig(
        vocab_size=own["vocab_size"],
        hidden_size=own["n_embd"],
        num_hidden_layers=own["n_layer"],
        num_attention_heads=own["n_head"],
        intermediate_size=own["n_inner"],
        layer_norm_eps=own["layer_norm_epsilon"],
        type_vocab_size=own["type_vocab_size"],
        max_position_embeddings=own["max_trained_positions"],
        rope_parameters={"rope_type": "default", "rope_theta": float(own["rotary_emb_base"])},
    )
    return NomicBertModel, config


def _own_file(model: Path, name: str) -> dict:
    """A JSON file of sentence-transformers; {} where there is none. Read apart from checkpoint.py, on purpose."""
    if not (model / "modules.json").is_file() or not (model / name).is_file():
        return {}
    return json.loads((model / name).read_text("utf-8"))


def _saved_prompt(model: Path) -> str | None:
    """The default prompt that sentence-transformers saved with the model."""
    saved = _own_file(model, "config_sentence_transformers.json")
    return (saved.get("prompts") or {}).get(saved.get("default_prompt_name"))


def _classifies(model: Path) -> bool:
    names = json.loads((model / "config.json").read_text("utf-8")).get("architectures") or [""]
    return names[0].endswith("ForSequenceClassification")


def _chat_ids(
    tokenizer, model: Path, pair: Pair, instruction: str | None, max_length: int, template: str | None = None
) -> list[int]:
    """Token ids of a pair by the checkpoint's own chat template. A long one loses the end of the document.

    Source: Transformer.preprocess() of sentence-transformers 6.2, which restores the template's tail after the cut.
    """
    message = (_own_file(model, "sentence_bert_config.json").get("modality_config") or {}).get("message") or {}
    if template is not None:
        message, tokenizer.chat_template = {}, template
    text = tokenizer.chat_template
    structured = "content[0]" in text or "'type'" in text or '"type"' in text
    if message.get("format", "auto") != "auto":
        structured = message["format"] == "structured"

    def ids_of(document: str) -> list[int]:
        texts = {"system": pair.instruction or instruction, "query": pair.query, "document": document}
        chat = [
            {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
            for role, text in texts.items()
            if role != "system" or text
        ]
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)

    ids = ids_of(pair.document)
    if len(ids) <= max_length:
        return ids
    one, other = ids_of("0"), ids_of("1 2 3 4")
    same = next(i for i in range(len(one)) if one[-1 - i] != other[-1 - i])
    return ids[: max_length - same] + one[len(one) - same :]


def _own_logit(network, ids, model: Path, tokens: tuple[int, int | None] | None = None):
    """The logit of a head with one label, or of the tokens: given ones, else those of the LogitScore module."""
    logits = network(ids).logits
    if _classifies(model):
        return logits[0, 0]
    true, false = tokens or _logit_score(model)
    return logits[0, -1, true] if false is None else logits[0, -1, true] - logits[0, -1, false]


def _logit_score(model: Path) -> tuple[int, int | None]:
    """(id of the token for relevant, id of the one for not relevant or None) by the LogitScore module."""
    file = model / "modules.json"
    for module in json.loads(file.read_text("utf-8")) if file.is_file() else []:
        if module["type"].endswith("LogitScore"):
            score = json.loads((model / module["path"] / "config.json").read_text("utf-8"))
            return score["true_token_id"], score.get("false_token_id")
    raise ConfigError(f"{model}: no LogitScore module names the tokens of the score: set SCORE_TOKENS")


def _activation(model: Path):
    """The activation that sentence-transformers' CrossEncoder applies to a logit; the sigmoid where no file names one.

    Source: sentence-transformers 6.2: its own file, then config.json's new key, then the old one; torch's only.
    """
    from torch import nn

    config = json.loads((model / "config.json").read_text("utf-8"))
    named = _own_file(model, "config_sentence_transformers.json").get("activation_fn")
    if not (named or "").startswith("torch."):
        named = (config.get("sentence_transformers") or {}).get(
            "activation_fn", config.get("sbert_ce_default_activation_function")
        )
    return getattr(nn, named.rpartition(".")[2])() if named and named.startswith("torch.") else nn.Sigmoid()


def _embedding(tokenizer, network, text: str, max_length: int, modes: tuple[str, ...] | None, dense: list):
    """One text's embedding [size of the last layer], pooled as sentence-transformers does."""
    batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    hidden = network(**batch).last_hidden_state[0]  # one text, no padding: every position counts
    if modes not in (("mean",), ("cls",), ("lasttoken",)):
        raise ValueError(f"no reference for pooling {modes}")
    vector = hidden.mean(0) if modes == ("mean",) else hidden[0 if modes == ("cls",) else -1]
    for layer in dense:
        vector = layer(vector)
    return vector


def _dense_layers(model: Path) -> list:
    """The Dense and LayerNorm modules in their order. A Dense is a linear layer and its activation, Tanh by default."""
    from safetensors.torch import load_file
    from torch import nn

    layers: list[nn.Module] = []
    file = model / "modules.json"
    for module in json.loads(file.read_text("utf-8")) if file.is_file() else []:
        if module["type"].endswith(".LayerNorm"):
            folder = model / module["path"]
            norm = nn.LayerNorm(json.loads((folder / "config.json").read_text("utf-8"))["dimension"])
            norm.load_state_dict(
                {k.removeprefix("norm."): v for k, v in load_file(folder / "model.safetensors").items()}
            )
            layers.append(norm.float())
        if module["type"].endswith(".Dense"):
            folder = model / module["path"]
            config = json.loads((folder / "config.json").read_text("utf-8"))
            linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
            weights = load_file(folder / "model.safetensors")
            linear.load_state_dict({name.removeprefix("linear."): weight.float() for name, weight in weights.items()})
            activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
            layers += [linear, getattr(nn, activation.rpartition(".")[2])()]
    return layers
