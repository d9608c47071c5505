"""Makes the tiny checkpoints of tests/models/library_checkpoints.tar.xz with the libraries that people train with.

Each release of transformers and sentence-transformers writes its own files and gets its own run. The scores that the
library itself gives after loading are recorded beside each checkpoint. `make` takes a minute an environment, on a CPU.

    python measurements/library_checkpoints.py base FOLDER          untrained models; with the kit's own environment
    python measurements/library_checkpoints.py make FOLDER OUT      in each environment; OUT gets a folder for it
    python measurements/library_checkpoints.py pack OUT             OUT/* into tests/models/library_checkpoints.tar.xz

The environments: the kit's own .venv with other releases first on PYTHONPATH (`pip install --no-deps --target DIR`):
    transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 with sentence-transformers==3.4.1, then ==5.3.0
    the kit's transformers 5 with sentence-transformers==5.3.0, then ==6.2.0
    all: scikit-learn==1.9.1 scipy==1.17.1 joblib threadpoolctl narwhals peft==0.21.2 accelerate==1.15.0 Pillow psutil
"""

import json
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
ARCHIVE = KIT / "tests" / "models" / "library_checkpoints.tar.xz"
# No white space at the edges: sentence-transformers 3 strips it, 6 does not, and nothing in a checkpoint says so.
PAIRS = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("What is the capital of China?", "Gravity attracts bodies to each other."),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("yes", "no\n\n  yes"),
    ("long", "Gravity attracts bodies." + " Gravity attracts bodies." * 40),
]
INSTRUCTION = "Find the paragraph that answers"
OWN = (
    "{%- set q = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}\n"
    "{%- set d = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}\n"
    "{%- for m in messages if m.role == 'system' %}\n"
    "Task: {{ m.content }}\n"
    "{% endfor %}\n"
    "Question: {{ q }}\n"
    "Text: {{ d }}<|im_end|>\n"
    "Relevant:\n"
)
PARTS = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor -%}"
    "<|im_start|>assistant\n{{ '' }}"
)
CHATML = (
    "{%- for message in messages %}{%- if message.role in ['system', 'user', 'assistant'] %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The model card's prompt for messages of role system, query and document.
CARD = (
    "{%- set i = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | "
    "default('Given a web search query, retrieve relevant passages that answer the query') -%}\n"
    "{%- set q = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}\n"
    "{%- set d = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}\n"
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ i }}\n<Query>: {{ q }}\n<Document>: {{ d }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ '' }}"
)


def base(folder: Path) -> None:
    """Untrained models with the tokenizers of the tests. Coarse weights: they pack into a tenth."""
    sys.path.insert(0, str(KIT / "tests" / "stand_ins"))
    import tiny_models
    import torch
    import transformers

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    qwen = {
        **sizes,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    }
    tiny_models.qwen3_tokenizer(folder / "qwen", text=tiny_models.TEXT + "\ntrue\nfalse\nYes" * 3)
    set_template(folder / "qwen", CHATML)
    qwen["vocab_size"] = 960
    _save(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen, tie_word_embeddings=True)), folder / "qwen")
    padding = transformers.AutoTokenizer.from_pretrained(folder / "qwen").pad_token_id
    one = transformers.Qwen3Config(**qwen, num_labels=1, pad_token_id=padding)
    shutil.copytree(folder / "qwen", folder / "qwen_seq_cls", ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    _save(transformers.Qwen3ForSequenceClassification(one), folder / "qwen_seq_cls")
    shutil.copytree(
        folder / "qwen", folder / "qwen_embedding", ignore=shutil.ignore_patterns("*.safetensors", "config*")
    )
    tiny_models.qwen3_tokenizer(folder / "qwen_embedding", append="<|endoftext|>")
    _save(transformers.Qwen3Model(transformers.Qwen3Config(**qwen)), folder / "qwen_embedding")

    for name in ("bert", "xlmr", "modernbert"):
        maker = {"bert": "bert_cross_encoder", "xlmr": "xlm_roberta_cross_encoder"}.get(
            name, "modernbert_cross_encoder"
        )
        getattr(tiny_models, maker)(folder / name)
        config = transformers.AutoConfig.from_pretrained(folder / name)
        few = {k: v for k, v in sizes.items() if k != "num_hidden_layers"} if name == "modernbert" else sizes
        config.update({**few, "num_attention_heads": 1})
        _save(transformers.AutoModelForSequenceClassification.from_config(config), folder / name)
        if name == "modernbert":  # the name of transformers 5, which 4 does not know
            settings = folder / name / "tokenizer_config.json"
            settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        skip = shutil.ignore_patterns("*.safetensors", "config*")
        shutil.copytree(folder / name, folder / f"{name}_embedding", ignore=skip)
        more = {} if name == "modernbert" else {"add_pooling_layer": False}
        _save(transformers.AutoModel.from_config(config, **more), folder / f"{name}_embedding")


def _save(model, folder: Path) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randint(-4, 5, weight.shape) / 16)
                if "score" in name or "classifier" in name or "out_proj" in name:
                    weight *= 2
            elif name.endswith("weight"):
                weight.fill_(1.0)
    model.float().save_pretrained(folder)


def set_template(folder: Path, text: str | None) -> None:
    """Write a chat template as a file of its own; None removes it."""
    file = folder / "chat_template.jinja"
    if text is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(text, "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if text is not None:  # transformers before 4.50 reads it here
        settings["chat_template"] = text
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


class Maker:
    """Makes the checkpoints of one environment."""

    def __init__(self, source: Path, out: Path):
        import sentence_transformers
        import transformers

        self.transformers, self.st = transformers, sentence_transformers
        self.major = int(sentence_transformers.__version__.partition(".")[0])
        self.versions = {"transformers": transformers.__version__, "st": sentence_transformers.__version__}
        short = [".".join(v.split(".")[:2]) for v in self.versions.values()]
        self.source, self.out = source, out / f"transformers-{short[0]}-st-{short[1]}"

    def make(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.encoders()
        self.embeddings()
        self.seq_cls()
        self.causal()
        if self.major >= 6:
            self.causal_by_sentence_transformers()

    # --- how a checkpoint comes about ---

    def base(self, name: str, template: str | None = "keep") -> Path:
        """A copy of an untrained model, with another chat template if one is given."""
        folder = self.out / "work" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.source / name, folder)
        if template != "keep":
            set_template(folder, template)
        return folder

    def cross_encoder(self, folder: Path, **more):
        key = "activation_fn" if self.major > 3 else "default_activation_function"
        if "activation_fn" in more:
            more[key] = more.pop("activation_fn")
        return self.st.CrossEncoder(str(folder), device="cpu", **more)

    def with_labels(self, model, tokenizer) -> None:
        """One forward pass with labels, as Trainer makes them: transformers notes problem_type by itself."""
        import torch

        batch = tokenizer("a query", "a document", return_tensors="pt")
        model(**batch, labels=torch.tensor([1.0]))

    def lora(self, folder: Path, kind: str, layers: tuple[str, ...] = ("q_proj", "v_proj")):
        """The model after peft added an adapter, trained it (here: drew it) and merged it."""
        import torch
        from peft import LoraConfig, get_peft_model

        loader = getattr(self.transformers, f"AutoModelFor{kind}")
        task = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}[kind]
        torch.manual_seed(3)
        model = get_peft_model(
            loader.from_pretrained(folder, torch_dtype=torch.float32),
            LoraConfig(task_type=task, r=2, target_modules=list(layers), init_lora_weights=False),
        )
        return model.merge_and_unload()

    def keep(self, name: str, saved: Path, profile: str | None, score, **more) -> None:
        """Put a saved folder among the results, with the scores that `score(folder)` gives for it.

        profile: the one that the kit must choose; None = it must refuse, with `refused` in the reason.
        """
        target = self.out / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saved, target, ignore=shutil.ignore_patterns("README.md", "vocab.txt.*"))
        record = {**self.versions, "profile": profile, **more}
        if score is not None:
            record["scores"] = [float(s) for s in score(target)]
        (target / "made_by.json").write_text(json.dumps(record, indent=1))
        print(self.out.name, name, [round(s, 4) for s in record.get("scores", [])], flush=True)

    # --- what the libraries return ---

    def predict(self, folder: Path) -> list[float]:
        return self.cross_encoder(folder).predict([list(pair) for pair in PAIRS], show_progress_bar=False).tolist()

    def cosines(self, folder: Path) -> list[float]:
        import torch

        model = self.st.SentenceTransformer(str(folder), device="cpu")
        sides = [model.encode(list(side), convert_to_tensor=True) for side in zip(*PAIRS, strict=True)]
        return torch.cosine_similarity(*sides, dim=1).tolist()

    def card(self, folder: Path) -> list[float]:
        """The model card's recipe: fixed prefix and suffix, the document cut to fit 512 tokens."""
        import torch

        classifies = "SequenceClassification" in (folder / "config.json").read_text()
        kind = "SequenceClassification" if classifies else "CausalLM"
        loader = getattr(self.transformers, f"AutoModelFor{kind}")
        model = loader.from_pretrained(folder, torch_dtype=torch.float32).eval()
        tokenizer = self.transformers.AutoTokenizer.from_pretrained(folder)
        yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        prefix, suffix = (
            CARD[CARD.index("<|im_start|>") : CARD.index("<Instruct>")],
            CARD[CARD.index("<|im_end|>\n<|im_start|>assistant") : -len("{{ '' }}")],
        )
        fixed = [tokenizer.encode(part, add_special_tokens=False) for part in (prefix, suffix)]
        task, out = CARD.partition("default('")[2].partition("')")[0], []
        for query, document in PAIRS:
            text = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
            middle = tokenizer.encode(text, add_special_tokens=False)[: 512 - sum(map(len, fixed))]
            with torch.inference_mode():
                logits = model(torch.tensor([fixed[0] + middle + fixed[1]])).logits[0]
            out.append(torch.sigmoid(logits[0] if classifies else logits[-1, yes] - logits[-1, no]).item())
        return out

    # --- the checkpoints ---

    def encoders(self) -> None:
        from torch import nn

        work = self.out / "work" / "saved"

        def emptied(folder: Path) -> str:
            shutil.rmtree(folder, ignore_errors=True)
            return str(folder)

        for name in ("bert", "xlmr", "modernbert"):
            cases = {"plain": {}, "max_length": {"max_length": 24}, "identity": {"activation_fn": nn.Identity()}}
            for case, more in cases.items():
                self.cross_encoder(self.base(name), **more).save_pretrained(emptied(work))
                self.keep(f"{name}-{case}", work, "cross_encoder", self.predict)
            again = self.out / "work" / "again"
            self.cross_encoder(work).save_pretrained(emptied(again))
            self.keep(f"{name}-saved_again", again, "cross_encoder", self.predict)
            for case in ("labels", "resized"):
                model = self.cross_encoder(self.base(name))
                if case == "labels":
                    self.with_labels(model.model, model.tokenizer)
                else:
                    model.model.resize_token_embeddings(model.model.config.vocab_size + 24)
                model.save_pretrained(emptied(work))
                self.keep(f"{name}-{case}", work, "cross_encoder", self.predict)
            layers = ("Wqkv",) if name == "modernbert" else ("query", "value")
            merged = self.lora(self.base(name), "SequenceClassification", layers)
            merged.save_pretrained(emptied(work))
            self.transformers.AutoTokenizer.from_pretrained(self.base(name)).save_pretrained(str(work))
            self.keep(f"{name}-lora", work, "cross_encoder", self.predict)
        # The key of ms-marco checkpoints, which older releases wrote.
        folder = self.base("bert")
        config = json.loads((folder / "config.json").read_text())
        config["sbert_ce_default_activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "config.json").write_text(json.dumps(config))
        shutil.rmtree(work, ignore_errors=True)
        self.cross_encoder(folder).save_pretrained(str(work))
        self.keep("ms-marco", work, "cross_encoder", self.predict)
        if self.major >= 6:
            shutil.rmtree(work, ignore_errors=True)
            prompts = {"prompts": {"search": "search: "}, "default_prompt_name": "search"}
            self.cross_encoder(self.base("bert"), **prompts).save_pretrained(str(work))
            self.keep("bert-default_prompt", work, None, self.predict, refused="default prompt 'search: '")

    def embeddings(self) -> None:
        from sentence_transformers import SentenceTransformer, models

        work = self.out / "work" / "saved"
        for name, pooling in (("bert", "cls"), ("xlmr", "mean"), ("modernbert", "mean"), ("qwen", "lasttoken")):
            folder = self.base(f"{name}_embedding", template=None) if name == "qwen" else self.base(f"{name}_embedding")
            word = models.Transformer(str(folder), max_seq_length=24 if name == "bert" else None)
            chain = [word, models.Pooling(word.get_word_embedding_dimension(), pooling_mode=pooling)]
            if name != "xlmr":
                chain.append(models.Normalize())
            shutil.rmtree(work, ignore_errors=True)
            SentenceTransformer(modules=chain, device="cpu").save_pretrained(str(work))
            self.keep(f"{name}_embedding-plain", work, "embedding", self.cosines)
        again = self.out / "work" / "again"
        for name in ("xlmr", "modernbert", "qwen", "bert"):
            shutil.rmtree(again, ignore_errors=True)
            SentenceTransformer(str(self.out / f"{name}_embedding-plain"), device="cpu").save_pretrained(str(again))
            self.keep(f"{name}_embedding-saved_again", again, "embedding", self.cosines)
        model = SentenceTransformer(str(again), device="cpu", prompts={"q": "query: "}, default_prompt_name="q")
        shutil.rmtree(work, ignore_errors=True)
        model.save_pretrained(str(work))
        self.keep("bert_embedding-default_prompt", work, None, self.cosines, refused="default prompt 'query: '")

    def seq_cls(self) -> None:
        work = self.out / "work" / "Qwen3-Reranker-seq-cls"
        loader = self.transformers.AutoModelForSequenceClassification
        tokenizer = self.transformers.AutoTokenizer.from_pretrained(self.base("qwen_seq_cls"))
        for case in ("plain", "labels", "lora"):
            folder = self.base("qwen_seq_cls")
            model = self.lora(folder, "SequenceClassification") if case == "lora" else loader.from_pretrained(folder)
            if case == "labels":
                model.config.pad_token_id = tokenizer.pad_token_id
                self.with_labels(model, tokenizer)
            shutil.rmtree(work, ignore_errors=True)
            model.save_pretrained(str(work))
            tokenizer.save_pretrained(str(work))
            self.keep(f"Qwen3-Reranker-seq-cls-{case}", work, "qwen3_reranker_seq_cls", self.card)

    def causal(self) -> None:
        work = self.out / "work" / "Qwen3-Reranker"
        loader = self.transformers.AutoModelForCausalLM
        tokenizer = self.transformers.AutoTokenizer.from_pretrained(self.base("qwen"))
        for case in ("plain", "lora", "resized"):
            model = (
                self.lora(self.base("qwen"), "CausalLM")
                if case == "lora"
                else loader.from_pretrained(self.base("qwen"))
            )
            if case == "resized":
                model.resize_token_embeddings(928)
            shutil.rmtree(work, ignore_errors=True)
            model.save_pretrained(str(work))
            tokenizer.save_pretrained(str(work))
            self.keep(f"Qwen3-Reranker-{case}", work, "qwen3_reranker", self.card)

    def causal_by_sentence_transformers(self) -> None:
        from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
        from torch import nn

        def logit(true: str, false: str | None):
            def change(model):
                ids = model.tokenizer.convert_tokens_to_ids
                assert ids(true) is not None and (false is None or ids(false) is not None)
                model[1] = LogitScore(ids(true), None if false is None else ids(false))

            return change

        prompts = {"prompts": {"task": INSTRUCTION}, "default_prompt_name": "task"}
        card = "qwen3_reranker"
        # name: (base, chat template, arguments of CrossEncoder, change before saving, profile)
        cases = {
            "official": ("qwen", CARD, {}, None, card),
            "own_template": ("qwen", OWN, {}, None, card),
            "parts": ("qwen", PARTS, {}, None, card),
            "default_prompt": ("qwen", CARD, prompts, None, card),
            "own_default_prompt": ("qwen", OWN, prompts, None, card),
            "max_length": ("qwen", CARD, {"max_length": 160}, None, card),
            "Qwen3-Reranker-yes_only": ("qwen", CARD, {}, logit("yes", None), "logit_score"),
            "Qwen3-Reranker-true_false": ("qwen", CARD, {}, logit("true", "false"), "logit_score"),
            "Yes_only": ("qwen", OWN, {}, logit("Yes", None), "logit_score"),
            "seq_cls-own_template": ("qwen_seq_cls", OWN, {}, None, "qwen3_reranker_seq_cls"),
            "seq_cls-official": ("qwen_seq_cls", CARD, {}, None, "qwen3_reranker_seq_cls"),
        }
        for name, (base_name, template, more, change, profile) in cases.items():
            saved = self.by_cross_encoder(base_name, template, more, change)
            self.keep(name, saved, profile, self.predict)
        identity = {"activation_fn": nn.Identity()}
        for name, base_name in (("identity", "qwen"), ("seq_cls-identity", "qwen_seq_cls")):
            profile = card if base_name == "qwen" else "qwen3_reranker_seq_cls"
            self.keep(name, self.by_cross_encoder(base_name, CARD, identity, None), profile, self.predict, logit=True)
        bare = self.by_cross_encoder("qwen", None, {}, None)
        self.keep("no_template", bare, None, self.predict, refused="without any prompt")

    def by_cross_encoder(self, base_name: str, template: str | None, more: dict, change) -> Path:
        model = self.cross_encoder(self.base(base_name, template), **more)
        if change:
            change(model)
        saved = self.out / "work" / "saved"
        shutil.rmtree(saved, ignore_errors=True)
        model.save_pretrained(str(saved))
        return saved


def pack(out: Path) -> None:
    """All checkpoints in one archive. Equal weights and tokenizers lie side by side: they are stored once."""
    files = [f for f in sorted(out.glob("*/*/**/*")) if f.is_file() and f.relative_to(out).parts[1] != "work"]
    files.sort(key=lambda f: (f.name, f.stat().st_size, str(f)))
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    with lzma.open(ARCHIVE, "wb", filters=chain) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            item = tarfile.TarInfo(str(file.relative_to(out)))
            item.size, item.mode = file.stat().st_size, 0o644
            with file.open("rb") as content:
                archive.addfile(item, content)
    print(f"{ARCHIVE.name}: {len(files)} files, {ARCHIVE.stat().st_size} bytes")


def main(argv: list[str]) -> int:
    if len(argv) == 2 and argv[0] in ("base", "pack"):
        (base if argv[0] == "base" else pack)(Path(argv[1]))
    elif len(argv) == 3 and argv[0] == "make":
        maker = Maker(Path(argv[1]), Path(argv[2]))
        maker.make()
        shutil.rmtree(maker.out / "work")
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
